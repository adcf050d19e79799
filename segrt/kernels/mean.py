"""The mean of several networks' probabilities, a box of the image at a time; used by `assemble`. Runs where the arrays lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Array, FloatArray, Shape3
from ..device import on_device
from ..errors import InputError
from . import _mean
from ._spline import fractions
from ._views import LAUNCH, flatten


@dataclass(frozen=True)
class Box:
    """Which part of a whole the two arrays of a call hold.

    Attributes
    ----------
    first, total : the logits hold source planes (along z) from `first` on, of `total`
    shape : (z, y, x) of the whole result
    start : (z, y, x) in it where the part to be written begins
    """

    first: int
    total: int
    shape: Shape3
    start: Shape3


def add_probabilities(
    mean: FloatArray,
    logits: Array,
    box: Box,
    *,
    activation: str,
    share: float,
    separate: int | None = None,
    single: bool = False,
    round16: bool = False,
) -> None:
    """Add `share` times the probabilities of logits to `mean`, in place: resampled linearly, then softmax or sigmoid, in one pass.

    Parameters
    ----------
    mean : (K, z, y, x) float32, any strides, where the logits lie
    logits : (K, Z, Y, X) float32 or float16, any strides, on the host or on a device
    box : what they are of
    activation : "softmax" or "sigmoid"
    separate, single, round16 : as in `argmax.resample_argmax`

    Raises
    ------
    InputError
        When `activation` is unknown, or the logits do not hold what the box needs.
    """
    if activation not in ("softmax", "sigmoid"):
        raise InputError(f"activation: expected 'softmax' or 'sigmoid', got {activation!r}")
    if mean.ndim != 4 or logits.ndim != 4 or len(mean) != len(logits) or mean.dtype != np.float32:
        raise InputError(f"expected logits and float32 means of as many classes, got {logits.shape} and {mean.dtype} {mean.shape}")
    if 0 in mean.shape:
        return
    positions = _positions(box, logits, mean.shape[1:], separate, single)
    rule = activation == "sigmoid", round16
    if on_device(logits):
        from ._cuda import mean as device

        device.add(logits, positions, rule, share, mean)
        return
    lowest, highest = int(positions[0][0][0]), int(positions[0][0][-1]) + 2
    part = logits[:, lowest:highest].astype(np.float32, copy=False)
    z, y, x = positions
    (flat, layout), (out, out_layout) = flatten(part), flatten(mean)
    with LAUNCH:
        _mean.add_rows(flat, layout, part.shape, (z[0] - lowest, z[1]), y, x, rule, np.float32(share), out, out_layout)


def _positions(box: Box, logits: Array, size: tuple[int, ...], separate: int | None, single: bool) -> list[tuple[Array, Array]]:
    """Per axis the lower position (n,) int64 in the logits and the fraction to the next one (n,) float32."""
    source = (box.total, *logits.shape[2:])
    found = []
    for axis, (n, whole, start, count) in enumerate(zip(source, box.shape, box.start, size, strict=True)):
        if start < 0 or start + count > whole:
            raise InputError(f"box: {start} to {start + count} is no part of {whole} voxels on axis {'zyx'[axis]}")
        # an axis that keeps its length is read where it is
        order = 0 if axis == separate or n == whole else 1
        lower, fraction = fractions(n, whole, order, single=single and order == 0 and n != whole)
        found.append((lower[start : start + count].astype(np.int64), fraction[start : start + count].astype(np.float32)))
    lower, fraction = found[0]
    lowest, highest = int(lower[0]), int((lower + (fraction > 0)).max())
    if lowest < box.first or highest >= box.first + logits.shape[1]:
        raise InputError(
            f"box: planes {box.start[0]}.. of the result need logits of planes {lowest} to {highest}, "
            f"got {box.first} to {box.first + logits.shape[1] - 1}"
        )
    found[0] = lower - box.first, fraction
    return found
