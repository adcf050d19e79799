"""TRAIN, label values become what the loss compares with: class indices or regions, at every resolution the network is supervised at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..arrays import Array
from ..spec import ModelSpec

IGNORED = -1


def make_targets(labels: Tensor, spec: ModelSpec, scales: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    """Return one target per scale; a single one when all scales are alike.

    Parameters
    ----------
    labels : ([z,] y, x) int16 label values; -1 (outside the image) is background
    scales : shares of the axes, finest first

    Returns
    -------
    tuple of ([z,] y, x) int16, k where the label is `spec.head.values[k]`; for regions (K, [z,] y, x) int8, 1 where the label is one of
    region k's. -1 where the label is the ignored one.
    """
    convert = _regions if spec.head.activation == "sigmoid" else _indices
    distinct = tuple(dict.fromkeys(tuple(scale) for scale in scales))
    targets = tuple(convert(_shrunk(labels, scale[-labels.ndim :]), spec) for scale in distinct)
    return targets if len(targets) == len(scales) or len(targets) == 1 else tuple(targets[distinct.index(tuple(s))] for s in scales)


def class_names(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the foreground channels of the network's output, in their order."""
    if spec.head.activation == "sigmoid":
        return tuple(label.name for label in spec.labels)
    named = {label.values[0]: label.name for label in spec.labels}
    return tuple(named.get(value, str(value)) for value in spec.head.values[1:])


def class_values(spec: ModelSpec) -> tuple[int, ...]:
    """Label values the foreground channels become in a prediction, in their order."""
    return spec.head.values if spec.head.activation == "sigmoid" else spec.head.values[1:]


def label_values(target: Array, spec: ModelSpec) -> Array:
    """Give the label map a target stands for; regions are painted one over the other, as predictions are.

    Parameters
    ----------
    target : ([z,] y, x) class indices, or (K, [z,] y, x) regions, -1 where nothing is learned; see `make_targets`

    Returns
    -------
    ([z,] y, x) int16, -1 where nothing is learned
    """
    values = spec.head.values
    if spec.head.activation == "softmax":
        return np.array((*values, IGNORED), np.int16)[target]
    labels = np.where(target[0] == IGNORED, IGNORED, 0).astype(np.int16)
    for value, region in zip(values, target, strict=True):
        labels[region > 0] = value
    return labels


def _shrunk(labels: Tensor, scale: Sequence[float]) -> Tensor:
    """The nearest voxel of a coarser grid, as nnU-Net takes it."""
    if all(share == 1 for share in scale):
        return labels
    shape = [round(size * share) for size, share in zip(labels.shape, scale, strict=True)]
    return functional.interpolate(labels[None, None].float(), shape, mode="nearest-exact")[0, 0].to(labels.dtype)


def _indices(labels: Tensor, spec: ModelSpec) -> Tensor:
    values = spec.head.values
    if spec.ignore is None and values == tuple(range(len(values))):
        return labels.clamp(min=0)
    # the last entry is what -1 finds: the background
    table = np.zeros(max(*values, spec.ignore or 0) + 2, np.int16)
    table[list(values)] = np.arange(len(values))
    table[-1] = table[0]
    if spec.ignore is not None:
        table[spec.ignore] = IGNORED
    return torch.from_numpy(table[labels.numpy()])


def _regions(labels: Tensor, spec: ModelSpec) -> Tensor:
    masks = [torch.isin(labels, torch.tensor(region.values, dtype=labels.dtype)) for region in spec.labels]
    regions = torch.stack(masks).to(torch.int8)
    if spec.ignore is not None:
        regions[:, labels == spec.ignore] = IGNORED
    return regions
