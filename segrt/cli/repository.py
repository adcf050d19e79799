"""The part of `segrt-build` that is about a Triton model repository: its options, and what it says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..engines import Backend, Precision


@dataclass(frozen=True)
class RepositoryOptions:
    """What was asked for with --triton, --triton-name and --instances."""

    triton: Path | None
    name: str | None
    instances: int | None

    def check(self, bundle: Path) -> None:
        """Raise an InputError for what cannot be served as it is asked for; before a build, which takes minutes."""
        if self.triton is not None:
            from ..repository import check_target  # after --help, which needs none of it

            check_target(self.triton, bundle, self.name)
        elif not (self.name is None and self.instances is None):
            raise InputError("--triton-name and --instances are for a model repository; name its folder with --triton")

    def write(self, bundle: Bundle, *, backend: Backend, device: str, precisions: Sequence[Precision]) -> None:
        """Write the repository that was asked for, and say what is in it; the engines are those of the first precision."""
        if self.triton is None:
            return
        from ..export.triton import write_triton

        written = write_triton(
            bundle,
            self.triton,
            name=self.name,
            device=device,
            backend=backend,
            precision=precisions[0] if precisions else None,
            instances=self.instances or 1,
        )
        state = "written" if written.new else "is there already"
        print(f"{self.triton}: version {written.version} {state}; models {', '.join(written.models)}")
        for model in written.unused:
            print(f"{self.triton / model} is of an earlier version; remove it once no server runs that")
