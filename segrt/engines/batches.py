"""What engines of a GPU share: calls of one fixed size, and what happens when the GPU's memory runs out."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..arrays import Array, Shape3
from ..device import get_xp, give_back, memory_errors
from ..errors import BackendError
from . import Engine

# what cuDNN says when none of its algorithms finds room
_NO_ROOM = re.compile(r"valid cuDNN algorithm|unable to find an engine|ALLOC_FAILED", re.IGNORECASE)
# voxels of a batch that keep a large GPU busy: 4 windows of 64 x 160 x 160, with some 3 GB of activations in 16 bits
_BUSY_VOXELS = 2**23
_LARGEST_BATCH = 16


def gpu_batch(patch: Shape3) -> int:
    """Windows per call on a GPU: a power of two, fewer when they are large."""
    fitting = max(1, _BUSY_VOXELS // int(np.prod(patch)))
    return min(_LARGEST_BATCH, 1 << (fitting.bit_length() - 1))


@runtime_checkable
class Measured(Protocol):
    """An engine that knows what its calls take; that of others is estimated."""

    @property
    def keeps(self) -> bool:
        """Whether it keeps that for its next call, beside what another engine then takes."""
        ...

    def call_bytes(self, windows: int, each: int) -> int:
        """Bytes that a call of `windows` still takes of its device's free memory; `each` is the estimate for one window."""
        ...


def call_bytes(engine: Engine, windows: int, each: int) -> int:
    """Bytes that a call of `windows` still takes of the free memory of an engine's device; see `Measured`."""
    return engine.call_bytes(windows, each) if isinstance(engine, Measured) else windows * each


def keeps(engine: Engine) -> bool:
    """Whether an engine keeps what a call took; see `Measured`."""
    return isinstance(engine, Measured) and engine.keeps


@dataclass
class _Limit:
    """An engine's batch without limits, the one that was set, and the limits of the calls that are under way."""

    before: int
    now: int
    limits: list[int] = field(default_factory=list)


_lock = threading.Lock()
_limited: dict[int, _Limit] = {}  # by engine, while a call is limited


@contextmanager
def at_most(engine: Engine, windows: int | None) -> Iterator[None]:
    """Have an engine compute at most so many windows at once, any number for None; afterwards as many as before.

    It is not enough to call it with fewer: it fills up what is less than its batch. Of calls of several threads the smallest limit holds
    until all of them are over.
    """
    if windows is None:
        yield
        return
    with _lock:
        limit = _limited.setdefault(id(engine), _Limit(engine.batch, engine.batch))
        limit.limits.append(windows)
        _apply(limit, engine)
    try:
        yield
    finally:
        with _lock:
            limit.limits.remove(windows)
            _apply(limit, engine)
            if not limit.limits:
                del _limited[id(engine)]


def _apply(limit: _Limit, engine: Engine) -> None:
    if engine.batch != limit.now:  # it ran out of memory meanwhile, and keeps what may fit
        limit.before = min(limit.before, engine.batch)
    wanted = min([limit.before, *limit.limits])
    if wanted != engine.batch:
        engine.batch = wanted
    limit.now = engine.batch


def in_batches(patches: Array, batch: int, classes: int, dtype: Any, run: Callable[[Any, Any], None]) -> Array:
    """Logits (N, classes, Z, Y, X) of `dtype` where the patches lie, by `run(part, out)` on exactly `batch` patches at a time.

    GPU libraries choose their algorithm by the batch. With one size, the last part filled up with zeros, equal patches give equal logits,
    and nothing is tuned or compiled twice.
    """
    xp = get_xp(patches)
    count, spatial = len(patches), patches.shape[2:]
    logits: Array = xp.empty((count, classes, *spatial), dtype)
    for first in range(0, count, batch):
        part = xp.ascontiguousarray(patches[first : first + batch])
        if len(part) == batch:
            run(part, logits[first : first + batch])
            continue
        full = xp.zeros((batch, *patches.shape[1:]), np.float32)
        full[: len(part)] = part
        scratch = xp.empty((batch, classes, *spatial), dtype)
        run(full, scratch)
        logits[first:] = scratch[: len(part)]
    return logits


@contextmanager
def smaller_batch_after_memory_error(engine: Engine) -> Iterator[None]:
    """Raise MemoryError for whatever a CUDA library calls it, and halve the engine's batch, so that the caller's next try asks for less."""
    try:
        with memory_errors(), _library_errors():
            yield
    except MemoryError:
        engine.batch = max(1, engine.batch // 2)
        give_back(engine.device)
        raise


def too_large(engine: Engine, err: MemoryError) -> BackendError:
    """What to raise when not even one window fits into the memory of an engine's device."""
    reason = " ".join(str(err).split()) or "allocation failed"
    return BackendError(f"{engine.name}: the memory of {engine.device} does not hold one window ({reason}); free some of it")


@contextmanager
def _library_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:
        if _NO_ROOM.search(str(err)):
            raise MemoryError(str(err)) from err
        raise
