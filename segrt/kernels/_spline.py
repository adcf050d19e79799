"""The loops of `resample`: B-spline prefilter and sampling, separable, vectorised across rows.

A pass works on lines along one axis. In-plane passes take one slice at a time (x first, sixteen rows at once and transposed, so that the
recursion along x runs in sixteen lanes; then y across whole rows); the depth pass takes one row of every slice at a time.

The prefilter is the recursion of Unser, Aldroubi and Eden (1991, doi:10.1109/34.75515). scipy pads by 12 edge voxels and starts from a
mirrored sum; here the edge continues forever, for which both starts have a closed form. They differ by z^24 = 2e-14 of the range.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from ..arrays import Array

POLE = 3**0.5 - 2
GAIN = 6.0  # (1 - POLE) * (1 - 1 / POLE), folded into the sampling weights
MARGIN = 2  # coefficients needed beyond each end of a line of a cubic spline
CARDINAL = 28  # taps of a sample that needs no prefilter
LANES = 16
STRIP = 256  # x voxels of a row the depth pass takes at once: nz * STRIP floats stay in the second-level cache

_FAR = 34  # POLE^34 is below float64's resolution
_Z = np.float32(POLE)
_FIRST = np.float32(1 / (1 - POLE))
_LAST_STEADY = np.float32(-POLE / (1 - POLE))
_LAST_DECAY = np.float32(-POLE / (1 - POLE * POLE))

_FAST = {"contract", "nnan", "nsz"}


def taps(size: int, new: int, order: int) -> tuple[Array, Array]:
    """Return where and with which weights each of `new` samples reads a line of `size`: (new, T) uint32 and (new, T) float32.

    T is 1, 2 or 4 for order 0, 1 or 3. Order 3 reads coefficients that start MARGIN before the line.
    """
    if order < 3:
        lower, t = fractions(size, new, order)
        index = np.stack([lower, np.minimum(lower + 1, size - 1)], axis=1).astype(np.uint32)
        return (index[:, :1], np.ones((new, 1), np.float32)) if order == 0 else (index, np.stack([1 - t, t], axis=1).astype(np.float32))
    low, basis = _cubic_basis(size, new)
    return (low[:, None] + (np.arange(4) - 1 + MARGIN)).astype(np.uint32), (basis * (GAIN / 6)).astype(np.float32)


def cardinal_taps(size: int, new: int) -> tuple[Array, Array]:
    """Return where each of `new` cubic samples starts to read a line of `size` (new,) int64, and the samples' weights (new, T) float64.

    Basis functions and prefilter in one: the inverse of the B-spline filter answers to a single one with sqrt(3) * POLE^|m|. What lies
    beyond a window, or beyond an end, is taken to be what lies at its end; with CARDINAL taps that changes a sample by less than 1.1e-8 of
    the line's range. T is CARDINAL, or `size` for shorter lines. A sum over the window replaces the recursion where threads want no order.
    """
    low, basis = _cubic_basis(size, new)
    reach = np.arange(-_FAR, _FAR + 1)
    weights = basis @ (3**0.5 / 6 * POLE ** np.abs(reach - np.arange(-1, 3)[:, None]))
    count = min(CARDINAL, size)
    start = np.clip(low - (CARDINAL // 2 - 1), 0, size - count)
    tap = np.clip(low[:, None] + reach - start[:, None], 0, count - 1) + count * np.arange(new)[:, None]
    return start, np.bincount(tap.ravel(), weights.ravel(), new * count).reshape(new, count)


def _cubic_basis(size: int, new: int) -> tuple[Array, Array]:
    """The position at or below each of `new` samples (new,) int64, and six times the basis functions from one before it (new, 4)."""
    position = size / new * (np.arange(new) + 0.5) - 0.5
    low = np.floor(position).astype(np.int64)
    t = position - low
    u = 1 - t
    return low, np.stack([u**3, t * t * (t - 2) * 3 + 4, u * u * (u - 2) * 3 + 4, t**3], axis=1)


def fractions(size: int, new: int, order: int, *, single: bool = False) -> tuple[Array, Array]:
    """Return the lower source position (new,) uint64 and the fraction to the next one (new,) float64, for order 0 or 1.

    With `single` positions are rounded to float32 as in torch's "nearest-exact": which of two equally near voxels is taken depends on it.
    """
    scale = np.float64(np.float32(size) / np.float32(new)) if single else size / new
    position = scale * (np.arange(new) + 0.5) - 0.5
    position = np.clip(position.astype(np.float32) if single else position, 0, size - 1)
    lower = np.floor(position + 0.5 if order == 0 else position)
    return lower.astype(np.uint64), np.zeros(new) if order == 0 else position - lower


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _load(flat, start, step, n, affine, row):  # type: ignore[no-untyped-def]
    """row[:n] = (clip(v) - shift) * factor of n elements of flat."""
    lower, upper, shift, factor = affine
    if step == 1:
        source = flat[start : start + n]
        for i in range(n):
            row[i] = (min(max(np.float32(source[i]), lower), upper) - shift) * factor
    else:
        for i in range(n):
            row[i] = (min(max(np.float32(flat[start + i * step]), lower), upper) - shift) * factor


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _prefilter(lines, n, width):  # type: ignore[no-untyped-def]
    """Turn samples in lines[MARGIN : MARGIN + n] into spline coefficients (divided by GAIN) at lines[: n + 2 * MARGIN]."""
    last = lines[n + 1]
    end = np.empty(width, np.float32)
    for i in range(width):
        end[i] = last[i] * _FIRST
    first, before, outermost = lines[2], lines[1], lines[0]
    for i in range(width):
        c = first[i] * _FIRST
        first[i] = c
        before[i] = c
        outermost[i] = c
    for k in range(3, n + 2):
        line, previous = lines[k], lines[k - 1]
        for i in range(width):
            line[i] += _Z * previous[i]
    edge, beyond, farthest = lines[n + 1], lines[n + 2], lines[n + 3]
    for i in range(width):
        decay = (edge[i] - end[i]) * _LAST_DECAY
        steady = end[i] * _LAST_STEADY
        edge[i] = steady + decay
        beyond[i] = steady + decay * _Z
        farthest[i] = steady + decay * (_Z * _Z)
    for k in range(n, -1, -1):
        line, following = lines[k], lines[k + 1]
        for i in range(width):
            line[i] = _Z * (following[i] - line[i])


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _sample(lines, index, weights, o, width, low, high, row):  # type: ignore[no-untyped-def]
    """row[:width] = sample o across lines, clipped to [low, high]."""
    count = index.shape[1]
    if count == 1:
        a = lines[index[o, 0]]
        for i in range(width):
            row[i] = min(max(a[i], low), high)
    elif count == 2:
        a, b = lines[index[o, 0]], lines[index[o, 1]]
        t = weights[o, 1]
        for i in range(width):
            row[i] = min(max(a[i] + t * (b[i] - a[i]), low), high)
    else:
        a, b, c, d = lines[index[o, 0]], lines[index[o, 1]], lines[index[o, 2]], lines[index[o, 3]]
        wa, wb, wc, wd = weights[o, 0], weights[o, 1], weights[o, 2], weights[o, 3]
        for i in range(width):
            row[i] = min(max(wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i], low), high)


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _rows_cubic(rows, count, n, lanes, index, weights, samples, lines, y):  # type: ignore[no-untyped-def]
    """Resample `count` rows along x into lines[y : y + count]."""
    for x in range(n):
        lane = lanes[x + MARGIN]
        for r in range(LANES):
            lane[r] = rows[r, x]
    _prefilter(lanes, n, LANES)
    new = index.shape[0]
    for x in range(new):
        s = index[x, 0]
        a, b, c, d = lanes[s], lanes[s + 1], lanes[s + 2], lanes[s + 3]
        wa, wb, wc, wd = weights[x, 0], weights[x, 1], weights[x, 2], weights[x, 3]
        target = samples[x]
        for r in range(LANES):
            target[r] = wa * a[r] + wb * b[r] + wc * c[r] + wd * d[r]
    for r in range(count):
        line = lines[y + r]
        for x in range(new):
            line[x] = samples[x, r]


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _row_linear(row, index, weights, line):  # type: ignore[no-untyped-def]
    """Resample one row along x with one or two taps."""
    new = index.shape[0]
    if index.shape[1] == 1:
        for x in range(new):
            line[x] = row[index[x, 0]]
    else:
        for x in range(new):
            a = row[index[x, 0]]
            line[x] = a + weights[x, 1] * (row[index[x, 1]] - a)


@njit(cache=True, nogil=True, parallel=True, fastmath=_FAST)
def resize_planes(flat, layout, size, planes, affine, along_y, along_x, bounds, out):  # type: ignore[no-untyped-def]
    """out[j] (Y', X') = plane planes[j] of the array, resampled in x and y, clipped to bounds [low[j], high[j]].

    flat, layout : (Z, Y, X) as from `flatten`; size : (Z, Y, X); affine : see `_load`; along_y, along_x : from `taps`
    """
    offset, sz, sy, sx = layout
    (yi, yw), (xi, xw), (low, high) = along_y, along_x, bounds
    _, ny, nx = size
    cubic_x, cubic_y = xi.shape[1] == 4, yi.shape[1] == 4
    wide = xi.shape[0]
    margin = MARGIN if cubic_y else 0
    for j in prange(planes.shape[0]):
        base = offset + planes[j] * sz
        lines = np.empty((ny + 2 * margin, wide), np.float32)
        rows = np.zeros((LANES, nx), np.float32)
        if cubic_x:
            lanes = np.empty((nx + 2 * MARGIN, LANES), np.float32)
            samples = np.empty((wide, LANES), np.float32)
            for y in range(0, ny, LANES):
                count = min(LANES, ny - y)
                for r in range(count):
                    _load(flat, base + (y + r) * sy, sx, nx, affine, rows[r])
                _rows_cubic(rows, count, nx, lanes, xi, xw, samples, lines, y + margin)
        else:
            for y in range(ny):
                _load(flat, base + y * sy, sx, nx, affine, rows[0])
                _row_linear(rows[0], xi, xw, lines[y + margin])
        if cubic_y:
            _prefilter(lines, ny, wide)
        for o in range(yi.shape[0]):
            _sample(lines, yi, yw, o, wide, low[j], high[j], out[j, o])


@njit(cache=True, nogil=True, parallel=True, fastmath=_FAST)
def resize_depth(flat, layout, size, affine, along_z, bounds, out):  # type: ignore[no-untyped-def]
    """out (Z', Y, X) = the array resampled along z, clipped to bounds (low, high)."""
    offset, sz, sy, sx = layout
    (zi, zw), (low, high) = along_z, bounds
    nz, ny, nx = size
    margin = MARGIN if zi.shape[1] == 4 else 0
    strips = (nx + STRIP - 1) // STRIP
    for job in prange(ny * strips):
        y, x = job // strips, job % strips * STRIP
        width = min(STRIP, nx - x)
        lines = np.empty((nz + 2 * margin, width), np.float32)
        for z in range(nz):
            _load(flat, offset + z * sz + y * sy + x * sx, sx, width, affine, lines[z + margin])
        if margin:
            _prefilter(lines, nz, width)
        for o in range(zi.shape[0]):
            _sample(lines, zi, zw, o, width, low, high, out[o, y, x:])


@njit(cache=True, nogil=True, parallel=True, fastmath=_FAST)
def plane_extremes(flat, layout, size):  # type: ignore[no-untyped-def]
    """Smallest and largest value of every plane, (Z,) float32 each; size : (Z, Y, X)."""
    offset, sz, sy, sx = layout
    nz, ny, nx = size
    low, high = np.empty(nz, np.float32), np.empty(nz, np.float32)
    for z in prange(nz):
        start = offset + z * sz
        smallest, largest = np.full(nx, flat[start]), np.full(nx, flat[start])
        for y in range(ny):
            if sx == 1:
                row = flat[start + y * sy : start + y * sy + nx]
                # per column: a running minimum of one number would not vectorise
                for x in range(nx):
                    smallest[x], largest[x] = min(smallest[x], row[x]), max(largest[x], row[x])
            else:
                for x in range(nx):
                    v = flat[start + y * sy + x * sx]
                    smallest[x], largest[x] = min(smallest[x], v), max(largest[x], v)
        low[z], high[z] = smallest.min(), largest.max()
    return low, high
