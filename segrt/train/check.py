"""TRAIN, `check_dataset`: every file of a dataset read once, and every problem by file name; stored as reports/dataset.json."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ..arrays import Array, ProgressFn
from ..errors import InputError
from ..spec import Part
from .cases import Dataset, Missing, TrainingCase
from .dataset import geometry_problem, read_image, read_label_map, value_problem
from .parallel import run_each

Kind = Literal["missing", "image", "labels", "geometry", "values", "dimensions"]
_SHOWN = 3  # problems an error tells in full


class Problem(Part):
    """What is wrong with one case.

    Attributes
    ----------
    kind : "missing" file (of a case, or what would make one of a lone image or label map), unreadable "image" or "labels" (NaN, wrong
        channels, values that are not whole), other "geometry", unknown label "values", or "dimensions" unlike the other cases'
    files : the files it is about
    message : one sentence
    """

    case: str
    kind: Kind
    files: tuple[str, ...]
    message: str


class CheckReport(Part):
    """What `check_dataset` found.

    Attributes
    ----------
    problems : what keeps the dataset from being trained on, in the order of the cases
    warnings : what may be on purpose: cases without foreground, labels nobody has, label maps of floats
    voxels : label name -> voxels over all cases
    """

    dataset: str
    cases: int
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    voxels: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_json(self) -> str:
        """The text of dataset.json in the reports."""
        return self.model_dump_json(indent=1) + "\n"

    def require_ok(self, written: Path | None = None) -> None:
        """Do nothing for a sound dataset; `written` is where all problems stand.

        Raises
        ------
        InputError
            With the first problems in full and the number of the others.
        """
        if self.problems:
            told = "; ".join(problem.message for problem in self.problems[:_SHOWN])
            more = f"; and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
            more += f" (see {written})" if written else ""
            raise InputError(f"dataset {self.dataset} cannot be trained on: {told}{more}")


def check_dataset(dataset: Dataset, *, workers: int = 0, progress: ProgressFn | None = None) -> CheckReport:
    """Read every case and say what is wrong with it: missing files, NaN, channels, grids that differ, values that are no labels.

    Parameters
    ----------
    workers : processes; 0 or 1 checks in this one
    """
    looks = run_each(partial(_look, dataset=dataset), dataset.cases, workers=workers, progress=progress)
    problems = [_lone(missing) for missing in dataset.missing] + [problem for look, _, _, _ in looks for problem in look]
    problems += _dimension_problems(dataset, [dimensions for _, _, _, dimensions in looks])
    counts = np.sum([count for _, count, _, _ in looks], axis=0)
    voxels = {name: int(n) for name, n in zip(dataset.labels, counts, strict=True)}
    empty = [
        case.name for case, (look, count, _, _) in zip(dataset.cases, looks, strict=True) if not look and not _foreground(dataset, count)
    ]
    warnings = [warning for _, _, warning, _ in looks if warning]
    warnings += [f"{len(empty)} case{'s have' if len(empty) > 1 else ' has'} no foreground: {', '.join(empty[:10])}"] if empty else []
    warnings += [f"no case has label {name!r}" for name, n in voxels.items() if not n]
    return CheckReport(dataset=dataset.name, cases=len(dataset.cases), problems=tuple(problems), warnings=tuple(warnings), voxels=voxels)


def _look(case: TrainingCase, *, dataset: Dataset) -> tuple[list[Problem], Array, str, int]:
    """Problems of a case, voxels per label, a warning or "", and 2 or 3 dimensions (0: unknown)."""
    counts, warning, problems = np.zeros(len(dataset.labels), np.int64), "", []
    if missing := [path for path in case.files if not path.exists()]:
        return [_problem(case, "missing", f"{', '.join(p.name for p in missing)} of case {case.name} is missing")], counts, "", 0
    volume = labels = None
    try:
        volume = read_image(case, dataset)
    except InputError as err:
        problems.append(_problem(case, "image", str(err)))
    try:
        labels, grid, dtype = read_label_map(case, dataset.mask)
    except InputError as err:
        problems.append(_problem(case, "labels", str(err)))
    if volume is not None and labels is not None and (why := geometry_problem(case, volume, grid)):
        problems.append(_problem(case, "geometry", why))
    if labels is not None:
        if why := value_problem(case, labels, dataset):
            problems.append(_problem(case, "values", why))
        else:
            found = np.bincount(labels.ravel(), minlength=32768)
            counts += [int(sum(found[v] for v in values)) for values in dataset.labels.values()]
        if dtype.startswith("float"):
            warning = (
                f"{case.labels.name if case.labels else case.name} stores its labels as {dtype}; they are whole numbers, so they are taken"
            )
    return problems, counts, warning, volume.grid.dimensions if volume is not None else 0


def _problem(case: TrainingCase, kind: Kind, message: str) -> Problem:
    return Problem(case=case.name, kind=kind, files=tuple(str(path) for path in case.files), message=message)


def _lone(missing: Missing) -> Problem:
    return Problem(case=missing.case, kind="missing", files=tuple(str(path) for path in missing.files), message=missing.message)


def _foreground(dataset: Dataset, counts: Array) -> int:
    return sum(int(n) for values, n in zip(dataset.labels.values(), counts, strict=True) if set(values) != {0})


def _dimension_problems(dataset: Dataset, dimensions: list[int]) -> list[Problem]:
    """Cases that are flat while most are not, or the other way round."""
    flat, full = dimensions.count(2), dimensions.count(3)
    if not flat or not full:
        return []
    odd = 2 if flat < full else 3
    return [
        _problem(case, "dimensions", f"{case.images[0].name} is {odd}-D, most images of dataset {dataset.name} are {5 - odd}-D")
        for case, n in zip(dataset.cases, dimensions, strict=True)
        if n == odd
    ]
