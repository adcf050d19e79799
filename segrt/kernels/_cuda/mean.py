"""Mean probabilities on a device; launched by `kernels.mean`, which checks what it is given.

A thread owns a voxel: it interpolates each class three times from eight corners that its neighbours read too, which the caches keep. That
leaves the mean itself as all there is to write; nothing else of size classes x result exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...arrays import Array
from ...device import get_xp
from .labels import interpolate, place, round_half
from .launch import launch, thread_kernel

_ZERO, _ONE = np.float32(0), np.float32(1)
_LOWEST, _LEAST_LOGIT = np.float32(-np.inf), np.float32(-80)
_INTEGER = np.float32(1.5 * 2.0**23)  # see `labels.round_half`


def add(logits: Any, positions: Sequence[tuple[Array, Array]], rule: tuple[bool, bool], share: float, mean: Any) -> None:
    """One launch: every mean is read and written once (in the softmax's case after three looks at the logits).

    positions : for each axis of the result the lower source position and the fraction to the next
    """
    sigmoid, half = rule
    xp = get_xp(logits)
    lower = xp.asarray(np.concatenate([p[0].astype(np.int32) for p in positions]))
    fraction = xp.asarray(np.concatenate([p[1] for p in positions]))
    kernel = add_sigmoid if sigmoid else add_softmax
    launch(kernel, mean.shape[1:], logits, lower, fraction, np.int32(half), np.float32(share), mean)


@thread_kernel()
def add_softmax(z, y, x, logits, lower, fraction, half, share, mean):  # type: ignore[no-untyped-def]
    """Probabilities of all classes at one voxel."""
    shape = (mean.shape[1], mean.shape[2], mean.shape[3])
    corners = place(z, y, x, logits.shape, shape, lower)
    tz, ty, tx = fraction[z], fraction[shape[0] + y], fraction[shape[0] + shape[1] + x]
    top, total = _LOWEST, _ZERO
    for k in range(logits.shape[0]):
        v, _ = interpolate(logits, k, corners, tz, ty, tx)
        if half:
            v = round_half(v, _ONE, _INTEGER)
        top = max(top, v)
    for k in range(logits.shape[0]):
        v, _ = interpolate(logits, k, corners, tz, ty, tx)
        if half:
            v = round_half(v, _ONE, _INTEGER)
        total += math.exp(v - top)
    for k in range(logits.shape[0]):
        v, _ = interpolate(logits, k, corners, tz, ty, tx)
        if half:
            v = round_half(v, _ONE, _INTEGER)
        mean[k, z, y, x] += share * (math.exp(v - top) / total)


@thread_kernel()
def add_sigmoid(z, y, x, logits, lower, fraction, half, share, mean):  # type: ignore[no-untyped-def]
    """Probability of every class at one voxel."""
    shape = (mean.shape[1], mean.shape[2], mean.shape[3])
    corners = place(z, y, x, logits.shape, shape, lower)
    tz, ty, tx = fraction[z], fraction[shape[0] + y], fraction[shape[0] + shape[1] + x]
    for k in range(logits.shape[0]):
        v, _ = interpolate(logits, k, corners, tz, ty, tx)
        if half:
            v = round_half(v, _ONE, _INTEGER)
        mean[k, z, y, x] += share * (_ONE / (_ONE + math.exp(-max(v, _LEAST_LOGIT))))
