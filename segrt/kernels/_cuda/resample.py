"""Thread bodies of `resample.resize` and the order in which they are launched.

Orders 0 and 1 take one launch whatever changes: an input voxel comes from memory about once (2 bytes of int16, 4 of float32; neighbouring
threads find it in the caches) and an output voxel is written once (4 bytes). A cubic spline takes one launch with that same traffic per
axis that changes its length: the prefilter is folded into the sampling weights (`_spline.cardinal_taps`), so there is no recursion and no
pass for it. Clipping it reads the input once more, for its extremes, which never leave the device.

What a cubic pass is short of is loads from the first-level cache, 28 to 40 an output. Along z and y a thread makes eight consecutive
samples, so that a voxel and its place are read once for all of them; along x it makes one sample of four rows with the same weights.

On a GPU `src/spline.cu` takes the place of these bodies where rows have no gaps: a recursion in registers and four taps instead of 28.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...arrays import Array, Shape3
from ...device import get_xp
from .. import _spline
from . import native
from .launch import launch, scalar, thread_kernel
from .normalize import PLAIN, Scalars, coalesced, extremes, fold_extremes, read_value
from .splines import cubic_call, linear_call

_GROUP = 8  # samples of one thread along z or y
_ROWS = 4  # rows of one thread
_ZERO = np.float32(0)
_FREE = np.array([[-np.inf], [np.inf]], np.float32)


def resize(array: Any, out: Any, order: int, order_z: int, *, separate: bool, single: bool, clip: bool, scalars: Scalars) -> None:
    """Resample `array` into `out`, both on a device; the axes that change decide what is launched. See `resample.resize`."""
    array = coalesced(array)
    changed = [axis for axis in range(3) if array.shape[axis] != out.shape[axis]]
    if all((order_z, order, order)[axis] < 3 for axis in changed):
        _sample(array, out, (order_z, order, order), single and separate, scalars)
    elif separate:
        _slices(array, out, order, order_z, single, clip, scalars)
    else:
        _whole(array, out, changed, clip, scalars)


def _whole(array: Any, out: Any, axes: Sequence[int], clip: bool, scalars: Scalars) -> None:
    """Cubic along every axis, clipped to the extremes of the whole array in the last pass."""
    xp = get_xp(array)
    bounds = fold_extremes(extremes(array, scalars).reshape(2, -1, 1)) if clip else xp.asarray(_FREE)
    *first, last = _shrinking_first(array.shape, out.shape, axes)
    for axis in first:
        middle = xp.empty(_replaced(array.shape, axis, out.shape[axis]), np.float32)
        _cubic(array, middle, axis, xp.asarray(_FREE), scalars)
        array, scalars = middle, PLAIN
    _cubic(array, out, last, bounds, scalars)


def _slices(array: Any, out: Any, order: int, order_z: int, single: bool, clip: bool, scalars: Scalars) -> None:
    """In the plane by `order`, each slice clipped to its own extremes, then along z by `order_z`, not clipped."""
    (nz, *plane), (new_z, *new_plane) = array.shape, out.shape
    if plane == new_plane:
        _cubic(array, out, 0, get_xp(array).asarray(_FREE), scalars)
    elif order_z == 0 or nz == new_z:
        planes = _spline.fractions(nz, new_z, 0, single=single)[0].astype(np.int32)
        _in_plane(array, out, planes, clip, scalars)
    else:
        middle = get_xp(array).empty((nz, *new_plane), np.float32)
        if order == 3:
            _in_plane(array, middle, np.arange(nz, dtype=np.int32), clip, scalars)
        else:
            _sample(array, middle, (0, order, order), False, scalars)
        if order_z == 3:
            _cubic(middle, out, 0, get_xp(array).asarray(_FREE), PLAIN)
        else:
            _sample(middle, out, (order_z, 0, 0), False, PLAIN)


def _in_plane(array: Any, out: Any, planes: Array, clip: bool, scalars: Scalars) -> None:
    """Cubic in the plane: slice j of `out` comes from slice planes[j]; slices are picked in the pass that leaves less to do."""
    xp, nz = get_xp(array), len(array)
    bounds, slots = (extremes(array, scalars), planes) if clip else (xp.asarray(_FREE), 0 * planes)
    *first, last = _shrinking_first(array.shape, out.shape, [axis for axis in (1, 2) if array.shape[axis] != out.shape[axis]])
    for axis in first:
        picked, planes = (planes, np.arange(len(planes), dtype=np.int32)) if len(planes) <= nz else (np.arange(nz, dtype=np.int32), planes)
        middle = xp.empty(_replaced((len(picked), *array.shape[1:]), axis, out.shape[axis]), np.float32)
        _cubic(array, middle, axis, xp.asarray(_FREE), scalars, picked)
        array, scalars = middle, PLAIN
    _cubic(array, out, last, bounds, scalars, planes, slots)


def _shrinking_first(shape: Shape3, new: Shape3, axes: Sequence[int]) -> list[int]:
    return sorted(axes, key=lambda axis: (new[axis] / shape[axis], axis))


def _replaced(shape: Shape3, axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _cubic(array: Any, out: Any, axis: int, bounds: Any, scalars: Scalars, planes: Array | None = None, slots: Array | None = None) -> None:
    """One axis; plane j along the first other axis comes from plane planes[j] and keeps to bounds[:, slots[j]]."""
    if axis == 0:
        array, out, axis = array.transpose(1, 0, 2), out.transpose(1, 0, 2), 1
    deep, high, wide = out.shape
    planes = np.arange(deep) if planes is None else planes
    rows = np.stack([planes, np.zeros(deep) if slots is None else slots], axis=1).astype(np.int32)
    if native.available(array) and native.run(cubic_call(array, out, axis, bounds, scalars, rows)):
        return
    start, weights = _spline.cardinal_taps(array.shape[axis], out.shape[axis])
    if axis == 2:
        kernel, shape = _cubic_x, (deep, -(-high // _ROWS), wide)
        weights = np.ascontiguousarray(weights.T, np.float32)
    else:
        start, weights = _grouped(start, weights, array.shape[1])
        kernel, shape = _cubic_y, (deep, len(start), wide)
    tables = (get_xp(array).asarray(table) for table in (rows, start.astype(np.int32), weights))
    launch(kernel, shape, array, *tables, bounds, *scalars, out)


def _grouped(start: Array, weights: Array, size: int) -> tuple[Array, Array]:
    """Where each group of `_GROUP` samples starts to read (G,), and its weights (G, positions, _GROUP) float32, 0 where it does not."""
    new, count = weights.shape
    sample = np.arange(new)
    group = sample // _GROUP
    first = start[::_GROUP]
    reach = int((start + count - first[group]).max())
    first = np.minimum(first, size - reach)
    dense = np.zeros((len(first), reach, _GROUP), np.float32)
    position = (start - first[group])[:, None] + np.arange(count)
    dense[group[:, None], position, (sample % _GROUP)[:, None]] = weights
    return first, dense


@scalar
def _put(out, z, y, x, v, bounds, slot):  # type: ignore[no-untyped-def]
    """Write a clipped value where the row is there."""
    if y < out.shape[1]:
        if v < bounds[0, slot]:
            v = bounds[0, slot]
        if v > bounds[1, slot]:
            v = bounds[1, slot]
        out[z, y, x] = v


@thread_kernel()
def _cubic_y(z, y, x, array, rows, start, weights, bounds, plain, lower, upper, shift, factor, out):  # type: ignore[no-untyped-def]
    """Eight consecutive samples along the middle axis."""
    plane, slot, o = rows[z, 0], rows[z, 1], _GROUP * y
    # unsigned: Numba asks of every signed index whether it is negative, and no address can then be counted up
    i, t, one = np.uintp(start[y]), np.uintp(0), np.uintp(1)
    a, b, c, d, e, f, g, h = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for _ in range(weights.shape[1]):
        v = read_value(array[plane, i, x], plain, lower, upper, shift, factor)
        a += weights[y, t, 0] * v
        b += weights[y, t, 1] * v
        c += weights[y, t, 2] * v
        d += weights[y, t, 3] * v
        e += weights[y, t, 4] * v
        f += weights[y, t, 5] * v
        g += weights[y, t, 6] * v
        h += weights[y, t, 7] * v
        i += one
        t += one
    _put(out, z, o, x, a, bounds, slot)
    _put(out, z, o + 1, x, b, bounds, slot)
    _put(out, z, o + 2, x, c, bounds, slot)
    _put(out, z, o + 3, x, d, bounds, slot)
    _put(out, z, o + 4, x, e, bounds, slot)
    _put(out, z, o + 5, x, f, bounds, slot)
    _put(out, z, o + 6, x, g, bounds, slot)
    _put(out, z, o + 7, x, h, bounds, slot)


@thread_kernel()
def _cubic_x(z, y, x, array, rows, start, weights, bounds, plain, lower, upper, shift, factor, out):  # type: ignore[no-untyped-def]
    """One sample of four rows along the last axis."""
    plane, slot, o = rows[z, 0], rows[z, 1], _ROWS * y
    i, t, one = np.uintp(start[x]), np.uintp(0), np.uintp(1)
    last = out.shape[1] - 1
    p, q, r = min(o + 1, last), min(o + 2, last), min(o + 3, last)
    a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
    for _ in range(weights.shape[0]):
        w = weights[t, x]
        a += w * read_value(array[plane, o, i], plain, lower, upper, shift, factor)
        b += w * read_value(array[plane, p, i], plain, lower, upper, shift, factor)
        c += w * read_value(array[plane, q, i], plain, lower, upper, shift, factor)
        d += w * read_value(array[plane, r, i], plain, lower, upper, shift, factor)
        i += one
        t += one
    _put(out, z, o, x, a, bounds, slot)
    _put(out, z, o + 1, x, b, bounds, slot)
    _put(out, z, o + 2, x, c, bounds, slot)
    _put(out, z, o + 3, x, d, bounds, slot)


def _sample(array: Any, out: Any, orders: Shape3, single: bool, scalars: Scalars) -> None:
    """Order 0 or 1 along each axis; `single` rounds positions along z to float32."""
    lower, fraction = [], []
    for axis, (n, m, order) in enumerate(zip(array.shape, out.shape, orders, strict=True)):
        # an axis that keeps its length is read where it is, whatever its order
        index, t = _spline.fractions(n, m, order if n != m else 0, single=single and axis == 0 and order == 0)
        lower.append(index.astype(np.int32))
        fraction.append(t.astype(np.float32))
    xp, (deep, high, wide) = get_xp(array), out.shape
    tables = xp.asarray(np.concatenate(lower)), xp.asarray(np.concatenate(fraction))
    if not (native.available(array) and native.run(linear_call(array, out, *tables, scalars))):
        launch(_linear, (deep, -(-high // _ROWS), wide), array, *tables, *scalars, out)


@scalar
def _between(a, b, t):  # type: ignore[no-untyped-def]
    """From a to b; a itself, infinite or not, where b has no weight."""
    return a if t == _ZERO else a + t * (b - a)


@scalar
def _bilinear(array, z, y, x, ty, tx, plain, lower, upper, shift, factor):  # type: ignore[no-untyped-def]
    """The value of plane z at (y + ty, x + tx); a neighbour that has no weight is not read."""
    q, r = y, x
    if ty != _ZERO:
        q += np.uintp(1)
    if tx != _ZERO:
        r += np.uintp(1)
    # all four are asked for before the first is waited for
    first, second, third, fourth = array[z, y, x], array[z, y, r], array[z, q, x], array[z, q, r]
    a = read_value(first, plain, lower, upper, shift, factor)
    b = read_value(second, plain, lower, upper, shift, factor)
    c = read_value(third, plain, lower, upper, shift, factor)
    d = read_value(fourth, plain, lower, upper, shift, factor)
    return _between(_between(a, b, tx), _between(c, d, tx), ty)


@thread_kernel()
def _linear(z, y, x, array, index, fraction, plain, lower, upper, shift, factor, out):  # type: ignore[no-untyped-def]
    """Four rows of one column; index and fraction hold z's, y's and x's one after the other."""
    deep, high = out.shape[0], out.shape[1]
    iz, tz = np.uintp(index[z]), fraction[z]
    ix, tx = np.uintp(index[deep + high + x]), fraction[deep + high + x]
    for o in range(_ROWS * y, min(_ROWS * y + _ROWS, high)):
        iy, ty = np.uintp(index[deep + o]), fraction[deep + o]
        v = _bilinear(array, iz, iy, ix, ty, tx, plain, lower, upper, shift, factor)
        if tz != _ZERO:
            v = _between(v, _bilinear(array, iz + np.uintp(1), iy, ix, ty, tx, plain, lower, upper, shift, factor), tz)
        out[z, o, x] = v
