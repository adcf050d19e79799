"""TRAIN, `plan_nnunet`: dataset and fingerprint become a `Plan` by nnU-Net 2.8.1's rules, with the reason of each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..arrays import Array
from ..errors import InputError
from .cases import Dataset
from .configuration import Configuration, Plan, load_plan
from .fingerprint import Fingerprint
from .nnunet_spec import Stage, cascade, stage_configuration
from .patch import Fit, fit_patch
from .presets import PRESETS, Planner, Preset
from .target import Target, choose_target
from .unetpp_plan import plan_unetpp
from .vnet_plan import plan_vnet

__all__ = ["Configuration", "Plan", "load_plan", "plan_nnunet", "plan_unetpp", "plan_vnet"]

LOWRES_SHARE = 0.25  # a full-resolution patch below this share of the median image asks for a low-resolution stage
LOWRES_STEP = 1.03


@dataclass(frozen=True)
class _Setting:
    """What every configuration of a plan shares."""

    dataset: Dataset
    fingerprint: Fingerprint
    preset: Preset
    memory_gb: float
    target: Target

    def fit(self, spacing: Array, median_shape: Sequence[float]) -> Fit:
        """The patch for a working grid; nnU-Net counts every label, the ignored one too, as a class."""
        classes = len(self.dataset.labels) + (self.dataset.ignore is not None)
        return fit_patch(spacing.tolist(), median_shape, self.preset, memory_gb=self.memory_gb, classes=classes)


def plan_nnunet(dataset: Dataset, fingerprint: Fingerprint, *, planner: Planner = "default", memory_gb: float | None = None) -> Plan:
    """Give every configuration nnU-Net would train: 2d, and for volumes 3d_fullres, 3d_lowres and 3d_cascade_fullres where they apply.

    Parameters
    ----------
    planner : "default" is the plain U-Net; "resenc_m", "resenc_l" and "resenc_xl" are residual encoders for about 8, 24 and 40 GB
    memory_gb : GPU memory to plan for instead of the preset's

    Raises
    ------
    InputError
        When the fingerprint is of another number of cases or channels, the planner does not exist, or no patch fits the memory.

    References
    ----------
    Isensee et al. 2021, nnU-Net, doi:10.1038/s41592-020-01008-z; Isensee et al. 2024, nnU-Net Revisited,
    doi:10.1007/978-3-031-72114-4_47; `ExperimentPlanner` and `ResEncUNetPlanner` of nnU-Net 2.8.1. One difference: among axes that are
    equally large relative to the median image, always the last one shrinks (NumPy's sort leaves it open).
    """
    _check(dataset, fingerprint, planner, memory_gb)
    preset = PRESETS[planner]
    memory = memory_gb or preset.memory_gb
    setting = _Setting(dataset, fingerprint, preset, memory, choose_target(fingerprint))
    order = list(setting.target.transpose)
    spacing = np.median(np.asarray(fingerprint.spacings), axis=0)[order]
    shape = np.median(np.asarray(fingerprint.shapes), axis=0)[order]
    stages = [_flat(setting), *_volumes(setting)]
    configurations = {stage.name: stage_configuration(stage, dataset, fingerprint, setting.target) for stage in stages}
    if "3d_lowres" in configurations:
        configurations["3d_cascade_fullres"] = cascade(configurations["3d_fullres"], "3d_lowres")
    return Plan(
        dataset=dataset.name,
        planner=planner,
        memory_gb=memory,
        transpose=setting.target.transpose,
        median_spacing=tuple(spacing.tolist()),
        median_shape=tuple(round(n) for n in shape.tolist()),
        configurations=configurations,
    )


def _check(dataset: Dataset, fingerprint: Fingerprint, planner: str, memory_gb: float | None) -> None:
    if planner not in PRESETS:
        raise InputError(f"planner: expected one of {', '.join(PRESETS)}, got {planner!r}")
    if memory_gb is not None and not memory_gb > 0:
        raise InputError(f"memory_gb: expected more than 0, got {memory_gb:g}")
    for what, have, need in (
        ("cases", len(fingerprint.spacings), len(dataset.cases)),
        ("channels", len(fingerprint.intensities), len(dataset.channels)),
    ):
        if have != need:
            raise InputError(f"the fingerprint is of {have} {what}, dataset {dataset.name} has {need}; measure it again")


def _flat(setting: _Setting) -> Stage:
    """2d: slices across the first transposed axis."""
    target = setting.target
    fit = setting.fit(target.spacing[1:], target.median_shape[1:].tolist())
    return Stage(
        name="2d",
        spacing=(None, *target.spacing[1:].tolist()),
        median_shape=target.median_shape.tolist(),
        dataset_voxels=float(np.prod(target.median_shape)) * len(setting.dataset.cases),
        fit=fit,
        preset=setting.preset,
        memory_gb=setting.memory_gb,
        batch_dice=True,
        reasons={
            "batch_dice": "Single slices often hold no foreground, so the Dice loss is taken over the whole batch.",
            "spacing": "In the plane the spacing of the full resolution; slices are taken as they are.",
        },
    )


def _volumes(setting: _Setting) -> list[Stage]:
    """3d_lowres, where it is worth it, and 3d_fullres; nothing for plain 2-D images."""
    target = setting.target
    if target.median_shape[0] == 1:
        return []
    median = target.median_shape.tolist()
    full = setting.fit(target.spacing, median)
    lowres, why = _lowres(setting, full)
    cascaded = lowres is not None
    fullres = Stage(
        name="3d_fullres",
        spacing=tuple(target.spacing.tolist()),
        median_shape=median,
        dataset_voxels=float(np.prod(target.median_shape)) * len(setting.dataset.cases),
        fit=full,
        preset=setting.preset,
        memory_gb=setting.memory_gb,
        batch_dice=cascaded,
        reasons={
            "batch_dice": (
                "The patch is a small part of the image and often lacks classes, so the Dice loss is taken over the whole batch."
                if cascaded
                else "nnU-Net's rule where there is no low-resolution stage: every image of the batch gets its own Dice loss."
            ),
            "spacing": target.reason,
            "stages": why,
        },
    )
    return [*([lowres] if lowres else []), fullres]


def _lowres(setting: _Setting, full: Fit) -> tuple[Stage | None, str]:
    """Coarsen the spacing until a patch holds a quarter of the median image; the finer axes first, until they are within a factor 2."""
    fine, median = setting.target.spacing, setting.target.median_shape
    spacing, fit, rounded = fine.copy(), full, median.tolist()
    voxels = all_voxels = float(np.prod(median))
    while prod(fit.topology.patch) / voxels < LOWRES_SHARE:
        finer = spacing.max() / spacing > 2
        spacing[finer if finer.any() else slice(None)] *= LOWRES_STEP
        shape = fine / spacing * median
        rounded, voxels = [round(n) for n in shape.tolist()], float(np.prod(shape))
        fit = setting.fit(spacing, rounded)
    share = prod(full.topology.patch) / all_voxels
    if fit is full:
        return None, f"The patch holds {share:.0%} of the median image (at least {LOWRES_SHARE:.0%}), so no low-resolution stage is needed."
    if all_voxels / voxels < 2:
        return None, "A low-resolution stage would have more than half of the voxels, so it is left out."
    why = f"The patch holds {share:.0%} of the median image (less than {LOWRES_SHARE:.0%}), so a low-resolution stage sees more of it."
    stage = Stage(
        name="3d_lowres",
        spacing=tuple(spacing.tolist()),
        median_shape=rounded,
        dataset_voxels=voxels * len(setting.dataset.cases),
        fit=fit,
        preset=setting.preset,
        memory_gb=setting.memory_gb,
        batch_dice=False,
        reasons={
            "batch_dice": "The patch is a large part of the image, so every image of the batch gets its own Dice loss.",
            "spacing": f"Full resolution coarsened by {LOWRES_STEP - 1:.0%} at a time until a patch holds {LOWRES_SHARE:.0%} of the image.",
            "stages": why,
        },
    )
    return stage, why
