"""How much of its logits a model holds at a time, and how much memory that takes; `memory` and `device_plan` add up the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from .arrays import Shape3
from .preprocess import working_grid
from .restore import can_restore_by_slab, mean_planes
from .spec import ModelSpec
from .volume import Grid, Placement
from .windows import count_starts

HOST_LOGITS = 512 * 2**20  # on the CPU logits that take more are made slab by slab


@dataclass(frozen=True)
class Load:
    """What one model asks of the machine.

    Attributes
    ----------
    batch : windows in one call of an engine
    engine : bytes the engines still need while they run
    step : overrides the spec's window step
    flips : mirrored passes
    less : what it asks for with fewer windows in a call; None when they cannot be fewer
    """

    spec: ModelSpec
    batch: int = 1
    engine: int = 0
    step: float | None = None
    flips: int = 1
    less: Load | None = None


def plan_host(loads: Sequence[Load], placements: Sequence[Placement]) -> tuple[int | None, ...]:
    """Return for how many starts each model holds its logits at a time on the CPU, a pair no more than one model."""
    first, budget = loads[0].spec, HOST_LOGITS // len(loads)
    return tuple(
        starts_per_slab(load.spec, placement.shape, budget, batch=load.batch, step=load.step)
        if can_restore_by_slab(placement, load.spec) and load.spec.transpose[0] == first.transpose[0]
        else None
        for load, placement in zip(loads, placements, strict=True)
    )


def starts_per_slab(spec: ModelSpec, shape: Shape3, budget: int, *, batch: int = 1, step: float | None = None) -> int | None:
    """Return for how many window starts along z logits are held at a time: None for all of them when that takes no more than `budget`.

    Parameters
    ----------
    shape : (z, y, x) of the working grid
    budget : bytes
    batch : windows the engine likes at once; a slab has at least as many
    step : overrides the spec's window step
    """
    if 4 * spec.classes * prod(padded_shape(spec, shape)) <= budget:
        return None
    counts = _counts(spec, shape, step)
    least = -(-batch // (counts[1] * counts[2]))
    return None if least >= counts[0] else least


def logits_bytes(spec: ModelSpec, shape: Shape3, starts: int | None, *, step: float | None = None) -> int:
    """Return the memory of the blended logits, whole or for slabs of `starts` (see `starts_per_slab`)."""
    deep, high, wide = padded_shape(spec, shape)
    if starts is not None:
        patch, count = spec.inference.patch[0], _counts(spec, shape, step)[0]
        between = ceil((starts - 1) * (deep - patch) / max(count - 1, 1))
        # one plane of the slab before; starts are rounded
        deep = min(deep, patch + between + (2 if starts > 1 else 1))
    return 4 * spec.classes * deep * high * wide


def mean_bytes(spec: ModelSpec, grid: Grid) -> int:
    """Return the bytes of the slab of mean probabilities a pair is decided by."""
    return 4 * spec.classes * mean_planes(spec, grid.shape) * (prod(grid.shape) // grid.shape[spec.transpose[0]])


def spread_bytes(spec: ModelSpec, grid: Grid) -> int:
    """Return the bytes of a pair's logits on the image's grid, where no kernel resamples them in passing."""
    return 0 if can_restore_by_slab(whole_placement(spec, grid), spec) else 4 * spec.classes * prod(grid.shape)


def padded_shape(spec: ModelSpec, shape: Shape3) -> tuple[int, ...]:
    """Return the shape (z, y, x) of a working array that the patch fits into."""
    return tuple(max(n, p) for n, p in zip(shape, spec.inference.patch, strict=True))


def _counts(spec: ModelSpec, shape: Shape3, step: float | None) -> tuple[int, ...]:
    """Windows along each axis; not listed, for an image may claim any size."""
    chosen = spec.inference.step if step is None else step
    return tuple(count_starts(n, p, chosen) for n, p in zip(padded_shape(spec, shape), spec.inference.patch, strict=True))


def working_shape(spec: ModelSpec, grid: Grid) -> Shape3:
    """Return the shape (z, y, x) an image of `grid` is resampled to when it is not cropped."""
    t = spec.transpose
    turned = (grid.shape[t[0]], grid.shape[t[1]], grid.shape[t[2]])
    return working_grid(spec, turned, (grid.spacing[t[0]], grid.spacing[t[1]], grid.spacing[t[2]]))[0]


def whole_placement(spec: ModelSpec, grid: Grid) -> Placement:
    """Return the placement of an image that is not cropped."""
    t = spec.transpose
    turned = (grid.shape[t[0]], grid.shape[t[1]], grid.shape[t[2]])
    working, spacing = working_grid(spec, turned, (grid.spacing[t[0]], grid.spacing[t[1]], grid.spacing[t[2]]))
    return Placement(grid, t, ((0, turned[0]), (0, turned[1]), (0, turned[2])), working, spacing)
