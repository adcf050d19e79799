"""What one request may ask of the server: checked against what is announced, before anything is allocated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..bundle import Bundle
from ..errors import BackendError, InputError
from ..memory import available_bytes, case_bytes, resident_bytes
from ..slabs import working_shape
from ..spec import ModelSpec
from ..volume import Grid
from ..windows import count_starts

# what an image takes at least while it is read, moved and normalised
_BYTES_PER_VOXEL = 16
# nothing that a scanner or a microscope makes is coarser, and products of larger numbers leave the range of floats
_LARGEST_MM = 1e6
# a whole-body CT at a quarter of a window takes some ten thousand; their plan alone would take seconds and gigabytes beyond this
_MOST_WINDOWS = 2**19
_SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Limits:
    """The most that one request may take.

    Attributes
    ----------
    voxels : over all channels
    bytes : of memory while it is worked on; 0 where the system does not tell what it has
    sharing : requests that the model works on at once
    left : tells the bytes that are free at this moment, for this process; 0 where the system does not tell
    """

    voxels: int
    bytes: int
    sharing: int = 1
    left: Callable[[], int] = lambda: 0

    @classmethod
    def here(cls, max_voxels: int | None = None, *, sharing: int = 1) -> Limits:
        """Decide by the memory there is now, of which `sharing` requests at once get equal parts; `max_voxels` comes first."""
        share, idle = available_bytes() // sharing, resident_bytes()
        # what this process took since then, for an earlier image, it can use again
        return cls(
            max_voxels or (share // _BYTES_PER_VOXEL if share else 2**40),
            share,
            sharing,
            lambda: available_bytes() + max(0, resident_bytes() - idle),
        )

    def check_voxels(self, name: str, shape: Sequence[int], *, beside: int = 0) -> None:
        """Refuse a shape with too many voxels, or none.

        Parameters
        ----------
        beside : voxels of the image's other files

        Raises
        ------
        InputError
            Naming the image, its shape and the limit.
        """
        sizes = " x ".join(map(str, shape))
        if min(shape, default=0) < 1:
            raise InputError(f"{name} has an axis of size 0 ({sizes} voxels), expected at least one voxel along each axis")
        if prod(map(int, shape)) + beside > self.voxels:
            others = f" beside {beside} of other channels" if beside else ""
            raise InputError(
                f"{name} announces {sizes} voxels{others}, this server takes at most {self.voxels} in all; crop it, or send it in coarser "
                "voxels"
            )

    def check_work(self, name: str, bundle: Bundle, grid: Grid, itemsize: int, *, probabilities: bool, step: float | None) -> None:
        """Refuse an image that would take too much while it is worked on: a small one grows when its spacing is coarser than the model's.

        Raises
        ------
        InputError
            With what is needed and what there is.
        BackendError
            When the memory it needs is there, but taken at this moment.
        """
        if max(grid.spacing) > _LARGEST_MM:
            raise InputError(f"{name} has a spacing of {grid.spacing} mm, expected at most {_LARGEST_MM:g}")
        partner = bundle.partner.spec if bundle.partner else None
        needed = case_bytes(bundle.spec, grid, itemsize, probabilities=probabilities, step=step, partner=partner)
        if self.bytes and needed > self.bytes:
            each = f" for each of {self.sharing} images at once" if self.sharing > 1 else ""
            raise InputError(
                f"{name} needs {needed / 2**30:.1f} GB while it is worked on, this server has {self.bytes / 2**30:.1f}{each}; "
                f"its spacing is {grid.spacing} mm: check it, crop the image, or send coarser voxels"
            )
        if (left := self.left()) and needed > left:
            raise BackendError(
                f"{name} needs {needed / 2**30:.1f} GB while it is worked on, {left / 2**30:.1f} are free now: other images or programs "
                "have the rest; try again later"
            )
        windows = max(_count_windows(spec, grid, step) for spec in (bundle.spec, *([partner] if partner else [])))
        if windows > _MOST_WINDOWS:
            raise InputError(f"{name} takes {windows} windows, this server runs at most {_MOST_WINDOWS}; ask for a larger step, or crop it")


def check_answer(name: str, bundle: Bundle, grid: Grid, *, probabilities: bool, shared: Path = _SHARED) -> None:
    """Refuse an image whose answer can never fit in the shared memory through which it goes to the server, before the work is done.

    What is free there is not asked: the server keeps what it took, and uses it again for the next answer.

    Parameters
    ----------
    shared : where that memory is mounted; elsewhere nothing is checked

    Raises
    ------
    BackendError
        With what is needed and what there is.
    """
    if not shared.is_dir():
        return
    spec, total = bundle.spec, shutil.disk_usage(shared).total
    needed = prod(grid.shape) * (np.dtype(spec.label_dtype).itemsize + (4 * spec.classes if probabilities else 0))
    if needed > total:
        raise BackendError(
            f"the answer to {name} needs {needed / 2**20:.0f} MB of the server's shared memory, {shared} has {total / 2**20:.0f}; "
            "give it more (docker run --shm-size), or ask for no probabilities"
        )


def _count_windows(spec: ModelSpec, grid: Grid, step: float | None) -> int:
    """Windows of an image that is not cropped."""
    chosen = spec.inference.step if step is None else step
    sides = zip(working_shape(spec, grid), spec.inference.patch, strict=True)
    return prod(count_starts(max(side, patch), patch, chosen) for side, patch in sides)
