"""What `segrt-study` shows, and how its options say what is meant for which run."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ..errors import InputError
from .training import TrainBars, step_text

if TYPE_CHECKING:
    from ..train.loop import Step
    from ..train.study import StudyShow
    from ..train.study_results import Study

Value = str | tuple[str, ...]

_LINE_S = 30.0  # between two lines of a run, where there is no terminal


def per_run(text: str | None, *, model: str | None = None) -> Value | dict[str, Value] | None:
    """What an option's text says: a value, several, or one per run, optimizer or model such as `sgd=0.01,vnet=40,56,40`.

    Parameters
    ----------
    model : the only one that has this option; a text that names none is for it

    Raises
    ------
    InputError
        When only some parts of the text name what they are for.
    """
    if text is None:
        return None
    named: list[tuple[str, list[str]]] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, equals, value = part.partition("=")
        if equals:
            named.append((name.strip(), [value.strip()]))
        elif named:
            named[-1][1].append(part)  # a value of several numbers
        elif "=" in text:
            raise InputError(f"{text!r}: expected one value for all runs, or NAME=VALUE from the first on, such as sgd=0.01,adamw=0.003")
    if not named:
        return _value(text.split(",")) if model is None else {model: _value(text.split(","))}
    return {name: _value(values) for name, values in named}


def _value(parts: list[str]) -> Value:
    return parts[0].strip() if len(parts) == 1 else tuple(part.strip() for part in parts)


class StudyBars:
    """A bar for each run at work and lines for what happens; in a file or pipe a line of numbers now and then."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._preparing = TrainBars(1)
        self._tasks = dict[str, TaskID]()
        self._told = dict[str, float]()

    @property
    def show(self) -> StudyShow:
        """What `run_study` calls."""
        from ..train.study import StudyShow

        return StudyShow(preparing=self._preparing.show, stage=self._stage, step=self._step)

    def __enter__(self) -> StudyBars:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self._preparing.__exit__(kind, value, trace)

    def _stage(self, name: str, text: str) -> None:
        self._console.print(f"{name}: {text}", highlight=False, soft_wrap=True)
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))
        if not self._tasks:
            self._progress.stop()

    def _step(self, name: str, step: Step) -> None:
        self._progress.start()
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=step.iterations, numbers="")
        numbers = step_text(step)
        self._progress.update(self._tasks[name], completed=step.iteration, total=step.iterations, numbers=numbers)
        now = time.monotonic()
        last = step.iteration == step.iterations
        if not self._console.is_terminal and (last or now - self._told.get(name, 0.0) >= _LINE_S):
            self._told[name] = now
            self._console.print(
                f"{name}: iteration {step.iteration} of about {step.iterations}, {numbers}", highlight=False, soft_wrap=True
            )


def print_study(study: Study, folder: Path) -> None:
    """A line per run, the best one, and where to look."""
    console = Console(markup=False)
    width = max(len(run.name) for run in study.runs)
    for run in study.runs:
        pair = run.mean_dice
        scores = [] if pair is None else ["-" if score is None else f"{score:.4f}" for score in (pair.without, pair.with_)]
        text = (
            f"mean Dice {scores[0]}, {scores[1]} with post-processing" if scores else f"{run.status}{': ' if run.error else ''}{run.error}"
        )
        console.print(f"{run.name:{width}}  {text}", highlight=False, soft_wrap=True)
    if study.best is not None:
        console.print(f"best: {folder / study.best.name}; tables and picture: {folder}", highlight=False, soft_wrap=True)
