"""TRAIN, what a validation decides: post-processing by nnU-Net's rule, and the best configuration or pair of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import InputError
from ..io import read_labels
from ..metrics import overlaps
from ..postprocess import postprocess
from ..spec import KeepLargest, PostprocessStep
from .cases import Dataset
from .dataset import read_label_map
from .validate import CaseScores, Summary

Steps = tuple[PostprocessStep, ...]


@dataclass(frozen=True)
class Choice:
    """The steps that help, and the scores they were chosen by.

    Attributes
    ----------
    steps : to be applied in this order; none when none helps
    before, after : scores without and with them, of the same predictions
    tried : one sentence per step: what it changed and whether it is taken
    """

    steps: Steps
    before: Summary
    after: Summary
    tried: tuple[str, ...]

    def to_json(self) -> str:
        """The text of reports/postprocess.json; `model` is the hash of the weights whose predictions decided."""
        structures = {name: {"without": self.before.dice[name], "with": self.after.dice[name]} for name in self.before.structures}
        values: dict[str, Any] = {
            "model": self.before.model,
            "cases": len(self.before.cases),
            "steps": [step.model_dump(mode="json") for step in self.steps],
            "mean_dice": {"without": _plain(self.before.mean_dice), "with": _plain(self.after.mean_dice)},
            "dice": {name: {k: _plain(v) for k, v in pair.items()} for name, pair in structures.items()},
            "tried": list(self.tried),
        }
        return json.dumps(values, indent=1) + "\n"

    @property
    def table(self) -> dict[str, dict[str, float]]:
        """Columns for `segrt.report.tables`."""
        return {"without post-processing": self.before.dice, "with post-processing": self.after.dice}


def choose_postprocess(summary: Summary, dataset: Dataset, *, workers: int = 2) -> Choice:
    """Decide which components to clear, from predictions and truth on the images' own grids.

    nnU-Net 2.8.1's rule: first, of all foreground together only the largest component is kept, if the mean Dice rises and no structure's
    falls; then structure by structure the same, if its own Dice rises, each on what the steps before left.

    Parameters
    ----------
    summary : of predictions without post-processing, by the weights the steps are meant for
    dataset : knows the truth
    workers : threads

    Raises
    ------
    InputError
        When a label map cannot be read.
    """
    values = tuple(sorted({value for group in summary.structures.values() for value in group}))
    best, steps, tried = summary, tuple[PostprocessStep, ...](), list[str]()
    candidates: list[tuple[str, KeepLargest]] = [("all structures together", KeepLargest(values=values))]
    if len(summary.structures) > 1:
        candidates += [(name, KeepLargest(values=group)) for name, group in summary.structures.items()]
    for name, step in candidates:
        new = _with(summary, dataset, (*steps, step), workers)
        together = step is candidates[0][1]
        better = _helps_all(best, new) if together else new.dice[name] > best.dice[name]
        old_score, new_score = (best.mean_dice, new.mean_dice) if together else (best.dice[name], new.dice[name])
        tried.append(f"{name}: Dice {old_score:.5f} becomes {new_score:.5f}, {'taken' if better else 'left out'}")
        if better:
            best, steps = new, (*steps, step)
    return Choice(steps, summary, best, tuple(tried))


def choose_nothing(summary: Summary) -> Choice:
    """Decide for no post-processing where a model saw all cases in training, as nnU-Net does: on those it seems to need none."""
    return Choice((), summary, summary, ("none: fold all holds no case back that it could be chosen on",))


@dataclass(frozen=True)
class Best:
    """The configuration, or pair, with the highest mean Dice, those it was compared with, and on which cases, in words."""

    name: str
    summaries: Mapping[str, Summary]
    where: str = "in validation"

    @property
    def summary(self) -> Summary:
        """Its scores."""
        return self.summaries[self.name]

    @property
    def text(self) -> str:
        """One line for all of them."""
        scores = ", ".join(f"{name} {summary.mean_dice:.4f}" for name, summary in self.summaries.items())
        return f"mean Dice {self.where}: {scores}" + (f"; best: {self.name}" if len(self.summaries) > 1 else "")

    def to_json(self) -> str:
        """The text of reports/configurations.json."""
        scores = {name: {"mean_dice": _plain(s.mean_dice), "cases": len(s.cases), "model": s.model} for name, s in self.summaries.items()}
        return json.dumps({"best": self.name, "configurations": scores}, indent=1) + "\n"


def choose_best(summaries: Mapping[str, Summary], *, where: str = "in validation") -> Best:
    """Take the configuration with the highest mean Dice over the same cases; of equals the first.

    Parameters
    ----------
    where : on which cases they were scored, in words

    Raises
    ------
    InputError
        When they were not validated on the same cases.
    """
    cases = {name: {case.name for case in summary.cases} for name, summary in summaries.items()}
    first = next(iter(cases))
    for name, names in cases.items():
        if different := sorted(names ^ cases[first]):
            raise InputError(f"configurations {first} and {name} cannot be compared: only one of them was validated on {different[0]}")
    return Best(max(summaries, key=lambda name: _comparable(summaries[name].mean_dice)), dict(summaries), where)


def _comparable(score: float) -> float:
    return score if score == score else -1.0


def _helps_all(before: Summary, after: Summary) -> bool:
    if not after.mean_dice > before.mean_dice:
        return False
    return not any(after.dice[name] < before.dice[name] for name in before.structures)


def _with(summary: Summary, dataset: Dataset, steps: Steps, workers: int) -> Summary:
    """The scores of the same predictions after `steps`."""
    score = partial(
        _rescore, structures=summary.structures, truths={case.name: case for case in dataset.cases}, dataset=dataset, steps=steps
    )
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return replace(summary, cases=tuple(pool.map(score, summary.cases)))


def _rescore(
    case: CaseScores, *, structures: Mapping[str, tuple[int, ...]], truths: Mapping[str, Any], dataset: Dataset, steps: Steps
) -> CaseScores:
    labels, grid = read_labels(case.prediction)
    truth, _, _ = read_label_map(truths[case.name], dataset.mask)
    cleared = postprocess(labels, steps, voxel_mm3=grid.voxel_mm3)
    return replace(case, overlaps=overlaps(truth, cleared, structures, ignore=dataset.ignore))


def _plain(score: float) -> float | None:
    return score if score == score else None
