"""TRAIN, the three transforms the article's V-Net was trained with: a resized crop, a rotation about one axis, a flip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..arrays import Shape3
from .config import Transforms

_ARTICLE = Transforms()
_TRIES = 10


def augment(
    image: Tensor, labels: Tensor, size: Shape3, rng: np.random.Generator, transforms: Transforms = _ARTICLE
) -> tuple[Tensor, Tensor]:
    """Crop and resize to `size`, rotate, and flip a volume.

    Parameters
    ----------
    image : (C, Z, Y, X) float32, resampled linearly; 0 comes in from outside
    labels : (S, Z, Y, X) int16, the nearest label always: the article's software rotated them linearly and made labels that no organ
        has; -1 comes in from outside
    """
    if transforms.scale is not None:
        image, labels = resized_crop(image, labels, size, rng, transforms)
    if transforms.degrees:
        degrees = float(rng.uniform(-transforms.degrees, transforms.degrees))
        image, labels = rotate(image, labels, degrees, int(rng.integers(3)))
    axis = int(rng.integers(3))
    if rng.uniform() < transforms.flip:
        image, labels = image.flip(axis + 1), labels.flip(axis + 1)
    return image, labels


def resized_crop(
    image: Tensor, labels: Tensor, size: Shape3, rng: np.random.Generator, transforms: Transforms = _ARTICLE
) -> tuple[Tensor, Tensor]:
    """Cut a box of a share of the volume, two of its sides in a random ratio, and resize it to `size`.

    Of ten boxes the first that fits is taken, else the largest cube in the middle.
    """
    start, shape = _box(image.shape[1:], rng, transforms)
    where = (slice(None), *(slice(s, s + n) for s, n in zip(start, shape, strict=True)))
    image, labels = image[where], labels[where]
    if tuple(shape) == tuple(size):
        return image, labels
    resized = functional.interpolate(image[None], size, mode="trilinear", align_corners=False)[0]
    nearest = functional.interpolate(labels[None].float(), size, mode="nearest-exact")[0]
    return resized, nearest.to(labels.dtype)


def _box(shape: Sequence[int], rng: np.random.Generator, transforms: Transforms = _ARTICLE) -> tuple[list[int], list[int]]:
    scale = transforms.scale or (1.0, 1.0)
    for _ in range(_TRIES):
        volume, ratio = rng.uniform(*scale) * np.prod(shape, dtype=float), rng.uniform(*transforms.ratio)
        sides = [round((volume * ratio) ** (1 / 3)), round((volume / ratio) ** (1 / 3)), shape[2]]
        if rng.uniform() < 0.5:
            sides = [sides[i] for i in rng.permutation(3)]
        if all(side <= n for side, n in zip(sides, shape, strict=True)):
            return [int(rng.integers(n - side + 1)) for side, n in zip(sides, shape, strict=True)], sides
    side = min(shape)
    return [(n - side) // 2 for n in shape], [side] * 3


def rotate(image: Tensor, labels: Tensor, degrees: float, axis: int) -> tuple[Tensor, Tensor]:
    """Rotate (C, Z, Y, X) and (S, Z, Y, X) about the middle of the volume in the plane across `axis`; the shape stays."""
    angle = np.deg2rad(degrees)
    a, b = (n for i, n in enumerate(image.shape[1:]) if i != axis)
    u, v = torch.meshgrid(torch.arange(a) - (a - 1) / 2, torch.arange(b) - (b - 1) / 2, indexing="ij")
    source_u, source_v = np.cos(angle) * u + np.sin(angle) * v, -np.sin(angle) * u + np.cos(angle) * v
    grid = torch.stack((source_v * 2 / b, source_u * 2 / a), -1)[None].float()
    rotated = _planes(image, grid, axis, "bilinear")
    # shifted by one, so that what comes in from outside is -1
    nearest = _planes(labels.float() + 1, grid, axis, "nearest").to(labels.dtype) - 1
    return rotated, nearest


def _planes(volume: Tensor, grid: Tensor, axis: int, mode: str) -> Tensor:
    """Sample every plane across `axis` at the same places."""
    moved = volume.movedim(axis + 1, 1)
    planes = functional.grid_sample(moved.reshape(1, -1, *moved.shape[2:]), grid, mode=mode, padding_mode="zeros", align_corners=False)
    return planes[0].reshape(moved.shape).movedim(1, axis + 1)
