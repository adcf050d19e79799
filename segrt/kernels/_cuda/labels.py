"""Labels and probabilities on a device; launched by `kernels.argmax` and `kernels.activation`, which check what they are given.

Fused with linear resampling a thread owns a voxel of the result: it interpolates every class from eight corners, which its neighbours read
too and the caches keep, in float32. Where rounding could change the answer it decides again in float64, as the CPU's loops do and with
their result. Nothing of size classes x result exists.

On a GPU `src/logits.cu` takes the place of the bodies that make labels, where the voxels of a class have no gaps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...arrays import Array
from ...device import get_xp
from . import native
from .launch import Scalar, cuda, launch, scalar, thread_kernel
from .logits import label_call, resampled_call

# Three lerps of seven roundings at most (products and sums may be rounded apart): below 1.25e-6 of the largest input, twice that for a
# difference of two classes; and what float16 makes equal, as in `_labels`
_ERROR = np.float32(2.6e-6)
_HALF_ULP = np.float32(1.01 * 2.0**-10)
_HALF_TINY = np.float32(2.0**-24)

_ZERO, _TWO = np.float32(0), np.float32(2)
_LOWEST, _HIGHEST = np.float32(-np.inf), np.float32(np.inf)
_STEPS, _OVERFLOW = np.float32(2048), np.float32(65520)
_INTEGER, _INTEGER64 = np.float32(1.5 * 2.0**23), np.float64(1.5 * 2.0**52)  # added and taken away: rounds to integers, ties to even
_LEAST_LOGIT = np.float32(-80)


def label(logits: Any, values: Array, rule: tuple[bool, float, bool], out: Any) -> None:
    """One launch: every logit is read once, every label written once."""
    regions, bound, _ = rule
    table, stack = get_xp(logits).asarray(values), _single_or_half(logits)
    if native.available(stack) and native.run(label_call(stack, table, regions, bound, out)):
        return
    if regions:
        launch(painted, out.shape, stack, table, np.float32(bound), out)
    else:
        launch(largest, out.shape, stack, table, out)


def label_resampled(
    logits: Any, positions: tuple[tuple[Array, Array], ...], values: Array, rule: tuple[bool, float, bool], out: Any
) -> None:
    """One launch: source logits are read once from memory (eight times from the caches for each voxel), every label written once.

    positions : for each axis of `out` the lower source position and the fraction to the next, as from `fractions`
    """
    regions, bound, half = rule
    xp = get_xp(logits)
    # three axes in one table, so that few arrays are copied and passed
    lower = xp.asarray(np.concatenate([p[0].astype(np.int32) for p in positions]))
    fraction = np.concatenate([p[1] for p in positions])
    stack, exact, table = _single_or_half(logits), xp.asarray(fraction), xp.asarray(values)
    if native.available(stack) and native.run(resampled_call(stack, lower, exact, table, rule, out)):
        return
    tables = lower, xp.asarray(fraction.astype(np.float32)), exact, table
    if regions:
        launch(painted_resampled, out.shape, stack, *tables, np.float32(bound), np.int32(half), out)
    else:
        launch(largest_resampled, out.shape, stack, *tables, np.int32(half), out)


def activate(logits: Any, activation: str, round16: bool) -> None:
    """One launch, in place: softmax reads every logit three times (twice from the caches), sigmoid once."""
    launch(softmax if activation == "softmax" else sigmoid, logits.shape[1:], logits, np.int32(round16))


def keep_larger(best: Any, candidate: Any, labels: Any, value: int, round16: bool) -> None:
    """One launch: two arrays are read; the winner's logit and label are written where it changes."""
    launch(larger, labels.shape, best, candidate, labels, np.int32(value), np.int32(round16))


def paint_over(candidate: Any, labels: Any, value: int, bound: np.float32, round16: bool) -> None:
    """One launch: one array is read, labels are written where they change."""
    launch(above, labels.shape, candidate, labels, np.int32(value), bound, np.int32(round16))


def _single_or_half(logits: Any) -> Any:
    if logits.dtype in (np.float32, np.float16):
        return logits
    wide = get_xp(logits).empty(logits.shape, np.float32)
    wide[...] = logits
    return wide


