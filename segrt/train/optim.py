"""Optimizers and learning rates of a training, as its `TrainConfig` names them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig

logger = logging.getLogger(__name__)


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer; L1 regularisation is part of its step.

    As `weight_decay` is, L1 is added after the gradient was clipped: every step reads gradient + l1 * sign(weight).

    Parameters
    ----------
    parameters : what is learned
    config : optimizer, lr, momentum, nesterov, betas, weight_decay, l1

    Returns
    -------
    Optimizer : torch's SGD, Adam (weight decay as L2) or AdamW (weight decay apart from the gradient)
    """
    learned = [p for p in parameters if p.requires_grad]
    match config.optimizer:
        case "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                learned, config.lr, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay
            )
        case "adam":
            optimizer = torch.optim.Adam(learned, config.lr, betas=config.betas, weight_decay=config.weight_decay)
        case "adamw":
            optimizer = torch.optim.AdamW(learned, config.lr, betas=config.betas, weight_decay=config.weight_decay)
    if config.l1:
        optimizer.register_step_pre_hook(lambda opt, *_: _add_l1(opt, config.l1))
    return optimizer


@torch.no_grad()
def _add_l1(optimizer: torch.optim.Optimizer, l1: float) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.add_(p.sign(), alpha=l1)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most `limit`, in place.

    Returns
    -------
    Tensor : () float32, the norm before, NaN or infinite where a gradient is
    """
    return nn.utils.clip_grad_norm_(parameters, limit)


def learning_rate(config: TrainConfig, iteration: int, total: int, *, spent: float = 0.0) -> float:
    """Return the learning rate of an iteration (from 0) of a training of `total`.

    poly: (lr - end) (1 - t / D)^power + end, with D = `decay_iterations` or the whole training, and `end` from there on. cosine: half a
    wave from lr to `end_lr`, with the same D. step: lr * gamma^(t // step_iterations), or gamma to the number of `step_epochs` that are
    over. Under `schedule_by_epoch` t and D count whole epochs, so the rate is constant within one, as nnU-Net's is. `spent` is the share of
    a limited training's time that is over: where it is larger than t / D, it takes its place.
    """
    unit = config.epoch if config.schedule_by_epoch else 1
    now = iteration // unit * unit
    left = 1 - min(max(now / _decay(config, total), spent), 1.0)
    match config.schedule:
        case "constant":
            return config.lr
        case "poly":
            return (config.lr - config.final_lr) * math.pow(left, config.power) + config.final_lr
        case "cosine":
            return (config.lr - config.final_lr) * (1 - math.cos(math.pi * left)) / 2 + config.final_lr
        case "step":
            passed = now // config.step_iterations
            if config.step_epochs:
                passed = sum(now >= after * config.epoch for after in config.step_epochs)
            return config.lr * math.pow(config.gamma, passed)


def _decay(config: TrainConfig, total: int) -> int:
    """Iterations until the rate has fallen, in whole epochs where it falls by epoch."""
    unit = config.epoch if config.schedule_by_epoch else 1
    return -(-(config.decay_iterations or total) // unit) * unit


class Schedule:
    """Sets an optimizer's learning rate; `step` comes after each iteration.

    It remembers nothing but the number of the iteration and the share of the time that is over, so what it does after a resume is what it
    would have done.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, total: int) -> None:
        self._optimizer, self._config, self._total = optimizer, config, total
        self._set(0, 0.0)

    def step(self, spent: float = 0.0) -> None:
        """Go on to the next iteration; `spent` is the share of the training's time that is over."""
        self._set(self.iteration + 1, spent)

    def state_dict(self) -> dict[str, Any]:
        """All there is to remember."""
        return {"iteration": self.iteration, "spent": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the iteration of `state`."""
        self._set(int(state["iteration"]), float(state.get("spent", 0.0)))

    def _set(self, iteration: int, spent: float) -> None:
        self.iteration, self.spent = iteration, spent
        self.lr = learning_rate(self._config, iteration, self._total, spent=spent)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int) -> Schedule:
    """Make the learning rate's schedule for a training of `total` iterations and set the rate of the first.

    A rate that reaches zero before the training ends is logged as a warning: what comes after learns nothing.
    """
    decay = _decay(config, total)
    if config.schedule in ("poly", "cosine") and decay < total and config.final_lr == 0:
        logger.warning(
            "the learning rate is 0 from iteration %d of %d on, and what comes after learns nothing: let it fall over all %d iterations or "
            "to an end_lr above 0",
            *(decay, total, total),
        )
    return Schedule(optimizer, config, total)
