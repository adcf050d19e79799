"""Thread bodies for labels: their change of grid, and the one-hot channels of a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...arrays import Array
from ...device import get_xp
from .launch import launch, scalar, thread_kernel
from .normalize import coalesced

# adding 2^52 and taking it off again rounds a float64 to an integer, ties to even
_ROUND = np.float64(2**52)
_SMALLEST = np.float64(2**-14)


def gather(labels: Any, index: Sequence[Array], out: Any) -> None:
    """out[z, y, x] = labels[index[0][z], index[1][y], index[2][x]]. Traffic: what is taken read once, out written once."""
    tables = (get_xp(labels).asarray(i.astype(np.int32)) for i in index)
    launch(_gather, out.shape, coalesced(labels), *tables, out)


@thread_kernel()
def _gather(z, y, x, labels, along_z, along_y, along_x, out):  # type: ignore[no-untyped-def]
    out[z, y, x] = labels[along_z[z], along_y[y], along_x[x]]


def vote(labels: Any, axes: Sequence[tuple[Array, Array, Array]], half: bool, out: Any) -> None:
    """Labels by largest interpolated indicator; axes: `_indicators.corners` of z, y and x.

    Traffic: labels read and out written once; a voxel whose corners differ (a few in a hundred) reads them again from the caches.
    """
    xp = get_xp(labels)
    # corners and the nearest position side by side: (size, 3)
    index = (xp.asarray(np.column_stack([corner, nearest]).astype(np.int32)) for corner, _, nearest in axes)
    weights = (xp.asarray(weight) for _, weight, _ in axes)
    launch(_vote, out.shape, coalesced(labels), *index, *weights, int(half), out)


@scalar
def _thousandths(score):  # type: ignore[no-untyped-def]
    """1000 * score as float32, rounded to the nearest float16 (ties to even); score is in [0, 2]."""
    v = np.float64(np.float32(score * np.float64(1000)))
    step, low = np.float64(1), np.float64(1024)
    while v < low and low > _SMALLEST:
        low *= np.float64(0.5)
        step *= np.float64(0.5)
    return (v / step + _ROUND - _ROUND) * step


@thread_kernel(float64=True)
def _vote(z, y, x, labels, zi, yi, xi, zw, yw, xw, half, out):  # type: ignore[no-untyped-def]
    first = labels[zi[z, 0], yi[y, 0], xi[x, 0]]
    same = True
    for c in range(1, 8):
        same &= labels[zi[z, c >> 2], yi[y, (c >> 1) & 1], xi[x, c & 1]] == first
    if same:
        out[z, y, x] = first
        return
    closest = labels[zi[z, 2], yi[y, 2], xi[x, 2]]
    winner, top, own = first, np.float64(-1), np.float64(-1)
    for c in range(8):
        label = labels[zi[z, c >> 2], yi[y, (c >> 1) & 1], xi[x, c & 1]]
        score = np.float64(0)
        for k in range(8):
            weight = zw[z, k >> 2] * yw[y, (k >> 1) & 1] * xw[x, k & 1]
            # a sum of products without the choice would become fused multiply-adds: other bits, other ties than on the CPU
            score += weight if labels[zi[z, k >> 2], yi[y, (k >> 1) & 1], xi[x, k & 1]] == label else np.float64(0)
        score = _thousandths(score) if half != 0 else min(score, np.float64(1))
        if score > top or (score == top and label < winner):
            winner, top = label, score
        if label == closest:
            own = score
    out[z, y, x] = closest if own == top and half == 0 else winner


def include(mask: Any, labels: Any) -> None:
    """Set the voxels of `mask` that have a label, in place."""
    launch(_include, mask.shape, mask, labels)


@thread_kernel()
def _include(z, y, x, mask, labels):  # type: ignore[no-untyped-def]
    if labels[z, y, x] != 0:
        mask[z, y, x] = True


def mark_outside(labels: Any, mask: Any, out: Any) -> None:
    """out = labels inside the mask, -1 outside."""
    launch(_mark_outside, out.shape, labels, mask, out)


@thread_kernel()
def _mark_outside(z, y, x, labels, mask, out):  # type: ignore[no-untyped-def]
    out[z, y, x] = labels[z, y, x] if mask[z, y, x] else -1


def one_hot(labels: Any, values: Sequence[int], out: Any) -> None:
    """out[k] = 1 where labels are values[k], else 0. Traffic: labels read once, every channel written once."""
    launch(_one_hot, labels.shape, labels, get_xp(labels).asarray(np.array(values, np.int32)), out)


@thread_kernel()
def _one_hot(z, y, x, labels, values, out):  # type: ignore[no-untyped-def]
    label = labels[z, y, x]
    for k in range(values.shape[0]):
        out[k, z, y, x] = np.float32(label == values[k])
