"""Change of grid: what nnU-Net's `resample_data_or_seg` and its torch variant do to one channel; used by `preprocess` and `restore`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..arrays import Array, FloatArray, Shape3
from ..device import get_xp, on_device, to_host
from ..errors import InputError
from . import _spline
from ._indicators import corners, resize_indicators
from ._views import LAUNCH, NATIVE, flatten
from .normalize import clip_shift_scale

Affine = tuple[float, float, float, float]
_Scalars = tuple[np.float32, np.float32, np.float32, np.float32]
_TIE = np.float32(1e-6)  # what float32 splines cannot tell apart


def resize(
    array: Array,
    shape: Shape3,
    *,
    order: int,
    separate: int | None = None,
    order_z: int = 0,
    single: bool = False,
    clip: bool = True,
    affine: Affine | None = None,
    out: FloatArray | None = None,
) -> FloatArray:
    """Return `array` on a grid of `shape`, float32; voxel i of the result lies at (i + 0.5) * n / n' - 0.5.

    Order 0, 1 and 3 agree with skimage's resize(mode="edge", anti_aliasing=False), which is scipy's zoom(mode="nearest", grid_mode=True).
    int16 and float32 are read as they are; other dtypes are converted to float32 first.

    Parameters
    ----------
    array : (Z, Y, X) any real dtype, any strides; not modified; may lie on a device
    shape : (z, y, x) in voxels
    order : 0, 1 or 3
    separate : resample slices across this axis by `order` in their plane, then along the axis by `order_z` (map_coordinates)
    order_z : 0, 1 or 3
    single : with order_z 0, round positions along `separate` to float32 as torch's "nearest-exact" does
    clip : clip to the input's smallest and largest value (with `separate`: each slice to its own); order 0 and 1 never need it
    affine : (lower, upper, shift, scale): values become (clip(v, lower, upper) - shift) / scale while they are read
    out : (z, y, x) float32 to write to, where the array lies

    Returns
    -------
    (z, y, x) float32: `out`, or a new array where the array lies

    Raises
    ------
    InputError
        When a size is zero, an order is not 0, 1 or 3, or `out` does not fit.
    """
    _check(array, shape, order, order_z, separate)
    if out is not None and (out.shape != tuple(shape) or out.dtype != np.float32):
        raise InputError(f"resize: out must be float32 of shape {tuple(shape)}, got {out.dtype} of shape {out.shape}")
    if separate:
        front = separate, *(axis for axis in range(3) if axis != separate)
        moved_out = None if out is None else out.transpose(front)
        moved = _triple(shape[axis] for axis in front)
        turned, rule = array.transpose(front), {"order": order, "order_z": order_z}
        resized = resize(turned, moved, **rule, separate=0, single=single, clip=clip, affine=affine, out=moved_out)
        back: FloatArray = resized.transpose(tuple(front.index(axis) for axis in range(3)))
        return back
    result = out if out is not None and out.flags.c_contiguous else get_xp(array).empty(shape, np.float32)
    if array.shape == tuple(shape):
        result[...] = array if affine is None else clip_shift_scale(array, *affine)
    else:
        source = array if array.dtype in NATIVE else get_xp(array).asarray(array, np.float32)
        if on_device(array):
            from ._cuda import resample as device

            scalars = (int(affine is None), *_scalars(affine))
            rules = {"separate": separate == 0, "single": single, "clip": clip and 3 in (order, order_z)}
            device.resize(source, result, order, order_z if separate == 0 else order, **rules, scalars=scalars)
        else:
            with LAUNCH:
                _resize(source, result, order, order_z if separate == 0 else order, separate == 0, single, clip, affine)
    if out is None or out is result:
        return result
    out[...] = result
    return out


def _resize(
    array: Array, out: FloatArray, order: int, order_z: int, separate: bool, single: bool, clip: bool, affine: Affine | None
) -> None:
    """Resample in plane and along z, whichever leaves less to the other first; `separate` fixes the order and clips per slice."""
    nz, ny, nx = array.shape
    new_z, new_y, new_x = out.shape
    function = _scalars(affine)
    in_plane, along_z = (ny, nx) != (new_y, new_x), nz != new_z
    low, high = _bounds(array, function, clip and (order if in_plane or not separate else 0) == 3, separate)
    planes = np.arange(nz)
    if separate and order_z == 0 and along_z:
        planes = _spline.fractions(nz, new_z, 0, single=single)[0].astype(np.int64)
        _gather(array, planes, out, order, function, low, high)
    elif not along_z:
        _in_plane(array, planes, out, order, function, low, high)
    elif not in_plane:
        _depth(array, out, order_z, function, *((-np.inf, np.inf) if separate else (low[0], high[0])))
    elif not separate and new_z * ny * nx < nz * new_y * new_x:
        middle = np.empty((new_z, ny, nx), np.float32)
        _depth(array, middle, order_z, function, -np.inf, np.inf)
        _in_plane(middle, np.arange(new_z), out, order, _scalars(None), *(np.full(new_z, b[0]) for b in (low, high)))
    else:
        middle = np.empty((nz, new_y, new_x), np.float32)
        free = np.full(nz, np.inf, np.float32)
        _in_plane(array, planes, middle, order, function, *((low, high) if separate else (-free, free)))
        _depth(middle, out, order_z, _scalars(None), *((-np.inf, np.inf) if separate else (low[0], high[0])))


def _gather(array: Array, planes: Array, out: FloatArray, order: int, function: _Scalars, low: FloatArray, high: FloatArray) -> None:
    """Nearest along z: each slice that is used is resampled once."""
    used = np.unique(planes)
    if len(used) == len(planes):
        _in_plane(array, planes, out, order, function, low[planes], high[planes])
        return
    middle = np.empty((len(used), *out.shape[1:]), np.float32)
    _in_plane(array, used, middle, order, function, low[used], high[used])
    np.take(middle, np.searchsorted(used, planes), axis=0, out=out)


def _in_plane(array: Array, planes: Array, out: FloatArray, order: int, function: _Scalars, low: FloatArray, high: FloatArray) -> None:
    (ny, nx), (new_y, new_x) = array.shape[1:], out.shape[1:]
    # an axis that keeps its length is copied: a spline goes through its samples
    x = _spline.taps(nx, new_x, order if nx != new_x else 0)
    y = _spline.taps(ny, new_y, order if ny != new_y else 0)
    flat, layout = flatten(array)
    _spline.resize_planes(flat, layout, array.shape, planes, function, y, x, (low, high), out)


def _depth(array: Array, out: FloatArray, order: int, function: _Scalars, low: float, high: float) -> None:
    flat, layout = flatten(array)
    z = _spline.taps(array.shape[0], out.shape[0], order)
    _spline.resize_depth(flat, layout, array.shape, function, z, (np.float32(low), np.float32(high)), out)


def _scalars(affine: Affine | None) -> _Scalars:
    """(lower, upper, shift, factor) in float32 for the loops."""
    lower, upper, shift, scale = (-np.inf, np.inf, 0.0, 1.0) if affine is None else affine
    return np.float32(lower), np.float32(upper), np.float32(shift), np.float32(1 / scale)


def _bounds(array: Array, function: _Scalars, wanted: bool, per_slice: bool) -> tuple[FloatArray, FloatArray]:
    """What each slice (Z,) may not leave: its own extremes, the whole array's, or nothing."""
    if not wanted:
        free = np.full(len(array), np.inf, np.float32)
        return -free, free
    flat, layout = flatten(array)
    lower, upper, shift, factor = function
    ends = [(np.clip(v.astype(np.float32), lower, upper) - shift) * factor for v in _spline.plane_extremes(flat, layout, array.shape)]
    if not per_slice:
        ends = [np.full_like(ends[0], ends[0].min()), np.full_like(ends[1], ends[1].max())]
    return ends[0], ends[1]


