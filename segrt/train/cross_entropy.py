"""Cross-entropy with class weights and voxels left out, and the targets it compares with; used by the losses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import SpecError
from ..spec import ModelSpec

ClassWeights = Literal["none", "batch", "first_batch"] | tuple[float, ...]

IGNORED = -1


def check_class_weights(weights: ClassWeights, spec: ModelSpec, kind: str) -> tuple[float, ...] | None:
    """Give the weights that are numbers, one per class.

    Raises
    ------
    SpecError
        See `build_loss`.
    """
    if weights == "none":
        return None
    if spec.head.activation == "sigmoid":
        raise SpecError("class_weights: this model has regions, which are learned one by one; leave them out")
    if isinstance(weights, str):
        if kind != "mixed":
            raise SpecError(f"class_weights: {weights!r} belongs to loss 'mixed'; use that, or give a number per class")
        return None
    if len(weights) != spec.classes or not any(weights):
        raise SpecError(
            f"class_weights: expected one number for each of the {spec.classes} classes (background first), not all 0, got {weights}"
        )
    return weights


def nll(logs: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of minus the log-probability of the true class, weighted by class; 0 where every voxel is ignored."""
    total = functional.nll_loss(logs, target, weights, ignore_index=IGNORED, reduction="sum")
    counted = target != IGNORED
    share = counted.sum() if weights is None else (weights[target.clamp_min(0)] * counted).sum()
    return total / torch.where(share > 0, share, 1)


def class_indices(logits: Tensor, target: Tensor) -> Tensor:
    """(N, ...) int64."""
    return (target[:, 0] if target.ndim == logits.ndim else target).long()


def one_hot(target: Tensor, classes: int) -> Tensor:
    """(N, ...) -> (N, C, ...) bool, all false where ignored."""
    numbers = torch.arange(classes, device=target.device).view(1, -1, *[1] * (target.ndim - 1))
    return target[:, None] == numbers


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
