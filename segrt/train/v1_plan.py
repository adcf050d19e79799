"""TRAIN, `plan_nnunet_v1`: a `Plan` by the rules of nnU-Net 1 (its planner 2.1), which MedicalSeg's nnU-Net is planned by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, prod

import numpy as np

from ..arrays import Array
from ..spec import UNetSpec
from .cases import Dataset
from .configuration import Configuration, Plan
from .fingerprint import Fingerprint
from .nnunet_spec import Stage, cascade, stage_configuration
from .patch import Fit
from .presets import PRESETS
from .target import Target, choose_target
from .topology import SMALLEST_EDGE, Topology

BUDGET = {2: 19_739_648 * 50 / 2, 3: 520_000_000 * 32 / 30}  # numbers in all feature maps of two patches on a card of 11 GB
MEMORY_GB = 11.0
FEATURES, MOST_FEATURES = 32, {2: 480, 3: 320}
_PLANNED_FEATURES = {2: 512, 3: 320}  # the planner counts with more in 2-D than the network has
_FIRST_FEATURES = {2: 30, 3: 32}  # and begins with fewer
_BATCH, _COVERAGE = 2, 0.05
_LONGEST = 512  # voxels along the coarsest axis of the patch the search starts from
_LOWRES_SHARE, _LOWRES_STEP = 4, 1.01


@dataclass(frozen=True)
class _Setting:
    dataset: Dataset
    fingerprint: Fingerprint
    target: Target
    median: Array  # of the cases' shapes on the target grid, not rounded

    @property
    def classes(self) -> int:
        return len(self.dataset.values)

    @property
    def channels(self) -> int:
        return len(self.dataset.channels)


def plan_nnunet_v1(dataset: Dataset, fingerprint: Fingerprint) -> Plan:
    """Give the configurations that nnU-Net 1 would train: 2d, 3d_fullres, and where they apply 3d_lowres and 3d_cascade_fullres.

    Against 2.8.1, patches are larger for the same card, kernels follow the largest group of axes that are about as fine as each other, and
    the low-resolution stage is kept by another rule. The runtime, the augmentation and the training loop are the same, and the
    network has 2.8.1's decoder: version 1's took its kernels from the level below, and its heads had no bias.

    References
    ----------
    Isensee et al. 2021, nnU-Net, doi:10.1038/s41592-020-01008-z, as of version 1; restated in MedicalSeg, which leaves 480 features at most
    in 2-D.
    """
    target = choose_target(fingerprint)
    order = list(target.transpose)
    spacings, shapes = (np.asarray(v, np.float64) for v in (fingerprint.spacings, fingerprint.shapes))
    fine = np.empty(3)
    fine[order] = target.spacing
    setting = _Setting(dataset, fingerprint, target, np.median(spacings / fine * shapes, axis=0)[order])
    stages = [_flat(setting), *_volumes(setting)]
    configurations = {stage.name: _configuration(stage, setting) for stage in stages}
    if "3d_lowres" in configurations:
        configurations["3d_cascade_fullres"] = cascade(configurations["3d_fullres"], "3d_lowres")
    return Plan(
        dataset=dataset.name,
        planner="v1",
        memory_gb=MEMORY_GB,
        transpose=target.transpose,
        median_spacing=tuple(np.median(spacings, axis=0)[order].tolist()),
        median_shape=tuple(round(n) for n in np.median(shapes, axis=0)[order].tolist()),
        configurations=configurations,
    )


def _flat(setting: _Setting) -> Stage:
    """2d: slices across the first transposed axis."""
    target, median = setting.target, _rounded(setting.median)
    fit = _shrunk(target.spacing[1:].tolist(), median[1:], median[1:], setting)
    why = {
        "batch_dice": "Single slices often hold no foreground, so the Dice loss is taken over the whole batch.",
        "spacing": "In the plane the spacing of the full resolution; slices are taken as they are.",
    }
    return _stage("2d", (None, *target.spacing[1:].tolist()), median, fit, setting, batch_dice=True, reasons=why)


def _volumes(setting: _Setting) -> list[Stage]:
    """3d_lowres, where it is worth it, and 3d_fullres; nothing for plain 2-D images."""
    median = _rounded(setting.median)
    if median[0] == 1:
        return []
    full = _fit(setting.target.spacing, median, setting)
    lowres, why = _lowres(setting, full)
    reasons = {
        "batch_dice": "MedicalSeg's choice at full resolution: the Dice loss is taken over the whole batch.",
        "spacing": setting.target.reason,
        "stages": why,
    }
    spacing = tuple(setting.target.spacing.tolist())
    fullres = _stage("3d_fullres", spacing, median, full, setting, batch_dice=True, reasons=reasons)
    return [*([lowres] if lowres else []), fullres]


def _lowres(setting: _Setting, full: Fit) -> tuple[Stage | None, str]:
    """Coarsen the spacing until the median image is four patches; the finer axes first, until they are within a factor 2."""
    fine, spacing, fit, rounded = setting.target.spacing, setting.target.spacing.copy(), full, _rounded(setting.median)
    voxels = float(np.prod(setting.median))
    if voxels / prod(full.topology.patch) < _LOWRES_SHARE:
        return None, f"The median image is less than {_LOWRES_SHARE} patches, so no low-resolution stage is needed."
    while voxels > _LOWRES_SHARE * prod(fit.topology.patch):
        finer = spacing.max() / spacing > 2
        spacing[finer if finer.any() else slice(None)] *= _LOWRES_STEP
        shape = fine / spacing * setting.median
        voxels, rounded = float(np.prod(shape)), _rounded(shape)
        fit = _fit(spacing, rounded, setting)
    if 2 * prod(rounded) >= prod(_rounded(setting.median)):
        return None, "A low-resolution stage would have more than half of the voxels, so it is left out."
    why = f"The median image is {_LOWRES_SHARE} patches or more, so a low-resolution stage sees more of it."
    reasons = {
        "batch_dice": "MedicalSeg's choice at low resolution: every image of the batch gets its own Dice loss.",
        "spacing": f"Full resolution coarsened by {_LOWRES_STEP - 1:.0%} at a time until the image is {_LOWRES_SHARE} patches.",
        "stages": why,
    }
    return _stage("3d_lowres", tuple(spacing.tolist()), rounded, fit, setting, batch_dice=False, reasons=reasons), why


def _stage(
    name: str,
    spacing: tuple[float | None, ...],
    median: tuple[int, ...],
    fit: Fit,
    setting: _Setting,
    *,
    batch_dice: bool,
    reasons: dict[str, str],
) -> Stage:
    voxels = float(prod(median)) * len(setting.dataset.cases)
    return Stage(name, spacing, median, voxels, fit, PRESETS["default"], MEMORY_GB, batch_dice, reasons)


def _configuration(stage: Stage, setting: _Setting) -> Configuration:
    """The stage as 2.8.1 would describe it, with version 1's batch and features."""
    made = stage_configuration(stage, setting.dataset, setting.fingerprint, setting.target)
    network = made.spec.network
    assert isinstance(network, UNetSpec)
    capped = network.model_copy(update={"features": tuple(min(n, MOST_FEATURES[stage.dimensions]) for n in network.features)})
    source = f"segrt-train, nnU-Net 1's rules, {stage.name}"
    fitting, covering = _fitting_batch(stage), round(_COVERAGE * stage.dataset_voxels / prod(stage.fit.topology.patch))
    least = 1 if stage.dimensions == 2 else _BATCH
    reasons = {
        **made.reasons,
        "batch_size": f"{fitting} fit and {covering} would cover {_COVERAGE:.0%} of all voxels; the smaller counts, but at least {least}.",
        "topology": (
            "Axes are halved while 4 voxels are left and their spacing is within a factor 2 of the finest; kernels are 3 along the largest "
            "group of axes within a factor 2 of each other, 1 along the others."
        ),
    }
    return made.model_copy(
        update={
            "spec": made.spec.model_copy(update={"network": capped, "source": source}),
            "batch_size": max(least, min(fitting, max(covering, least))),
            "reasons": reasons,
        }
    )


