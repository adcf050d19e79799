"""TRAIN, which patch of which case: nnU-Net 2.8.1's draw with a generator of our own, between `prepare` and `augment`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import Array, FloatArray, Shape3
from .cache import Locations, PreparedCase, Stored, open_case

_LARGEST_ROTATION = 90.0
_SMALLEST_SCALE = 0.85  # nnU-Net's own, though its patches shrink to .7


@dataclass(frozen=True)
class Sampling:
    """How patches are drawn.

    Attributes
    ----------
    patch : (z, y, x) in voxels that the network sees; z is 1 for slices
    initial : (z, y, x) that is cut for it, larger where the patch is going to be rotated; see `enlarge`
    oversampling : share of a batch that is made to hold foreground
    probabilistic : each element is by that chance, instead of the last ones of every batch
    """

    patch: Shape3
    initial: Shape3
    oversampling: float = 0.33
    probabilistic: bool = False


@dataclass(frozen=True)
class Sample:
    """A patch before augmentation: `data` (C, z, y, x) float32, `labels` and `previous` (z, y, x) int16, -1 outside the image."""

    name: str
    data: FloatArray
    labels: Array
    previous: Array | None


def enlarge(patch: Sequence[int], degrees: float) -> tuple[int, ...]:
    """Give the shape that still fills `patch` (two or three axes) when it is rotated about one axis by up to `degrees`.

    nnU-Net 2.8.1's `get_patch_size`: each axis' rotation on its own, at most 90 degrees, divided by .85 for scaling, cut to integers.
    """
    angle = np.deg2rad(min(_LARGEST_ROTATION, abs(degrees)))
    cos, sin = np.cos(angle), np.sin(angle)
    extent, longest = np.array(patch, np.float64), np.array(patch, np.float64)
    pairs = ((1, 2), (2, 0), (0, 1)) if len(patch) == 3 else ((0, 1),)
    for a, b in pairs:
        turned = extent.copy()
        turned[a] = extent[a] * cos + extent[b] * sin
        turned[b] = -extent[a] * sin + extent[b] * cos
        longest = np.maximum(longest, np.abs(turned))
    return tuple(int(n) for n in longest / _SMALLEST_SCALE)


def wants_foreground(position: int, batch: int, sampling: Sampling, rng: np.random.Generator) -> bool:
    """Whether element `position` of a batch has to hold foreground; of several processes' common batch, too."""
    if sampling.probabilistic:
        return bool(rng.uniform() < sampling.oversampling)
    return position >= round(batch * (1 - sampling.oversampling))


def draw(folder: Path, case: PreparedCase, sampling: Sampling, *, foreground: bool, ignore: bool, rng: np.random.Generator) -> Sample:
    """Cut a patch out of a prepared case.

    Parameters
    ----------
    foreground : it has to hold a voxel of a foreground label, each as likely as the others
    ignore : the model has an ignored label: patches that need no foreground are centred on a voxel somebody annotated

    Raises
    ------
    InputError
        When the prepared case cannot be opened.
    """
    opened = open_case(folder, case)
    centre = _centre(case.locations, opened.locations, foreground=foreground, ignore=ignore, rng=rng)
    start = _start(case.shape, sampling, centre, rng)
    return Sample(
        case.name,
        cut(opened.data, start, sampling.initial, 0).astype(np.float32, copy=False),
        cut(opened.labels, start, sampling.initial, -1),
        None if opened.previous is None else cut(opened.previous, start, sampling.initial, -1),
    )


def _centre(rows: Sequence[Locations], points: Array, *, foreground: bool, ignore: bool, rng: np.random.Generator) -> Array | None:
    """Voxel (z, y, x) the patch is centred on, or None for anywhere."""
    present = [row for row in rows if row.stop > row.start]
    annotated = [row for row in present if row.values[0] == -1]
    if foreground:
        # what is annotated, background included, is the last resort
        chosen = [row for row in present if row.values[0] != -1] or annotated
    else:
        chosen = annotated if ignore else []
    if not chosen:
        return None
    row = chosen[rng.integers(len(chosen))]
    voxel: Array = np.asarray(points[rng.integers(row.start, row.stop)], np.int64)
    return voxel


def _start(shape: Shape3, sampling: Sampling, centre: Array | None, rng: np.random.Generator) -> Shape3:
    """First voxel of the patch; it may lie outside the image by what the patch is enlarged or the image too small."""
    starts = []
    for axis, (size, patch, final) in enumerate(zip(shape, sampling.initial, sampling.patch, strict=True)):
        pad = max(patch - final, patch - size)
        low, high = -((pad + 1) // 2), size + pad // 2 + pad % 2 - patch
        starts.append(int(rng.integers(low, high + 1)) if centre is None else max(low, int(centre[axis]) - patch // 2))
    return starts[0], starts[1], starts[2]


def cut(array: Stored, start: Shape3, size: Shape3, fill: int) -> Array:
    """Copy the window at `start` of `size` (z, y, x) out of the last three axes of `array`; what lies outside is `fill`."""
    shape = array.shape[-3:]
    lower = [min(max(s, 0), n) for s, n in zip(start, shape, strict=True)]
    upper = [min(max(s + p, 0), n) for s, p, n in zip(start, size, shape, strict=True)]
    inside = array[(..., *(slice(a, b) for a, b in zip(lower, upper, strict=True)))]
    window = np.full((*array.shape[:-3], *size), fill, inside.dtype)
    z, y, x = (slice(a - s, b - s) for a, b, s in zip(lower, upper, start, strict=True))
    window[..., z, y, x] = inside
    return window
