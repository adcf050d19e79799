"""Questions over HTTP(S) with binary tensors: the standard library alone, a connection per request, closed to cancel."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, suppress
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from ..errors import BackendError, InputError
from .connection import Address, Connection, Tls
from .wire import Answer, Failure, Question, Reason, Region, Running, decode, placeholder, reason_of, type_name

_HEADER_SIZE = "Inference-Header-Content-Length"
_REASONS: dict[int, Reason] = {
    400: "invalid",
    404: "unknown",
    408: "late",
    413: "invalid",
    429: "unavailable",
    499: "cancelled",
    502: "unavailable",
    503: "unavailable",
    504: "late",
}
# zlib's window bits of the two formats
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


class HttpTransport:
    """A connection per request; several threads may ask at once."""

    streams = False

    def __init__(self, address: Address, connection: Connection) -> None:
        self._address, self._compression = address, connection.compression
        self._context = _context(connection.tls or Tls()) if address.encrypted else None
        self._running = Running()

    def parameters(self, model: str, version: str, timeout: float | None) -> dict[str, str]:
        """Parameters of a model's configuration."""
        config = self._json("GET", f"{_path(model, version)}/config", timeout)
        return {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}

    def is_ready(self, model: str, version: str, timeout: float | None) -> bool:
        """Whether a model is there and ready."""
        try:
            self._send("GET", f"{_path(model, version)}/ready", [], {}, timeout)
        except Failure as failure:
            if failure.reason in ("invalid", "unknown"):
                return False
            raise
        return True

    def infer(self, question: Question, timeout: float | None) -> Answer:
        """One question, one answer."""
        text = json.dumps(_header(question)).encode()
        parts: list[bytes | memoryview] = [text, *(_bytes_of(array) for array in question.sent)]
        headers = {_HEADER_SIZE: str(len(text)), "Content-Type": "application/octet-stream"}
        size, body = self._send("POST", f"{_path(question.model, question.version)}/infer", parts, headers, timeout)
        return _answer(memoryview(body), size, question)

    def stream(self, question: Question, timeout: float | None) -> Generator[Answer]:
        """HTTP carries one answer, see `streams`."""
        raise AssertionError("the caller asks for streams first")

    def register(self, region: Region, timeout: float | None) -> None:
        """Make a region known to the server."""
        kind, handle = region.registration
        known: dict[str, Any] = {"byte_size": region.size}
        known |= (
            {"key": handle, "offset": 0}
            if isinstance(handle, str)
            else {"raw_handle": {"b64": base64.b64encode(handle).decode()}, "device_id": 0}
        )
        self._json("POST", f"/v2/{kind}sharedmemory/region/{quote(region.name)}/register", timeout, known)

    def unregister(self, kind: Literal["system", "cuda"], name: str, timeout: float | None) -> None:
        """Make the server forget a region."""
        self._json("POST", f"/v2/{kind}sharedmemory/region/{quote(name)}/unregister", timeout)

    def system_regions(self, timeout: float | None) -> dict[str, str]:
        """Name -> key of the system shared memory the server knows."""
        return {region["name"]: region["key"] for region in self._json("GET", "/v2/systemsharedmemory/status", timeout)}

    def cancel(self) -> None:
        """End what is under way, and refuse all but tidying up."""
        self._running.cancel()

    def close(self) -> None:
        """Nothing is held between requests."""

    def _json(self, method: str, path: str, timeout: float | None, values: dict[str, Any] | None = None) -> Any:
        parts = [] if values is None else [json.dumps(values).encode()]
        _, body = self._send(method, path, parts, {"Content-Type": "application/json"}, timeout)
        return _parsed(body) if body else {}

    def _send(
        self, method: str, path: str, parts: Sequence[bytes | memoryview], headers: dict[str, str], timeout: float | None
    ) -> tuple[int | None, bytes]:
        """The length of the JSON in front of the body, and the body of a request that was answered with 200."""
        try:
            with closing(self._connection(timeout)) as connection:
                connection.connect()
                with self._running(lambda: _hang_up(connection), tidying=path.endswith("/unregister")):
                    return self._exchange(connection, method, path, parts, headers)
        except ssl.SSLCertVerificationError as err:
            raise Failure("failed", f"its certificate is not accepted ({err.verify_message})") from err
        except TimeoutError as err:
            raise Failure("late", "no answer in time") from err
        except (http.client.HTTPException, OSError) as err:
            raise Failure("cancelled" if self._running.is_cancelled else "unavailable", str(err) or type(err).__name__) from err

    def _connection(self, timeout: float | None) -> http.client.HTTPConnection:
        where = self._address
        if self._context is not None:
            return http.client.HTTPSConnection(where.host, where.port, timeout=timeout, context=self._context)
        return http.client.HTTPConnection(where.host, where.port, timeout=timeout)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, parts: Sequence[bytes | memoryview], headers: dict[str, str]
    ) -> tuple[int | None, bytes]:
        headers = {**headers}
        if self._compression is not None:
            headers["Accept-Encoding"] = self._compression
            if parts:
                headers["Content-Encoding"] = self._compression
                parts = [_compressed(parts, self._compression)]
        headers["Content-Length"] = str(sum(len(part) for part in parts))
        with suppress(BrokenPipeError):  # a server that refuses at once closes while we send; its answer can be read all the same
            connection.request(method, self._address.path + path, body=iter(parts), headers=headers)
        response = connection.getresponse()
        body = response.read()
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding in _WINDOW_BITS:
            body = zlib.decompress(body, _WINDOW_BITS[encoding])
        if response.status != 200:
            raise _failure(response.status, body)
        size = response.headers.get(_HEADER_SIZE)
        return (int(size) if size else None), body


