"""PREDICT and TRAIN, first stage: an image becomes the array a network reads, and a `Placement` that leads back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import prod
from typing import TypeVar

import numpy as np

from .arrays import Array, FloatArray, Shape3, Spacing3
from .device import get_xp, on_device, to_host
from .errors import InputError
from .kernels.bbox import nonzero_bbox, nonzero_mask
from .kernels.normalize import mean_std, minmax, moments, standardize
from .kernels.onehot import include, mark_outside, one_hot
from .kernels.resample import resize, resize_labels, resize_labels_linear
from .spec import CTNorm, ModelSpec, NoNorm, Normalization, Resampling, RescaleNorm, RGBNorm, ShapeTarget, WindowNorm, ZScoreNorm
from .volume import Placement, Volume

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
Affine = tuple[float, float, float, float]
_UNBOUNDED = (-float("inf"), float("inf"))
_EPSILON = 1e-8
_MOST_VOXELS = 2**36  # 256 GiB for one float32 channel


def preprocess(volume: Volume, spec: ModelSpec, *, previous: Array | None = None) -> tuple[FloatArray, Placement]:
    """Transpose, crop, normalise and resample an image as the model was trained.

    Parameters
    ----------
    volume : (C, Z, Y, X) of any real dtype; not modified; its data may lie on a device
    previous : (Z, Y, X) labels of the stage before on the image's own grid, wherever they lie; needed by a cascade

    Returns
    -------
    data : (C, Z, Y, X) float32 on the working grid, one-hot labels of the stage before as its last channels, where the image's data lies
    placement : where that array sits in the image

    Raises
    ------
    InputError
        When the number of channels is not the model's, or a cascade gets no labels of the stage before.
    """
    _check_channels(volume, spec, previous)
    placement = place(volume, spec)
    image = volume.data.transpose(0, *(axis + 1 for axis in spec.transpose))[(slice(None), *placement.slices)]
    if on_device(image) and spec.transpose != (0, 1, 2):
        image = get_xp(image).ascontiguousarray(image)  # once, not in every kernel: neighbouring threads read neighbouring voxels
    labels = None if previous is None or spec.previous is None else _beside(previous, image).transpose(spec.transpose)[placement.slices]
    mask = None
    if labels is not None or any(isinstance(c.normalization, ZScoreNorm) and c.normalization.masked for c in spec.channels):
        mask = nonzero_mask(image)
    if labels is not None and mask is not None:
        # nnU-Net's mask is its segmentation, -1 outside: a label of the stage before is inside wherever it lies
        mask = include(mask, labels)
    data: FloatArray = get_xp(image).empty((spec.in_channels, *placement.shape), np.float32)
    separate = spec.resample_image.separate_axis(placement.transposed_spacing, placement.spacing)
    for channel, part, out in zip(image, spec.channels, data, strict=False):
        _normalize_resize(channel, part.normalization, mask, spec.resample_image, separate, out, f"{volume.name}, channel {part.name}")
    if labels is not None and mask is not None:
        _one_hot(labels, mask, spec, placement, data[len(spec.channels) :])
    return data, placement


def place_labels(labels: Array, volume: Volume, spec: ModelSpec, placement: Placement) -> Array:
    """Bring a label map of the image onto its working grid, as `preprocess` brings the labels of a stage before; TRAIN's targets.

    Parameters
    ----------
    labels : (Z, Y, X) any integer dtype, on the image's own grid; not modified
    volume : the image; when the spec crops to what is not zero, background outside that becomes -1
    placement : from `preprocess`

    Returns
    -------
    (Z, Y, X) int16 on the working grid

    Raises
    ------
    InputError
        When the labels have another shape than the image.
    """
    if labels.shape != volume.grid.shape:
        raise InputError(f"{volume.name}: its labels have shape {labels.shape}, the image {volume.grid.shape}")
    turned = labels.transpose(spec.transpose)[placement.slices]
    if spec.crop_nonzero:
        image = volume.data.transpose(0, *(axis + 1 for axis in spec.transpose))[(slice(None), *placement.slices)]
        turned = mark_outside(turned, include(nonzero_mask(image), turned))
    placed: Array = _resample_labels(turned, spec, placement).astype(np.int16)
    return placed


def _beside(labels: Array, image: Array) -> Array:
    """The labels where the image lies."""
    if on_device(image):
        moved: Array = get_xp(image).asarray(labels)
        return moved
    return to_host(labels)


def place(volume: Volume, spec: ModelSpec) -> Placement:
    """Decide the crop and the working grid of an image without touching its intensities."""
    grid, t = volume.grid, spec.transpose
    image = volume.data.transpose(0, *(axis + 1 for axis in t))
    z, y, x = image.shape[1:]
    bbox = nonzero_bbox(image) if spec.crop_nonzero else ((0, z), (0, y), (0, x))
    working, spacing = working_grid(spec, _triple(stop - start for start, stop in bbox), _triple(grid.spacing[a] for a in t))
    if prod(working) > _MOST_VOXELS:
        have, want = (", ".join(f"{s:g}" for s in mm) for mm in ((grid.spacing[a] for a in t), spacing))
        raise InputError(
            f"{volume.name} would be resampled to {' x '.join(str(n) for n in working)} voxels (its spacing is {have} mm, "
            f"the model works at {want} mm), more than any machine holds; check the unit of its spacing"
        )
    return Placement(grid, t, bbox, working, spacing)


def working_grid(spec: ModelSpec, cropped: Shape3, spacing: Spacing3) -> tuple[Shape3, Spacing3]:
    """Shape (z, y, x) and spacing (mm) a crop of shape `cropped` and `spacing` is resampled to."""
    if isinstance(spec.target, ShapeTarget):
        return spec.target.shape, _triple(s * n / m for s, n, m in zip(spacing, cropped, spec.target.shape, strict=True))
    target = _triple(s if t is None else t for s, t in zip(spacing, spec.target.spacing, strict=True))
    if spec.resample_image.method == "none":
        return cropped, target
    # Python's half-even rounding of old / new * n, as nnU-Net computes it; never less than one voxel
    return _triple(max(1, round(s / t * n)) for s, t, n in zip(spacing, target, cropped, strict=True)), target


def _check_channels(volume: Volume, spec: ModelSpec, previous: Array | None) -> None:
    names = ", ".join(c.name for c in spec.channels)
    if volume.data.shape[0] != len(spec.channels):
        raise InputError(f"{volume.name} has {volume.data.shape[0]} channel(s), model {spec.name!r} needs {len(spec.channels)} ({names})")
    if spec.previous is not None and previous is None:
        raise InputError(f"{volume.name}: model {spec.name!r} is the second stage of a cascade and needs the labels of the first")
    if previous is not None and previous.shape != volume.grid.shape:
        raise InputError(f"{volume.name}: labels of the previous stage have shape {previous.shape}, the image {volume.grid.shape}")


def _normalize_resize(
    channel: Array, norm: Normalization, mask: Array | None, how: Resampling, separate: int | None, out: FloatArray, name: str
) -> None:
    """Write one channel, normalised and resampled, into `out`."""
    order, clip = (1, False) if how.method == "linear" else (how.order, True)
    affine: Affine | None = None
    if isinstance(norm, ZScoreNorm) and norm.masked and mask is not None:
        channel = _standardize(channel, mask, name)
    else:
        affine = _affine(channel, norm, name)
    single = how.method == "linear"
    resize(channel, out.shape, order=order, separate=separate, order_z=how.order_z, single=single, clip=clip, affine=affine, out=out)


def _standardize(channel: Array, mask: Array, name: str) -> Array:
    """Zero mean and unit variance inside `mask`; the outside stays as it is."""
    count, mean, std = moments(channel, mask)
    if count == 0:
        logger.warning("%s has no voxel that is not zero; it is left as it is", name)
        return channel
    return standardize(channel, mask, mean, max(std, _EPSILON))


def _affine(channel: Array, norm: Normalization, name: str) -> Affine | None:
    """(lower, upper, shift, scale) such that a normalised voxel is (clip(v, lower, upper) - shift) / scale."""
    match norm:
        case CTNorm():
            return norm.lower, norm.upper, norm.mean, max(norm.std, _EPSILON)
        case WindowNorm():
            return norm.lower, norm.upper, norm.lower, (norm.upper - norm.lower) / norm.scale
        case ZScoreNorm():
            mean, std = mean_std(channel)
            return *_UNBOUNDED, mean, max(std, _EPSILON)
        case RescaleNorm():
            low, high = minmax(channel)
            return *_UNBOUNDED, low, max(high - low, _EPSILON)
        case RGBNorm():
            low, high = minmax(channel)
            if low < 0 or high > 255:
                raise InputError(f"{name}: expected 8-bit colour in 0..255, found values {low:g}..{high:g}")
            return *_UNBOUNDED, 0.0, 255.0
        case NoNorm():
            return None


def _one_hot(labels: Array, mask: Array, spec: ModelSpec, placement: Placement, out: FloatArray) -> None:
    """Resample the labels of the stage before and write one channel per label into `out`."""
    assert spec.previous is not None
    # nnU-Net marks background outside the non-zero mask by -1 before it resamples; that competes at the borders
    one_hot(_resample_labels(mark_outside(labels, mask), spec, placement), spec.previous.values, out)


def _resample_labels(labels: Array, spec: ModelSpec, placement: Placement) -> Array:
    how = spec.resample_labels
    separate = how.separate_axis(placement.transposed_spacing, placement.spacing)
    if how.method == "linear":
        return resize_labels_linear(labels, placement.shape, separate=separate)
    return resize_labels(labels, placement.shape, order=how.order, separate=separate, order_z=how.order_z)


def _triple(values: Iterable[_T]) -> tuple[_T, _T, _T]:
    z, y, x = values
    return z, y, x
