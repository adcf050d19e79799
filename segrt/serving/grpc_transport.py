"""Questions over gRPC: cancellable calls, and streams of progress."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

from ..arrays import require
from ..errors import InputError
from ..protocol import ErrorCode, code_of
from .connection import Address, Connection, Tls
from .wire import Answer, Failure, Question, Reason, Region, Running, decode, placeholder, reason_of, type_name

# the protocol's own limit for one message
_MOST_BYTES = 2**31 - 1
_OPTIONS = [
    ("grpc.max_send_message_length", _MOST_BYTES),
    ("grpc.max_receive_message_length", _MOST_BYTES),
    # a server that comes back is found by the next repeat, not up to two minutes later; the smallest of these three times stays as it
    # is, for it also is the time that connecting may take
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
# a call ends by its own deadline; this long after it nobody reads the server's answers any more
_GRACE_S = 1.0
_REASONS: dict[str, Reason] = {
    "INVALID_ARGUMENT": "invalid",
    "NOT_FOUND": "unknown",
    "UNAVAILABLE": "unavailable",
    "DEADLINE_EXCEEDED": "late",
    "CANCELLED": "cancelled",
}
# TritonError's codes
_CODES: dict[ErrorCode, Reason] = {"INVALID_ARG": "invalid", "UNAVAILABLE": "unavailable", "CANCELLED": "cancelled", "INTERNAL": "failed"}


class GrpcTransport:
    """One channel; calls of several threads share it."""

    streams = True

    def __init__(self, address: Address, connection: Connection) -> None:
        self._grpc = require("grpc", extra="triton")
        self._messages = require("tritonclient.grpc.service_pb2", extra="triton")
        services = require("tritonclient.grpc.service_pb2_grpc", extra="triton")
        kinds = self._grpc.Compression
        how = {None: kinds.NoCompression, "gzip": kinds.Gzip, "deflate": kinds.Deflate}[connection.compression]
        if address.encrypted:
            self._channel = self._grpc.secure_channel(address.netloc, self._credentials(connection.tls or Tls()), _OPTIONS, how)
        else:
            self._channel = self._grpc.insecure_channel(address.netloc, _OPTIONS, how)
        self._running = Running()
        self._calls = services.GRPCInferenceServiceStub(self._channel)

    def parameters(self, model: str, version: str, timeout: float | None) -> dict[str, str]:
        """Parameters of a model's configuration."""
        config = self._ask("ModelConfig", self._messages.ModelConfigRequest(name=model, version=version), timeout).config
        return {name: value.string_value for name, value in config.parameters.items()}

    def is_ready(self, model: str, version: str, timeout: float | None) -> bool:
        """Whether a model is there and ready."""
        return bool(self._ask("ModelReady", self._messages.ModelReadyRequest(name=model, version=version), timeout).ready)

    def infer(self, question: Question, timeout: float | None) -> Answer:
        """One question, one answer."""
        return _answer(self._ask("ModelInfer", self._request(question), timeout), question)

    def stream(self, question: Question, timeout: float | None) -> Generator[Answer]:
        """One question, several answers; leaving the loop early cancels the rest."""
        call = self._calls.ModelStreamInfer(iter([self._request(question)]), timeout=timeout)
        try:
            with self._running(call.cancel):
                for response in call:
                    if response.error_message:
                        raise _streamed_failure(response.error_message)
                    yield _answer(response.infer_response, question)
        except self._grpc.RpcError as err:
            raise self._failure(err) from err
        finally:
            call.cancel()

    def register(self, region: Region, timeout: float | None) -> None:
        """Make a region known to the server."""
        kind, handle = region.registration
        if kind == "system":
            known = self._messages.SystemSharedMemoryRegisterRequest(name=region.name, key=handle, byte_size=region.size)
            self._ask("SystemSharedMemoryRegister", known, timeout)
        else:
            known = self._messages.CudaSharedMemoryRegisterRequest(name=region.name, raw_handle=handle, byte_size=region.size)
            self._ask("CudaSharedMemoryRegister", known, timeout)

    def unregister(self, kind: Literal["system", "cuda"], name: str, timeout: float | None) -> None:
        """Make the server forget a region."""
        prefix = "SystemSharedMemoryUnregister" if kind == "system" else "CudaSharedMemoryUnregister"
        self._ask(prefix, getattr(self._messages, f"{prefix}Request")(name=name), timeout)

    def system_regions(self, timeout: float | None) -> dict[str, str]:
        """Name -> key of the system shared memory the server knows."""
        answer = self._ask("SystemSharedMemoryStatus", self._messages.SystemSharedMemoryStatusRequest(), timeout)
        return {name: region.key for name, region in answer.regions.items()}

    def cancel(self) -> None:
        """Cancel what is under way, and refuse all but tidying up."""
        self._running.cancel()

    def close(self) -> None:
        """Release the channel."""
        self._channel.close()

    def _credentials(self, tls: Tls) -> Any:
        if tls.insecure:
            raise InputError("insecure: gRPC always checks the server's certificate; give root_certificates, or use https://")
        files = (tls.root_certificates, tls.key, tls.certificate)
        try:
            return self._grpc.ssl_channel_credentials(*(None if file is None else Path(file).read_bytes() for file in files))
        except OSError as err:
            raise InputError(f"{err.filename} cannot be read ({err.strerror or err}); expected a certificate or key in PEM format") from err

    def _ask(self, method: str, request: Any, timeout: float | None) -> Any:
        call = getattr(self._calls, method).future(request, timeout=timeout)
        # Ctrl-C while gRPC's own result() waits can leave a lock taken for which its reading thread then waits for ever; this waits in C
        done: SimpleQueue[Any] = SimpleQueue()
        call.add_done_callback(done.put)
        try:
            with self._running(call.cancel, tidying=method.endswith("Unregister")):
                done.get(timeout=None if timeout is None else timeout + _GRACE_S)
                return call.result()
        except Empty:
            call.cancel()
            raise Failure("late", "no answer, and no end by the deadline") from None
        except self._grpc.RpcError as err:
            raise self._failure(err) from err
        except self._grpc.FutureCancelledError as err:
            raise Failure("cancelled", "cancelled") from err
        except BaseException:  # Ctrl-C: the server stops its windows
            call.cancel()
            raise

    def _request(self, question: Question) -> Any:
        size = sum(array.nbytes for array in question.sent)
        if size > _MOST_BYTES - 2**20:
            raise InputError(f"the image takes {size / 1e9:.2f} GB, gRPC carries 2 GB; use http:// or, on one machine, shared memory")
        request = self._messages.ModelInferRequest(model_name=question.model, model_version=question.version)
        for name, array in question.inputs.items():
            tensor = request.inputs.add(name=name, datatype=type_name(array), shape=array.shape)
            _place(tensor, question, name)
        request.raw_input_contents.extend(array.tobytes() for array in question.sent)
        for name in question.outputs:
            _place(request.outputs.add(name=name), question, name)
        for option, value in question.parameters.items():
            if isinstance(value, bool):
                request.parameters[option].bool_param = value
            else:
                request.parameters[option].string_param = value
        return request

    def _failure(self, err: Any) -> Failure:
        code, text = err.code().name, err.details() or "no reason given"
        # a connection that breaks under a call
        if code == "UNKNOWN" and "stream removed" in text.lower():
            return Failure("unavailable", text)
        # a server that others reach refuses this machine's shared memory, whoever asks and however often
        if code == "UNAVAILABLE" and "protocol is restricted" in text:
            return Failure("failed", text)
        reason = _REASONS.get(code, "failed")
        return Failure(reason_of(text, reason) if reason in ("failed", "unknown") else reason, text)


def _place(tensor: Any, question: Question, name: str) -> None:
    if slot := question.slots.get(name):
        tensor.parameters["shared_memory_region"].string_param = slot.region
        tensor.parameters["shared_memory_byte_size"].int64_param = slot.size
        tensor.parameters["shared_memory_offset"].int64_param = slot.offset


def _streamed_failure(message: str) -> Failure:
    # the metadata triton_grpc_error would bring the status, and with it the end of a Triton 2.51 (a segmentation fault)
    code, text = code_of(message)
    return Failure(_CODES[code] if code else reason_of(text), text)


def _answer(response: Any, question: Question) -> Answer:
    raw = list(response.raw_output_contents)
    found = {}
    for index, tensor in enumerate(response.outputs):
        if tensor.name in question.slots:
            found[tensor.name] = placeholder(tensor.datatype, tensor.shape, tensor.name)
        else:
            found[tensor.name] = decode(raw[index] if index < len(raw) else b"", tensor.datatype, tensor.shape, tensor.name)
    return found
