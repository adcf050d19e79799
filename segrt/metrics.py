"""Agreement of two label maps; used by verification, training and the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Array
from .errors import InputError


def dice(truth: Array, prediction: Array, values: Sequence[int]) -> dict[int, float]:
    """Dice overlap of each label value: 2 |A and B| / (|A| + |B|).

    Parameters
    ----------
    truth, prediction : (Z, Y, X) unsigned integer, on the same grid; not modified
    values : labels to compare

    Returns
    -------
    dict
        value -> Dice in 0..1, NaN where neither map holds the value

    Raises
    ------
    InputError
        When the shapes differ.

    References
    ----------
    Dice LR (1945). Measures of the amount of ecologic association between species. doi:10.2307/1932409
    """
    if truth.shape != prediction.shape:
        raise InputError(f"dice: truth has shape {truth.shape}, prediction {prediction.shape}; bring both onto one grid first")
    length = int(max(truth.max(initial=0), prediction.max(initial=0), *values, 0)) + 1
    both = np.bincount(truth[truth == prediction], minlength=length)
    total = np.bincount(truth.ravel(), minlength=length) + np.bincount(prediction.ravel(), minlength=length)
    return {v: 2 * int(both[v]) / int(total[v]) if total[v] else float("nan") for v in values}


def mean_dice(scores: dict[int, float]) -> float:
    """Mean over the labels that are present somewhere; NaN when none is."""
    present = [s for s in scores.values() if not np.isnan(s)]
    return float(np.mean(present)) if present else float("nan")


@dataclass(frozen=True)
class Overlap:
    """Voxels of one structure: found (`tp`), found where it is not (`fp`), missed (`fn`), and the rest (`tn`)."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def dice(self) -> float:
        """2 |A and B| / (|A| + |B|); NaN where neither map holds the structure."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else float("nan")

    @property
    def iou(self) -> float:
        """|A and B| / |A or B|; NaN where neither map holds the structure."""
        union = self.tp + self.fp + self.fn
        return self.tp / union if union else float("nan")


def overlaps(truth: Array, prediction: Array, structures: Mapping[str, Sequence[int]], *, ignore: int | None = None) -> dict[str, Overlap]:
    """Count how structures of one or several labels overlap in two maps.

    Parameters
    ----------
    truth, prediction : (Z, Y, X) integers from 0, on the same grid; not modified
    structures : name -> label values
    ignore : voxels with this value in `truth` count nowhere

    Raises
    ------
    InputError
        When the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise InputError(f"overlaps: truth has shape {truth.shape}, prediction {prediction.shape}; bring both onto one grid first")
    if ignore is not None:
        known = truth != ignore
        truth, prediction = truth[known], prediction[known]
    values = sorted({value for group in structures.values() for value in group})
    joint = _joint(truth, prediction, values)
    total, found = int(joint.sum()), {}
    for name, group in structures.items():
        rows = [values.index(value) + 1 for value in group]
        tp = int(joint[np.ix_(rows, rows)].sum())
        fn, fp = int(joint[rows].sum()) - tp, int(joint[:, rows].sum()) - tp
        found[name] = Overlap(tp, fp, fn, total - tp - fp - fn)
    return found


def _joint(truth: Array, prediction: Array, values: Sequence[int]) -> Array:
    """(n + 1, n + 1) voxels by truth and prediction, for each of the n values and (first) all others."""
    length = int(max(truth.max(initial=0), prediction.max(initial=0), *values, 0)) + 1
    table = np.zeros(length, np.int64)
    table[list(values)] = np.arange(1, len(values) + 1)
    n = len(values) + 1
    counts = np.bincount((table[truth] * n + table[prediction]).ravel(), minlength=n * n)
    return counts.reshape(n, n)
