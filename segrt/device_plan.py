"""What one case will allocate on a GPU: decided before anything is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from .errors import BackendError
from .restore import can_restore_by_slab
from .slabs import Load, logits_bytes, mean_bytes, spread_bytes, starts_per_slab, whole_placement, working_shape
from .spec import ModelSpec, ZScoreNorm
from .volume import Grid

_DEVICE_SHARE = 0.92  # of a GPU's free memory: the allocator cannot use all of it
_OF_EACH = ("working array", "logits")  # what a pair holds of both its models at once


@dataclass(frozen=True)
class DevicePlan:
    """What one case allocates on a GPU.

    Attributes
    ----------
    stages : stage -> (what, bytes) of all that is held at its worst moment
    starts : see `starts_per_slab`, for each model
    batches : windows in one call of each model's engines
    """

    stages: dict[str, tuple[tuple[str, int], ...]]
    starts: tuple[int | None, ...]
    batches: tuple[int, ...]

    @property
    def peak(self) -> int:
        """Bytes of the stage that needs most."""
        return max(sum(size for _, size in held) for held in self.stages.values())


def plan_device(loads: Sequence[Load], grid: Grid, itemsize: int, *, free: int, probabilities: bool = False) -> DevicePlan:
    """Decide whether a case's logits fit a GPU whole or slab by slab, and with how many windows at a time, before anything is allocated.

    Slabs come first, for they cost less time than small batches.

    Parameters
    ----------
    loads : of one model, or of both of a pair
    grid : of the image; the crop is not known yet, so this is an upper bound
    itemsize : bytes a voxel of the image takes
    free : bytes the GPU has left
    probabilities : they are asked for: a single model's logits are whole then

    Raises
    ------
    BackendError
        When not even slabs and the smallest batches fit.
    """
    budget, by_slab = int(free * _DEVICE_SHARE), len(loads) > 1 or not probabilities
    plan = _device_plan(loads, grid, itemsize, probabilities, by_slab=False)
    if plan.peak > budget and by_slab:
        plan = _device_plan(loads, grid, itemsize, probabilities, by_slab=True)
    while plan.peak > budget and any(load.less for load in loads):
        loads = [load.less or load for load in loads]
        plan = _device_plan(loads, grid, itemsize, probabilities, by_slab=by_slab)
    if plan.peak > budget:
        stage = max(plan.stages, key=lambda name: sum(size for _, size in plan.stages[name]))
        parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in plan.stages[stage] if size)
        raise BackendError(
            f"an image of {' x '.join(map(str, grid.shape))} voxels needs {plan.peak / 1e9:.2f} GB of the GPU's memory ({parts} GB) and "
            f"{budget / 1e9:.2f} GB can be had; free some, build an engine of fewer windows (segrt-build --batch), or use --device cpu"
        )
    return plan


def _least_starts(load: Load, grid: Grid, first: ModelSpec) -> int | None:
    """Starts of the thinnest slabs, where the model can go by slab, and along the axis of the pair's first."""
    spec = load.spec
    if spec.transpose[0] != first.transpose[0] or not can_restore_by_slab(whole_placement(spec, grid), spec):
        return None
    return starts_per_slab(spec, working_shape(spec, grid), 0, batch=max(1, load.batch // load.flips), step=load.step)


def _device_plan(loads: Sequence[Load], grid: Grid, itemsize: int, probabilities: bool, *, by_slab: bool) -> DevicePlan:
    pair = len(loads) > 1
    starts = tuple(_least_starts(load, grid, loads[0].spec) if by_slab else None for load in loads)
    batches = tuple(load.batch for load in loads)
    each = [_device_stages(load, grid, itemsize, n, probabilities and not pair) for load, n in zip(loads, starts, strict=True)]
    if not pair:
        return DevicePlan(each[0], starts, batches)
    stages = {}
    for stage in each[0]:
        held = [dict(stages[stage]) for stages in each]
        # one network runs at a time, beside what the other one has made so far
        stages[stage] = tuple((what, (sum if what in _OF_EACH else max)(sizes[what] for sizes in held)) for what in held[0])
    mean = mean_bytes(loads[0].spec, grid) + sum(spread_bytes(load.spec, grid) for load in loads)
    for stage in ("network", "restore"):
        stages[stage] += (("mean", mean),)
    return DevicePlan(stages, starts, batches)


def _device_stages(
    load: Load, grid: Grid, itemsize: int, starts: int | None, probabilities: bool
) -> dict[str, tuple[tuple[str, int], ...]]:
    spec = load.spec
    working, voxels, patch = working_shape(spec, grid), prod(grid.shape), prod(spec.inference.patch)
    masked = spec.previous is not None or any(isinstance(c.normalization, ZScoreNorm) and c.normalization.masked for c in spec.channels)
    image = ("image", len(spec.channels) * voxels * itemsize)
    data = ("working array", 4 * spec.in_channels * prod(working))
    labels = ("labels", np.dtype(spec.label_dtype).itemsize * voxels)
    turned = [grid.shape[axis] for axis in spec.transpose]
    # two passes of a separable resampling are held at once
    between = ("resampling", 8 * prod(max(n, m) for n, m in zip(turned, working, strict=True)))
    copied = ("turned image", 0 if spec.transpose == (0, 1, 2) else image[1])
    windows = ("windows", 4 * load.batch * patch * (spec.in_channels + 2 * spec.classes))
    logits = ("logits", logits_bytes(spec, working, starts, step=load.step))
    scores = ("probabilities", 4 * spec.classes * voxels if probabilities else 0)
    # a class on its way to turned probabilities; or, where no kernel resamples in passing, the best so far, the next one, passes to it
    in_passing = can_restore_by_slab(whole_placement(spec, grid), spec)
    resized = ("class by class", (4 * voxels if probabilities else 0) if in_passing else 8 * voxels + between[1])
    components = ("components", 10 * voxels if spec.postprocess else 0)
    return {
        "preprocess": (image, copied, data, between, ("mask", (9 if masked else 0) * voxels)),
        "network": (data, windows, logits, labels, scores, ("engine", load.engine)),
        "restore": (data, logits, labels, scores, resized),
        "postprocess": (labels, ("result", labels[1]), components),
    }
