"""Losses equal slow float64 NumPy ones for any number of classes, shape, missing class and ignored voxel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segrt.train.losses import DiceCELoss, MixedLoss, RegionLoss, SupervisedLoss


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K, ...) and class indices (N, ...) with -1 for ignored ones; in 2-D or 3-D, some classes missing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes, samples = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    logits = rng.normal(0, draw(st.sampled_from([0.1, 2.0, 30.0])), (samples, classes, *shape))
    present = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=classes, unique=True))
    target = rng.choice(present, (samples, *shape))
    target[rng.random(target.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    return logits, target


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def slow_dice(p: np.ndarray, truth: np.ndarray, valid: np.ndarray, *, batch: bool) -> float:
    """Minus the mean of (2 I + s) / (P + T + s), voxel by voxel; p and truth (N, C, ...), valid (N, ...)."""
    values = []
    for samples in [range(len(p))] if batch else [[n] for n in range(len(p))]:
        for c in range(p.shape[1]):
            i = s = t = 0.0
            for n in samples:
                for where in np.argwhere(valid[n]):
                    voxel = tuple(int(a) for a in where)
                    i += p[n, c][voxel] * truth[n, c][voxel]
                    s += p[n, c][voxel]
                    t += truth[n, c][voxel]
            values.append((2 * i + 1e-5) / (s + t + 1e-5))
    return -float(np.mean(values))


def one_hot(target: np.ndarray, classes: int) -> np.ndarray:
    return np.stack([target == c for c in range(classes)], 1).astype(float)


def slow_ce(x: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean of -log p of the true class over the voxels that count."""
    shifted = x - x.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    total = share = 0.0
    for n, *where in np.argwhere(target >= 0):
        c = target[(n, *where)]
        total -= weights[c] * logs[(n, c, *where)]
        share += weights[c]
    return total / share if share else 0.0


def value(loss: Any, x: np.ndarray, target: np.ndarray) -> float:
    return float(loss(torch.from_numpy(x), torch.from_numpy(target))[0])


@given(cases(), st.booleans())
def test_labels(case: tuple[np.ndarray, np.ndarray], batch: bool) -> None:
    x, target = case
    classes = x.shape[1]
    dice = slow_dice(softmax(x)[:, 1:], one_hot(target, classes)[:, 1:], target >= 0, batch=batch)
    expected = slow_ce(x, target, np.ones(classes)) + dice
    assert value(DiceCELoss(batch_dice=batch, ignore=True), x, target) == pytest.approx(expected, abs=1e-9)
    assert value(DiceCELoss(batch_dice=batch, ignore=True), x, target[:, None]) == pytest.approx(expected, abs=1e-9)
    if (target >= 0).all():
        assert value(DiceCELoss(batch_dice=batch), x, target) == pytest.approx(expected, abs=1e-9)


@given(cases(), st.booleans())
def test_regions(case: tuple[np.ndarray, np.ndarray], batch: bool) -> None:
    """Region k holds the labels from k on, so regions overlap."""
    x, labels = case
    regions, valid = x.shape[1], labels >= 0
    truth = np.stack([labels >= k for k in range(regions)], 1) & valid[:, None]
    target = np.where(valid[:, None], truth, -1)
    pieces = np.logaddexp(0, x) - x * truth
    dice = slow_dice(sigmoid(x), truth, valid, batch=batch)
    masked = sum(float(pieces[:, k][valid].mean()) if valid.any() else 0.0 for k in range(regions))
    assert value(RegionLoss(batch_dice=batch, ignore=True), x, target) == pytest.approx(masked + dice, abs=1e-9)
    if valid.all():
        assert value(RegionLoss(batch_dice=batch), x, target) == pytest.approx(masked / regions + dice, abs=1e-9)


@given(cases(), st.sampled_from(["none", "batch", "first_batch", "given"]), st.sampled_from(["sigmoid", "softmax"]))
def test_mixed(case: tuple[np.ndarray, np.ndarray], kind: Any, activation: Any) -> None:
    x, target = case
    classes, valid = x.shape[1], target >= 0
    share = softmax(x).transpose(1, 0, *range(2, x.ndim))[:, valid].sum(1)
    weights = {
        "none": np.ones(classes),
        "given": np.arange(1.0, classes + 1),
        "batch": (valid.sum() - share) / np.maximum(share, 1e-6),
    }["batch" if kind == "first_batch" else kind]
    p = (sigmoid(x) if activation == "sigmoid" else softmax(x)).transpose(1, 0, *range(2, x.ndim))[:, valid]
    truth = one_hot(target, classes).transpose(1, 0, *range(2, x.ndim))[:, valid]
    dice = 2 * (p * truth).sum(1) / np.maximum((p**2).sum(1) + truth.sum(1), 1e-6)
    expected = 0.7 * slow_ce(x, target, weights) + 1.3 * (1 - dice.mean())
    chosen = tuple(range(1, classes + 1)) if kind == "given" else kind
    loss = MixedLoss(classes, coefficients=(0.7, 1.3), class_weights=chosen, activation=activation)
    assert value(loss, x, target) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(cases(), st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_outputs_are_weighed(case: tuple[np.ndarray, np.ndarray], weights: list[float]) -> None:
    x, target = case
    outputs, targets = [torch.from_numpy(x) / (k + 1) for k in range(len(weights))], [torch.from_numpy(target)] * len(weights)
    one = DiceCELoss(ignore=True)
    expected = sum(w * float(one(y, t)[0]) for w, y, t in zip(weights, outputs, targets, strict=True))
    assert float(SupervisedLoss(one, weights)(outputs, targets)[0]) == pytest.approx(expected, abs=1e-12)


@given(cases())
def test_float32_stays_close(case: tuple[np.ndarray, np.ndarray]) -> None:
    x, target = case
    for loss in (DiceCELoss(ignore=True), MixedLoss(x.shape[1])):
        single = float(loss(torch.from_numpy(x).float(), torch.from_numpy(target))[0])
        assert single == pytest.approx(value(loss, x, target), rel=1e-4, abs=1e-4)
