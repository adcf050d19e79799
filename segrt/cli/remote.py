"""The part of `segrt-predict` that is about a model on a Triton server: its options, and what does not go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import InputError
from .common import comma_list

if TYPE_CHECKING:
    from ..serving.connection import Connection
    from ..serving.remote import RemotePredictor


@dataclass(frozen=True)
class RemoteOptions:
    """What was asked for with --triton and the flags beside it."""

    triton: str | None
    timeout: float | None = None
    compression: str | None = None
    shared_memory: str = "auto"
    send_files: bool = False
    root_certificates: Path | None = None
    client_key: Path | None = None
    client_certificate: Path | None = None
    insecure: bool = False

    def check(self, **local: bool) -> None:
        """Raise an InputError for flags that do not go together; `local` says which of those for engines of this machine were given."""
        if self.triton is None:
            if self != RemoteOptions(None):
                raise InputError(
                    "--timeout, --send-files and what is about compression, shared memory and encryption need a server: --triton HOST:PORT"
                )
        elif any(local.values()):
            names = ", ".join(f"--{name}" for name, was_given in local.items() if was_given)
            raise InputError(f"{names}: decided where the server was set up; leave out what is about this machine, or --triton")

    def open(self, model: Path, options: dict[str, Any]) -> list[RemotePredictor]:
        """The model on each of the servers (several, separated by commas, share the cases)."""
        from ..serving.remote import RemotePredictor

        urls, opened = comma_list(self.triton) or (), list[RemotePredictor]()
        if not urls:
            raise InputError(f"--triton: expected HOST:PORT, got {self.triton!r}")
        try:
            for url in urls:
                opened.append(RemotePredictor(url, str(model), connection=self._connection(), **options))
            _check_same(opened)
        except BaseException:
            for predictor in opened:
                predictor.close()
            raise
        return opened

    def _connection(self) -> Connection:
        from ..serving.connection import Compression, Connection, Sharing, Tls

        asked = (self.root_certificates, self.client_key, self.client_certificate)
        tls = Tls(*asked, insecure=self.insecure) if any(asked) or self.insecure else None
        return Connection(
            timeout_s=self.timeout,
            compression=cast("Compression | None", self.compression),
            shared_memory=cast("Sharing", self.shared_memory),
            send_files=self.send_files,
            tls=tls,
        )


def _check_same(opened: list[RemotePredictor]) -> None:
    first, *others = opened
    for other in others:
        if other.provenance != first.provenance:
            raise InputError(
                f"{other.where} serves another bundle as {other.model!r} than {first.where}; one folder is segmented by one model"
            )
