"""TRAIN, where the foreground is: voxels of every label that patches are centred on, found once for each prepared case."""

from __future__ import annotations

from math import ceil

import numpy as np

from ..arrays import Array
from ..spec import ModelSpec
from .cache import Locations

_SEED = 1234
MOST = 10_000
_SHARE = 0.01


def find_locations(labels: Array, spec: ModelSpec) -> tuple[tuple[Locations, ...], Array]:
    """Return for every foreground label (region) which rows of the second result are voxels of it.

    nnU-Net 2.8.1's draw, with its seed: 10,000 voxels or one in a hundred, whichever is more, or all there are. With an ignored label
    there is one entry more, for all that is annotated, the background and what lies outside the non-zero region (-1) included.

    Parameters
    ----------
    labels : (Z, Y, X) int16 on the working grid; not modified

    Returns
    -------
    locations : one for each label; empty where it has no voxel
    points : (N, 3) of the smallest unsigned integers that hold them, (z, y, x)
    """
    wanted = [label.values for label in spec.labels]
    if spec.head.activation == "softmax":
        wanted = sorted(wanted)
    if spec.ignore is not None:
        wanted.append((-1, *sorted({0, *(value for label in spec.labels for value in label.values)})))
    voxels = _by_value(labels, sorted({value for values in wanted for value in values}))
    draw = np.random.RandomState(_SEED)
    rows: list[Locations] = []
    drawn: list[Array] = []
    start = 0
    for values in wanted:
        together = np.concatenate([voxels[value] for value in values])
        count = max(min(MOST, len(together)), ceil(len(together) * _SHARE))
        if count:
            drawn.append(together[draw.choice(len(together), count, replace=False)])
        rows.append(Locations(values=values, start=start, stop=start + count))
        start += count
    flat = np.concatenate(drawn) if drawn else np.empty(0, np.int64)
    return tuple(rows), np.stack(np.unravel_index(flat, labels.shape), axis=1).astype(np.min_scalar_type(max(labels.shape)))


def _by_value(labels: Array, values: list[int]) -> dict[int, Array]:
    """Flat indices of the voxels of each value, in C order, with one sort for all of them."""
    flat = labels.ravel()
    inside = np.flatnonzero(np.isin(flat, values))
    found = flat[inside]
    order = np.argsort(found, kind="stable")
    found, inside = found[order], inside[order]
    return {value: inside[np.searchsorted(found, value) : np.searchsorted(found, value, side="right")] for value in values}
