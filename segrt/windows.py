"""Sliding windows: where they start, and the aggregator that blends their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from .arrays import Array, FloatArray, Shape3
from .device import get_xp
from .kernels.blend import add_window_half, axis_weights, blend_windows, divide_half, gaussian_half
from .spec import Inference

Accumulate = Literal["float32", "float16"]


@dataclass(frozen=True)
class WindowPlan:
    """Windows over a padded working array.

    Attributes
    ----------
    shape : (z, y, x) of the padded array
    patch : (z, y, x) of a window
    axes : per axis the starts, ascending; windows are their product, z outermost
    low : padding before the array on each axis
    """

    shape: Shape3
    patch: Shape3
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    low: Shape3

    @property
    def starts(self) -> list[Shape3]:
        """Start of every window (z, y, x), z outermost, x innermost."""
        return list(product(*self.axes))

    def __len__(self) -> int:
        return len(self.axes[0]) * len(self.axes[1]) * len(self.axes[2])


def plan_windows(shape: Sequence[int], inference: Inference, *, step: float | None = None) -> WindowPlan:
    """Place windows as nnU-Net does: as few as keep the step at or below `step` x patch, spread evenly.

    Parameters
    ----------
    shape : (z, y, x) of the working array; axes shorter than the patch are padded, the odd voxel above
    step : overrides `inference.step`
    """
    patch = inference.patch
    padded = tuple(max(n, p) for n, p in zip(shape, patch, strict=True))
    low = tuple((p - n) // 2 for p, n in zip(padded, shape, strict=True))
    axes = tuple(_axis_starts(n, p, inference.step if step is None else step) for n, p in zip(padded, patch, strict=True))
    return WindowPlan(padded, patch, axes, low)  # type: ignore[arg-type]


def count_starts(size: int, patch: int, step: float) -> int:
    """Return how many windows of length `patch` an axis of `size` >= `patch` voxels gets."""
    return size if patch == 1 else int(np.ceil((size - patch) / (patch * step))) + 1


def _axis_starts(size: int, patch: int, step: float) -> tuple[int, ...]:
    if patch == 1:
        return tuple(range(size))  # a 2-D model visits every slice, whatever the step
    count = count_starts(size, patch, step)
    width = (size - patch) / (count - 1) if count > 1 else 0.0
    return tuple(int(np.round(width * i)) for i in range(count))


@dataclass(frozen=True)
class Slab:
    """Windows whose starts along z are consecutive.

    Attributes
    ----------
    entries : (W, 10) int32, one row per window: start z y x, flip z y x (0), row of the axis weights z y x, source (0)
    base : plane of the padded array where the slab begins, one before its first window's when there is one
    stop : plane after its last window's
    ready : planes before this one get no more windows
    """

    entries: Array
    base: int
    stop: int
    ready: int


@dataclass(frozen=True)
class Planes:
    """Logits (K, n, Y, X) of the working planes `first`, `first` + 1, ...; those before `ready` are final."""

    logits: Array
    first: int
    ready: int


def plan_slabs(plan: WindowPlan, starts_per_slab: int | None = None) -> list[Slab]:
    """Divide windows into slabs of `starts_per_slab` consecutive z starts; all in one by default.

    A slab begins one plane before its first window: linear resampling may still need the last plane that is ready.
    """
    z_starts, y_starts, x_starts = plan.axes
    size = starts_per_slab or len(z_starts)
    slabs = []
    for first in range(0, len(z_starts), size):
        rows = range(first, min(first + size, len(z_starts)))
        entries = [
            (z_starts[i], y, x, 0, 0, 0, i, j, k, 0) for i in rows for (j, y), (k, x) in product(enumerate(y_starts), enumerate(x_starts))
        ]
        following = rows.stop < len(z_starts)
        stop = z_starts[rows.stop - 1] + plan.patch[0]
        ready = z_starts[rows.stop] if following else plan.shape[0]
        slabs.append(Slab(np.array(entries, np.int32).reshape(-1, 10), max(z_starts[first] - 1, 0), stop, ready))
    return slabs


class Aggregator:
    """Blend window logits in float32 with weights that sum to one at every voxel: no count array, no division pass.

    It holds the planes of one slab, where `like` lies; `move_to` the next one keeps the planes they share.
    """

    def __init__(self, classes: int, plan: WindowPlan, blending: str, *, slabs: Sequence[Slab], like: Array) -> None:
        xp = get_xp(like)
        depth = max(slab.stop - slab.base for slab in slabs)
        self.logits: FloatArray = xp.zeros((classes, depth, *plan.shape[1:]), np.float32)
        self._base = slabs[0].base
        self._tables = tuple(
            xp.asarray(axis_weights(starts, size, length, blending))
            for starts, size, length in zip(plan.axes, plan.patch, plan.shape, strict=True)
        )

    def add(self, logits: Array, entries: Array, scale: float = 1.0) -> None:
        """Add the windows of `entries` (see `Slab`; source is the row of `logits` (N, K, z, y, x)), times `scale`."""
        here = entries.copy()
        here[:, 0] -= self._base
        blend_windows(self.logits, logits, here, self._tables, scale)

    def move_to(self, slab: Slab) -> None:
        """Begin at the slab's first plane: planes before it are forgotten, those after the last one are zero."""
        shift, depth = slab.base - self._base, self.logits.shape[1]
        # plane by plane: a copy within one array must not overlap itself on a GPU, and NumPy holds what it may overlap twice
        for plane in range(depth - shift if shift else 0):
            self.logits[:, plane] = self.logits[:, plane + shift]
        if shift:
            self.logits[:, max(depth - shift, 0) :] = 0
        self._base = slab.base


class HalfAggregator:
    """nnU-Net's own accumulation: float16 sums and counts, each addition rounded, then divided."""

    def __init__(self, classes: int, plan: WindowPlan, blending: str) -> None:
        self.logits: Array = np.zeros((classes, *plan.shape), np.float16)
        self._count: Array = np.zeros(plan.shape, np.float16)
        self._weight: Array = gaussian_half(plan.patch) if blending == "gaussian" else np.ones(plan.patch, np.float16)

    def add(self, logits: FloatArray, start: Shape3) -> None:
        """Add one window's logits (K, z, y, x) at `start`."""
        add_window_half(self.logits, self._count, logits, start, self._weight)

    def finish(self) -> Array:
        """The blended logits (K, Z, Y, X) float16 on the padded array."""
        divide_half(self.logits, self._count)
        return self.logits
