"""What one request may ask of the server: checked against what is announced, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..bundle import Bundle
from ..errors import InputError
from ..memory import available_bytes, case_bytes
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


@dataclass(frozen=True)
class Limits:
    """The most that one request may take.

    Attributes
    ----------
    voxels : over all channels
    bytes : of memory while it is worked on; 0 where the system does not tell what it has
    """

    voxels: int
    bytes: int

    @classmethod
    def here(cls, max_voxels: int | None = None) -> Limits:
        """Decide by the memory there is now; `max_voxels` comes first."""
        free = available_bytes()
        return cls(max_voxels or (free // _BYTES_PER_VOXEL if free else 2**40), free)

    def check_voxels(self, name: str, shape: Sequence[int]) -> None:
        """Refuse a shape with too many voxels, or none.

        Raises
        ------
        InputError
            Naming the image, its shape and the limit.
        """
        sizes = " x ".join(map(str, shape))
        if min(shape, default=0) < 1:
            raise InputError(f"{name} has an axis of size 0 ({sizes} voxels), expected at least one voxel along each axis")
        if prod(map(int, shape)) > self.voxels:
            raise InputError(
                f"{name} announces {sizes} voxels, this server takes at most {self.voxels} in all; crop it, or send it in coarser voxels"
            )

    def check_work(self, name: str, bundle: Bundle, grid: Grid, itemsize: int, *, probabilities: bool, step: float | None) -> None:
        """Refuse an image that would take too much while it is worked on: a small one grows when its spacing is coarser than the model's.

        Raises
        ------
        InputError
            With what is needed and what there is.
        """
        if max(grid.spacing) > _LARGEST_MM:
            raise InputError(f"{name} has a spacing of {grid.spacing} mm, expected at most {_LARGEST_MM:g}")
        partner = bundle.partner.spec if bundle.partner else None
        needed = case_bytes(bundle.spec, grid, itemsize, probabilities=probabilities, step=step, partner=partner)
        if self.bytes and needed > self.bytes:
            raise InputError(
                f"{name} needs {needed / 2**30:.1f} GB while it is worked on, this server has {self.bytes / 2**30:.1f}; "
                f"its spacing is {grid.spacing} mm: check it, crop the image, or send coarser voxels"
            )
        windows = max(_count_windows(spec, grid, step) for spec in (bundle.spec, *([partner] if partner else [])))
        if windows > _MOST_WINDOWS:
            raise InputError(f"{name} takes {windows} windows, this server runs at most {_MOST_WINDOWS}; ask for a larger step, or crop it")


def _count_windows(spec: ModelSpec, grid: Grid, step: float | None) -> int:
    """Windows of an image that is not cropped."""
    chosen = spec.inference.step if step is None else step
    sides = zip(working_shape(spec, grid), spec.inference.patch, strict=True)
    return prod(count_starts(max(side, patch), patch, chosen) for side, patch in sides)
