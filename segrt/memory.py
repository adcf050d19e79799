"""How much memory a case will take: said before the work starts, so that nobody finds out from the kernel's killer."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np

from .restore import can_restore_by_slab
from .slabs import HOST_LOGITS, logits_bytes, mean_bytes, padded_shape, spread_bytes, starts_per_slab, whole_placement, working_shape
from .spec import ModelSpec, UNetPPSpec, UNetSpec, VNetSpec
from .volume import Grid

_SLACK = 128 * 2**20  # compiled kernels, thread stacks, the allocator's own rounding


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


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that new work can take without swapping, in bytes: what the machine has left, and no more than a container's limit leaves.

    Parameters
    ----------
    root : where proc/ and sys/ are

    Returns
    -------
    int
        At least 1; 0 where the system does not tell.
    """
    left = [*_left_on_machine(root), *_left_in_groups(root)]
    return max(min(left), 1) if left else 0


def _left_on_machine(root: Path) -> Iterator[int]:
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the limits of this process's control groups leave: its own, and those it lies in."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        number, controllers, path = line.split(":", 2)
        kind = _VERSION_2 if number == "0" else _VERSION_1 if "memory" in controllers.split(",") else None
        if kind is None:
            continue
        # a container often sees its own group as the root of all, under a path that only its host has
        parts = (part for part in path.split("/") if part not in ("", ".."))
        for group in accumulate(parts, Path.joinpath, initial=root / kind.folder):
            yield from kind.left(group)


@dataclass(frozen=True)
class _Groups:
    """Files in which control groups tell of their memory; what they hold of files that are not in use is given up for new work."""

    folder: str
    limit: str
    usage: str
    inactive: str

    def left(self, group: Path) -> Iterator[int]:
        with suppress(OSError):  # no such group here
            limit = (group / self.limit).read_text().strip()
            if limit != "max":
                held = int((group / self.usage).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield int(limit) - max(held - int(stat.get(self.inactive, 0)), 0)


_VERSION_2 = _Groups("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Groups("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


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
    data = sum(4 * model.in_channels * prod(working_shape(model, grid)) for model in models)
    whole = half or (probabilities and partner is None)
    logits = sum(_host_logits(model, grid, half=half, whole=whole, budget=HOST_LOGITS // len(models), step=step) for model in models)
    mean = mean_bytes(spec, grid) + sum(spread_bytes(model, grid) for model in models) if partner else 0
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
    working = working_shape(spec, grid)
    padded = prod(padded_shape(spec, working))
    # float16 sums keep a count and the weights beside them, and the last division widens one channel at a time; of folds two are held
    sums = (4 if len(spec.members) > 1 else 2) if half else 4
    logits = spec.classes * padded * sums + (8 * padded if half else 0)
    if whole or not can_restore_by_slab(whole_placement(spec, grid), spec):
        return logits
    starts = starts_per_slab(spec, working, budget, step=step)
    # a smaller crop of the image may be held whole up to the budget
    return min(logits, max(budget, logits_bytes(spec, working, starts, step=step)))


def _between(spec: ModelSpec, grid: Grid) -> int:
    """Bytes between the two passes that resample an image."""
    turned, working = [grid.shape[axis] for axis in spec.transpose], working_shape(spec, grid)
    return 4 * max(turned[0], working[0]) * max(turned[1], working[1]) * working[2]


def engine_bytes(spec: ModelSpec, members: int) -> int:
    """Upper bound of what engines of this network hold and need while they run, when no build has measured it."""
    network = spec.network
    if isinstance(network, VNetSpec):
        return _vnet_bytes(network, prod(spec.inference.patch), members)
    if isinstance(network, UNetPPSpec):
        return _unetpp_bytes(network, prod(spec.inference.patch), members)
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


def _unetpp_bytes(network: UNetPPSpec, voxels: int, members: int) -> int:
    """Every node's features, for later ones read them, and three times the widest input beside; eight windows of a 2-D network."""
    weights, held, widest = 0, 0.0, 0.0
    for i, j in network.nodes:
        features, share = network.features[i], voxels / 2 ** (network.dimensions * i)
        weights += 3**network.dimensions * features * (network.width(i, j) + features)
        held, widest = held + features * share, max(widest, network.width(i, j) * share)
    windows = 1 if network.dimensions == 3 else max(1, min(8, 2**16 // voxels))
    return int(members * 8 * weights + 4 * windows * (held + 3 * widest) + 64 * 2**20)


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
