"""Images at which the process that worked on them died: each is known by a short mark, and the process is named so while it works on it.

The name of a process is all that is left of one that was killed; `Watch` reads it, and tells the process that follows (FATAL in its
configuration) what not to begin again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import InputError
from ..protocol import RequestOptions

# the parameter of a configuration; in capitals, as those that are none of a repository's own
FATAL = "FATAL"
_PREFIX, _DIGITS = "at-", 12  # the kernel keeps 15 letters
_SAMPLES = 2**14


def mark_of(tensors: Mapping[str, Array], options: RequestOptions) -> str:
    """What tells an image and what is asked of it from others: of large tensors a sample, for this is done for every request."""
    # each repeat comes later and has less time; a name is no part of an image
    digest = hashlib.sha256(options.model_dump_json(exclude={"timeout_s", "arrived", "name"}).encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.reshape(-1)
        sample = flat[:: max(len(flat) // _SAMPLES, 1)]
        digest.update(f"{name}{tensor.shape}{tensor.dtype}".encode() + np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()[:_DIGITS]


@contextmanager
def working_on(mark: str) -> Iterator[None]:
    """While the block runs, this process bears the image's mark as its name."""
    own = Path("/proc/self/comm")
    before = own.read_text().strip() if own.is_file() else ""
    _rename(own, _PREFIX + mark)
    try:
        yield
    finally:
        _rename(own, before)


def image_in(name: str) -> str | None:
    """The mark that a process's name bears; None when it worked on nothing."""
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


def fatal_in(config: Mapping[str, Any]) -> frozenset[str]:
    """Marks of images that a model's configuration calls fatal."""
    return frozenset(config.get("parameters", {}).get(FATAL, {}).get("string_value", "").split(","))


def check_fatal(mark: str, fatal: Collection[str], name: str) -> None:
    """Refuse an image at which the process died before.

    Raises
    ------
    InputError
        Saying so.
    """
    if mark in fatal:
        raise InputError(
            f"the server's process died twice while it worked on {name} (out of memory, most likely), which is not tried again; crop the "
            "image, send coarser voxels, or give the server more memory"
        )


def _rename(own: Path, name: str) -> None:
    with contextlib.suppress(OSError):  # no such file where this is no Linux
        own.write_text(name)
