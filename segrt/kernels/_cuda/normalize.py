"""Thread bodies of `normalize`: one pass over the voxels each, and two-level sums whose order never changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...device import get_xp, to_host
from . import native
from .launch import launch, scalar, thread_kernel
from .splines import extremes_call, fold_call

Scalars = tuple[int, np.float32, np.float32, np.float32, np.float32]  # plain (1: leave it), lower, upper, shift, factor
PLAIN: Scalars = (1, np.float32(-np.inf), np.float32(np.inf), np.float32(0), np.float32(1))

# threads of a plane: together with the planes of an image enough to hide the memory's latency, and few enough to add up after
_HIGH, _WIDE = 4, 128
_PARTS = 1024  # sums that the host adds


def coalesced(array: Any) -> Any:
    """Return the array, or a copy when neighbours along its last axis are no neighbours in memory: every warp would read 32 lines."""
    if array.shape[-1] == 1 or array.strides[-1] == array.itemsize:
        return array
    return get_xp(array).ascontiguousarray(array)


@scalar
def read_value(raw, plain, lower, upper, shift, factor):  # type: ignore[no-untyped-def]
    """(clip(v) - shift) * factor in float32; NaN stays NaN."""
    v = np.float32(raw)
    if plain == 0:
        if v < lower:
            v = lower
        if v > upper:
            v = upper
        v = (v - shift) * factor
    return v


def scale(array: Any, lower: float, upper: float, shift: float, divisor: float, out: Any) -> None:
    """out = (clip(array) - shift) / divisor; three axes. Traffic: each voxel read and written once."""
    launch(_scale, out.shape, array, *(np.float32(v) for v in (lower, upper, shift, divisor)), out)


@thread_kernel()
def _scale(z, y, x, array, lower, upper, shift, divisor, out):  # type: ignore[no-untyped-def]
    v = np.float32(array[z, y, x])
    if v < lower:
        v = lower
    if v > upper:
        v = upper
    out[z, y, x] = (v - shift) / divisor


def standardize(array: Any, mask: Any, shift: float, divisor: float, out: Any) -> None:
    """out = (array - shift) / divisor inside the mask, the array outside. Traffic: array and mask read, out written, once."""
    launch(_standardize, out.shape, array, mask, np.float32(shift), np.float32(divisor), out)


@thread_kernel()
def _standardize(z, y, x, array, mask, shift, divisor, out):  # type: ignore[no-untyped-def]
    v = np.float32(array[z, y, x])
    if mask[z, y, x]:
        v = (v - shift) / divisor
    out[z, y, x] = v


def extremes(array: Any, scalars: Scalars) -> Any:
    """Smallest and largest `read_value` of every plane, (2, Z) float32 on the device; NaN where a plane has one.

    Traffic: each voxel read once, 8 bytes written per thread (512 a plane at most).
    """
    call = extremes_call(array, scalars) if native.available(array) else None
    if call is not None:
        native.run(call[0])
        return fold_extremes(call[1])
    xp, (deep, high, wide) = get_xp(array), array.shape
    threads = deep, min(high, _HIGH), min(wide, _WIDE)
    # planes last: the threads that fold them read neighbouring numbers
    partial = xp.empty((2, *threads[1:], deep), np.float32)
    launch(_plane_extremes, threads, array, *scalars, partial)
    return fold_extremes(partial.reshape(2, -1, deep))


def wide_extremes(array: Any) -> Any:
    """Smallest and largest value of every plane, (2, Z) float64 on the device, for types of which float32 does not hold every number."""
    xp, (deep, high, wide) = get_xp(array), array.shape
    threads = deep, min(high, _HIGH), min(wide, _WIDE)
    partial = xp.empty((2, *threads[1:], deep), np.float64)
    launch(_wide_extremes, threads, array, partial)
    folded = xp.empty((2, deep), np.float64)
    launch(_fold_wide, (1, 1, deep), partial.reshape(2, -1, deep), folded)
    return folded


@thread_kernel(float64=True)
def _wide_extremes(z, y, x, array, partial):  # type: ignore[no-untyped-def]
    low = np.float64(array[z, y, x])
    high = low
    for i in range(x, array.shape[2], partial.shape[2]):
        for j in range(y, array.shape[1], partial.shape[1]):
            v = np.float64(array[z, j, i])
            if v < low or v != v:
                low = v
            if v > high or v != v:
                high = v
    partial[0, y, x, z] = low
    partial[1, y, x, z] = high


@thread_kernel(float64=True)
def _fold_wide(z, y, x, partial, folded):  # type: ignore[no-untyped-def]
    low, high = partial[0, 0, x], partial[1, 0, x]
    for n in range(partial.shape[1]):
        a, b = partial[0, n, x], partial[1, n, x]
        if a < low or a != a:
            low = a
        if b > high or b != b:
            high = b
    folded[0, x], folded[1, x] = low, high


@thread_kernel()
def _plane_extremes(z, y, x, array, plain, lower, upper, shift, factor, partial):  # type: ignore[no-untyped-def]
    low = read_value(array[z, y, x], plain, lower, upper, shift, factor)
    high = low
    for i in range(x, array.shape[2], partial.shape[2]):
        for j in range(y, array.shape[1], partial.shape[1]):
            v = read_value(array[z, j, i], plain, lower, upper, shift, factor)
            if v < low or v != v:
                low = v
            if v > high or v != v:
                high = v
    partial[0, y, x, z] = low
    partial[1, y, x, z] = high


def fold_extremes(partial: Any) -> Any:
    """(2, N, M) -> (2, M): smallest of the first and largest of the second over N."""
    folded = get_xp(partial).empty((2, partial.shape[2]), np.float32)
    if not (native.available(partial) and native.run(fold_call(partial, folded))):
        launch(_fold_extremes, (1, 1, partial.shape[2]), partial, folded)
    return folded


@thread_kernel()
def _fold_extremes(z, y, x, partial, folded):  # type: ignore[no-untyped-def]
    low, high = partial[0, 0, x], partial[1, 0, x]
    for n in range(partial.shape[1]):
        a, b = partial[0, n, x], partial[1, n, x]
        if a < low or a != a:
            low = a
        if b > high or b != b:
            high = b
    folded[0, x], folded[1, x] = low, high


def moments(array: Any, mask: Any | None) -> tuple[int, float, float, float]:
    """Count, sum and sum of squares of the voxels' distance from the pivot, and the pivot: the array's first voxel.

    Traffic: array and mask read once, 24 bytes written per thread (512 a plane at most), 32 KiB copied to the host.
    """
    xp, (deep, high, wide) = get_xp(array), array.shape
    threads = deep, min(high, _HIGH), min(wide, _WIDE)
    partial = xp.empty((3, *threads), np.float64)
    launch(_moments, threads, array, xp.zeros((1, 1, 1), np.bool_) if mask is None else mask, int(mask is not None), partial)
    sums = xp.empty((4, min(_PARTS, partial.size // 3)), np.float64)
    launch(_fold_moments, (1, 1, sums.shape[1]), array, partial.reshape(3, -1), sums)
    count, total, square, pivot = to_host(sums)
    return int(count.sum()), float(total.sum()), float(square.sum()), float(pivot[0])


@thread_kernel(float64=True)
def _moments(z, y, x, array, mask, masked, partial):  # type: ignore[no-untyped-def]
    # around a value of the array itself, so that a large offset does not cancel the variance
    pivot = np.float64(array[0, 0, 0])
    count, total, square = 0, np.float64(0), np.float64(0)
    for i in range(x, array.shape[2], partial.shape[3]):
        for j in range(y, array.shape[1], partial.shape[2]):
            if masked == 0 or mask[z, j, i]:
                v = np.float64(array[z, j, i]) - pivot
                count += 1
                total += v
                square += v * v
    partial[0, z, y, x] = np.float64(count)
    partial[1, z, y, x] = total
    partial[2, z, y, x] = square


@thread_kernel(float64=True)
def _fold_moments(z, y, x, array, partial, sums):  # type: ignore[no-untyped-def]
    sums[3, x] = np.float64(array[0, 0, 0])
    for k in range(3):
        total = np.float64(0)
        for n in range(x, partial.shape[1], sums.shape[1]):
            total += partial[k, n]
        sums[k, x] = total
