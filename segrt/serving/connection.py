"""How a client reaches a server: its address, and what it does about time, failures, encryption and large arrays."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from math import isfinite
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from ..errors import InputError

Sharing: TypeAlias = Literal["auto", "system", "cuda", "off"]
Compression: TypeAlias = Literal["gzip", "deflate"]
_SCHEMES = ("grpc", "grpcs", "http", "https")
SHARING: tuple[Sharing, ...] = ("auto", "system", "cuda", "off")
COMPRESSIONS: tuple[Compression, ...] = ("gzip", "deflate")


@dataclass(frozen=True)
class Tls:
    """Files for an encrypted connection, all PEM; the system's certificate authorities by default.

    Attributes
    ----------
    root_certificates : authorities the server's certificate is checked against
    key, certificate : the client's own, for servers that ask for them
    insecure : do not check the server's certificate (https only): whoever stands in between can read the images
    """

    root_certificates: Path | None = None
    key: Path | None = None
    certificate: Path | None = None
    insecure: bool = False

    def check(self) -> None:
        """Raise an InputError for files that are missing or do not belong together."""
        for name in ("root_certificates", "key", "certificate"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise InputError(f"{name}: {path} is no file; expected one in PEM format")
        if (self.key is None) != (self.certificate is None):
            raise InputError("key and certificate belong together: give both files of the client's identity, or neither")
        if self.insecure and self.root_certificates is not None:
            raise InputError("insecure means that no certificate is checked; leave out root_certificates, or insecure")


@dataclass(frozen=True)
class Connection:
    """How requests travel.

    Attributes
    ----------
    timeout_s : seconds a call may take in all, repeats included; as long as it takes by default
    connect_s : seconds until a server must have answered when the model is opened
    retries : repeats of a request that no server took, or whose model process died; a refused request is never repeated
    backoff_s : pause before the first repeat; each further one is up to twice as long, at most 8 s, and shortened at random
    compression : of what travels over the network
    shared_memory : pass arrays through memory that both processes see: "auto" does so when the server is on this machine and can, "system"
        insists on it, "cuda" uses a GPU's memory, "off" sends everything
    send_files : send image files as they are instead of their voxels, where the format is one the server reads
    tls : encryption; `grpcs://` and `https://` addresses have it without being told
    """

    timeout_s: float | None = None
    connect_s: float = 10.0
    retries: int = 6
    backoff_s: float = 0.25
    compression: Compression | None = None
    shared_memory: Sharing = "auto"
    send_files: bool = False
    tls: Tls | None = None

    def check(self) -> None:
        """Raise an InputError for a value that cannot be."""
        for name in ("timeout_s", "connect_s", "backoff_s"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise InputError(f"{name}: expected seconds above 0, got {value}")
        if self.retries < 0:
            raise InputError(f"retries: expected 0 or more, got {self.retries}")
        if self.compression is not None and self.compression not in COMPRESSIONS:
            raise InputError(f"compression: expected {' or '.join(COMPRESSIONS)}, got {self.compression!r}")
        if self.shared_memory not in SHARING:
            raise InputError(f"shared_memory: expected {', '.join(SHARING)}, got {self.shared_memory!r}")
        if self.tls is not None:
            self.tls.check()


@dataclass(frozen=True)
class Address:
    """A server's address: `kind`, `host`, `port`, the `path` in front of the protocol's own (HTTP), and whether it is encrypted."""

    kind: Literal["grpc", "http"]
    host: str
    port: int
    path: str
    encrypted: bool

    @property
    def netloc(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine (or at the near end of a tunnel)."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_address(url: str, *, encrypted: bool = False) -> Address:
    """Read "host:port" or "grpc://host:port" (gRPC), "http://host:port/path"; "grpcs://" and "https://" are encrypted.

    Raises
    ------
    InputError
        When it is none of these.
    """
    expected = f"{url!r}: expected HOST:PORT (gRPC), http://HOST:PORT or https://HOST:PORT"
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    try:
        port = parts.port
    except ValueError as err:
        raise InputError(f"{expected}; its port is no number up to 65535") from err
    if parts.scheme not in _SCHEMES or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
        raise InputError(expected)
    kind: Literal["grpc", "http"] = "http" if parts.scheme.startswith("http") else "grpc"
    secure = encrypted or parts.scheme in ("grpcs", "https")
    if port is None and kind == "http":
        port = 443 if secure else 80
    if not port or (kind == "grpc" and parts.path.strip("/")):
        raise InputError(expected)
    return Address(kind, parts.hostname, port, parts.path.rstrip("/"), secure)
