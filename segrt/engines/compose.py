"""Engines made of engines: mirrored copies averaged, an engine of the CPU in a device's pipeline, one batch over several engines."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import chain, combinations, cycle
from typing import Any

import numpy as np

from ..arrays import Array, FloatArray, require
from ..device import Simulated, compute_on, get_xp, on_device, open_stream, to_device, to_host, use_device, wait_for
from . import Engine
from .batches import call_bytes, keeps


class Mirrored:
    """Average an engine over all flips of `axes` (0 = z, 1 = y, 2 = x), summed in nnU-Net's order: none, single axes, pairs, all.

    For engines of the host; on a device mirrored windows are entries of a batch.
    """

    def __init__(self, engine: Engine, axes: Sequence[int]) -> None:
        self._engine = engine
        self._flips = list(chain.from_iterable(combinations(sorted(axes), n) for n in range(1, len(axes) + 1)))
        self.name = f"{engine.name}, {len(self._flips) + 1} mirrored passes"
        self.batch = engine.batch
        self.held_bytes = engine.held_bytes
        self.device = engine.device

    def __call__(self, patches: FloatArray) -> Array:
        """Average over all flips; see `Engine`."""
        total = self._engine(patches)
        for flip in self._flips:
            axes = tuple(axis + 2 for axis in flip)
            total += np.flip(self._engine(np.ascontiguousarray(np.flip(patches, axes))), axes)
        total /= len(self._flips) + 1
        return total

    def close(self) -> None:
        """Close the engine inside."""
        self._engine.close()


class Hosted:
    """Run an engine of the host in the pipeline of `device`: patches come to the host, logits go to the device."""

    def __init__(self, engine: Engine, device: str) -> None:
        self._engine = engine
        self.name = f"{engine.name}, for {device}"
        self.batch = engine.batch
        self.held_bytes = engine.held_bytes
        self.device = device

    def __call__(self, patches: FloatArray) -> Array:
        """Run the engine inside on host memory; see `Engine`."""
        logits: Array = to_device(self._engine(to_host(patches)), self.device)
        return logits

    keeps = False

    def call_bytes(self, windows: int, each: int) -> int:
        """Nothing of the device's."""
        return 0

    def close(self) -> None:
        """Close the engine inside."""
        self._engine.close()


class Spread:
    """Run one batch over several engines at once, one thread each: several GPUs, or copies of a network on one device.

    The patches are dealt out in parts of the engines' own batches and the logits come back in the patches' order, so equal engines give the
    bytes that one of them alone would. `device` is the first engine's; parts for others are copied there and back.

    Raises
    ------
    MemoryError, BackendError
        What any engine raises, once all have stopped.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._streams = [open_stream(engine.device) for engine in engines]
        # a thread of its own for every engine: CUDA's libraries keep handles for each thread that calls them
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="segrt-engine") for _ in engines]
        self.name = " + ".join(engine.name for engine in engines)
        held = [engine.held_bytes for engine in engines]
        self.held_bytes = sum(held) if all(held) else 0
        self.device = engines[0].device
        self._before: list[int] = []  # each one's batch, while there is a smaller one

    @property
    def batch(self) -> int:
        """The engines' together; a number that is set is shared out as they are, and the one from before gives each what it had."""
        return sum(engine.batch for engine in self._engines)

    @batch.setter
    def batch(self, count: int) -> None:
        had = [engine.batch for engine in self._engines]
        shares = [max(1, count * share // sum(had)) for share in had]
        if self._before and count == sum(self._before):
            shares, self._before = self._before, []
        elif not self._before and count < sum(had):
            self._before = had
        for engine, share in zip(self._engines, shares, strict=True):
            engine.batch = share

    def __call__(self, patches: FloatArray) -> Array:
        """Run all engines on their parts; see `Engine`."""
        _finish(patches)
        parts = self._deal(len(patches))
        jobs = [
            thread.submit(self._run, number, [patches[a:b] for a, b, owner in parts if owner == number])
            for number, thread in enumerate(self._threads)
        ]
        wait(jobs)
        answers = [iter(job.result()) for job in jobs]
        return _joined([next(answers[owner]) for _, _, owner in parts])

    @property
    def keeps(self) -> bool:
        """Whether one of the engines does."""
        return any(keeps(engine) for engine in self._engines)

    def call_bytes(self, windows: int, each: int) -> int:
        """What the engines of the first one's device take; the others have memory of their own."""
        here = [engine for engine in self._engines if engine.device == self.device]
        return sum(call_bytes(engine, max(1, windows * engine.batch // self.batch), each) for engine in here)

    def close(self) -> None:
        """Close all engines."""
        for thread in self._threads:
            thread.shutdown()
        for engine in self._engines:
            engine.close()

    def _deal(self, count: int) -> list[tuple[int, int, int]]:
        """(first, stop, engine) of every part, in order."""
        parts, first = [], 0
        for number in cycle(range(len(self._engines))):
            stop = min(first + self._engines[number].batch, count)
            parts.append((first, stop, number))
            first = stop
            if first >= count:
                return parts
        raise AssertionError("there is an engine")

    def _run(self, number: int, parts: Sequence[Array]) -> list[Array]:
        """Logits of one engine's parts, where the patches lie."""
        engine, stream, answers = self._engines[number], self._streams[number], []
        with compute_on(engine.device, stream):
            for part in parts:
                logits = engine(_moved(part, engine.device))
                wait_for(stream)
                answers.append(_moved(logits, self.device))
        return answers


def _joined(parts: Sequence[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    whole: Array = get_xp(parts[0]).empty((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    first = 0
    for part in parts:
        whole[first : first + len(part)] = part
        first += len(part)
    return whole


def _moved(array: Any, device: str) -> Any:
    """The array on `device`; itself where it lies there. The copy is done when it comes out."""
    place = _place(array)
    if place == device:
        return array
    if not (place.startswith("cuda") and device.startswith("cuda")):
        return to_device(to_host(array), device)
    with use_device(device):
        copied = array.copy()  # from one GPU to the other
        _finish(copied)
        return copied


def _place(array: Any) -> str:
    if isinstance(array, Simulated):
        return "simulated"
    return f"cuda:{array.device.id}" if on_device(array) else "cpu"


def _finish(array: Any) -> None:
    """Wait for what the current stream still does to an array on a GPU."""
    if _place(array).startswith("cuda"):
        with array.device:
            require("cupy", extra="cuda").cuda.get_current_stream().synchronize()
