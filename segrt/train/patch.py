"""The largest patch whose network fits a memory budget, and the batch beside it; nnU-Net 2.8.1's rules, used by the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..errors import InputError
from .presets import REFERENCE_BATCH, SMALLEST_BATCH, Preset, features_per_stage
from .topology import Topology, feature_map_elements, plan_topology

_LARGEST = {2: 2048**2, 3: 256**3}  # voxels of the patch the search starts from


@dataclass(frozen=True)
class Fit:
    """What fits: the topology with its patch, feature map elements of one patch, their budget, and how often the patch had to shrink."""

    topology: Topology
    elements: int
    budget: float
    shrunk: int
    unclipped: tuple[int, ...]

    def batch_size(self, preset: Preset, dataset_voxels: float) -> tuple[int, int]:
        """Give the batch that fits the memory and the one that covers no more of the dataset than the preset allows."""
        fitting = round(self.budget / self.elements * REFERENCE_BATCH[len(self.topology.patch)])
        return fitting, round(dataset_voxels * preset.coverage / prod(self.topology.patch))


def fit_patch(spacing: Sequence[float], median_shape: Sequence[float], preset: Preset, *, memory_gb: float, classes: int) -> Fit:
    """Shrink an isotropic patch no larger than the median image until its network fits.

    The axis that is largest relative to the median image gives way first; of equal ones the last.

    Parameters
    ----------
    spacing : mm per axis, two or three of them
    median_shape : voxels per axis, may be fractions
    memory_gb : scales the preset's budget
    classes : channels of the head

    Raises
    ------
    InputError
        When no patch is small enough.
    """
    budget = preset.budget[len(spacing)] * (memory_gb / preset.memory_gb)
    unclipped = _isotropic(spacing)
    patch: Sequence[float] = [min(p, m) for p, m in zip(unclipped, median_shape, strict=True)]
    topology = plan_topology(spacing, patch)
    shrunk = 0
    while (elements := _elements(topology, preset, classes)) * _share(preset, len(spacing)) > budget:
        topology = _smaller(topology, spacing, median_shape, memory_gb)
        shrunk += 1
    return Fit(topology, elements, budget, shrunk, tuple(unclipped))


def _isotropic(spacing: Sequence[float]) -> list[int]:
    """Voxels of a patch with edges of equal length in mm, surely larger than what fits."""
    inverse = 1 / np.asarray(spacing, np.float64)
    scale = (_LARGEST[len(spacing)] / np.prod(inverse)) ** (1 / len(spacing))
    return [round(float(n)) for n in inverse * scale]


def _elements(topology: Topology, preset: Preset, classes: int) -> int:
    stages = topology.stages
    return feature_map_elements(
        topology,
        features_per_stage(stages, len(topology.patch)),
        preset.encoder_blocks(stages),
        (preset.decoder_convs,) * (stages - 1),
        classes=classes,
        residual=preset.residual,
    )


def _share(preset: Preset, dimensions: int) -> float:
    """Share of the reference batch that has to fit beside the patch."""
    return SMALLEST_BATCH / REFERENCE_BATCH[dimensions] if preset.fits_smallest_batch else 1.0


def _smaller(topology: Topology, spacing: Sequence[float], median_shape: Sequence[float], memory_gb: float) -> Topology:
    """The next smaller patch.

    A step as long as the divisor may skip a patch that is valid with one pooling less: the step is the divisor after the step.
    """
    patch = list(topology.patch)
    axis = max(range(len(patch)), key=lambda a: (patch[a] / median_shape[a], a))
    trial = list(patch)
    trial[axis] -= topology.divisor[axis]
    patch[axis] -= plan_topology(spacing, trial).divisor[axis]
    if patch[axis] < 1:
        raise InputError(f"memory_gb: no patch fits into {memory_gb:g} GB, the last one tried was {topology.patch}; allow more memory")
    return plan_topology(spacing, patch)
