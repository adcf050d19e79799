"""Labels and probabilities on a device: skimage and numpy == CPU == the loop over threads == the CUDA simulator."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from segrt.device import Simulated, get_xp, to_device, to_host
from segrt.errors import InputError
from segrt.kernels import activation, argmax
from segrt.kernels._cuda.launch import cuda_simulator, recording
from tests import reference

shapes = st.tuples(*[st.integers(1, 10)] * 3)
axes = st.sampled_from((None, 0, 1, 2))
dtypes = st.sampled_from((np.float32, np.float16))
thresholds = st.sampled_from((0.5, 0.3, 0.9, 1.0, 1e-40))
seeds = st.integers(0, 2**32 - 1)


def logits(classes, shape, seed, dtype=np.float32, *, integers=False):
    values = np.random.default_rng(seed).normal(0, 2, (classes, *shape))
    return (np.round(values) if integers else values).astype(dtype)


def on_device(array, seed=0):
    """On the simulated device; one time in three each: as it is, cropped from something larger, with axes swapped."""
    device = to_device(array, "simulated")
    if seed % 3 == 1:
        view = get_xp(device).zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)[..., 1:-2]
    elif seed % 3 == 2:
        view = get_xp(device).zeros(array.shape[::-1], array.dtype).transpose(*range(array.ndim)[::-1])
    else:
        return device
    view[...] = device
    return view


def place(shape, seed, dtype=np.uint8):
    """The part of an image on the device that labels are written to, and the image; axes turned, a margin on every side."""
    turn = [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)][seed % 4]
    image = get_xp(to_device(np.zeros(1), "simulated")).zeros([shape[turn.index(axis)] + 3 for axis in range(3)], dtype)
    z, y, x = (slice(1, n + 1) for n in shape)
    return image.transpose(turn)[z, y, x], image


def check(function, stack, args, options, seed):
    """CPU == device, bit for bit; and only the place given is written."""
    expected = function(stack, *args, **options)
    device = on_device(stack, seed)
    result = function(device, *args, **options)
    assert isinstance(result, Simulated)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(to_host(result), expected)
    out, image = place(expected.shape, seed, (np.uint8, np.uint16)[seed // 4 % 2])
    assert function(device, *args, **options, out=out) is out
    np.testing.assert_array_equal(to_host(out), expected)
    assert to_host(image).astype(np.int64).sum() == expected.astype(np.int64).sum()
    return expected


@given(st.integers(1, 9), shapes, shapes, axes, st.booleans(), st.booleans(), dtypes, st.booleans(), seeds)
def test_fused_argmax(classes, shape, new, separate, single, round16, dtype, integers, seed):
    """Integers make exact ties, and rounding to float16 many more: those go to the lowest class on every path."""
    stack = logits(classes, shape, seed, dtype, integers=integers)
    values = tuple(range(3, 3 + classes))
    options = {"separate": separate, "single": single, "round16": round16}
    labels = check(argmax.resample_argmax, stack, (new, values), options, seed)
    if shape != new and not single and round16:
        expected = reference.resample_logits(stack, new, separate=separate, round16=True)
        np.testing.assert_array_equal(labels, expected.argmax(0) + 3)


@given(st.integers(1, 5), shapes, shapes, axes, st.booleans(), dtypes, thresholds, st.booleans(), seeds)
def test_fused_paint(classes, shape, new, separate, round16, dtype, threshold, integers, seed):
    stack = logits(classes, shape, seed, dtype, integers=integers)
    values = tuple(range(classes, 0, -1))
    labels = check(argmax.resample_paint, stack, (new, values, threshold), {"separate": separate, "round16": round16}, seed)
    if shape != new and 0.1 < threshold < 0.99:
        expected = reference.resample_logits(stack, new, separate=separate, round16=round16)
        np.testing.assert_array_equal(labels, reference.paint(expected, values, threshold))


@given(st.integers(1, 6), shapes, dtypes, thresholds, st.booleans(), seeds)
def test_argmax_and_paint(classes, shape, dtype, threshold, integers, seed):
    stack = logits(classes, shape, seed, dtype, integers=integers)
    values = tuple(range(classes, 0, -1))
    np.testing.assert_array_equal(check(argmax.argmax, stack, (values,), {}, seed), np.array(values)[stack.argmax(0)])
    check(argmax.paint, stack, (values, threshold), {}, seed)


def test_differences_that_float32_cannot_see_are_decided_in_float64():
    """Two classes that differ by less than a rounding of the interpolation; which one wins changes from voxel to voxel."""
    rng = np.random.default_rng(5)
    base = rng.normal(0, 100, (9, 10, 11))
    stack = np.stack([base, base]).astype(np.float32)
    stack[1] = np.nextafter(stack[1], np.where(rng.random(base.shape) < 0.5, -np.inf, np.inf).astype(np.float32))
    expected = reference.resample_logits(stack, (13, 14, 15))
    labels = check(argmax.resample_argmax, stack, ((13, 14, 15), (0, 1)), {}, 0)
    decided = abs(expected[0] - expected[1]) > 1e-12
    assert 0.2 < labels.mean() < 0.8
    np.testing.assert_array_equal(labels[decided], expected.argmax(0)[decided])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("separate", [None, 0])
def test_labels_in_the_cuda_simulator(dtype, separate):
    with cuda_simulator():
        for seed, classes in ((0, 4), (1, 1), (2, 5)):
            stack = logits(classes, (3, 4, 2), seed, dtype, integers=seed == 2)
            values = tuple(range(1, classes + 1))
            for round16 in (False, True):
                options = {"separate": separate, "round16": round16}
                check(argmax.resample_argmax, stack, ((4, 5, 3), values), options, seed)
                check(argmax.resample_paint, stack, ((4, 5, 3), values, 0.5), options, seed)
            check(argmax.argmax, stack, (values,), {}, seed)
            check(argmax.paint, stack, (values, 0.5), {}, seed)


tiny = st.tuples(*[st.integers(1, 3)] * 3)


@settings(max_examples=5)
@given(tiny, tiny, axes, st.booleans(), dtypes, st.booleans(), seeds)
def test_any_shape_in_the_cuda_simulator(shape, new, separate, round16, dtype, integers, seed):
    stack = logits(3, shape, seed, dtype, integers=integers)
    with cuda_simulator():
        check(argmax.argmax, stack, ((1, 2, 3),), {}, seed)
        check(argmax.paint, stack, ((1, 2, 3), 0.5), {}, seed)
        for function, args in ((argmax.resample_argmax, ((1, 2, 3),)), (argmax.resample_paint, ((1, 2, 3), 0.5))):
            check(function, stack, (new, *args), {"separate": separate, "round16": round16}, seed)


def check_probabilities(stack, new, kind, separate, round16, seed):
    resampled = reference.resample_logits(stack, new, separate=separate, round16=round16 and stack.shape[1:] != new).astype(np.float64)
    expected = reference.softmax(resampled) if kind == "softmax" else 1 / (1 + np.exp(-resampled))
    options = {"activation": kind, "separate": separate, "round16": round16}
    # one float16 step of a logit where float32 rounds the other way, else float32
    close = {"rtol": 0, "atol": 2e-3 if round16 else 1e-6}
    np.testing.assert_allclose(argmax.resample_probabilities(stack, new, **options), expected, **close)
    device = on_device(stack, seed)
    result = argmax.resample_probabilities(device, new, **options)
    assert isinstance(result, Simulated)
    np.testing.assert_allclose(to_host(result), expected, **close)
    image = get_xp(device).zeros((len(stack), *new[::-1]), np.float32)
    assert argmax.resample_probabilities(device, new, **options, out=image.transpose(0, 3, 2, 1)).base is not None
    np.testing.assert_array_equal(to_host(image).transpose(0, 3, 2, 1), to_host(result))


@given(st.integers(1, 4), shapes, shapes, st.sampled_from(("softmax", "sigmoid")), axes, st.booleans(), dtypes, seeds)
def test_probabilities(classes, shape, new, kind, separate, round16, dtype, seed):
    check_probabilities(logits(classes, shape, seed, dtype), new, kind, separate, round16, seed)


@pytest.mark.parametrize("round16", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_probabilities_in_the_cuda_simulator(kind, round16):
    stack = 30 * logits(3, (4, 3, 5), 1)
    expected, device = stack.copy(), to_device(stack, "simulated")
    activation.activate(expected, kind, round16=round16)
    with cuda_simulator():
        activation.activate(device, kind, round16=round16)
    np.testing.assert_allclose(to_host(device), expected, rtol=0, atol=1e-6)


@settings(max_examples=10)
@given(st.integers(1, 4), tiny, st.sampled_from(("softmax", "sigmoid")), st.booleans(), st.booleans(), seeds)
def test_any_probabilities_in_the_cuda_simulator(classes, shape, kind, round16, integers, seed):
    stack = 30 * logits(classes, shape, seed, integers=integers)
    expected, device = stack.copy(), on_device(stack, seed)
    activation.activate(expected, kind, round16=round16)
    with cuda_simulator():
        activation.activate(device, kind, round16=round16)
    np.testing.assert_allclose(to_host(device), expected, rtol=0, atol=1e-6)


def test_every_float16_and_what_lies_between_is_rounded_as_numpy_does():
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate(
        [halves, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf)), [65519, 65520, 1e9]]
    )
    values = np.concatenate([values, -values]).astype(np.float32)[None, None]
    best = get_xp(to_device(values, "simulated")).full(values.shape, -np.inf, np.float32)
    labels = get_xp(best).zeros(values.shape, np.uint8)
    activation.keep_larger(best, to_device(values, "simulated"), labels, 1, round16=True)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(to_host(best), expected)
    np.testing.assert_array_equal(to_host(labels), expected > -np.inf)


@pytest.mark.parametrize("simulator", [nullcontext, cuda_simulator])
@pytest.mark.parametrize("round16", [False, True])
def test_class_by_class(simulator, round16):
    """A running best is argmax, ties to the first; painting in order is paint."""
    check_class_by_class((3, 4, 5), 0, simulator, round16)


@settings(max_examples=10)
@given(tiny, st.booleans(), seeds)
def test_any_shape_class_by_class_in_the_cuda_simulator(shape, round16, seed):
    check_class_by_class(shape, seed, cuda_simulator, round16)


def check_class_by_class(shape, seed, simulator, round16):
    stack = logits(4, shape, seed, integers=True)
    stack[2] += np.float32(1e-4)  # below half a float16 step of numbers from 1 on
    rounded = stack.astype(np.float16) if round16 else stack
    for there in (np.array, functools.partial(on_device, seed=seed)):
        channels = [there(channel) for channel in stack]
        best = there(stack[0])
        labels, painted = (there(np.zeros(shape, (np.uint8, np.uint16)[seed % 2])) for _ in range(2))
        with simulator():
            for value, channel in enumerate(channels):
                activation.paint_over(channel, painted, value + 1, 0.5, round16=round16)
                if value:
                    activation.keep_larger(best, channel, labels, value, round16=round16)
        np.testing.assert_array_equal(to_host(labels), rounded.argmax(0))
        np.testing.assert_array_equal(to_host(painted), reference.paint(rounded, (1, 2, 3, 4), 0.5))
        np.testing.assert_array_equal(to_host(channels[1]), stack[1])


def test_labels_are_one_launch_and_no_array_of_all_classes_is_made():
    device = to_device(logits(7, (6, 7, 8), 0, np.float16), "simulated")
    with recording() as launches:
        argmax.resample_argmax(device, (12, 14, 16), range(7), round16=True)
    assert len(launches) == 1
    assert max(a.nbytes for a in launches[0].arguments if hasattr(a, "nbytes")) == device.nbytes


def test_other_dtypes_become_float32_first():
    stack = logits(3, (4, 5, 6), 0, np.float64)
    np.testing.assert_array_equal(to_host(argmax.argmax(to_device(stack, "simulated"), range(3))), stack.argmax(0))
    out = get_xp(to_device(stack, "simulated")).zeros((4, 5, 6), np.int64)
    argmax.argmax(to_device(stack, "simulated"), range(3), out=out)
    np.testing.assert_array_equal(to_host(out), stack.argmax(0))


def test_labels_lie_where_the_logits_lie():
    stack = logits(3, (2, 3, 4), 0)
    with pytest.raises(InputError, match="same device"):
        argmax.argmax(to_device(stack, "simulated"), range(3), out=np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(InputError, match="same device"):
        argmax.resample_argmax(stack, (4, 4, 4), range(3), out=to_device(np.zeros((4, 4, 4), np.uint8), "simulated"))


@given(st.integers(2, 4), shapes, shapes, seeds)
def test_large_and_small_logits_beside_each_other(classes, shape, new, seed):
    """The error bound follows the magnitudes a voxel is made of, also where they cancel."""
    assume(shape != new)
    rng = np.random.default_rng(seed)
    stack = logits(classes, shape, seed) * np.float32(10) ** rng.integers(-3, 5, shape).astype(np.float32)
    check(argmax.resample_argmax, stack, (new, range(classes)), {}, seed)
