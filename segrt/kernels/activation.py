"""What logits mean: probabilities, the logit a threshold asks for, and labels made class by class; used by `argmax` and `restore`."""

from __future__ import annotations

from functools import cache

import numpy as np

from ..arrays import Array, FloatArray
from ..device import on_device
from ..errors import InputError


def activate(logits: FloatArray, activation: str, *, round16: bool = False) -> None:
    """Turn logits (K, Z, Y, X) float32 into probabilities, in place; "softmax" over K or "sigmoid".

    Parameters
    ----------
    round16 : round the logits to float16 first

    Raises
    ------
    InputError
        When `activation` is unknown.
    """
    if activation not in ("softmax", "sigmoid"):
        raise InputError(f"activation: expected 'softmax' or 'sigmoid', got {activation!r}")
    if on_device(logits):
        from ._cuda import labels as device

        device.activate(logits, activation, round16)
        return
    for z in range(logits.shape[1]):
        plane = _rounded(logits[:, z]) if round16 else logits[:, z]
        logits[:, z] = _softmax(plane) if activation == "softmax" else _sigmoid(plane)


def keep_larger(best: FloatArray, candidate: FloatArray, labels: Array, value: int, *, round16: bool = False) -> None:
    """Where `candidate` exceeds `best` (both (Z, Y, X) float32), store it there and `value` in `labels`; in place, the candidate is kept.

    Class after class this is an argmax without all classes at once; with `round16` both are rounded to float16 before comparing.
    """
    if on_device(candidate):
        from ._cuda import labels as device

        device.keep_larger(best, candidate, labels, value, round16)
        return
    challenger = _rounded(candidate) if round16 else candidate
    better = challenger > (_rounded(best) if round16 else best)
    np.copyto(labels, value, where=better)
    np.copyto(best, challenger, where=better)


def paint_over(candidate: FloatArray, labels: Array, value: int, threshold: float, *, round16: bool = False) -> None:
    """Store `value` in `labels` where sigmoid(candidate) exceeds `threshold`, in place; parameters as in `keep_larger` and `paint`."""
    bound = np.float32(largest_below(threshold))
    if on_device(candidate):
        from ._cuda import labels as device

        device.paint_over(candidate, labels, value, bound, round16)
        return
    np.copyto(labels, value, where=(_rounded(candidate) if round16 else candidate) > bound)


@cache
def largest_below(threshold: float) -> float:
    """The largest float32 logit whose sigmoid in float32 does not exceed `threshold`."""
    limit = np.float32(threshold)
    low, high = np.float32(-80), np.float32(80)
    if _sigmoid(np.array([low]))[0] > limit:
        return -np.inf
    if _sigmoid(np.array([high]))[0] <= limit:
        return np.inf
    while True:
        middle = np.float32((np.float64(low) + np.float64(high)) / 2)
        if middle in (low, high):
            return float(low)
        if _sigmoid(np.array([middle]))[0] > limit:
            high = middle
        else:
            low = middle


def _rounded(logits: FloatArray) -> FloatArray:
    return logits.astype(np.float16).astype(np.float32)


def _softmax(logits: FloatArray) -> FloatArray:
    weights: FloatArray = np.exp(logits - logits.max(axis=0))
    weights /= weights.sum(axis=0)
    return weights


def _sigmoid(logits: FloatArray) -> FloatArray:
    # exp rounded once from float64: monotonous, and no overflow warning for large negative logits
    exponential = np.exp(-np.maximum(logits, -80).astype(np.float64)).astype(np.float32)
    result: FloatArray = np.float32(1) / (np.float32(1) + exponential)
    return result