def _cuda_product(a: Any, b: Any) -> Any:
    return cuda.fma(a, b, 0.0)


def _loop_product(a: Any, b: Any) -> Any:
    return a * b


# a product that is rounded before it is added to anything: what a * b + c is not, once the compiler has fused it
product: Any = Scalar(_cuda_product, _loop_product)


@scalar
def round_half(v, one, integer):  # type: ignore[no-untyped-def]
    """`v` rounded to the nearest float16, ties to even; `one` and `integer` (1.5 times 2 to the bits of the mantissa) are of its type."""
    size = abs(v)
    if size >= _OVERFLOW:
        return v * _HIGHEST
    # below 2^-13 steps are 2^-24; every power of two above doubles them
    step, inverse, limit = one * _HALF_TINY, one / _HALF_TINY, one * _HALF_TINY * _STEPS
    while size >= limit:
        step, inverse, limit = step + step, inverse / _TWO, limit + limit
    return ((v * inverse + integer) - integer) * step


@scalar
def place(z, y, x, size, shape, lower):  # type: ignore[no-untyped-def]
    """Lower and upper source position of a voxel of the result: iz, jz, iy, jy, ix, jx."""
    iz, iy, ix = lower[z], lower[shape[0] + y], lower[shape[0] + shape[1] + x]
    jz, jy, jx = min(iz + 1, size[1] - 1), min(iy + 1, size[2] - 1), min(ix + 1, size[3] - 1)
    # Numba looks whether a signed index is negative, every time
    return np.uint64(iz), np.uint64(jz), np.uint64(iy), np.uint64(jy), np.uint64(ix), np.uint64(jx)


@scalar
def interpolate(logits, k, corners, tz, ty, tx):  # type: ignore[no-untyped-def]
    """One class at one voxel in float32, and the largest magnitude it was made of."""
    iz, jz, iy, jy, ix, jx = corners
    k = np.uint64(k)
    a, b = np.float32(logits[k, iz, iy, ix]), np.float32(logits[k, jz, iy, ix])
    c, d = np.float32(logits[k, iz, iy, jx]), np.float32(logits[k, jz, iy, jx])
    e, f = np.float32(logits[k, iz, jy, ix]), np.float32(logits[k, jz, jy, ix])
    g, h = np.float32(logits[k, iz, jy, jx]), np.float32(logits[k, jz, jy, jx])
    peak = max(max(max(abs(a), abs(b)), max(abs(c), abs(d))), max(max(abs(e), abs(f)), max(abs(g), abs(h))))
    a, c, e, g = a + tz * (b - a), c + tz * (d - c), e + tz * (f - e), g + tz * (h - g)
    a, e = a + tx * (c - a), e + tx * (g - e)
    return a + ty * (e - a), peak


@scalar
def interpolate_exactly(logits, k, corners, tz, ty, tx, half):  # type: ignore[no-untyped-def]
    """One class at one voxel in float64, corners in scipy's order; rounded to float16 if `half`."""
    iz, jz, iy, jy, ix, jx = corners
    total = 0.0
    for i in range(2):
        wz, sz = (tz, jz) if i else (1.0 - tz, iz)
        for j in range(2):
            wy, sy = (ty, jy) if j else (1.0 - ty, iy)
            total += product(np.float64(logits[k, sz, sy, ix]) * wz * wy, 1.0 - tx)
            total += product(np.float64(logits[k, sz, sy, jx]) * wz * wy, tx)
    return round_half(total, np.float64(1), _INTEGER64) if half else total


@thread_kernel()
def largest(z, y, x, logits, values, out):  # type: ignore[no-untyped-def]
    """Label of the largest logit."""
    best, winner = np.float32(logits[0, z, y, x]), 0
    for k in range(1, logits.shape[0]):
        v = np.float32(logits[k, z, y, x])
        if v > best:
            best, winner = v, k
    out[z, y, x] = values[winner]


@thread_kernel()
def painted(z, y, x, logits, values, bound, out):  # type: ignore[no-untyped-def]
    """Label of the last class above `bound`."""
    label = 0
    for k in range(logits.shape[0]):
        if np.float32(logits[k, z, y, x]) > bound:
            label = values[k]
    out[z, y, x] = label


