"""How much memory a case will take: said before the work starts, so that nobody finds out from the kernel's killer."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import numpy as np

from .arrays import Shape3
from .errors import BackendError
from .preprocess import working_grid
from .restore import can_restore_by_slab, mean_planes
from .spec import ModelSpec, UNetSpec, VNetSpec, ZScoreNorm
from .volume import Grid, Placement
from .windows import count_starts

_SLACK = 128 * 2**20  # compiled kernels, thread stacks, the allocator's own rounding
HOST_LOGITS = 512 * 2**20  # on the CPU logits that take more are made slab by slab
_DEVICE_SHARE = 0.92  # of a GPU's free memory: the allocator cannot use all of it
_OF_EACH = ("working array", "logits")  # what a pair holds of both its models at once


def resident_bytes() -> int:
    """Memory the process holds now, in bytes."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory the process ever held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: Linux lets a new program inherit that from the process that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that new work can take without swapping, in bytes; 0 where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def starts_per_slab(spec: ModelSpec, shape: Shape3, budget: int, *, batch: int = 1, step: float | None = None) -> int | None:
    """Return for how many window starts along z logits are held at a time: None for all of them when that takes no more than `budget`.

    Parameters
    ----------
    shape : (z, y, x) of the working grid
    budget : bytes
    batch : windows the engine likes at once; a slab has at least as many
    step : overrides the spec's window step
    """
    if 4 * spec.classes * prod(_padded(spec, shape)) <= budget:
        return None
    counts = _counts(spec, shape, step)
    least = -(-batch // (counts[1] * counts[2]))
    return None if least >= counts[0] else least


def logits_bytes(spec: ModelSpec, shape: Shape3, starts: int | None, *, step: float | None = None) -> int:
    """Return the memory of the blended logits, whole or for slabs of `starts` (see `starts_per_slab`)."""
    deep, high, wide = _padded(spec, shape)
    if starts is not None:
        patch, count = spec.inference.patch[0], _counts(spec, shape, step)[0]
        between = ceil((starts - 1) * (deep - patch) / max(count - 1, 1))
        # one plane of the slab before; starts are rounded
        deep = min(deep, patch + between + (2 if starts > 1 else 1))
    return 4 * spec.classes * deep * high * wide


def _padded(spec: ModelSpec, shape: Shape3) -> tuple[int, ...]:
    return tuple(max(n, p) for n, p in zip(shape, spec.inference.patch, strict=True))


def _counts(spec: ModelSpec, shape: Shape3, step: float | None) -> tuple[int, ...]:
    """Windows along each axis; not listed, for an image may claim any size."""
    chosen = spec.inference.step if step is None else step
    return tuple(count_starts(n, p, chosen) for n, p in zip(_padded(spec, shape), spec.inference.patch, strict=True))


@dataclass(frozen=True)
class DevicePlan:
    """What one case allocates on a GPU.

    Attributes
    ----------
    stages : stage -> (what, bytes) of all that is held at its worst moment
    starts : see `starts_per_slab`, for each model
    """

    stages: dict[str, tuple[tuple[str, int], ...]]
    starts: tuple[int | None, ...]

    @property
    def peak(self) -> int:
        """Bytes of the stage that needs most."""
        return max(sum(size for _, size in held) for held in self.stages.values())


@dataclass(frozen=True)
class Load:
    """What one model asks of a GPU.

    Attributes
    ----------
    batch : windows in one call of an engine
    engine : bytes the engines still need while they run
    step : overrides the spec's window step
    flips : mirrored passes
    """

    spec: ModelSpec
    batch: int = 1
    engine: int = 0
    step: float | None = None
    flips: int = 1


def plan_device(loads: Sequence[Load], grid: Grid, itemsize: int, *, free: int, probabilities: bool = False) -> DevicePlan:
    """Decide whether a case's logits fit a GPU whole or slab by slab, before anything is allocated.

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
        When not even slabs fit.
    """
    budget = int(free * _DEVICE_SHARE)
    plan = _device_plan(loads, grid, itemsize, [None] * len(loads), probabilities)
    if plan.peak > budget and (len(loads) > 1 or not probabilities):
        plan = _device_plan(loads, grid, itemsize, [_least_starts(load, grid, loads[0].spec) for load in loads], probabilities)
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
    if spec.transpose[0] != first.transpose[0] or not can_restore_by_slab(_whole_placement(spec, grid), spec):
        return None
    return starts_per_slab(spec, _working_shape(spec, grid), 0, batch=max(1, load.batch // load.flips), step=load.step)


def _device_plan(loads: Sequence[Load], grid: Grid, itemsize: int, starts: Sequence[int | None], probabilities: bool) -> DevicePlan:
    pair = len(loads) > 1
    each = [_device_stages(load, grid, itemsize, n, probabilities and not pair) for load, n in zip(loads, starts, strict=True)]
    if not pair:
        return DevicePlan(each[0], tuple(starts))
    stages = {}
    for stage in each[0]:
        held = [dict(stages[stage]) for stages in each]
        # one network runs at a time, beside what the other one has made so far
        stages[stage] = tuple((what, (sum if what in _OF_EACH else max)(sizes[what] for sizes in held)) for what in held[0])
    mean = _mean_bytes(loads[0].spec, grid) + sum(_spread_bytes(load.spec, grid) for load in loads)
    stages["network"] += (("mean", mean),)
    return DevicePlan(stages, tuple(starts))


def _mean_bytes(spec: ModelSpec, grid: Grid) -> int:
    """Of the slab of mean probabilities a pair is decided by."""
    return 4 * spec.classes * mean_planes(spec, grid.shape) * (prod(grid.shape) // grid.shape[spec.transpose[0]])


def _spread_bytes(spec: ModelSpec, grid: Grid) -> int:
    """Of a pair's logits on the image's grid, where no kernel resamples them in passing."""
    return 0 if can_restore_by_slab(_whole_placement(spec, grid), spec) else 4 * spec.classes * prod(grid.shape)


def _device_stages(
    load: Load, grid: Grid, itemsize: int, starts: int | None, probabilities: bool
) -> dict[str, tuple[tuple[str, int], ...]]:
    spec = load.spec
    working, voxels, patch = _working_shape(spec, grid), prod(grid.shape), prod(spec.inference.patch)
    masked = spec.previous is not None or any(isinstance(c.normalization, ZScoreNorm) and c.normalization.masked for c in spec.channels)
    image = ("image", len(spec.channels) * voxels * itemsize)
    data = ("working array", 4 * spec.in_channels * prod(working))
    labels = ("labels", np.dtype(spec.label_dtype).itemsize * voxels)
    turned = [grid.shape[axis] for axis in spec.transpose]
    # two passes of a separable resampling are held at once
    between = ("resampling", 8 * prod(max(n, m) for n, m in zip(turned, working, strict=True)))
    windows = ("windows", 4 * load.batch * patch * (spec.in_channels + 2 * spec.classes))
    logits = ("logits", logits_bytes(spec, working, starts, step=load.step))
    scores = ("probabilities", 4 * spec.classes * voxels if probabilities else 0)
    components = ("components", 10 * voxels if spec.postprocess else 0)
    return {
        "preprocess": (image, data, between, ("mask", (9 if masked else 0) * voxels)),
        "network": (data, windows, logits, labels, scores, ("engine", load.engine)),
        "postprocess": (labels, ("result", labels[1]), components),
    }


def _working_shape(spec: ModelSpec, grid: Grid) -> Shape3:
    t = spec.transpose
    turned = (grid.shape[t[0]], grid.shape[t[1]], grid.shape[t[2]])
    return working_grid(spec, turned, (grid.spacing[t[0]], grid.spacing[t[1]], grid.spacing[t[2]]))[0]


def _whole_placement(spec: ModelSpec, grid: Grid) -> Placement:
    """The placement of an image that is not cropped."""
    t = spec.transpose
    turned = (grid.shape[t[0]], grid.shape[t[1]], grid.shape[t[2]])
    working, spacing = working_grid(spec, turned, (grid.spacing[t[0]], grid.spacing[t[1]], grid.spacing[t[2]]))
    return Placement(grid, t, ((0, turned[0]), (0, turned[1]), (0, turned[2])), working, spacing)


def case_bytes(
    spec: ModelSpec,
    grid: Grid,
    itemsize: int,
    *,
    half: bool = False,
    probabilities: bool = False,
    step: float | None = None,
    partner: ModelSpec | None = None,
) -> int:
    """Upper bound of the arrays one case needs at its worst moment, without the engine.

    Parameters
    ----------
    grid : of the image
    itemsize : bytes a voxel of the image takes
    half : accumulation in float16
    probabilities : they are asked for
    step : overrides the spec's window step
    partner : the other model of a pair
    """
    models = (spec,) if partner is None else (spec, partner)
    voxels = prod(grid.shape)
    image = voxels * len(spec.channels) * itemsize
    data = sum(4 * model.in_channels * prod(_working_shape(model, grid)) for model in models)
    whole = half or (probabilities and partner is None)
    logits = sum(_host_logits(model, grid, half=half, whole=whole, budget=HOST_LOGITS // len(models), step=step) for model in models)
    mean = _mean_bytes(spec, grid) + sum(_spread_bytes(model, grid) for model in models) if partner else 0
    label = np.dtype(spec.label_dtype).itemsize * voxels
    previous = label if any(model.previous for model in models) else 0
    reading = 2 * image
    resampling = image + data + max(_between(model, grid) for model in models) + (voxels if previous else 0)
    running = image + data + logits
    scores = 4 * spec.classes * voxels if probabilities else 0
    # what resizes a class at a time holds its result, a pass on the way there, the best so far and rounded copies
    by_class = any((model.resample_logits.order, model.resample_logits.order_z) != (1, 0) for model in models)
    restoring = image + data + logits + label + scores + mean + (16 if by_class else 8 if probabilities and not partner else 0) * voxels
    writing = label + 2 * scores  # and their compressed copy, which noise hardly shrinks
    cleaning = image + label * 2 + (6 * voxels if spec.postprocess else 0)
    return previous + max(reading, resampling, running, restoring, cleaning, writing)


def _host_logits(spec: ModelSpec, grid: Grid, *, half: bool, whole: bool, budget: int, step: float | None) -> int:
    """Bytes of the blended logits on the CPU; up to `budget` they are held whole."""
    working = _working_shape(spec, grid)
    padded = prod(_padded(spec, working))
    # float16 sums keep a count and the weights beside them, and the last division widens one channel at a time; of folds two are held
    sums = (4 if len(spec.members) > 1 else 2) if half else 4
    logits = spec.classes * padded * sums + (8 * padded if half else 0)
    if whole or not can_restore_by_slab(_whole_placement(spec, grid), spec):
        return logits
    starts = starts_per_slab(spec, working, budget, step=step)
    # a smaller crop of the image may be held whole up to the budget
    return min(logits, max(budget, logits_bytes(spec, working, starts, step=step)))


def _between(spec: ModelSpec, grid: Grid) -> int:
    """Bytes between the two passes that resample an image."""
    turned, working = [grid.shape[axis] for axis in spec.transpose], _working_shape(spec, grid)
    return 4 * max(turned[0], working[0]) * max(turned[1], working[1]) * working[2]


def engine_bytes(spec: ModelSpec, members: int) -> int:
    """Upper bound of what engines of this network hold and need while they run, when no build has measured it."""
    network = spec.network
    if isinstance(network, VNetSpec):
        return _vnet_bytes(network, prod(spec.inference.patch), members)
    if not isinstance(network, UNetSpec):
        return members * 512 * 2**20
    voxels, activations, weights, before = float(prod(spec.inference.patch)), 0.0, 0.0, network.in_channels
    for features, kernel, stride, blocks in zip(network.features, network.kernels, network.strides, network.blocks, strict=True):
        voxels /= prod(stride)
        activations += features * voxels * 2
        weights += prod(kernel) * features * (before + features * (2 * blocks + 1))
        before = features
    return int(members * 8 * weights + 4 * 3 * activations + 64 * 2**20)


def _vnet_bytes(network: VNetSpec, voxels: int, members: int) -> int:
    """What OpenVINO needs most: weights twice while it compiles, six maps of the largest level's features, three of the logits."""
    first = network.features[0]
    weights = 180_000 * first**2 + 250 * first * network.out_channels
    shrink = [1, *(prod(stride) for stride in network.strides)]
    largest = max(features * voxels / prod(shrink[: level + 1]) for level, features in enumerate(network.features))
    return int(members * 8 * weights + 4 * (6 * largest + 3 * network.out_channels * voxels) + 64 * 2**20)


def estimate(
    spec: ModelSpec,
    grid: Grid,
    itemsize: int,
    *,
    base: int,
    engines: int,
    half: bool = False,
    probabilities: bool = False,
    step: float | None = None,
    partner: ModelSpec | None = None,
) -> int:
    """Peak of the whole process in bytes: `base` (held before engines opened), the engines, the case, and slack."""
    case = case_bytes(spec, grid, itemsize, half=half, probabilities=probabilities, step=step, partner=partner)
    return int(base + engines + 1.1 * case + _SLACK)
