"""Labels of the stage before as input of a cascade: the mask they widen, what lies outside it, and their channels; for `preprocess`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array, FloatArray
from ..device import get_xp, on_device


def include(mask: Array, labels: Array) -> Array:
    """Return the voxels that are in `mask` or have a label, bool; on a device that is `mask` itself, changed in place.

    Parameters
    ----------
    mask : (Z, Y, X) bool; may lie on a device
    labels : (Z, Y, X) any integer dtype, where the mask lies; not modified
    """
    if not on_device(mask):
        united: Array = mask | (labels != 0)
        return united
    from ._cuda import indicators as device

    device.include(mask, labels)
    return mask


def mark_outside(labels: Array, mask: Array) -> Array:
    """Return `labels` with -1 outside `mask`: int16 for uint8 labels, else int32; always a new array.

    Parameters
    ----------
    labels : (Z, Y, X) any integer dtype; not modified; may lie on a device
    mask : (Z, Y, X) bool, where the labels lie
    """
    signed = np.dtype(np.int16 if labels.dtype == np.uint8 else np.int32)
    if not on_device(labels):
        # converted first: NumPy would store -1 as 255
        return np.where(mask, labels.astype(signed), signed.type(-1))
    from ._cuda import indicators as device

    out: Array = get_xp(labels).empty(labels.shape, signed)
    device.mark_outside(labels, mask, out)
    return out


def one_hot(labels: Array, values: Sequence[int], out: FloatArray) -> None:
    """Write 1 where `labels` are values[k] and 0 elsewhere into out[k].

    Parameters
    ----------
    labels : (Z, Y, X) any integer dtype; may lie on a device
    values : one for each channel
    out : (K, Z, Y, X) float32, where the labels lie
    """
    if not on_device(labels):
        for value, channel in zip(values, out, strict=True):
            np.equal(labels, value, out=channel, casting="unsafe")
        return
    from ._cuda import indicators as device

    device.one_hot(labels, values, out)