@thread_kernel(float64=True)
def largest_resampled(z, y, x, logits, lower, fraction, exact, values, half, out):  # type: ignore[no-untyped-def]
    """Label of the class whose interpolated logit is largest."""
    corners = place(z, y, x, logits.shape, out.shape, lower)
    row, column = out.shape[0] + y, out.shape[0] + out.shape[1] + x
    tz, ty, tx = fraction[z], fraction[row], fraction[column]
    best, peak = interpolate(logits, 0, corners, tz, ty, tx)
    second, winner = _LOWEST, 0
    for k in range(1, logits.shape[0]):
        v, size = interpolate(logits, k, corners, tz, ty, tx)
        peak = max(peak, size)
        if v > best:
            best, second, winner = v, best, k
        else:
            second = max(second, v)
    tolerance = _ERROR * peak
    if half:
        tolerance += _HALF_ULP * max(abs(best), abs(second)) + _HALF_TINY
    if best - second <= tolerance:
        top, floor = -np.inf, best - _TWO * tolerance
        for k in range(logits.shape[0]):
            v, size = interpolate(logits, k, corners, tz, ty, tx)
            if v >= floor:
                w = interpolate_exactly(logits, k, corners, exact[z], exact[row], exact[column], half)
                if w > top:
                    top, winner = w, k
    out[z, y, x] = values[winner]


@thread_kernel(float64=True)
def painted_resampled(z, y, x, logits, lower, fraction, exact, values, bound, half, out):  # type: ignore[no-untyped-def]
    """Label of the last class whose interpolated logit exceeds `bound`."""
    corners = place(z, y, x, logits.shape, out.shape, lower)
    row, column = out.shape[0] + y, out.shape[0] + out.shape[1] + x
    tz, ty, tx = fraction[z], fraction[row], fraction[column]
    label = 0
    for k in range(logits.shape[0]):
        v, peak = interpolate(logits, k, corners, tz, ty, tx)
        passes = v > bound
        tolerance = _ERROR * peak
        if half:
            tolerance += _HALF_ULP * max(abs(v), abs(bound)) + _HALF_TINY
        if abs(v - bound) <= tolerance:
            passes = interpolate_exactly(logits, k, corners, exact[z], exact[row], exact[column], half) > np.float64(bound)
        if passes:
            label = values[k]
    out[z, y, x] = label


@thread_kernel()
def softmax(z, y, x, logits, half):  # type: ignore[no-untyped-def]
    """Probabilities of all classes at one voxel."""
    top, total = _LOWEST, _ZERO
    for k in range(logits.shape[0]):
        v = logits[k, z, y, x]
        if half:
            v = round_half(v, np.float32(1), _INTEGER)
            logits[k, z, y, x] = v
        top = max(top, v)
    for k in range(logits.shape[0]):
        v = math.exp(logits[k, z, y, x] - top)
        logits[k, z, y, x] = v
        total += v
    for k in range(logits.shape[0]):
        logits[k, z, y, x] /= total


@thread_kernel()
def sigmoid(z, y, x, logits, half):  # type: ignore[no-untyped-def]
    """Probability of every class at one voxel."""
    for k in range(logits.shape[0]):
        v = logits[k, z, y, x]
        if half:
            v = round_half(v, np.float32(1), _INTEGER)
        logits[k, z, y, x] = np.float32(1) / (np.float32(1) + math.exp(-max(v, _LEAST_LOGIT)))


@thread_kernel()
def larger(z, y, x, best, candidate, labels, value, half):  # type: ignore[no-untyped-def]
    """Keep the larger of two logits and its label."""
    v, top = candidate[z, y, x], best[z, y, x]
    if half:
        v, top = round_half(v, np.float32(1), _INTEGER), round_half(top, np.float32(1), _INTEGER)
    if v > top:
        best[z, y, x] = v
        labels[z, y, x] = value


@thread_kernel()
def above(z, y, x, candidate, labels, value, bound, half):  # type: ignore[no-untyped-def]
    """Paint where a logit exceeds `bound`."""
    v = candidate[z, y, x]
    if half:
        v = round_half(v, np.float32(1), _INTEGER)
    if v > bound:
        labels[z, y, x] = value
