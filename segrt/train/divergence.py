"""Sentences for a training that no step leads out of; TRAIN, what its loop ends with then."""

from __future__ import annotations

from collections.abc import Sequence

from .config import TrainConfig

# fp16's scaler halves its factor with each; by then it is below a hundredth, and no gradient was too large for that
MOST_SKIPPED = 25


def no_loss(iteration: int, loss: float, names: Sequence[str], config: TrainConfig) -> str:
    """The loss of a batch of these cases is no number."""
    return f"the loss became {loss} in iteration {iteration}, {_where(names, config)}"


def no_gradient(iteration: int, norm: float, names: Sequence[str], config: TrainConfig) -> str:
    """Losses are numbers, and the gradients of `MOST_SKIPPED` iterations in a row were none."""
    return (
        f"the gradient was {norm} in iteration {iteration} as in the {MOST_SKIPPED - 1} before, none of which changed the weights, "
        + _where(names, config)
    )


def _where(names: Sequence[str], config: TrainConfig) -> str:
    cases = ", ".join(dict.fromkeys(names))
    others = {"fp16": "try precision bf16 or fp32, ", "bf16": "try precision fp32, "}
    return (
        f"with a batch of the cases {cases}; look at their images, {others.get(config.precision, '')}"
        f"lower the learning rate ({config.lr:g}) or the norm gradients are clipped to ({config.clip:g})"
    )
