"""`preprocess` on a device gives what it gives on the CPU, for the ways nnU-Net prepares an image."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from factories import make_spec, volume_of

from segrt.device import on_device, to_device, to_host
from segrt.errors import InputError
from segrt.kernels._cuda.launch import cuda_simulator
from segrt.phantom import make_phantom
from segrt.preprocess import preprocess
from segrt.spec import (
    Channel,
    CTNorm,
    NoNorm,
    PreviousStage,
    Resampling,
    RescaleNorm,
    RGBNorm,
    ShapeTarget,
    SpacingTarget,
    WindowNorm,
    ZScoreNorm,
)
from segrt.volume import Volume

CT = CTNorm(lower=-160, upper=240, mean=40, std=110)
ISOTROPIC = SpacingTarget(spacing=(3.0, 3.0, 3.0))
CASCADE = {"previous": PreviousStage(values=(1, 2, 6))}


@pytest.fixture(scope="module")
def phantom():
    """A coarse abdominal CT, its labels and its grid."""
    return make_phantom(np.random.default_rng(11), spacing=(5.0, 4.0, 4.0), shape=(21, 60, 75))


@pytest.fixture(scope="module")
def zero_outside(phantom):
    """Like an MRI whose background was set to zero, with air inside that is zero too."""
    image = np.maximum(phantom[0].astype(np.int32) + 400, 0).astype(np.int16)
    image[:3], image[:, :7], image[:, :, -9:] = 0, 0, 0
    return image


def both(data, spacing, spec, *, previous=None):
    """What the CPU and what the device gives, with the same placement."""
    volume = volume_of(data, spacing)
    expected, placement = preprocess(volume, spec, previous=previous)
    there = Volume(to_device(volume.data, "simulated"), volume.grid, volume.name)
    result, same = preprocess(there, spec, previous=previous)
    assert same == placement
    assert on_device(result)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(to_host(there.data), volume.data)
    return to_host(result), expected


def assert_close(result, expected):
    # float32 sums of a spline in another order: 3e-7 of the range is seen on either side of the exact value
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * max(1, np.ptp(expected)))


@pytest.mark.parametrize(
    "resampling",
    [
        Resampling(order=3, separate=False),
        Resampling(method="linear", order=1, separate=False),
        Resampling(order=3, separate=True),
        Resampling(order=3, order_z=1, separate=True),
        Resampling(method="linear", order=1, separate=True),
        Resampling(order=0, separate=False),
    ],
    ids=["spline", "linear", "separate z", "separate z, linear", "separate z, torch", "nearest"],
)
@pytest.mark.parametrize("target", [ISOTROPIC, SpacingTarget(spacing=(2.5, 6.0, 5.0)), ShapeTarget(shape=(21, 32, 48))])
def test_ct(phantom, resampling, target):
    image, _, grid = phantom
    spec = make_spec(channels=(Channel(name="CT", normalization=CT),), target=target, resample_image=resampling, crop_nonzero=False)
    assert_close(*both(image, grid.spacing, spec))


def test_anisotropic_images_are_resampled_slice_by_slice(phantom):
    image, _, grid = phantom
    spec = make_spec(channels=(Channel(name="CT", normalization=CT),), target=ISOTROPIC)
    assert spec.resample_image.separate_axis((15.0, *grid.spacing[1:]), (3.0, 3.0, 3.0)) == 0
    assert_close(*both(image, (15.0, *grid.spacing[1:]), spec))


def test_an_image_that_is_on_the_working_grid(phantom):
    image, _, grid = phantom
    spec = make_spec(channels=(Channel(name="CT", normalization=CT),))
    np.testing.assert_array_equal(*both(image, grid.spacing, spec))


@pytest.mark.parametrize(
    "normalization",
    [ZScoreNorm(masked=True), ZScoreNorm(), RescaleNorm(), NoNorm(), WindowNorm(lower=-100, upper=300)],
    ids=["masked", "z-score", "rescale", "none", "window"],
)
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint16])
def test_several_channels_cropped_and_normalised_by_their_own_numbers(zero_outside, normalization, dtype):
    data = np.stack([zero_outside, zero_outside // 2]).astype(dtype)
    channels = tuple(Channel(name=name, normalization=normalization) for name in ("T1", "T2"))
    spec = make_spec(channels=channels, target=ISOTROPIC, resample_image=Resampling(separate=False))
    result, expected = both(data, (4.0, 4.0, 4.0), spec)
    assert result.shape[1:] != data.shape[1:]
    assert_close(result, expected)


def test_a_turned_image(zero_outside):
    channels = (Channel(name="T1", normalization=ZScoreNorm(masked=True)),)
    spec = make_spec(channels=channels, target=ISOTROPIC, transpose=(2, 0, 1), resample_image=Resampling(separate=True))
    assert_close(*both(zero_outside, (4.0, 4.0, 4.5), spec))


@pytest.mark.parametrize(
    "how",
    [
        Resampling(order=1, separate=False),
        Resampling(order=1, separate=True),
        Resampling(method="linear", order=1, separate=False),
        Resampling(order=3, separate=False),
    ],
    ids=["corners", "separate z", "torch", "spline"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_cascade(phantom, zero_outside, how, dtype):
    labels = phantom[1].astype(dtype)
    spec = make_spec(**CASCADE, target=ISOTROPIC, resample_labels=how, resample_image=Resampling(separate=False))
    result, expected = both(zero_outside, (5.0, 4.0, 4.0), spec, previous=labels)
    assert_close(result[:1], expected[:1])
    np.testing.assert_array_equal(result[1:], expected[1:])
    assert (expected[1:].max(axis=(1, 2, 3)) == 1).all()


def test_labels_come_from_wherever_they_lie(phantom):
    image, labels, grid = phantom
    spec = make_spec(**CASCADE, target=ISOTROPIC, crop_nonzero=False)
    volume = volume_of(image, grid.spacing)
    expected, _ = preprocess(volume, spec, previous=labels)
    there = to_device(labels, "simulated")
    np.testing.assert_array_equal(preprocess(volume, spec, previous=there)[0], expected)
    on_both = Volume(to_device(volume.data, "simulated"), volume.grid)
    np.testing.assert_array_equal(to_host(preprocess(on_both, spec, previous=there)[0])[1:], expected[1:])
    np.testing.assert_array_equal(to_host(there), labels)


def test_an_empty_image_is_left_as_it_is(caplog: pytest.LogCaptureFixture):
    spec = make_spec(channels=(Channel(name="T1", normalization=ZScoreNorm(masked=True)),), target=ISOTROPIC)
    with caplog.at_level(logging.WARNING):
        result, expected = both(np.zeros((4, 5, 6), np.int16), (4.0, 4.0, 4.0), spec)
    assert (result == 0).all()
    np.testing.assert_array_equal(result, expected)
    assert [r.getMessage() for r in caplog.records] == 2 * ["image, channel T1 has no voxel that is not zero; it is left as it is"]


def test_colours_beyond_eight_bits_are_refused():
    data = to_device(np.full((1, 2, 3, 4), 256, np.int16), "simulated")
    spec = make_spec(channels=(Channel(name="red", normalization=RGBNorm()),))
    with pytest.raises(InputError, match="channel red: expected 8-bit colour"):
        preprocess(Volume(data, volume_of(np.zeros((2, 3, 4))).grid), spec)


def test_in_the_cuda_simulator(zero_outside):
    corner = zero_outside[8:12, 25:33, 30:39]
    labels = (corner > 450).astype(np.uint8)
    channels = (Channel(name="T1", normalization=ZScoreNorm(masked=True)),)
    spec = make_spec(channels=channels, previous=PreviousStage(values=(1,)), target=ISOTROPIC, resample_image=Resampling(separate=False))
    volume = volume_of(corner, (4.0, 4.0, 4.0))
    expected, _ = preprocess(volume, spec, previous=labels)
    with cuda_simulator():
        result, _ = preprocess(Volume(to_device(volume.data, "simulated"), volume.grid), spec, previous=labels)
    assert_close(to_host(result)[:1], expected[:1])
    np.testing.assert_array_equal(to_host(result)[1:], expected[1:])