def _hang_up(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def _context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.root_certificates)
        if tls.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except (ssl.SSLError, OSError) as err:
        raise InputError(f"certificates or key cannot be used ({err}); expected files in PEM format that belong together") from err
    return context


def _path(model: str, version: str) -> str:
    return f"/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")


def _bytes_of(array: Any) -> memoryview:
    """A contiguous array's bytes, uncopied."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _compressed(parts: Iterable[bytes | memoryview], how: str) -> bytes:
    # level 1: voxels that were compressed in their file shrink as much again, and the time must be won back on the network
    squeeze = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS[how])
    return b"".join([*(squeeze.compress(part) for part in parts), squeeze.flush()])


def _header(question: Question) -> dict[str, Any]:
    inputs = [
        {
            "name": name,
            "datatype": type_name(array),
            "shape": list(array.shape),
            "parameters": _slot(question, name) or {"binary_data_size": array.nbytes},
        }
        for name, array in question.inputs.items()
    ]
    outputs = [{"name": name, "parameters": _slot(question, name) or {"binary_data": True}} for name in question.outputs]
    return {"inputs": inputs, "outputs": outputs, "parameters": dict(question.parameters)}


def _slot(question: Question, name: str) -> dict[str, Any] | None:
    slot = question.slots.get(name)
    if slot is None:
        return None
    return {"shared_memory_region": slot.region, "shared_memory_byte_size": slot.size, "shared_memory_offset": slot.offset}


def _failure(status: int, body: bytes) -> Failure:
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode(errors="replace").strip() or f"HTTP {status}"
    reason = _REASONS.get(status, "failed")
    return Failure(reason_of(text, reason) if reason in ("failed", "unknown") else reason, text)


def _parsed(text: bytes | memoryview) -> Any:
    try:
        return json.loads(bytes(text))
    except ValueError as err:
        raise BackendError(f"the server sent {bytes(text)[:80]!r}, expected JSON; is this a Triton server?") from err


def _answer(body: memoryview, header_size: int | None, question: Question) -> Answer:
    described = _parsed(body[:header_size])
    start, found = header_size or len(body), {}
    for tensor in described.get("outputs", []):
        name, size = tensor["name"], tensor.get("parameters", {}).get("binary_data_size", 0)
        if name in question.slots:
            found[name] = placeholder(tensor["datatype"], tensor["shape"], name)
        else:
            found[name] = decode(body[start : start + size], tensor["datatype"], tensor["shape"], name)
            start += size
    return found