def _fitting_batch(stage: Stage) -> int:
    share = stage.fit.budget / stage.fit.elements
    return floor(share) * _BATCH if stage.dimensions == 2 else floor(max(share, 1) * _BATCH)


# ------------------------------------------------------------------ the patch
def _fit(spacing: Array, median: tuple[int, ...], setting: _Setting) -> Fit:
    """The patch of a volume: from 512 voxels along the coarsest axis down."""
    inverse = 1 / spacing
    start = [round(float(n)) for n in inverse / inverse.min() * _LONGEST]
    return _shrunk(spacing.tolist(), start, median, setting)


def _shrunk(spacing: Sequence[float], start: Sequence[int], median: Sequence[int], setting: _Setting) -> Fit:
    """Shrink the axis that is largest relative to the median image, of equal ones the last, until the network fits."""
    dimensions, shrunk = len(spacing), 0
    budget = BUDGET[dimensions]
    topology = plan_topology_v1(spacing, [min(s, m) for s, m in zip(start, median, strict=True)])
    elements = _elements(topology, setting, _FIRST_FEATURES[dimensions])
    while elements > budget:
        patch = list(topology.patch)
        axis = max(range(dimensions), key=lambda a: (patch[a] / median[a], a))
        trial = list(patch)
        trial[axis] -= topology.divisor[axis]
        patch[axis] -= plan_topology_v1(spacing, trial).divisor[axis]
        assert patch[axis] > 0  # the budget holds a few voxels of any number of classes
        topology, shrunk = plan_topology_v1(spacing, patch), shrunk + 1
        elements = _elements(topology, setting, FEATURES)
    return Fit(topology, elements, budget, shrunk, tuple(start))


