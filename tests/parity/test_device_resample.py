"""Change of grid on a device: scipy == CPU == the loop over threads == the CUDA simulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segrt.device import on_device, to_device, to_host
from segrt.errors import InputError
from segrt.kernels import _spline, onehot, resample
from segrt.kernels._cuda.launch import cuda_simulator, recording
from tests import reference

SIZES = st.integers(1, 11)
SHAPES = st.tuples(SIZES, SIZES, SIZES)
ORDERS = st.sampled_from((0, 1, 3))
AXES = st.sampled_from((None, 0, 1, 2))
SEEDS = st.integers(0, 2**32 - 1)
IMAGES = st.sampled_from((np.int16, np.float32, np.uint8, np.float64))
LABELS = st.sampled_from((np.uint8, np.int16, np.uint16, np.int64))
AFFINE = (-200.0, 250.0, 100.0, 40.0)

# of the largest value: float32 sums of 28 products, three axes, each of which amplifies the error of the one before by up to 1.55
TOLERANCE = 4e-6


def scattered(array, seed):
    """The array on the host, and on a device in other memory: whole, cropped, turned or reversed."""
    if seed % 4 == 1:
        return array, to_device(np.pad(array, 1), "simulated")[tuple(slice(1, -1) for _ in array.shape)]
    if seed % 4 == 2:
        return array, to_device(array.transpose(), "simulated").transpose()
    if seed % 4 == 3:
        return array, to_device(array[..., ::-1], "simulated")[..., ::-1]
    return array, to_device(array, "simulated")


def image(shape, seed, dtype=np.float32):
    values = np.random.default_rng(seed).normal(0, 300, shape)
    return scattered((np.abs(values) % 256 if np.dtype(dtype).kind == "u" else values).astype(dtype), seed)


def label_map(shape, seed, dtype):
    return scattered(np.random.default_rng(seed).integers(0, 4, shape).astype(dtype), seed)


# ------------------------------------------------------------------ images
@given(SHAPES, SHAPES, ORDERS, AXES, ORDERS, IMAGES, SEEDS)
def test_resize(shape, new, order, separate, order_z, dtype, seed):
    host, device = image(shape, seed, dtype)
    rule = {"order": order, "separate": separate, "order_z": order_z}
    result = resample.resize(device, new, **rule)
    assert on_device(result)
    assert result.dtype == np.float32
    limits = {"rtol": 0, "atol": TOLERANCE * np.abs(host).max()}
    np.testing.assert_allclose(to_host(result), resample.resize(host, new, **rule), **limits)
    np.testing.assert_allclose(to_host(result), reference.resize(host, new, **rule), **limits)


@given(SHAPES, SHAPES, ORDERS, AXES, ORDERS, st.booleans(), st.booleans(), SEEDS)
def test_normalised_free_or_with_float32_positions(shape, new, order, separate, order_z, clip, single, seed):
    host, device = image(shape, seed, (np.int16, np.float32)[seed // 4 % 2])
    rule = {"order": order, "separate": separate, "order_z": order_z, "clip": clip, "single": single, "affine": AFFINE}
    # normalised values lie in -7.5 .. 3.75
    np.testing.assert_allclose(to_host(resample.resize(device, new, **rule)), resample.resize(host, new, **rule), rtol=0, atol=3e-5)


def test_longer_lines_than_the_window():
    """Several windows, groups of samples with and without all eight, more voxels than threads in a block; up and down."""
    array = ndimage.gaussian_filter(np.random.default_rng(7).normal(size=(41, 70, 300)), 1).astype(np.float32)
    for shape in ((23, 90, 410), (60, 33, 150)):
        result = to_host(resample.resize(to_device(array, "simulated"), shape, order=3))
        expected = reference.resize(array, shape, order=3)
        # seen: 3e-7 of the range; the CPU's recursion is at the same distance
        assert np.abs(result - expected).max() < 1e-6 * np.ptp(expected)


@given(st.integers(1, 120), st.integers(1, 150), SEEDS)
def test_a_window_is_as_good_as_the_recursion(size, new, seed):
    # the worst a line can do: jumps over its whole range
    line = np.random.default_rng(seed).integers(0, 2, size).astype(float)
    start, weights = _spline.cardinal_taps(size, new)
    sampled = (line[start[:, None] + np.arange(weights.shape[1])] * weights).sum(axis=1)
    position = size / new * (np.arange(new) + 0.5) - 0.5
    expected = ndimage.map_coordinates(line, position[None], order=3, mode="nearest")
    assert np.abs(sampled - expected).max() < 1.1e-8


def test_the_result_keeps_to_the_range_of_the_input_or_of_its_slice():
    step = np.zeros((2, 20, 20), np.float32)
    step[:, :, 10:] = 1
    step[1] += 100
    device = to_device(step, "simulated")
    whole = to_host(resample.resize(device, (3, 33, 33), order=3))
    assert (whole.min(), whole.max()) == (0, 101)
    slices = to_host(resample.resize(device, (2, 33, 33), order=3, separate=0))
    assert [(s.min(), s.max()) for s in slices] == [(0, 1), (100, 101)]
    assert to_host(resample.resize(device, (2, 33, 33), order=3, clip=False)).max() > 101.01


@pytest.mark.parametrize("new_z", [3, 11])
def test_slices_keep_their_bounds_when_they_are_picked(new_z):
    """Fewer slices are picked before the plane is resampled, more after."""
    stack = np.random.default_rng(3).random((6, 9, 9)).astype(np.float32) + 10 * np.arange(6, dtype=np.float32)[:, None, None]
    rule = {"order": 3, "separate": 0}
    result = to_host(resample.resize(to_device(stack, "simulated"), (new_z, 14, 15), **rule))
    np.testing.assert_allclose(result, resample.resize(stack, (new_z, 14, 15), **rule), rtol=0, atol=60 * TOLERANCE)
    sources = _spline.fractions(6, new_z, 0)[0]
    for plane, source in zip(result, stack[sources.astype(int)], strict=True):
        assert source.min() <= plane.min() <= plane.max() <= source.max()


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_voxel_that_is_not_finite_reaches_no_further_than_the_window(order):
    array = np.zeros((40, 3, 3), np.float32)
    array[39] = np.inf
    result = to_host(resample.resize(to_device(array, "simulated"), (20, 3, 3), order=order, clip=False))
    assert (result[:4] == 0).all()


def test_it_writes_to_out_whatever_its_strides():
    host, device = image((6, 7, 8), 0)
    expected = resample.resize(host, (5, 9, 4), order=1)
    whole = to_device(np.zeros((2, 5, 9, 4), np.float32), "simulated")
    assert resample.resize(device, (5, 9, 4), order=1, out=whole[1]) is not None
    turned = to_device(np.zeros((4, 9, 5), np.float32), "simulated")
    resample.resize(device, (5, 9, 4), order=1, out=turned.transpose())
    for written in (to_host(whole)[1], to_host(turned).T):
        np.testing.assert_allclose(written, expected, atol=1e-3)
    assert (to_host(whole)[0] == 0).all()
    np.testing.assert_array_equal(to_host(device), host)


@pytest.mark.parametrize("affine", [None, AFFINE])
def test_an_unchanged_shape_is_copied(affine):
    host, device = image((2, 3, 4), 0, np.int16)
    result = resample.resize(device, (2, 3, 4), order=3, affine=affine)
    np.testing.assert_array_equal(to_host(result), resample.resize(host, (2, 3, 4), order=3, affine=affine))
    labels = to_device(np.ones((2, 3, 4), np.uint8), "simulated")
    copy = resample.resize_labels(labels, (2, 3, 4), order=1)
    copy[...] = labels[:1, :1, :1]
    assert copy is not labels


def test_wrong_arguments_are_refused_as_on_the_host():
    device = to_device(np.zeros((2, 3, 4), np.float32), "simulated")
    with pytest.raises(InputError, match="order and order_z"):
        resample.resize(device, (1, 1, 1), order=2)
    with pytest.raises(InputError, match="out must be float32"):
        resample.resize(device, (1, 1, 1), order=1, out=device)


@pytest.mark.parametrize(
    ("rule", "launches"),
    [
        ({"order": 1}, 1),
        ({"order": 1, "separate": 0}, 1),
        ({"order": 3, "clip": False}, 3),
        ({"order": 3}, 3 + 3),  # extremes of the threads, of the slices, of all
        ({"order": 3, "separate": 0}, 2 + 2),
    ],
)
def test_launches(rule, launches):
    with recording() as record:
        resample.resize(to_device(np.zeros((4, 5, 6), np.int16), "simulated"), (5, 6, 7), affine=AFFINE, **rule)
    assert len(record) == launches


# ------------------------------------------------------------------ labels
@given(SHAPES, SHAPES, ORDERS, AXES, ORDERS, LABELS, SEEDS)
def test_labels(shape, new, order, separate, order_z, dtype, seed):
    host, device = label_map(shape, seed, dtype)
    result = resample.resize_labels(device, new, order=order, separate=separate, order_z=order_z)
    assert on_device(result)
    assert result.dtype == dtype
    np.testing.assert_array_equal(to_host(result), resample.resize_labels(host, new, order=order, separate=separate, order_z=order_z))
    if order < 3 and order_z == 0:
        np.testing.assert_array_equal(to_host(result), reference.resize_labels(host, new, order=order, separate=separate))


@given(SHAPES, SHAPES, AXES, SEEDS)
def test_labels_of_the_torch_route(shape, new, separate, seed):
    host, device = label_map(shape, seed, np.int16)
    result = to_host(resample.resize_labels_linear(device, new, separate=separate))
    np.testing.assert_array_equal(result, resample.resize_labels_linear(host, new, separate=separate))
    if separate is None and shape != new:
        np.testing.assert_array_equal(result, reference.resize_labels_linear(host, new))


@pytest.mark.parametrize("shape", [(9, 13, 34), (33, 20, 68)])
def test_labels_of_halves_and_doubles_tie_as_on_the_cpu(shape):
    """Whole ratios put samples halfway: nearly every voxel at a border is a tie."""
    labels = np.random.default_rng(0).integers(-1, 5, (18, 10, 17)).repeat(2, axis=2).astype(np.int16)
    device = to_device(labels, "simulated")
    np.testing.assert_array_equal(to_host(resample.resize_labels(device, shape, order=1)), resample.resize_labels(labels, shape, order=1))
    np.testing.assert_array_equal(to_host(resample.resize_labels_linear(device, shape)), resample.resize_labels_linear(labels, shape))


@given(SHAPES, LABELS, SEEDS)
def test_channels_of_a_cascade(shape, dtype, seed):
    check_channels(shape, dtype, seed)


def check_channels(shape, dtype, seed):
    labels, device = label_map(shape, seed, dtype)
    inside, mask = scattered(np.random.default_rng(seed).random(shape) < 0.6, seed)
    united = inside | (labels != 0)
    np.testing.assert_array_equal(onehot.include(inside, labels), united)
    assert onehot.include(mask, device) is mask
    np.testing.assert_array_equal(to_host(mask), united)
    expected = np.where(united, labels.astype(np.int64), -1)
    for marked in (onehot.mark_outside(labels, united), to_host(onehot.mark_outside(device, mask))):
        assert marked.dtype == (np.int16 if dtype == np.uint8 else np.int32)
        np.testing.assert_array_equal(marked, expected)
    out = np.full((2, *shape), 7, np.float32)
    channels = to_device(out, "simulated")
    onehot.one_hot(labels, (3, 1), out)
    onehot.one_hot(device, (3, 1), channels)
    np.testing.assert_array_equal(out, np.stack([labels == 3, labels == 1]).astype(np.float32))
    np.testing.assert_array_equal(to_host(channels), out)


# ------------------------------------------------------------------ the CUDA form
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize(
    "rule",
    [
        {"order": 0},
        {"order": 1, "affine": AFFINE},
        {"order": 3, "affine": AFFINE},
        {"order": 3, "separate": 0},
        {"order": 3, "separate": 2, "order_z": 3},
        {"order": 3, "separate": 0, "order_z": 1, "clip": False},
    ],
)
def test_images_in_the_cuda_simulator(rule, dtype):
    host, device = image((3, 5, 6), 2, dtype)
    for new in ((4, 9, 4), (2, 3, 9)):
        with cuda_simulator():
            result = resample.resize(device, new, **rule)
        np.testing.assert_allclose(to_host(result), resample.resize(host, new, **rule), rtol=0, atol=TOLERANCE * np.abs(host).max())


tiny = st.tuples(*[st.integers(1, 4)] * 3)


@settings(max_examples=5)
@given(tiny, tiny, ORDERS, AXES, ORDERS, IMAGES, SEEDS)
def test_any_shape_in_the_cuda_simulator(shape, new, order, separate, order_z, dtype, seed):
    host, device = image(shape, seed, dtype)
    rule = {"order": order, "separate": separate, "order_z": order_z}
    labels, labels_there = label_map(shape, seed, np.uint8)
    with cuda_simulator():
        result = resample.resize(device, new, **rule)
        resized = resample.resize_labels(labels_there, new, order=min(order, 1), separate=separate)
        voted = resample.resize_labels_linear(labels_there, new, separate=separate)
    np.testing.assert_allclose(to_host(result), resample.resize(host, new, **rule), rtol=0, atol=TOLERANCE * np.abs(host).max())
    np.testing.assert_array_equal(to_host(resized), resample.resize_labels(labels, new, order=min(order, 1), separate=separate))
    np.testing.assert_array_equal(to_host(voted), resample.resize_labels_linear(labels, new, separate=separate))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_labels_in_the_cuda_simulator(dtype):
    host, device = label_map((2, 3, 4), 1, dtype)
    for new in ((3, 4, 6), (1, 3, 5)):
        for order, separate in ((0, None), (1, None), (1, 0)):
            with cuda_simulator():
                result = resample.resize_labels(device, new, order=order, separate=separate)
            np.testing.assert_array_equal(to_host(result), resample.resize_labels(host, new, order=order, separate=separate))
        with cuda_simulator():
            result = resample.resize_labels_linear(device, new)
        np.testing.assert_array_equal(to_host(result), resample.resize_labels_linear(host, new))


@settings(max_examples=10)
@given(tiny, st.sampled_from((np.uint8, np.uint16, np.int16)), SEEDS)
def test_channels_in_the_cuda_simulator(shape, dtype, seed):
    with cuda_simulator():
        check_channels(shape, dtype, seed)
