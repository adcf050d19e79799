"""A study's runs as processes: each on its own cores, several at once, none of which ends another."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from ..errors import InputError, SegrtError
from .config import TrainConfig
from .folds import Show
from .loop import Step
from .run import train_model
from .surroundings import signals

Cores: TypeAlias = tuple[int, ...]
ProgressRun: TypeAlias = Callable[[str, Step], None]

_POLL_S = 0.5
_STEP_S = 0.3  # between two steps that are told


@dataclass(frozen=True)
class Order:
    """One run: what `train_model` is called with, from a study's folder."""

    name: str
    source: str
    folder: Path
    config: TrainConfig
    dataset_options: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `error` is the sentence of a failure."""

    status: Literal["finished", "failed", "stopped"]
    error: str = ""


def share_cores(jobs: int, cores: int | None = None) -> list[Cores]:
    """The cores of each of `jobs` runs at once: `cores` for each, or an equal share of those this process may use.

    Raises
    ------
    InputError
        When there are not that many.
    """
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = cores if cores is not None else len(usable) // max(jobs, 1)
    if jobs < 1 or each < 1 or jobs * each > len(usable):
        wanted = "" if cores is None else f" with {cores} cores each"
        raise InputError(f"jobs: {len(usable)} cores can be used here, too few for {jobs} runs at once{wanted}; give fewer jobs or cores")
    return [tuple(usable[i * each : (i + 1) * each]) for i in range(jobs)]


def run_orders(
    orders: Sequence[Order],
    slots: Sequence[Cores],
    settle: Callable[[str, Outcome], None],
    *,
    stage: Callable[[str, str], None],
    step: ProgressRun | None = None,
) -> None:
    """Run all orders, as many at once as there are slots; `settle` hears of each that ended.

    After SIGINT or SIGTERM no further one begins, and the running ones are asked to save and stop.
    """
    waiting, free, running = list(orders), list(slots), list[_Running]()
    with signals() as stop:
        asked = False
        try:
            while running or (waiting and not stop):
                while waiting and free and not stop:
                    running.append(_start(waiting.pop(0), free.pop(0)))
                if stop and not asked:
                    asked = True
                    _ask_to_stop(running)
                for run in _ended(running, stage, step):
                    running.remove(run)
                    free.append(run.cores)
                    settle(run.order.name, run.outcome(stopped=bool(stop)))
        finally:
            _ask_to_stop(running)  # none is left, unless what they told could not be written


def _ask_to_stop(running: Sequence[_Running]) -> None:
    for run in running:
        run.process.terminate()


class _Running:
    """A process at work."""

    def __init__(self, order: Order, cores: Cores, process: SpawnProcess, pipe: Connection) -> None:
        self.order, self.cores, self.process, self.pipe = order, cores, process, pipe
        self.told: Outcome | None = None

    def outcome(self, *, stopped: bool) -> Outcome:
        """What the process said last, or what its exit code means."""
        code = self.process.exitcode
        if self.told is not None:
            return self.told
        if stopped:
            return Outcome("stopped")
        why = f"killed by signal {-code}, probably for want of memory" if code is not None and code < 0 else f"exit code {code}"
        return Outcome("failed", f"its process ended without a word ({why}); what it printed stands above")


def _start(order: Order, cores: Cores) -> _Running:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(order, len(cores), theirs), name=order.name)
    with _pinned(cores):
        process.start()
    theirs.close()  # so that the end of the process ends the pipe
    return _Running(order, cores, process, ours)


@contextmanager
def _pinned(cores: Cores) -> Iterator[None]:
    """What is started inside the block runs on `cores` alone, from its first instruction, and counts no others."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _ended(running: Sequence[_Running], stage: Callable[[str, str], None], step: ProgressRun | None) -> list[_Running]:
    """Pass on what the runs tell; those that ended come out."""
    ended = []
    ready = wait([run.pipe for run in running], timeout=_POLL_S)
    for run in (run for run in running if run.pipe in ready):
        try:
            message = run.pipe.recv()
        except EOFError:
            run.process.join()
            ended.append(run)
            continue
        if isinstance(message, Outcome):
            run.told = message
        elif isinstance(message, Step):
            if step:
                step(run.order.name, message)
        else:
            stage(run.order.name, str(message))
    return ended


# ------------------------------------------------------------------ in the process of a run
def _work(order: Order, threads: int, pipe: Connection) -> None:
    """Train, and say how it ended."""
    torch.set_num_threads(threads)
    target = order.folder / order.name
    # a bundle without a line in study.json is what an interrupted study left
    options: dict[str, Any] = {"work": target.with_name(target.name + ".train"), "shared": order.folder / "shared", "force": True}
    show = Show(stage=pipe.send, step=_every(pipe))
    try:
        bundle = train_model(order.source, target, order.config, dataset_options=order.dataset_options, show=show, **options)
        outcome = Outcome("stopped" if bundle is None else "finished")
    except KeyboardInterrupt:
        outcome = Outcome("stopped")
    except SegrtError as err:
        outcome = Outcome("failed", str(err))
    except OSError as err:
        outcome = Outcome("failed", f"{err.filename or 'a file'} cannot be read or written ({err.strerror or err})")
    pipe.send(outcome)


def _every(pipe: Connection) -> Callable[[Step], None]:
    """Send a step now and then, and the last one."""
    sent = 0.0

    def send(step: Step) -> None:
        nonlocal sent
        now = time.monotonic()
        if now - sent >= _STEP_S or step.iteration == step.iterations:
            sent = now
            pipe.send(step)

    return send
