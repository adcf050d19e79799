"""Intensities: clip-shift-scale, moments, extremes, percentiles, without full-size temporaries; for `preprocess` and the fingerprint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit, prange

from ..arrays import Array, FloatArray
from ..device import get_xp, on_device, to_host
from ..errors import InputError
from ._views import LAUNCH, NATIVE, flatten


def clip_shift_scale(array: Array, lower: float, upper: float, shift: float, scale: float) -> FloatArray:
    """Return (clip(v, lower, upper) - shift) / scale in float32 arithmetic.

    Parameters
    ----------
    array : any shape, any real dtype; not modified; may lie on a device
    lower, upper : clip bounds, may be infinite
    shift, scale : subtracted, then divided by

    Returns
    -------
    (same shape) float32, always a new array, where the array lies
    """
    volume = _volume(array)
    out: FloatArray = get_xp(array).empty(volume.shape, np.float32)
    if on_device(array):
        from ._cuda import normalize as device

        device.scale(volume, lower, upper, shift, scale, out)
        return out.reshape(array.shape)
    flat, layout = flatten(volume)
    with LAUNCH:
        _clip_shift_scale(flat, layout, np.float32(lower), np.float32(upper), np.float32(shift), np.float32(scale), out)
    return out.reshape(array.shape)


def mean_std(array: Array, mask: Array | None = None) -> tuple[float, float]:
    """Return mean and (population) standard deviation, accumulated in float64 without a float64 copy.

    Parameters
    ----------
    array : any shape, any real dtype; may lie on a device, then a few thousand sums come to the host
    mask : same shape, bool, where the array lies: only these voxels count; None takes all

    Raises
    ------
    InputError
        When no voxel counts, or mask and array differ in shape.
    """
    count, mean, std = moments(array, mask)
    if count == 0:
        raise InputError("mean_std: no voxel to measure (empty array or empty mask)")
    return mean, std


def moments(array: Array, mask: Array | None = None) -> tuple[int, float, float]:
    """Return how many voxels count, their mean and their standard deviation, (0, 0, 0) when none does; see `mean_std`.

    Raises
    ------
    InputError
        When mask and array differ in shape.
    """
    if mask is not None and mask.shape != array.shape:
        raise InputError(f"mean_std: mask of shape {mask.shape} does not fit an array of shape {array.shape}")
    count, total, square, pivot = _sums(array, mask) if array.size else (0, 0.0, 0.0, 0.0)
    if count == 0:
        return 0, 0.0, 0.0
    mean = total / count
    return count, pivot + mean, float(np.sqrt(max(square / count - mean * mean, 0.0)))


def _sums(array: Array, mask: Array | None) -> tuple[int, float, float, float]:
    """Voxels that count, the sums of their distance from the pivot and of its square, and the pivot."""
    volume = _volume(array)
    if on_device(array):
        from ._cuda import normalize as device

        return device.moments(volume, None if mask is None else mask.reshape(volume.shape))
    chosen = np.ones((1, 1, 1), np.uint8) if mask is None else _volume(mask.astype(bool, copy=False)).view(np.uint8)
    flat, layout = flatten(volume)
    chosen_flat, chosen_layout = flatten(chosen)
    with LAUNCH:
        # around a value of the array itself, so that a large offset does not cancel the variance
        pivot = float(volume[0, 0, 0])
        counts, sums, squares = _moments(flat, layout, volume.shape, chosen_flat, chosen_layout, mask is not None, pivot)
    return int(counts.sum()), float(sums.sum()), float(squares.sum()), pivot


def standardize(array: Array, mask: Array, mean: float, std: float) -> FloatArray:
    """Return (v - mean) / std inside the mask and v outside, in float32 arithmetic.

    Parameters
    ----------
    array : any shape, any real dtype; not modified; may lie on a device
    mask : same shape, bool, where the array lies

    Returns
    -------
    (same shape) float32, always a new array, where the array lies
    """
    if not on_device(array):
        scaled: FloatArray = np.where(mask, clip_shift_scale(array, -np.inf, np.inf, mean, std), array.astype(np.float32))
        return scaled
    from ._cuda import normalize as device

    volume = _volume(array)
    out: FloatArray = get_xp(array).empty(volume.shape, np.float32)
    device.standardize(volume, mask.reshape(volume.shape), mean, std, out)
    return out.reshape(array.shape)


def minmax(array: Array) -> tuple[float, float]:
    """Return the smallest and the largest value of an array, which may lie on a device; NaN when there is one.

    Raises
    ------
    InputError
        When the array is empty.
    """
    if array.size == 0:
        raise InputError("minmax: the array is empty")
    if not on_device(array):
        return float(array.min()), float(array.max())
    from ._cuda import normalize as device

    if array.dtype.itemsize > 2 and array.dtype != np.float32:
        ends = device.wide_extremes(_three_axes(array))
    else:
        ends = device.extremes(_volume(array), device.PLAIN)
    low, high = to_host(ends)
    return float(low.min()), float(high.max())


def percentiles(array: Array, q: Sequence[float]) -> tuple[float, ...]:
    """Return the percentiles `q` (0..100), linearly interpolated as numpy's default does; an array on a device is sorted on the host.

    Raises
    ------
    InputError
        When the array is empty.
    """
    if array.size == 0:
        raise InputError("percentiles: the array is empty")
    return tuple(float(v) for v in np.percentile(to_host(array), q))


def _volume(array: Array) -> Array:
    """`array` as (Z, Y, X) in a dtype the loops are compiled for, itself where possible."""
    return _three_axes(array if array.dtype in NATIVE or array.dtype == bool else get_xp(array).asarray(array, np.float32))


def _three_axes(array: Array) -> Array:
    return array if array.ndim == 3 else array.reshape(-1, 1, array.shape[-1] if array.ndim else 1)


@njit(cache=True, nogil=True, parallel=True)
def _clip_shift_scale(flat, layout, lower, upper, shift, scale, out):  # type: ignore[no-untyped-def]
    offset, sz, sy, sx = layout
    nz, ny, nx = out.shape
    for job in prange(nz * ny):
        z, y = job // ny, job % ny
        start = offset + z * sz + y * sy
        row = out[z, y]
        if sx == 1:
            source = flat[start : start + nx]
            for x in range(nx):
                row[x] = (min(max(np.float32(source[x]), lower), upper) - shift) / scale
        else:
            for x in range(nx):
                row[x] = (min(max(np.float32(flat[start + x * sx]), lower), upper) - shift) / scale


@njit(cache=True, nogil=True, parallel=True, fastmath={"contract", "reassoc", "nsz"})
def _moments(flat, layout, size, mask, mask_layout, masked, pivot):  # type: ignore[no-untyped-def]
    """Per slice: voxels that count, sum and sum of squares of their distance from pivot."""
    offset, sz, sy, sx = layout
    nz, ny, nx = size
    counts, sums, squares = np.zeros(nz, np.int64), np.zeros(nz), np.zeros(nz)
    for z in prange(nz):
        count, total, square = 0, 0.0, 0.0
        for y in range(ny):
            start = offset + z * sz + y * sy
            where = mask_layout[0] + z * mask_layout[1] + y * mask_layout[2]
            if masked:
                for x in range(nx):
                    weight = np.float64(mask[where + x * mask_layout[3]])
                    v = (np.float64(flat[start + x * sx]) - pivot) * weight
                    count += mask[where + x * mask_layout[3]]
                    total += v
                    square += v * v
            elif sx == 1:
                row = flat[start : start + nx]
                for x in range(nx):
                    v = np.float64(row[x]) - pivot
                    total += v
                    square += v * v
                count += nx
            else:
                for x in range(nx):
                    v = np.float64(flat[start + x * sx]) - pivot
                    total += v
                    square += v * v
                count += nx
        counts[z], sums[z], squares[z] = count, total, square
    return counts, sums, squares