def _check(array: Array, shape: Shape3, order: int, order_z: int, separate: int | None) -> None:
    if array.ndim != 3 or len(shape) != 3 or min(*array.shape, *shape) < 1:
        raise InputError(f"resize: expected three axes of at least one voxel, got shape {array.shape} -> {tuple(shape)}")
    if order not in (0, 1, 3) or order_z not in (0, 1, 3):
        raise InputError(f"resize: order and order_z must be 0, 1 or 3, got {order} and {order_z}")
    if separate not in (None, 0, 1, 2):
        raise InputError(f"resize: separate must be None, 0, 1 or 2, got {separate}")


def resize_labels(labels: Array, shape: Shape3, *, order: int, separate: int | None = None, order_z: int = 0) -> Array:
    """Return `labels` on a grid of `shape`: per voxel the label whose resampled indicator is largest.

    Exact ties go to the nearest neighbour's label if it is among the tied, else to the lowest (batchgenerators 0.25.5). Order 1 sums the
    eight corners in float64 as scipy does; order 3 compares float32 and takes differences below 1e-6 for ties.

    Parameters
    ----------
    labels : (Z, Y, X) any integer dtype, any strides; not modified; may lie on a device
    shape : (z, y, x) in voxels
    order : 0 (nearest neighbour), 1 or 3 (on the host, wherever the labels lie)
    separate : resample slices across this axis by `order` in their plane, then along the axis by `order_z`
    order_z : 0, or 1 or 3 (on the host): along the axis a label is set where its indicator exceeds 0.5, higher labels over lower

    Returns
    -------
    (z, y, x) of the labels' dtype, always a new array where the labels lie

    Raises
    ------
    InputError
        When a size is zero or an order is not 0, 1 or 3.
    """
    _check(labels, shape, order, order_z, separate)
    if labels.shape == tuple(shape):
        return labels.copy()
    across = separate is not None and order_z != 0 and labels.shape[separate] != shape[separate]
    if on_device(labels) and (across or order == 3):
        # no model that nnU-Net plans asks for these, and label by label they read the image dozens of times
        result: Array = resize_labels(to_host(labels), shape, order=order, separate=separate, order_z=order_z)
        return get_xp(labels).asarray(result)  # type: ignore[no-any-return]
    if separate is not None and across:
        within = _triple(n if a == separate else m for a, (n, m) in enumerate(zip(labels.shape, shape, strict=True)))
        return _along_axis(resize_labels(labels, within, order=order, separate=separate), shape, separate, order_z)
    if order == 0:
        return _by_nearest(labels, shape)
    if order == 3:
        return _by_spline(labels, shape, separate)
    return _by_corners(labels, shape, separate, half=False)