def plan_topology_v1(spacing: Sequence[float], patch: Sequence[int]) -> Topology:
    """Pool each axis whose spacing is within a factor 2 of the finest while 4 voxels are left along it.

    Parameters
    ----------
    spacing : mm per axis, two or three of them
    patch : wanted size in voxels per axis
    """
    mm, size = list(spacing), list(patch)
    strides, kernels = [(1,) * len(mm)], []
    while axes := [axis for axis, n in enumerate(size) if mm[axis] / min(mm) < 2 and n >= 2 * SMALLEST_EDGE]:
        alike = _largest_group(mm)
        kernels.append(tuple(3 if axis in alike else 1 for axis in range(len(mm))))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(len(mm))))
        for axis in axes:
            mm[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
    kernels.append((3,) * len(mm))
    topology = Topology(tuple(patch), tuple(kernels), tuple(strides))
    return replace(topology, patch=tuple(ceil(n / d) * d for n, d in zip(patch, topology.divisor, strict=True)))


def _largest_group(mm: Sequence[float]) -> list[int]:
    """Axes whose spacings are within a factor 2 of one axis; the largest such group, the first of equal ones."""
    groups = [[other for other, theirs in enumerate(mm) if 0.5 < theirs / own < 2] for own in mm]
    return max(groups, key=len)


def _elements(topology: Topology, setting: _Setting, features: int) -> int:
    """Numbers in all feature maps of one patch, as version 1 counts them: five convolutions' worth per level, two at the lowest."""
    voxels, most = prod(topology.patch), _PLANNED_FEATURES[len(topology.patch)]
    total = 5 * voxels * features + (setting.channels + setting.classes) * voxels
    for level, stride in enumerate(topology.strides[1:], 2):
        voxels //= prod(stride)  # the patch is a multiple of all strides
        features = min(2 * features, most)
        total += (2 if level == topology.stages else 5) * voxels * features
    return total


def _rounded(shape: Array) -> tuple[int, ...]:
    return tuple(int(n) for n in np.rint(shape))
