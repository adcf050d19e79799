"""The loops of `mean`: each row of the result takes four source rows of every class, and no more memory than those."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from ._labels import round_half

_FAST = {"contract", "nnan", "nsz"}
_LEAST_LOGIT = np.float32(-80)  # its sigmoid is no overflow and counts for nothing


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _interpolate(flat, corners, step, tz, ty, n, xi, xt, line, row):  # type: ignore[no-untyped-def]
    """row = one class along a row of the result; corners = where four source rows begin: (z, y), (z + 1, y), (z, y + 1), (z + 1, y + 1)."""
    p, q, r, s = corners
    for x in range(n):
        i = x * step
        a = flat[p + i] + tz * (flat[q + i] - flat[p + i])
        b = flat[r + i] + tz * (flat[s + i] - flat[r + i])
        line[x] = a + ty * (b - a)
    line[n] = line[n - 1]
    for x in range(xi.shape[0]):
        i = xi[x]
        row[x] = line[i] + xt[x] * (line[i + 1] - line[i])


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _softmax(rows, top, total):  # type: ignore[no-untyped-def]
    """Turn rows (K, X) into probabilities over K."""
    classes, wide = rows.shape
    top[:] = rows[0]
    for k in range(1, classes):
        row = rows[k]
        for x in range(wide):
            top[x] = max(top[x], row[x])
    total[:] = 0
    for k in range(classes):
        row = rows[k]
        for x in range(wide):
            row[x] = np.exp(row[x] - top[x])
            total[x] += row[x]
    for k in range(classes):
        row = rows[k]
        for x in range(wide):
            row[x] /= total[x]


@njit(cache=True, nogil=True, fastmath=_FAST, inline="never")
def _sigmoid(rows):  # type: ignore[no-untyped-def]
    for k in range(rows.shape[0]):
        row = rows[k]
        for x in range(row.shape[0]):
            row[x] = np.float32(1) / (np.float32(1) + np.exp(-max(row[x], _LEAST_LOGIT)))


@njit(cache=True, nogil=True, inline="never")
def _round(rows):  # type: ignore[no-untyped-def]
    for k in range(rows.shape[0]):
        for x in range(rows.shape[1]):
            rows[k, x] = np.float32(round_half(np.float64(rows[k, x])))


@njit(cache=True, nogil=True, parallel=True, fastmath=_FAST)
def add_rows(flat, layout, size, along_z, along_y, along_x, rule, share, out, out_layout):  # type: ignore[no-untyped-def]
    """out (K, z, y, x) += share * probabilities; along_* : lower positions and fractions in the source; rule : (sigmoid, round to float16).

    flat, layout : (K, Z, Y, X) float32 as from `flatten`, of `size`; out, out_layout : the same
    """
    offset, sk, sz, sy, sx = layout
    to, tk, tz_, ty_, tx_ = out_layout
    (zi, zt), (yi, yt), (xi, xt) = along_z, along_y, along_x
    classes, nz, ny, nx = size
    sigmoid, half = rule
    high, wide = yi.shape[0], xi.shape[0]
    for job in prange(zi.shape[0] * high):
        z, y = job // high, job % high
        below, above = zi[z], min(zi[z] + 1, nz - 1)
        upper, lower = yi[y], min(yi[y] + 1, ny - 1)
        line, rows = np.empty(nx + 1, np.float32), np.empty((classes, wide), np.float32)
        for k in range(classes):
            start = offset + k * sk
            corners = (
                start + below * sz + upper * sy,
                start + above * sz + upper * sy,
                start + below * sz + lower * sy,
                start + above * sz + lower * sy,
            )
            _interpolate(flat, corners, sx, zt[z], yt[y], nx, xi, xt, line, rows[k])
        if half:
            _round(rows)
        if sigmoid:
            _sigmoid(rows)
        else:
            _softmax(rows, np.empty(wide, np.float32), np.empty(wide, np.float32))
        for k in range(classes):
            base = to + k * tk + z * tz_ + y * ty_
            for x in range(wide):
                out[base + x * tx_] += share * rows[k, x]
