"""Soft Dice of probabilities, over the samples of all processes where asked; used by the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce


def soft_sums(probabilities: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
    """Sum intersection, prediction and truth per sample and channel.

    Parameters
    ----------
    probabilities : (N, C, ...) float
    truth : (N, C, ...) bool, false where voxels are to be ignored
    mask : (N, 1, ...) bool, false there; None for all true

    Returns
    -------
    (3, N, C) of the probabilities' type
    """
    spatial = tuple(range(2, probabilities.ndim))
    predicted = (probabilities if mask is None else probabilities * mask).sum(spatial)
    return torch.stack(((probabilities * truth).sum(spatial), predicted, truth.sum(spatial).to(predicted.dtype)))


def soft_dice_loss(sums: Tensor, *, batch: bool, everywhere: bool, smooth: float = 1e-5) -> Tensor:
    """Minus the mean over channels, and samples unless `batch`, of (2 I + smooth) / (P + T + smooth).

    Parameters
    ----------
    sums : (3, N, C), see `soft_sums`
    batch : the samples' sums are added first, as if they were one volume
    everywhere : with `batch`, those of all processes too
    """
    if batch:
        sums = sums.sum(1)
        sums = over_processes(sums) if everywhere else sums
    intersection, predicted, truth = sums
    dice: Tensor = (2 * intersection + smooth) / (predicted + truth + smooth).clamp_min(1e-8)
    return -dice.mean()


def over_processes(values: Tensor) -> Tensor:
    """Add up `values` of all processes; the gradient of each process's loss reaches every process's values.

    DDP divides gradients by the number of processes, so what comes of a loss that every process computes alike is its gradient once.
    """
    summed: Tensor = _AllReduce.apply(values)  # type: ignore[no-untyped-call]
    return summed


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        all_reduce(values, op=ReduceOp.SUM)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        all_reduce(gradient, op=ReduceOp.SUM)
        return gradient
