"""Optimizers and learning rates against float64 re-statements over 50 steps, and their state kept and restored."""

from __future__ import annotations

import io
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from segrt.train.config import TrainConfig, make_config
from segrt.train.optim import build_optimizer, build_schedule, clip_gradients, learning_rate

STEPS = 50
RNG = np.random.default_rng(0)
START, TARGETS = RNG.normal(size=(4, 3)), RNG.normal(size=(STEPS, 4, 3))


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"schedule_by_epoch": False, "iterations": STEPS} | changes))


def gradient(weights: np.ndarray, step: int) -> np.ndarray:
    """Of the sum of (w - target)^2 cosh-like terms: not the same twice, and steep enough to be clipped."""
    return 4 * (weights - TARGETS[step]) ** 3 + weights


class Reference:
    """The optimizers' formulas in NumPy, float64."""

    def __init__(self, chosen: TrainConfig) -> None:
        self.c, self.w = chosen, START.copy()
        self.m, self.v, self.t = np.zeros_like(START), np.zeros_like(START), 0

    def step(self, g: np.ndarray, lr: float) -> None:
        c = self.c
        self.t += 1
        if c.clip:
            g = g * min(1.0, c.clip / (np.sqrt((g**2).sum()) + 1e-6))
        g = g + c.l1 * np.sign(self.w)
        if c.optimizer == "adamw":
            self.w = self.w * (1 - lr * c.weight_decay)
        else:
            g = g + c.weight_decay * self.w
        if c.optimizer == "sgd":
            self.m = c.momentum * self.m + g if self.t > 1 else g
            self.w = self.w - lr * (g + c.momentum * self.m if c.nesterov else self.m)
            return
        b1, b2 = c.betas
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        self.w = self.w - lr * (self.m / (1 - b1**self.t)) / (np.sqrt(self.v / (1 - b2**self.t)) + 1e-8)


def one_step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, chosen: TrainConfig, step: int) -> None:
    weight.grad = torch.from_numpy(gradient(weight.detach().numpy(), step))
    if chosen.clip:
        clip_gradients([weight], chosen.clip)
    optimizer.step()


CHOICES = {
    "nnU-Net": {},
    "no nesterov": {"nesterov": False, "momentum": 0.9, "weight_decay": 1e-4, "clip": 0},
    "no momentum": {"nesterov": False, "momentum": 0.0},
    "adam": {"optimizer": "adam", "lr": 1e-2, "weight_decay": 2e-2},
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 2e-1, "betas": (0.8, 0.95)},
    "l1": {"l1": 0.1, "lr": 1e-2},
    "l1, adam, no clipping": {"optimizer": "adam", "l1": 0.1, "lr": 1e-2, "clip": 0},
    "l1, adamw": {"optimizer": "adamw", "l1": 0.1, "lr": 1e-2},
    "article": {"schedule": "poly", "decay_iterations": 25, "end_lr": 1e-4},
    "cosine": {"schedule": "cosine", "end_lr": 1e-4},
    "step": {"schedule": "step", "step_iterations": 20},
    "constant": {"schedule": "constant"},
    "epochs": {"schedule_by_epoch": True, "epoch": 10},
}


@pytest.mark.parametrize("name", CHOICES)
def test_fifty_steps_equal_the_reference(name: str) -> None:
    chosen = config(**CHOICES[name])
    weight, reference = nn.Parameter(torch.from_numpy(START.copy())), Reference(chosen)
    optimizer = build_optimizer([weight], chosen)
    schedule = build_schedule(optimizer, chosen, STEPS)
    for step in range(STEPS):
        reference.step(gradient(reference.w, step), slow_rate(chosen, step))
        one_step(weight, optimizer, chosen, step)
        schedule.step()
        assert weight.detach().numpy() == pytest.approx(reference.w, rel=1e-9, abs=1e-12), step
    assert np.abs(weight.detach().numpy() - START).max() > 0.01


def slow_rate(c: TrainConfig, step: int) -> float:
    """The rate, as the issue and SEEDS 2.3 write it."""
    total = c.iterations if c.decay_iterations is None else c.decay_iterations
    if c.schedule_by_epoch:
        step, total = step // c.epoch, total // c.epoch
    if c.schedule == "poly":
        return float((c.lr - c.end_lr) * (1 - min(step, total) / total) ** c.power + c.end_lr)
    if c.schedule == "cosine":
        return float(c.end_lr + (c.lr - c.end_lr) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total)))
    if c.schedule == "step":
        rate = c.lr
        for milestone in range(c.step_iterations, step + 1, c.step_iterations):
            rate *= c.gamma if milestone <= step else 1
        return rate
    return c.lr


