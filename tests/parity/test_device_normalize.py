"""Intensities on a device: NumPy == CPU == the loop over threads == the CUDA simulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segrt.device import on_device, to_device, to_host
from segrt.errors import InputError
from segrt.kernels import normalize
from segrt.kernels._cuda.launch import cuda_simulator, recording

SIZES = st.integers(1, 11)
SHAPES = st.one_of(st.tuples(SIZES), st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES, SIZES), st.tuples(SIZES, SIZES, SIZES, SIZES))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from((np.int16, np.float32, np.uint8, np.int32, np.float64, np.bool_))


def image(shape, seed, dtype):
    """An array on the host, and on a device, cropped out of something larger and turned."""
    host = np.random.default_rng(seed).normal(0, 300, shape)
    host = (host % 256 if np.dtype(dtype).kind in "ub" else host).astype(dtype)
    if seed % 2:
        return host, to_device(host, "simulated")
    whole = to_device(np.pad(host, 1).transpose(), "simulated").transpose()
    return host, whole[tuple(slice(1, -1) for _ in shape)]


def chosen(host, seed):
    mask = np.random.default_rng(seed + 1).random(host.shape) < 0.4
    return mask, to_device(mask, "simulated")


@given(SHAPES, DTYPES, SEEDS)
def test_voxels(shape, dtype, seed):
    host, device = image(shape, seed, dtype)
    mask, mask_there = chosen(host, seed)
    wide = host.astype(np.float32)
    clipped = normalize.clip_shift_scale(device, -50, 80, 3, 7)
    inside = normalize.standardize(device, mask_there, 3, 7)
    for result in (clipped, inside):
        assert on_device(result)
        assert result.dtype == np.float32
    # one subtraction and one division in float32, whoever makes them
    np.testing.assert_array_equal(to_host(clipped), (np.clip(wide, -50, 80) - np.float32(3)) / np.float32(7))
    np.testing.assert_array_equal(to_host(inside), np.where(mask, (wide - np.float32(3)) / np.float32(7), wide))
    np.testing.assert_array_equal(to_host(clipped), normalize.clip_shift_scale(host, -50, 80, 3, 7))
    np.testing.assert_array_equal(to_host(inside), normalize.standardize(host, mask, 3, 7))


@given(SHAPES, DTYPES, SEEDS)
def test_numbers(shape, dtype, seed):
    host, device = image(shape, seed, dtype)
    mask, mask_there = chosen(host, seed)
    wide = host.astype(np.float32).astype(np.float64)
    # float64 sums in another order
    close = {"rtol": 1e-12, "atol": 1e-7}
    np.testing.assert_allclose(normalize.mean_std(device), (wide.mean(), wide.std()), **close)
    np.testing.assert_allclose(normalize.mean_std(device), normalize.mean_std(host), **close)
    count, mean, std = normalize.moments(device, mask_there)
    assert count == normalize.moments(host, mask)[0] == mask.sum()
    if count:
        np.testing.assert_allclose((mean, std), (wide[mask].mean(), wide[mask].std()), **close)
        assert normalize.mean_std(device, mask_there) == (mean, std)
    with recording() as launches:
        assert normalize.minmax(device) == normalize.minmax(host) == (host.min(), host.max())
    assert launches
    if dtype != np.bool_:
        assert normalize.percentiles(device, (0.5, 50)) == normalize.percentiles(host, (0.5, 50))


def test_as_many_voxels_as_threads_stride_over():
    """More planes, rows and columns than a launch has threads, and more sums than the host adds."""
    host = np.random.default_rng(0).normal(-1000, 3, (13, 21, 700)).astype(np.float32)
    device = to_device(host, "simulated")
    np.testing.assert_allclose(normalize.mean_std(device), (host.mean(dtype=float), host.std(dtype=float)), rtol=1e-12)
    assert normalize.minmax(device) == (host.min(), host.max())


def test_a_large_offset_does_not_cancel_the_variance():
    host = (10_000_000 + np.random.default_rng(0).integers(-2, 3, (4, 5, 6))).astype(np.float32)
    mean, std = normalize.mean_std(to_device(host, "simulated"))
    assert std == pytest.approx(host.std(dtype=float), rel=1e-9)
    assert mean == pytest.approx(host.mean(dtype=float), rel=1e-15)


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_extremes_that_float32_does_not_hold(dtype):
    host = np.arange(2**24 + 1, 2**24 + 121, dtype=dtype).reshape(4, 5, 6)
    assert normalize.minmax(to_device(host, "simulated")) == (2**24 + 1, 2**24 + 120)


@pytest.mark.parametrize("where", [(0, 0, 0), (1, 2, 3), (2, 4, 139)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_nan_comes_through(where, dtype):
    host = np.ones((3, 5, 140), dtype)
    host[where] = np.nan
    device = to_device(host, "simulated")
    assert np.isnan(normalize.minmax(device)).all()
    assert np.isnan(normalize.mean_std(device)).all()
    np.testing.assert_array_equal(to_host(normalize.clip_shift_scale(device, -1, 1, 0, 1)), host)


@pytest.mark.parametrize("size", [0, 1])
def test_nothing_to_measure_is_an_error(size):
    device = to_device(np.ones((size, 2, 2), np.int16), "simulated")
    nothing = to_device(np.zeros((size, 2, 2), bool), "simulated")
    with pytest.raises(InputError, match="no voxel to measure"):
        normalize.mean_std(device, nothing)
    with pytest.raises(InputError, match="does not fit"):
        normalize.mean_std(device, nothing[:, :1])
    if size == 0:
        with pytest.raises(InputError, match="minmax: the array is empty"):
            normalize.minmax(device)


@settings(max_examples=5)
@given(st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 31, 32, 33])), DTYPES, SEEDS)
def test_any_shape_in_the_cuda_simulator(shape, dtype, seed):
    host, device = image(shape, seed, dtype)
    mask, mask_there = chosen(host, seed)
    with cuda_simulator():
        clipped, inside = normalize.clip_shift_scale(device, -50, 80, 3, 7), normalize.standardize(device, mask_there, 3, 7)
        numbers = normalize.mean_std(device), normalize.minmax(device)
    np.testing.assert_array_equal(to_host(clipped), normalize.clip_shift_scale(host, -50, 80, 3, 7))
    np.testing.assert_array_equal(to_host(inside), normalize.standardize(host, mask, 3, 7))
    # float64 sums in another order
    np.testing.assert_allclose(numbers, (normalize.mean_std(host), normalize.minmax(host)), rtol=1e-12, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_in_the_cuda_simulator(dtype):
    host, device = image((2, 5, 130), 0, dtype)
    mask, mask_there = chosen(host, 0)
    with cuda_simulator():
        clipped, inside = normalize.clip_shift_scale(device, -50, 80, 3, 7), normalize.standardize(device, mask_there, 3, 7)
        numbers = normalize.mean_std(device), normalize.mean_std(device, mask_there), normalize.minmax(device)
    np.testing.assert_array_equal(to_host(clipped), normalize.clip_shift_scale(host, -50, 80, 3, 7))
    np.testing.assert_array_equal(to_host(inside), normalize.standardize(host, mask, 3, 7))
    expected = normalize.mean_std(host), normalize.mean_std(host, mask), normalize.minmax(host)
    np.testing.assert_allclose(numbers, expected, rtol=1e-12, atol=1e-7)
