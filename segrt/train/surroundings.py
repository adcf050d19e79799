"""What surrounds the training loop: seeds, signals, workers and the profiler, each for the length of a block."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from .config import TrainConfig

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Fresh weights and dropout from `seed`; torch's generators are what they were before after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def draw_anew(seed: int, rank: int, iteration: int) -> None:
    """Seed torch for an iteration of a process: dropout is the same after a resume, without the state of any generator being kept."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank, iteration)).generate_state(1, np.uint64)[0]))


@contextmanager
def gpu_settings(device: torch.device) -> Iterator[None]:
    """On a GPU let cuDNN look for the fastest algorithms, for the shapes never change; afterwards its memory is free for validation."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield
    torch.cuda.empty_cache()


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM asks to stop; the second one of a kind stops at once, as without us."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:
        logger.debug("not in the main thread: signals are left alone")
    try:
        yield received
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)


@contextmanager
def opened(batches: Callable[[int], Iterator[_T]], first: int) -> Iterator[Iterator[_T]]:
    """The batches from number `first` on; their workers end with the block."""
    iterator = batches(first)
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close:
            close()


@contextmanager
def profiler(config: TrainConfig, start: int, folder: Path) -> Iterator[Any]:
    """torch's profiler over the iterations asked for, into profile.json (chrome://tracing) and the table profile.txt; None without."""
    if config.profile is None or config.profile[0] < start:
        yield None
        return
    first, last = config.profile
    warmup = min(1, first - start)
    schedule = torch.profiler.schedule(wait=first - start - warmup, warmup=warmup, active=last - first, repeat=1)

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / "profile.json"))
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        (folder / "profile.txt").write_text(table, encoding="utf-8")

    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler
