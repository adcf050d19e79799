"""What `segrt-train` shows, and how its processes find each other."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ..errors import InputError

logger = logging.getLogger(__name__)

STOPPED, STOPPED_TEXT = 130, "stopped; the same command goes on from here"
_AGAIN_S = 0.02

if TYPE_CHECKING:
    from ..train.cases import Dataset
    from ..train.config import TrainConfig
    from ..train.epoch import EpochMeans
    from ..train.folds import Show
    from ..train.loop import Step


class TrainBars:
    """Lines for the stages, one bar for the cases of a stage, one for the iterations; in a file or pipe a line every `interval`."""

    def __init__(self, interval: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, markup=False, quiet=quiet)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=quiet or not self._console.is_terminal)
        self._interval = interval
        self._task: TaskID | None = None

    @property
    def show(self) -> Show:
        """What `train_model` calls."""
        from ..train.folds import Show

        return Show(stage=self._stage, cases=self._cases, step=self._step)

    def __enter__(self) -> TrainBars:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def _stage(self, text: str) -> None:
        self._end()
        self._console.print(text, highlight=False, soft_wrap=True)

    def _cases(self, done: int, total: int) -> None:
        self._advance("cases", done, total, "")

    def _step(self, step: Step) -> None:
        numbers = step_text(step)
        self._advance("iterations", step.iteration, step.iterations, numbers)
        if not self._console.is_terminal and (step.iteration % self._interval == 0 or step.iteration == step.iterations):
            self._console.print(f"iteration {step.iteration}/{step.iterations}, {numbers}", highlight=False, soft_wrap=True)
        if step.epoch is not None:
            self._console.print(epoch_text(step.epoch, step.iterations), highlight=False, soft_wrap=True)

    def _advance(self, name: str, done: int, total: int, numbers: str) -> None:
        self._progress.start()
        if self._task is None:
            self._task = self._progress.add_task(name, total=total, numbers="")
        self._progress.update(self._task, completed=done, total=total, numbers=numbers)
        if done == total:
            self._end()

    def _end(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


def step_text(step: Step) -> str:
    """The numbers of an iteration on one line."""
    dice = "" if step.dice is None else f"Dice {step.dice:.4f}, "
    left = timedelta(seconds=round(step.eta_s))
    return f"loss {step.loss:.4f}, {dice}lr {step.lr:.2e}, batch {step.batch_cost:.3f} s, reader {step.reader_cost:.3f} s, ETA {left}"


def epoch_text(means: EpochMeans, iterations: int) -> str:
    """What an epoch of a training of so many iterations came to, on one line."""
    each = (("Dice", means.dice), ("IoU", means.iou), ("validation Dice", means.validation_dice), ("validation IoU", means.validation_iou))
    scores = "".join(f"{name} {score:.4f}, " for name, score in each if score is not None)
    return f"epoch {means.number}/{-(-iterations // means.iterations)}: mean loss {means.loss:.4f}, {scores}lr {means.lr:.2e}"


def describe_training(
    source: Path | None, file: Path | None, root: Path | None, options: Mapping[str, Any], chosen: Mapping[str, Any]
) -> tuple[Path | Dataset, TrainConfig, dict[str, str]]:
    """What to train on, how, and reports about it; from the options alone, or from a MedicalSeg file that they beat."""
    if file is None:
        from ..train.config import make_config

        if root is not None:
            raise InputError("--medicalseg-root belongs to --from-medicalseg; name the file")
        if source is None:
            raise InputError("DATASET is missing; give a folder of images with labels")
        changes = {name: value for name, value in chosen.items() if name != "model"}
        return source, make_config(chosen["model"] or "nnunet", **changes), {}
    from ..train.medicalseg import import_medicalseg

    imported = import_medicalseg(file, source, root=root, dataset_options=options, **chosen)
    for warning in imported.warnings:
        logger.warning("%s: %s", file.name, warning)
    return imported.dataset, imported.config, {"medicalseg.txt": imported.recipe.text}


@contextmanager
def ending_on_signals(environment: Mapping[str, str]) -> Iterator[None]:
    """End the block on SIGTERM as on Ctrl-C, wherever it is, by the exit code for what goes on later; while it iterates it saves first.

    Those that torchrun started end as they would without us: while they wait for each other, nothing of ours would be called.
    """
    before = None if "WORLD_SIZE" in environment else signal.signal(signal.SIGTERM, _interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    thread_hook, threading.excepthook = threading.excepthook, _end_quietly
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(STOPPED_TEXT, err=True)
        raise typer.Exit(STOPPED) from None
    finally:
        sys.unraisablehook = hook
        threading.excepthook = thread_hook
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Where Python happened to be in a finaliser it drops the exception, and with it the wish to stop; so the signal is sent once more."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _end_quietly(ended: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread tells of a full disk here, and once more where the training writes its next number."""
    if isinstance(ended.exc_value, OSError):
        logger.info("a thread ended: %s", ended.exc_value)
    else:
        threading.__excepthook__(ended)


def picture_size(size: str, patch: str | None) -> list[str]:
    """The patch that a size of pictures means: 256 is 1,256,256."""
    sides = size.split(",")
    if patch is not None:
        raise InputError("--size and --patch say the same thing; give one of them")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise InputError(f"--size: expected a number such as 256, or height,width such as 192,256, got {size!r}")
    return ["1", sides[0].strip(), sides[-1].strip()]


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this is the process that writes; of those torchrun started, or the only one."""
    return int(environment.get("RANK", "0")) == 0


@contextmanager
def join_processes(environment: Mapping[str, str], device: str) -> Iterator[str]:
    """Join those that torchrun started, when it did; the device of this one comes out."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        yield device
        return
    from ..train.processes import group, has_gpu

    gpu = int(environment["LOCAL_RANK"]) if device != "cpu" and has_gpu() else None
    with group(int(environment["RANK"]), int(environment["WORLD_SIZE"]), gpu=gpu):
        yield "cpu" if gpu is None else f"cuda:{gpu}"
