"""nnU-Net's choice of the working grid: target spacing, order of axes, median shape; used by the planner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Array, Shape3
from .fingerprint import Fingerprint

ANISOTROPY = 3.0


@dataclass(frozen=True)
class Target:
    """The full-resolution working grid.

    Attributes
    ----------
    spacing : (3,) float64 in mm, in transposed axes
    transpose : the axis with the largest spacing first, the others in their order
    median_shape : (3,) float64, median over the cases of their shape at that spacing, in transposed axes
    reason : why this spacing
    """

    spacing: Array
    transpose: Shape3
    median_shape: Array
    reason: str


def choose_target(fingerprint: Fingerprint) -> Target:
    """Take the median spacing of each axis, or a finer one along the axis that is much coarser and shorter than the others.

    References
    ----------
    Isensee et al. 2021, nnU-Net, doi:10.1038/s41592-020-01008-z; `ExperimentPlanner` of nnU-Net 2.8.1.
    """
    spacings, shapes = (np.asarray(v, np.float64) for v in (fingerprint.spacings, fingerprint.shapes))
    spacing, reason = _spacing(spacings, shapes)
    coarsest = int(np.argmax(spacing))
    first, second = (axis for axis in range(3) if axis != coarsest)
    resampled = np.rint(spacings / spacing * shapes)  # half-even, as the runtime's own working grid
    transpose = (coarsest, first, second)
    return Target(spacing[list(transpose)], transpose, np.median(resampled, axis=0)[list(transpose)], reason)


def _spacing(spacings: Array, shapes: Array) -> tuple[Array, str]:
    target = np.percentile(spacings, 50, axis=0)
    size = np.percentile(shapes, 50, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarsest_other = float(max(target[others]))
    if not (target[worst] > ANISOTROPY * coarsest_other and size[worst] * ANISOTROPY < min(size[others])):
        return target, "The median spacing of each axis, which leaves half of the cases finer and half coarser."
    median = target[worst]
    fine = float(np.percentile(spacings[:, worst], 10))
    target[worst] = fine if fine >= coarsest_other else coarsest_other + 1e-5
    return target, (
        f"Axis {'zyx'[worst]} is more than {ANISOTROPY:g} times coarser and shorter than the others, so the 10th percentile of its "
        f"spacings ({target[worst]:.4g} mm) is taken instead of the median ({median:.4g} mm), which would blur the finer cases."
    )
