"""The mean of two models' probabilities by slab is the mean of the whole volumes, wherever the cuts lie and whatever their grids are."""

from __future__ import annotations

import numpy as np
import pytest
from factories import make_spec, volume_of
from hypothesis import given, settings
from hypothesis import strategies as st

from segrt.assemble import Flow, assemble
from segrt.device import get_xp, to_device, to_host
from segrt.engines.function import FunctionEngine
from segrt.errors import InputError
from segrt.infer import infer
from segrt.kernels._cuda.launch import cuda_simulator
from segrt.kernels.mean import Box, add_probabilities
from segrt.preprocess import preprocess
from segrt.restore import restore_probabilities
from segrt.spec import Resampling, SpacingTarget
from tests import reference

shapes = st.tuples(*[st.integers(1, 9)] * 3)
turns = st.permutations((0, 1, 2)).map(tuple)
devices = st.sampled_from(("cpu", "simulated"))
kinds = st.sampled_from(("softmax", "sigmoid"))
seeds = st.integers(0, 2**32 - 1)


def check_share(stack, new, kind, separate, round16, device, seed):
    """A box of the result, from the planes it needs, on top of what was there; cut and turned arrays."""
    rng = np.random.default_rng(seed)
    resampled = reference.resample_logits(stack, new, separate=separate, round16=round16 and stack.shape[1:] != new).astype(np.float64)
    expected = reference.softmax(resampled) if kind == "softmax" else 1 / (1 + np.exp(-resampled))
    start = [int(rng.integers(0, n)) for n in new]
    part = (slice(None), *(slice(a, int(rng.integers(a, n)) + 1) for a, n in zip(start, new, strict=True)))
    before = rng.random(expected[part].shape).astype(np.float32)
    scale = stack.shape[1] / new[0]
    lowest = max(0, int(np.floor((part[1].start + 0.5) * scale - 0.5)) - 1)
    highest = min(stack.shape[1], int(np.ceil((part[1].stop - 0.5) * scale - 0.5)) + 2)
    mean = to_device(before.transpose(0, 3, 2, 1).copy(), device).transpose(0, 3, 2, 1)
    box = Box(lowest, stack.shape[1], new, tuple(start))
    logits = to_device(stack, device)[:, lowest:highest]
    add_probabilities(mean, logits, box, activation=kind, share=0.5, separate=separate, round16=round16)
    # one float16 step of a logit where float32 rounds the other way, else float32
    np.testing.assert_allclose(to_host(mean), before + 0.5 * expected[part], rtol=0, atol=2e-3 if round16 else 1e-6)


@given(
    st.integers(1, 5),
    shapes,
    shapes,
    kinds,
    st.sampled_from((None, 0, 1, 2)),
    st.booleans(),
    st.sampled_from((np.float32, np.float16)),
    devices,
    seeds,
)
def test_a_share_of_any_box(classes, shape, new, kind, separate, round16, dtype, device, seed):
    stack = np.random.default_rng(seed).normal(0, 3, (classes, *shape)).astype(dtype)
    check_share(stack, new, kind, separate, round16, device, seed)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("round16", [False, True])
def test_a_share_in_the_cuda_simulator(kind, round16):
    with cuda_simulator():
        stack = np.random.default_rng(1).normal(0, 3, (3, 4, 3, 5)).astype(np.float16 if round16 else np.float32)
        check_share(stack, (5, 4, 3), kind, None, round16, "simulated", 1)


@settings(max_examples=8)
@given(
    st.integers(1, 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    kinds,
    st.sampled_from((None, 0, 1, 2)),
    st.booleans(),
    st.sampled_from((np.float32, np.float16)),
    seeds,
)
def test_a_share_of_any_box_in_the_cuda_simulator(classes, shape, new, kind, separate, round16, dtype, seed):
    stack = np.random.default_rng(seed).normal(0, 3, (classes, *shape)).astype(dtype)
    with cuda_simulator():
        check_share(stack, new, kind, separate, round16, "simulated", seed)


def test_far_logits_are_no_nan():
    stack = np.array([[[[1e4, -1e4]]], [[[-1e4, -1e4]]]], np.float32)
    for kind, expected in (("softmax", [[1, 0.5], [0, 0.5]]), ("sigmoid", [[1, 0], [0, 0]])):
        mean = np.zeros(stack.shape, np.float32)
        add_probabilities(mean, stack, Box(0, 1, (1, 1, 2), (0, 0, 0)), activation=kind, share=1)
        np.testing.assert_allclose(mean[:, 0, 0], expected, atol=1e-30)


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (Box(2, 6, (12, 4, 5), (0, 0, 0)), "need logits of planes 0 to 1, got 2 to 4"),
        (Box(0, 6, (12, 4, 5), (10, 0, 0)), "is no part of 12 voxels on axis z"),
        (Box(0, 3, (3, 4, 4), (0, 0, 0)), "is no part of 4 voxels on axis x"),
    ],
)
def test_impossible_boxes_are_refused(box, said):
    with pytest.raises(InputError, match=said):
        add_probabilities(np.zeros((2, 3, 4, 5), np.float32), np.zeros((2, 3, 4, 5), np.float32), box, activation="softmax", share=0.5)


