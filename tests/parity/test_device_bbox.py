"""Boxes and masks on a device: scipy == CPU == the loop over threads == the CUDA simulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segrt.device import Simulated, on_device, to_device, to_host
from segrt.errors import InputError
from segrt.kernels._cuda.launch import cuda_simulator, recording
from segrt.kernels.bbox import fill_enclosed, nonzero_bbox, nonzero_mask

DTYPES = ["int16", "uint8", "float32", "float16", "float64", "int32", "uint64", "bool"]
shapes = st.tuples(*[st.integers(1, 9)] * 3)


def expected_box(mask):
    if not mask.any():
        return tuple((0, n) for n in mask.shape)
    return tuple((int(index.min()), int(index.max()) + 1) for index in np.nonzero(mask))


def sparse(rng, channels, shape, dtype, density):
    data = rng.integers(1, 100, (channels, *shape)) * (rng.random((channels, *shape)) < density)
    return data.astype(dtype)


@given(
    shapes,
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 0.01, 0.3, 0.9, 1]),
    st.permutations(range(3)),
    st.integers(0, 99),
)
def test_box_and_mask(shape, channels, dtype, density, axes, seed):
    rng = np.random.default_rng(seed)
    # turned and cut: strides as `preprocess` has them
    host = sparse(rng, channels, [n + 2 for n in shape], dtype, density)
    device = to_device(host, "simulated")
    view = (slice(None), slice(1, -1), slice(0, -2), slice(2, None))
    host, device = (a.transpose(0, *(axis + 1 for axis in axes))[view] for a in (host, device))
    assert nonzero_bbox(device) == nonzero_bbox(host) == expected_box((host != 0).any(axis=0))
    mask = nonzero_mask(device)
    assert on_device(mask)
    assert mask.dtype == bool
    expected = ndimage.binary_fill_holes((host != 0).any(axis=0))
    np.testing.assert_array_equal(to_host(mask), expected)
    np.testing.assert_array_equal(nonzero_mask(host), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_zero_has_no_sign_and_nan_is_not_zero(dtype):
    data = np.zeros((1, 3, 4, 5), dtype)
    data[0, 1, :2, 3] = -0.0, np.nan
    assert nonzero_bbox(to_device(data, "simulated")) == ((1, 2), (1, 2), (3, 4))
    assert to_host(nonzero_mask(to_device(data, "simulated"))).sum() == 1


def test_the_smallest_value_that_is_not_zero_counts():
    data = np.zeros((1, 2, 2, 2), np.int16)
    data[0, 1, 0, 1] = np.iinfo(np.int16).min
    assert nonzero_bbox(to_device(data, "simulated")) == ((1, 2), (0, 1), (1, 2))


@given(shapes, st.floats(0.3, 0.95), st.integers(0, 99))
def test_enclosed_voxels_are_set_in_place(shape, density, seed):
    mask = np.random.default_rng(seed).random(shape) < density
    device = to_device(mask, "simulated")
    fill_enclosed(device)
    np.testing.assert_array_equal(to_host(device), ndimage.binary_fill_holes(mask))
    fill_enclosed(mask)
    np.testing.assert_array_equal(to_host(device), mask)


def test_only_part_of_an_array_is_filled():
    shell = np.ones((4, 5, 6), bool)
    shell[1:3, 1:4, 1:5] = False
    device = to_device(np.pad(shell, 1), "simulated")
    fill_enclosed(device[1:-1, 1:-1, 1:-1])
    np.testing.assert_array_equal(to_host(device), np.pad(np.ones((4, 5, 6), bool), 1))


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 4, 9), (3, 1, 1)])
def test_under_the_cuda_simulator(shape):
    data = sparse(np.random.default_rng(4), 2, shape, "float32", 0.45)
    with cuda_simulator():
        box, mask = nonzero_bbox(to_device(data, "simulated")), nonzero_mask(to_device(data, "simulated"))
    assert box == nonzero_bbox(data)
    np.testing.assert_array_equal(to_host(mask), nonzero_mask(data))


@settings(max_examples=5)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from(DTYPES), st.sampled_from([0.1, 0.8]), st.integers(0, 99))
def test_any_shape_under_the_cuda_simulator(shape, dtype, density, seed):
    # turned and cut
    data = sparse(np.random.default_rng(seed), 1, [n + 2 for n in shape], dtype, density)
    device = to_device(data, "simulated")
    data, device = (a.transpose(0, 3, 1, 2)[:, 1:-1, 0:-2, 2:] for a in (data, device))
    with cuda_simulator():
        box, mask = nonzero_bbox(device), nonzero_mask(device)
    assert box == nonzero_bbox(data)
    np.testing.assert_array_equal(to_host(mask), nonzero_mask(data))


def test_a_box_is_one_launch_and_a_mask_four():
    data = to_device(np.ones((1, 4, 4, 4), np.int16), "simulated")
    with recording() as launches:
        nonzero_bbox(data)
    assert [one.kernel.name for one in launches] == ["grow_box"]
    with recording() as launches:
        nonzero_mask(data)
    assert [one.kernel.name for one in launches] == ["mark_nonzero", "pack_blocks", "join_faces", "fill_parts"]


def test_a_mask_that_32_bits_cannot_count_is_refused():
    huge = np.broadcast_to(np.zeros((1, 1, 1), bool), (2048, 1024, 1024)).view(Simulated)
    with pytest.raises(InputError, match="2147483648 voxels"):
        fill_enclosed(huge)
