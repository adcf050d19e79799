"""PREDICT, last stage: clear what validation found to be noise; the steps stand in the model's spec."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array
from .kernels.components import Rule, fill_holes, keep_components
from .spec import DropSmall, FillHoles, KeepLargest, PostprocessStep


def postprocess(labels: Array, steps: Sequence[PostprocessStep], *, voxel_mm3: float) -> Array:
    """Apply each step in turn.

    Parameters
    ----------
    labels : (Z, Y, X) unsigned integers, on a device too; not modified
    voxel_mm3 : volume of a voxel, for sizes in mm3
    """
    rules: list[Rule] = []
    for step in steps:
        match step:
            case KeepLargest():
                rules.append(Rule(step.values))
            case DropSmall():
                rules.append(Rule(step.values, int(np.ceil(step.minimum_mm3 / voxel_mm3))))
            case FillHoles():
                labels = fill_holes(_apply(labels, rules), step.value)
                rules = []
    return _apply(labels, rules)


def _apply(labels: Array, rules: Sequence[Rule]) -> Array:
    """Rules that follow each other together: on a device they may share a pass."""
    return keep_components(labels, rules) if rules else labels
