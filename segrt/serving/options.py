"""How a server is started: `ServerOptions`, and tritonserver's own arguments made of them."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, TypeAlias

from ..errors import InputError
from ..protocol import ARRIVED

LogLevel: TypeAlias = Literal["error", "warning", "info", "verbose"]
LOG_LEVELS: tuple[LogLevel, ...] = ("error", "warning", "info", "verbose")
# what a client over the network may not do: name this machine's shared memory, write log and trace files
_LOCAL_ONLY = "shared-memory,trace,logging"
_PORTS = ("http_port", "grpc_port", "metrics_port")


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started.

    Attributes
    ----------
    host : IP address it listens on; only this machine reaches the default
    http_port, grpc_port, metrics_port : 0 picks free ones
    control : who may load and unload models: "none", so that only `Server.load` does, or "explicit", every client on this machine
    log_level : "error", "warning", "info" or "verbose": which lines of the log are shown
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
    control: Literal["none", "explicit"] = "none"
    log_level: LogLevel = "info"
    ready_s: float = 600.0
    exit_s: int = 120
    program: Path | None = None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise an InputError for an option that cannot be."""
        if not _is_address(self.host):
            raise InputError(f"host: expected an IP address such as 127.0.0.1 or 0.0.0.0, got {self.host!r}")
        for name in _PORTS:
            if not 0 <= getattr(self, name) <= 65535:
                raise InputError(f"{name}: expected 0 to 65535, got {getattr(self, name)}")
        if self.log_level not in LOG_LEVELS:
            raise InputError(f"log_level: expected {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        if self.control == "explicit" and not self.is_loopback:
            raise InputError(
                f"control: 'explicit' lets whoever reaches {self.host} replace the models, which are programs; it is for 127.0.0.1 only"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return ip_address(self.host).is_loopback

    @property
    def ports(self) -> tuple[int, ...]:
        """HTTP, gRPC, metrics."""
        return (self.http_port, self.grpc_port, self.metrics_port)

    def address(self, port: int) -> str:
        """HOST:PORT that a client on this machine connects to; nobody connects to "every address"."""
        host = ip_address(self.host)
        text = ("::1" if host.version == 6 else "127.0.0.1") if host.is_unspecified else str(host)
        return f"[{text}]:{port}" if host.version == 6 else f"{text}:{port}"

    def shows(self, line: str) -> bool:
        """Whether a line of tritonserver's log (I1120 18:36:00...) is of the level asked for; lines of the models always are."""
        level = {"E": 0, "W": 1, "I": 2}.get(line[:1], 0) if line[1:5].isdigit() else 0
        if is_noise(line):
            level = 2
        return level <= LOG_LEVELS.index(self.log_level)

    def with_free_ports(self) -> ServerOptions:
        """Options in which ports that were 0 are free ones, all different.

        Raises
        ------
        InputError
            When one that was chosen is taken.
        """
        family = socket.AF_INET6 if ip_address(self.host).version == 6 else socket.AF_INET
        ports = {}
        with contextlib.ExitStack() as held:
            for name in _PORTS:
                tried, port = held.enter_context(socket.socket(family)), getattr(self, name)
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(port != 0))
                try:
                    tried.bind((self.host, port))
                except OSError as err:
                    raise InputError(
                        f"{name}: {self.host}:{port} cannot be used ({err.strerror}); choose another, or 0 for a free one"
                    ) from err
                ports[name] = tried.getsockname()[1]
        return replace(self, **ports)

    def server_arguments(self, repository: Path, backends: Path, *, http: int, name: str, key: str) -> list[str]:
        """Arguments for tritonserver.

        Parameters
        ----------
        http : its own port for HTTP, which only this machine reaches
        name : of the server, with which the names of its shared memory begin
        key : what a caller has to show who loads models where clients may not
        """
        keys = [] if self.control == "explicit" else [f"model-repository:{KEY_HEADER}={key}"]
        if not self.is_loopback:
            # a key nobody is told
            keys.append(f"{_LOCAL_ONLY}:{KEY_HEADER}-local={secrets.token_hex(16)}")
        return [
            f"--id={name}",
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--http-address=127.0.0.1",
            f"--http-port={http}",
            f"--http-header-forward-pattern={ARRIVED}",
            *(f"--{name}-address={self.host}" for name in ("grpc", "metrics")),
            *(f"--{name}-port={getattr(self, f'{name}_port')}" for name in ("grpc", "metrics")),
            "--model-control-mode=explicit",
            "--load-model=*",
            # models that start all at once take each other's CPU for so long that the server gives up
            "--model-load-thread-count=1",
            "--disable-auto-complete-config",  # a process per model only to read what config.pbtxt says
            *(f"--http-restricted-api={text}" for text in keys),
            *(f"--grpc-restricted-protocol={text}" for text in keys),
            # what is logged is kept for the sentence that says why it failed; what is shown is chosen later
            "--log-info=true",
            f"--log-verbose={int(self.log_level == 'verbose')}",
            f"--exit-timeout-secs={self.exit_s}",
            f"--backend-config=python,shm-region-prefix-name={name}",
            # opening an engine may take minutes; the default is half of one
            f"--backend-config=python,stub-timeout-seconds={int(self.ready_s)}",
            # on a machine without a GPU each is a warning at every start
            *([] if Path("/dev/nvidiactl").exists() else ["--pinned-memory-pool-byte-size=0", "--allow-gpu-metrics=false"]),
            *self.arguments,
        ]


KEY_HEADER = "segrt-key"


def free_port() -> int:
    """A port of 127.0.0.1 that is free at this moment."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def is_noise(line: str) -> bool:
    """Whether a line of the log is of a table of what it found, or says only that there is no GPU."""
    return not line or line.startswith(("+-", "| ")) or "CudaDriverHelper" in line


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