def resize_labels_linear(labels: Array, shape: Shape3, *, separate: int | None = None) -> Array:
    """Return `labels` on a grid of `shape` as nnU-Net's torch variant does: the largest linearly interpolated indicator.

    Indicators are compared as float16 numbers in thousandths; ties go to the lowest label. See `resize_labels` for the parameters; along
    `separate` the nearest slice is taken.
    """
    _check(labels, shape, 1, 0, separate)
    if labels.shape == tuple(shape):
        return labels.copy()
    return _by_corners(labels, shape, separate, half=True)


def _by_nearest(labels: Array, shape: Shape3) -> Array:
    index = [_spline.taps(n, m, 0)[0][:, 0] for n, m in zip(labels.shape, shape, strict=True)]
    if not on_device(labels):
        gathered: Array = labels[np.ix_(*index)]
        return gathered
    from ._cuda import indicators as device

    out: Array = get_xp(labels).empty(shape, labels.dtype)
    device.gather(labels, index, out)
    return out


def _by_corners(labels: Array, shape: Shape3, separate: int | None, *, half: bool) -> Array:
    if not on_device(labels) and labels.dtype not in (np.uint8, np.int16):
        values, codes = np.unique(labels, return_inverse=True)
        # codes keep the order of the labels, which is all that ties ask for
        small = codes.reshape(labels.shape).astype(np.int16 if len(values) < 1 << 15 else np.int32)
        coded = _corner_loop(small, shape, separate, half=half)
        decoded: Array = values[coded]
        return decoded
    return _corner_loop(labels, shape, separate, half=half)


def _corner_loop(labels: Array, shape: Shape3, separate: int | None, *, half: bool) -> Array:
    z, y, x = (corners(n, m, nearest=a == separate, single=half) for a, (n, m) in enumerate(zip(labels.shape, shape, strict=True)))
    out: Array = get_xp(labels).empty(shape, labels.dtype)
    if on_device(labels):
        from ._cuda import indicators as device

        device.vote(labels, (z, y, x), half, out)
        return out
    flat, layout = flatten(labels)
    with LAUNCH:
        resize_indicators(flat, layout, z, y, x, half, out)
    return out


def _by_spline(labels: Array, shape: Shape3, separate: int | None) -> Array:
    """Label by label against a running best, so that no array of labels x voxels is made."""
    nearest = resize_labels(labels, shape, order=0, separate=separate)
    result = np.empty(shape, labels.dtype)
    best, own = np.full(shape, -1, np.float32), np.zeros(shape, np.float32)
    for value in np.unique(labels):
        score = resize((labels == value).astype(np.float32), shape, order=3, separate=separate)
        better = score > best + _TIE
        result[better] = value
        np.maximum(best, score, out=best)
        np.copyto(own, score, where=nearest == value)
    np.copyto(result, nearest, where=own >= best - _TIE)
    return result


def _along_axis(labels: Array, shape: Shape3, axis: int, order: int) -> Array:
    result = np.zeros(shape, labels.dtype)
    for value in np.unique(labels):
        result[resize((labels == value).astype(np.float32), shape, order=order, separate=axis, order_z=order) > 0.5 + _TIE] = value
    return result


def _triple(values: Iterable[int]) -> Shape3:
    z, y, x = values
    return z, y, x
