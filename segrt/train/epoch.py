"""TRAIN, what the loop tells after an epoch: the means of its iterations, and Dice and IoU of its voxels together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EpochMeans:
    """An epoch that is over: its number from 1, how many iterations each has, the mean loss, and means over the classes that are there.

    Attributes
    ----------
    dice, iou : of the training batches whose Dice was taken, all their voxels together; None where no structure was
    validation_dice, validation_iou : of the last look at the validation batches; None where there was none
    """

    number: int
    iterations: int
    loss: float
    dice: float | None
    iou: float | None
    validation_dice: float | None
    validation_iou: float | None
    lr: float


class EpochSums:
    """Adds up an epoch; from a checkpoint's `state` on where one ended within it."""

    def __init__(self, state: Mapping[str, Any] | None = None, device: torch.device | None = None) -> None:
        self._begin()
        if state is not None:
            self._loss, self._iterations = state["loss"], state["iterations"]
            self._counts = [torch.tensor(counts, dtype=torch.float64, device=device) for counts in state["counts"]]

    @property
    def state(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint."""
        return {"loss": self._loss, "iterations": self._iterations, "counts": [counts.tolist() for counts in self._counts]}

    def _begin(self) -> None:
        self._loss, self._iterations, self._counts = 0.0, 0, list[Tensor]()

    def add(self, loss: float, counts: Tensor | None) -> None:
        """Add an iteration; `counts` (3, classes) are its true positives, false positives and false negatives, or None if not counted."""
        self._loss, self._iterations = self._loss + loss, self._iterations + 1
        if counts is not None:
            self._counts = [counts + self._counts[0] if self._counts else counts]

    def end(self, number: int, iterations: int, validation: Tensor | None, lr: float) -> EpochMeans:
        """Give the means, and begin anew."""
        training = self._counts[0] if self._counts else None
        means = EpochMeans(number, iterations, self._loss / self._iterations, *_scores(training), *_scores(validation), lr)
        self._begin()
        return means


def dice_of(counts: Tensor) -> list[float]:
    """Dice per class; NaN where neither truth nor prediction has a voxel."""
    both, false, missed = counts
    scores: list[float] = (2 * both / (2 * both + false + missed)).tolist()
    return scores


def iou_of(counts: Tensor) -> list[float]:
    """IoU per class, likewise."""
    both, false, missed = counts
    scores: list[float] = (both / (both + false + missed)).tolist()
    return scores


def _scores(counts: Tensor | None) -> tuple[float | None, float | None]:
    """Mean Dice and mean IoU over the classes that are there."""
    return (None, None) if counts is None else (mean_of(dice_of(counts)), mean_of(iou_of(counts)))


def mean_of(scores: Sequence[float]) -> float | None:
    """Mean of what is a number; None when nothing is."""
    present = [score for score in scores if not math.isnan(score)]
    return sum(present) / len(present) if present else None