def test_nnunets_rate_falls_by_epoch() -> None:
    chosen = make_config("nnunet")
    for epoch, rate in ((0, 0.01), (1, 0.01 * 0.999**0.9), (999, 0.01 * 0.001**0.9)):
        for iteration in (250 * epoch, 250 * epoch + 249):
            assert learning_rate(chosen, iteration, 250_000) == pytest.approx(rate, rel=1e-12)
    short = config(schedule_by_epoch=True, epoch=250)
    assert learning_rate(short, 400, 401) == pytest.approx(0.01 * 0.5**0.9)  # the second of two epochs, which is cut short


def test_the_articles_rate_falls_by_iteration() -> None:
    """lr 1e-3 over 15000 of 30000 iterations: SEEDS 1.3."""
    chosen = make_config("vnet", decay_iterations=15_000)
    assert learning_rate(chosen, 0, 30_000) == 1e-3
    assert learning_rate(chosen, 7500, 30_000) == pytest.approx(1e-3 * 0.5**0.9)
    assert [learning_rate(chosen, t, 30_000) for t in (15_000, 29_999)] == [0.0, 0.0]


def test_a_rate_that_ends_early_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Defect (c) of the article's software: half of its training ran at a learning rate of zero, and nothing said so."""
    weight = nn.Parameter(torch.zeros(1))
    early: dict[str, Any] = {"decay_iterations": 30}
    for changes, warned in (
        (early, True),
        (early | {"schedule": "cosine"}, True),
        (early | {"end_lr": 1e-5}, False),
        (early | {"schedule": "constant"}, False),
        ({"decay_iterations": 50}, False),
        ({}, False),
    ):
        caplog.clear()
        chosen = config(**changes)
        with caplog.at_level(logging.WARNING):
            build_schedule(build_optimizer([weight], chosen), chosen, STEPS)
        assert bool(caplog.messages) == warned, changes
        if warned:
            assert caplog.messages[0].startswith("the learning rate is 0 from iteration 30 of 50 on")


def test_the_models_own_recipes_do_not_end_early(caplog: pytest.LogCaptureFixture) -> None:
    for model in ("nnunet", "vnet"):
        chosen = make_config(model)  # type: ignore[arg-type]
        build_schedule(build_optimizer([nn.Parameter(torch.zeros(1))], chosen), chosen, chosen.iterations)
        assert learning_rate(chosen, chosen.iterations - 1, chosen.iterations) > 0
    assert not caplog.messages


@pytest.mark.parametrize("name", CHOICES)
def test_state_comes_back_exactly(name: str) -> None:
    chosen = config(**CHOICES[name])
    through = nn.Parameter(torch.from_numpy(START.copy()))
    optimizer = build_optimizer([through], chosen)
    schedule = build_schedule(optimizer, chosen, STEPS)
    buffer = io.BytesIO()
    for step in range(STEPS):
        if step == 23:
            torch.save({"w": through.detach().clone(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, buffer)
        one_step(through, optimizer, chosen, step)
        schedule.step()
    buffer.seek(0)
    kept = torch.load(buffer, weights_only=True)
    resumed = nn.Parameter(kept["w"])
    optimizer = build_optimizer([resumed], chosen)
    schedule = build_schedule(optimizer, chosen, STEPS)
    optimizer.load_state_dict(kept["optimizer"])
    schedule.load_state_dict(kept["schedule"])
    for step in range(23, STEPS):
        one_step(resumed, optimizer, chosen, step)
        schedule.step()
    assert torch.equal(resumed, through)
    assert schedule.iteration == STEPS


def test_clipping_says_the_norm_before_and_keeps_the_direction() -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([12.0, 0.0])
    assert float(clip_gradients(weights, 12.0)) == pytest.approx(13)
    assert float(torch.cat([w.grad for w in weights if w.grad is not None]).norm()) == pytest.approx(12, rel=1e-6)
    assert float(clip_gradients(weights, 100.0)) == pytest.approx(12, rel=1e-6)
    weights[1].grad = torch.tensor([math.nan, 0.0])
    assert math.isnan(float(clip_gradients(weights, 12.0)))


def test_frozen_parameters_and_those_without_gradient_stay() -> None:
    learned, frozen, idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = build_optimizer([learned, frozen, idle], config(l1=0.1))
    learned.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(learned, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2))
    assert torch.equal(idle, torch.ones(2))


def test_l1_pulls_weights_to_zero_and_leaves_zero() -> None:
    weight = nn.Parameter(torch.tensor([0.5, -0.5, 0.0]))
    optimizer = build_optimizer([weight], config(momentum=0.0, nesterov=False, weight_decay=0.0, l1=1.0, lr=0.1))
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert weight.detach().tolist() == pytest.approx([0.4, -0.4, 0.0])