def test_arrays_that_do_not_fit_are_refused():
    whole = Box(0, 3, (3, 4, 5), (0, 0, 0))
    logits = np.zeros((2, 3, 4, 5), np.float32)
    with pytest.raises(InputError, match="as many classes"):
        add_probabilities(np.zeros((3, 3, 4, 5), np.float32), logits, whole, activation="softmax", share=0.5)
    with pytest.raises(InputError, match="expected 'softmax' or 'sigmoid', got 'relu'"):
        add_probabilities(np.zeros_like(logits), logits, whole, activation="relu", share=0.5)


def slow_mean(parts):
    """Both volumes whole, their mean, and the labels of that."""
    volumes = [
        to_host(restore_probabilities(infer(data, [engine], spec).whole(), placement, spec)) for data, placement, spec, engine in parts
    ]
    return (volumes[0] + volumes[1]) / 2


def check_labels(labels, mean, head):
    """Exactly, except where float32 cannot tell which is right."""
    values = np.array(head.values)
    if head.activation == "softmax":
        expected = values[mean.argmax(0)]
        second, best = np.sort(mean, axis=0)[-2:]
        close = best - second < 2e-6
    else:
        expected = np.zeros(mean.shape[1:], int)
        for value, channel in zip(values, mean, strict=True):
            expected[channel > head.threshold] = value
        close = (abs(mean - head.threshold) < 2e-6).any(axis=0)
    np.testing.assert_array_equal(labels[~close], expected[~close])
    return close


resamplings = st.sampled_from(
    (Resampling(order=1), Resampling(method="linear", order=1), Resampling(order=1, separate=True), Resampling(order=3, separate=False))
)


@settings(max_examples=40)
@given(
    st.tuples(*[st.integers(2, 11)] * 3),
    st.tuples(turns, turns),
    st.tuples(st.booleans(), st.booleans()),
    st.tuples(resamplings, resamplings),
    kinds,
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    devices,
    st.booleans(),
    seeds,
)
def test_a_pair_by_slab_is_the_mean_of_whole_volumes(shape, turn, crop, how, kind, starts, device, same, seed):
    """2-D and 3-D, cropped by one, both or none, turned alike or not, on grids of their own."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 2, shape).astype(np.float32)
    image[tuple(slice(int(rng.integers(0, n)), None) for n in shape)] = 0
    image[:, : shape[1] // 3] = 0
    image[0, -1, -1] = 1
    volume = volume_of(image, (3.0, 1.2, 1.5))
    specs = [
        make_spec(
            values=(0, 1, 2) if kind == "softmax" else (1, 2, 3),
            activation=kind,
            patch=patch,
            transpose=turn[0] if same else turn[number],
            crop_nonzero=crop[number],
            target=SpacingTarget(spacing=spacing),
            resample_logits=how[number],
        )
        for number, (patch, spacing) in enumerate((((1, 4, 4), (None, 1.0, 2.0)), ((4, 3, 5), (2.0, 1.7, 1.1))))
    ]
    functions = (lambda x: np.concatenate([-x, x, 0.5 - x * x], axis=1), lambda x: np.concatenate([0.2 * x, np.sin(3 * x), x + 1], axis=1))
    parts, flows = [], []
    for spec, function, count in zip(specs, functions, starts, strict=True):
        data, placement = preprocess(volume, spec)
        parts.append((data, placement, spec, FunctionEngine(function)))
        by_slab = spec.transpose[0] == specs[0].transpose[0] and spec.resample_logits.order == 1
        inferred = infer(
            to_device(data, device),
            [FunctionEngine(function, device=device)],
            spec,
            starts_per_slab=count if by_slab else None,
        )
        flows.append(Flow(inferred, placement, spec))
    labels, scores = assemble(flows, probabilities=True)
    mean = slow_mean(parts)
    np.testing.assert_allclose(scores, mean, rtol=0, atol=2e-6)
    check_labels(to_host(labels), mean, specs[0].head)
    assert get_xp(labels) is get_xp(to_device(image, device))
