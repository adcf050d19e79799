"""Calls of `src/spline.cu`: cubic resampling along an axis, linear resampling, extremes; see `resample` and `normalize`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ...arrays import Array
from ...device import get_xp
from .. import _spline
from .native import MOST_BLOCKS, MOST_SHARED, THREADS, Call, Options, across

_HALO = 14
_MOST_BYTES = 2**32 - 1  # of the lines of a plane: offsets are counted in 32 bits
_LINES = 32  # of a block along x
_SPLINES = 128  # threads of a block along y or z
_PARTS = 8  # of a plane, whose extremes are found apart
_REDUCING = 32, 8  # threads that fold extremes

TUNING: dict[str, int] = {"SPAN": 32, "WARPS": 4, "RZ": 4, "RY": 2}


def cubic_call(array: Any, out: Any, axis: int, bounds: Any, scalars: tuple[Any, ...], rows: Array) -> Call | None:
    """Resample along axis 1 or 2 of three; plane j comes from plane rows[j, 0] and keeps to bounds[:, rows[j, 1]]."""
    if not all(_rows_without_gaps(a) for a in (array, out)) or array.dtype not in (np.int16, np.float32) or min(array.strides) < 0:
        return None
    if array.shape[1] * abs(array.strides[1]) > _MOST_BYTES:
        return None
    (deep, high, wide), size, span = out.shape, array.shape[axis], TUNING["SPAN"]
    begin, weights = _samples(size, out.shape[axis], span)
    # one upload for all three
    places = get_xp(array).asarray(np.concatenate([begin, weights, rows.astype(np.int32).ravel()]))
    tables = places[: len(begin)], places[len(begin) : len(begin) + len(weights)], places[len(begin) + len(weights) :]
    steps = (np.int64(n // a.itemsize) for a in (array, out) for n in a.strides[:2])
    plane, line, out_plane, out_line = steps
    arguments = (array, plane, line, np.int32(size), *tables, np.int32(scalars[0]), *scalars[1:], bounds, np.int32(bounds.shape[1]))
    arguments = (*arguments, out, out_plane, out_line, np.int32(high), np.int32(wide))
    spans = -(-(size + 1) // span)
    options = _options(array)
    if axis == 1:
        block = across(wide), _SPLINES // across(wide)
        grid = -(-wide // block[0]), -(-spans // block[1]), deep
        return Call("spline", "along_lines", options, grid, block, arguments) if max(grid[1:]) <= MOST_BLOCKS else None
    return _rows_call(begin, size, spans, options, arguments, (deep, high))


def _rows_call(begin: Array, size: int, spans: int, options: Options, arguments: tuple[Any, ...], planes: tuple[int, int]) -> Call | None:
    span, warps = TUNING["SPAN"], TUNING["WARPS"]
    starts = begin[np.minimum(np.arange(0, spans + warps, warps) * span, size + 1)]
    columns = span * warps + 3 + 2 * _HALO
    pitch = max(columns, int(np.diff(starts).max())) | 1  # odd: a column of the tile lies in all banks
    grid = -(-spans // warps), -(-planes[1] // _LINES), planes[0]
    shared = 4 * _LINES * pitch
    if shared > MOST_SHARED or max(grid[1:]) > MOST_BLOCKS:
        return None
    return Call("spline", "along_rows", options, grid, (_LINES, warps), (*arguments, np.int32(pitch)), shared)


def linear_call(array: Any, out: Any, lower: Any, fraction: Any, scalars: tuple[Any, ...]) -> Call | None:
    """Resample by order 0 or 1 along each axis; the tables hold z's, y's and x's positions."""
    if not all(_rows_without_gaps(a) for a in (array, out)) or array.dtype not in (np.int16, np.float32) or min(array.strides) < 0:
        return None
    (deep, high, wide), x = out.shape, across(out.shape[2])
    block = x, THREADS // x
    grid = -(-wide // x), -(-high // (block[1] * TUNING["RY"])), -(-deep // TUNING["RZ"])
    if sum(n * step for n, step in zip(array.shape, array.strides, strict=True)) > _MOST_BYTES or max(grid[1:]) > MOST_BLOCKS:
        return None
    steps = (np.uint32(n) for n in array.strides[:2])
    out_steps = (np.int64(n // out.itemsize) for n in out.strides[:2])
    arguments = (array, *steps, lower, fraction, np.int32(scalars[0]), *scalars[1:], out, *out_steps, *(np.int32(n) for n in out.shape))
    return Call("spline", "linear", _options(array), grid, block, arguments)


@lru_cache(64)
def _samples(size: int, new: int, span: int) -> tuple[Array, Array]:
    """The first sample at or after each position from -1 on, and four weights of each sample as the bits of float32; both int32."""
    index, weights = _spline.taps(size, new, 3)
    low = index[:, 0].astype(np.int64) - (_spline.MARGIN - 1)
    count = max(size + 2, -(-(size + 1) // span) * span + 1)
    begin = np.searchsorted(low, np.arange(-1, -(-count // 4) * 4 - 1)).astype(np.int32)
    return begin, np.ascontiguousarray(weights).view(np.int32).ravel()


def extremes_call(array: Any, scalars: tuple[Any, ...]) -> tuple[Call, Any] | None:
    """Smallest and largest value of parts of every plane, and the array (2, parts, Z) they are written to."""
    if not _rows_without_gaps(array) or array.dtype not in (np.int16, np.float32) or len(array) > MOST_BLOCKS:
        return None
    deep, high, wide = array.shape
    parts = max(1, min(_PARTS, high // _REDUCING[1]))
    partial = get_xp(array).empty((2, parts, deep), np.float32)
    steps = (np.int64(n // array.itemsize) for n in array.strides[:2])
    arguments = (array, *steps, np.int32(high), np.int32(wide), np.int32(scalars[0]), *scalars[1:], partial)
    return Call("spline", "extremes", _options(array), (parts, deep), _REDUCING, arguments, 8 * 256), partial


def fold_call(partial: Any, folded: Any) -> Call:
    """(2, N, M) -> (2, M), both without gaps."""
    return Call(
        "spline", "fold_extremes", _options(partial), (partial.shape[2],), _REDUCING, (partial, np.int32(partial.shape[1]), folded), 8 * 256
    )


def _options(array: Any) -> Options:
    return ("INTEGER", int(array.dtype == np.int16)), *TUNING.items()


def _rows_without_gaps(array: Any) -> bool:
    return bool(array.shape[-1] == 1 or array.strides[-1] == array.itemsize)
