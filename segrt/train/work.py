"""The folder a training works in, and what it keeps of a trained configuration; TRAIN, what its stages hand to each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..spec import ModelSpec
from .cases import Dataset
from .config import TrainConfig
from .configuration import Configuration
from .folds import Fold, Show
from .processes import rank, wait_for_all
from .validate import Summary, merge


@dataclass(frozen=True)
class Work:
    """The folder a training works in, beside the bundle: reports, plan, prepared cases, and a folder per configuration.

    Attributes
    ----------
    shared : where that is which trainings of the same dataset may have in common: what was read of it, and its prepared cases
    """

    folder: Path
    dataset: Dataset
    config: TrainConfig
    device: torch.device
    shared: Path
    show: Show = field(default_factory=Show)

    def fold(self, name: str, fold: str) -> Path:
        """The folder of one fold of a configuration."""
        return self.folder / name / f"fold_{fold}"

    def prepared(self, name: str, *, cascaded: bool) -> Path:
        """The folder of a configuration's prepared cases; those of a cascade's second stage belong to this training alone."""
        return (self.folder if cascaded else self.shared) / "prepared" / name


@dataclass(frozen=True)
class Trained:
    """A configuration whose folds are trained and validated.

    Attributes
    ----------
    configuration : what was trained
    folds : name -> fold
    summaries : of each fold's validation, in their order
    """

    name: str
    configuration: Configuration
    folds: Mapping[str, Fold]
    summaries: tuple[Summary, ...]

    @property
    def summary(self) -> Summary:
        """The cases of all folds together."""
        return self.summary_of(tuple(self.folds))

    def summary_of(self, folds: Sequence[str]) -> Summary:
        """The cases of some folds together."""
        return merge([summary for fold, summary in zip(self.folds, self.summaries, strict=True) if fold in folds])

    @property
    def spec(self) -> ModelSpec:
        """The model with a member per fold."""
        return self.configuration.spec.model_copy(update={"members": tuple(self.folds)})


def labels_of(place: Work, previous: Trained) -> Path:
    """Give the folder of a first stage's label maps, each predicted by the fold that held the case back, where there is one."""
    folder = place.folder / previous.name / "labels"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for case in previous.summary.cases:
            _link(case.prediction, folder / case.prediction.name)
    wait_for_all()
    return folder


def _link(path: Path, target: Path) -> None:
    """`target` holds what `path` holds, without a second copy where the disk allows it; unchanged files keep their time."""
    if target.exists() and target.samefile(path):
        return
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(path)
    except OSError:
        shutil.copy2(path, target)


def in_turn(stage: Callable[[], Any]) -> Any:
    """Run a resumable stage in the first process, then in the others, who find it done."""
    result = stage() if rank() == 0 else None
    wait_for_all()
    return result if rank() == 0 else stage()
