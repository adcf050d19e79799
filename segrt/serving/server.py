"""A tritonserver of our own: started over a model repository, ready when it returns, stopped without cutting requests off."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

from ..errors import BackendError, InputError
from .launch import find_tritonserver, prepare_backends, server_environment

LogLevel: TypeAlias = Literal["error", "warning", "info", "verbose"]
Control: TypeAlias = Literal["none", "explicit", "poll"]
_LEVELS: tuple[LogLevel, ...] = ("error", "warning", "info")
_POLL_S, _ATTEMPTS, _KEPT_LINES = 0.1, 5, 500
# what a client over the network may not do: read this machine's shared memory, write log and trace files, replace models
_LOCAL_ONLY = "shared-memory,model-repository,trace,logging"
_BUSY = ("address already in use", "failed to bind", "unable to bind", "failed to start")


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started.

    Attributes
    ----------
    host : address it listens on; only this machine reaches the default
    http_port, grpc_port, metrics_port : 0 picks free ones
    control : "none" loads every model once; "explicit" also loads and unloads on request; "poll" follows changes of the folder
    log_level : "error", "warning", "info" or "verbose"
    ready_s : seconds until every model must be ready
    exit_s : seconds that requests in flight get to finish when it stops
    program : the tritonserver to use; searched by default
    arguments : further ones for tritonserver
    environment : variables to add for the models' processes
    """

    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    control: Control = "none"
    log_level: LogLevel = "info"
    ready_s: float = 600.0
    exit_s: int = 120
    program: Path | None = None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None

    def check(self) -> None:
        """Raise an InputError for an option that cannot be."""
        if not _is_address(self.host):
            raise InputError(f"host: expected an IP address such as 127.0.0.1 or 0.0.0.0, got {self.host!r}")
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InputError(f"{name}: expected 0 to 65535, got {getattr(self, name)}")
        if self.control == "explicit" and not self.is_loopback:
            raise InputError(
                f"control: 'explicit' lets whoever reaches {self.host} replace the models, which are programs; use poll, or host 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return ip_address(self.host).is_loopback


class Server:
    """A running tritonserver over one model repository; used with `with`, or `start` and `stop`.

    Parameters
    ----------
    repository : folder of models, as `segrt-build --triton` writes it
    options : ports, logging, limits
    show : gets each line the server logs; dropped by default (the last ones are in `log`)

    Raises
    ------
    InputError
        When the repository or an option cannot be used.
    BackendError
        When there is no tritonserver, or it does not become ready.

    Examples
    --------
    >>> with Server("model_repository/") as server:                        # doctest: +SKIP
    ...     print(server.http, server.grpc)
    127.0.0.1:43211 127.0.0.1:37651
    """

    def __init__(
        self, repository: str | Path, options: ServerOptions | None = None, *, show: Callable[[str], object] | None = None
    ) -> None:
        self.repository, self.options = Path(repository).resolve(), options or ServerOptions()
        self.options.check()
        if not any(self.repository.glob("*/config.pbtxt")):
            raise InputError(
                f"{repository}: expected a model repository (folders with a config.pbtxt), found none; segrt-build --triton makes one"
            )
        self.installation = find_tritonserver(self.options.program)
        self._show = show
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._ports = self.options
        # the server's shared memory gets names of its own, so that what a killed one leaves can be told and removed
        self._region = f"segrt_{os.getpid()}_{secrets.token_hex(4)}_"

    @property
    def http(self) -> str:
        """HOST:PORT for HTTP clients."""
        return self._address(self._ports.http_port)

    @property
    def grpc(self) -> str:
        """HOST:PORT for gRPC clients."""
        return self._address(self._ports.grpc_port)

    @property
    def metrics(self) -> str:
        """HOST:PORT of /metrics."""
        return self._address(self._ports.metrics_port)

    @property
    def log(self) -> str:
        """The last lines the server logged."""
        return "\n".join(self._lines)

    @property
    def pid(self) -> int:
        """Process of the server; its group holds the models' processes."""
        if self._process is None:
            raise BackendError("the server was not started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Server:
        """Start it and wait until every model is ready."""
        for attempt in range(_ATTEMPTS):
            self._ports = _with_free_ports(self.options)
            self._launch()
            try:
                self._wait_until_ready()
            except BackendError:
                self.kill()
                # somebody else took a port between our choice and its use: another choice
                if attempt + 1 < _ATTEMPTS and self._ports != self.options and any(text in self.log.lower() for text in _BUSY):
                    continue
                raise
            except BaseException:
                self.kill()
                raise
            return self
        raise AssertionError("the last attempt raises")

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process ends, and give its exit code (negative: minus the signal); None after `timeout` seconds."""
        try:
            return self._process.wait(timeout) if self._process else None
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int | None:
        """End the server once its requests have finished, and give its exit code; it is safe to call twice."""
        if self.is_running:
            self._signal(signal.SIGTERM)
            self.wait(self.options.exit_s + 10)
        return self.kill()

    def kill(self) -> int | None:
        """End whatever still runs, remove what it left, and give the exit code."""
        if self._process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        if self._reader is not None:
            self._reader.join()
        for region in Path("/dev/shm").glob(f"{self._region}*"):
            region.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()
        return code

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _launch(self) -> None:
        self._lines.clear()
        self._folder = tempfile.TemporaryDirectory(prefix="segrt-serve-")
        backends = prepare_backends(self.installation, Path(self._folder.name))
        environment = server_environment(self.installation, os.environ) | dict(self.options.environment or {})
        self._process = subprocess.Popen(
            [str(self.installation.program), *self._arguments(backends)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone; we stop it in order
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _arguments(self, backends: Path) -> list[str]:
        how = self._ports
        shown = _LEVELS[: _LEVELS.index(how.log_level) + 1] if how.log_level != "verbose" else _LEVELS
        arguments = [
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            *(f"--{name}-address={how.host}" for name in ("http", "grpc", "metrics")),
            *(f"--{name}-port={getattr(how, f'{name}_port')}" for name in ("http", "grpc", "metrics")),
            f"--model-control-mode={how.control}",
            *(["--load-model=*"] if how.control == "explicit" else []),
            *(f"--log-{level}={str(level in shown).lower()}" for level in _LEVELS),
            f"--log-verbose={int(how.log_level == 'verbose')}",
            f"--exit-timeout-secs={how.exit_s}",
            f"--backend-config=python,shm-region-prefix-name={self._region}",
            # opening an engine may take minutes; the default is half of one
            f"--backend-config=python,stub-timeout-seconds={int(how.ready_s)}",
        ]
        if not how.is_loopback:
            # a key nobody is told
            key = f"segrt-local={secrets.token_hex(16)}"
            arguments += [f"--http-restricted-api={_LOCAL_ONLY}:{key}", f"--grpc-restricted-protocol={_LOCAL_ONLY}:{key}"]
        return [*arguments, *how.arguments]

    def _read_log(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.append(line.rstrip("\n"))
                if self._show is not None:
                    self._show(line.rstrip("\n"))

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + self.options.ready_s
        while not self._is_ready():
            if not self.is_running:
                self._join_log()
                raise BackendError(f"tritonserver ended with code {self.wait()} before it was ready: {_reason(list(self._lines))}")
            if time.monotonic() > until:
                raise BackendError(
                    f"tritonserver was not ready after {self.options.ready_s:g} s (--ready-timeout): {_reason(list(self._lines))}"
                )
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        """Whether every model is ready; the server itself says so."""
        try:
            # straight to it: a proxy for the outside is no way to our own process
            with _DIRECT.open(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _join_log(self) -> None:
        if self._reader is not None:
            self._reader.join(5)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _address(self, port: int) -> str:
        """What a client on this machine connects to; nobody connects to "every address"."""
        host = ip_address(self.options.host)
        text = ("::1" if host.version == 6 else "127.0.0.1") if host.is_unspecified else str(host)
        return f"[{text}]:{port}" if host.version == 6 else f"{text}:{port}"


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _with_free_ports(options: ServerOptions) -> ServerOptions:
    """Options in which ports that were 0 are free ones, all different."""
    family = socket.AF_INET6 if ip_address(options.host).version == 6 else socket.AF_INET
    with contextlib.ExitStack() as held:
        ports = {}
        for name in ("http_port", "grpc_port", "metrics_port"):
            if getattr(options, name) == 0:
                taken = held.enter_context(socket.socket(family))
                taken.bind((options.host, 0))
                ports[name] = taken.getsockname()[1]
    return replace(options, **ports)


def _reason(lines: list[str]) -> str:
    """The line of the log that says why, without its prefix of time and place."""
    failures = [line for line in lines if line.startswith("E") or "failed" in line.lower() or "error" in line.lower()]
    return (failures or lines or ["it logged nothing"])[-1].split("] ", 1)[-1].strip('"')
