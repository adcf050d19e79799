"""Shared memory between a client and a server on one machine: a region per request, always unregistered and removed."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..arrays import Array, require
from ..errors import BackendError
from .connection import Sharing
from .wire import DTYPES, Answer, Failure, Question, Slot, Transport

logger = logging.getLogger(__name__)

Wanted = tuple[str, tuple[int, ...]]
_PREFIX = "segrt-client-"
_ALIGN = 64
_MEMORY = Path("/dev/shm")
# a server that is gone must not hold up an error or Ctrl-C
TIDY_S = 5.0
# a request that was answered is cleared away in less
MOMENT_S = 0.2
# bytes from which a tensor of its own goes there, and from which two more calls to the server are worth it
_SMALL, _WORTH = 2**10, 2**18


class SystemRegion:
    """POSIX shared memory."""

    def __init__(self, size: int) -> None:
        self.name, self.size = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}", size
        self._memory = SharedMemory(self.name, create=True, size=size)
        try:
            self._reserve()
        except BaseException:
            self.close()
            raise

    @property
    def registration(self) -> tuple[Literal["system"], str]:
        """Its kind and key."""
        return "system", f"/{self.name}"

    def write(self, offset: int, array: Array) -> None:
        """Copy an array in."""
        np.ndarray(array.shape, array.dtype, self._memory.buf, offset)[...] = array

    def read(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Copy an array out."""
        return np.ndarray(shape, dtype, self._memory.buf, offset).copy()

    def close(self) -> None:
        """Remove it."""
        self._memory.close()
        self._memory.unlink()

    def _reserve(self) -> None:
        """Take the pages now: memory that runs out later ends the process with a bus error."""
        file = _MEMORY / self.name
        if file.exists():
            with file.open("rb+") as stream:
                os.posix_fallocate(stream.fileno(), 0, self.size)


class CudaRegion:
    """Memory of the first GPU; written by the documentation, it has not run against a server."""

    def __init__(self, size: int) -> None:
        self._cupy = require("cupy", extra="cuda")
        self.name, self.size = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}", size
        # not from CuPy's pool: another process maps a whole allocation
        self._memory = self._cupy.cuda.Memory(size)

    @property
    def registration(self) -> tuple[Literal["cuda"], bytes]:
        """Its kind and raw handle."""
        return "cuda", bytes(self._cupy.cuda.runtime.ipcGetMemHandle(self._memory.ptr))

    def write(self, offset: int, array: Array) -> None:
        """Copy an array in."""
        self._at(offset, array.shape, array.dtype).set(np.ascontiguousarray(array))
        self._cupy.cuda.runtime.deviceSynchronize()

    def read(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Copy an array out."""
        found: Array = self._at(offset, shape, dtype).get()
        return found

    def close(self) -> None:
        """Release it."""
        self._memory = None

    def _at(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self._cupy.ndarray(shape, dtype, self._cupy.cuda.MemoryPointer(self._memory, offset))


@dataclass(frozen=True)
class Shelf:
    """A question whose large tensors lie in a region, and how its answer is read from there."""

    question: Question
    region: SystemRegion | CudaRegion | None = None

    def take(self, answer: Answer) -> Answer:
        """The answer with what lies in the region."""
        if self.region is None:
            return answer
        slots = self.question.slots
        placed = {name: self.region.read(slots[name].offset, found.shape, found.dtype) for name, found in answer.items() if name in slots}
        return {**answer, **placed}


class SharedMemoryUse:
    """Decides for one client whether arrays go through shared memory, and tidies up behind every request."""

    def __init__(self, transport: Transport, mode: Sharing, *, near: bool) -> None:
        self._transport, self._insists, self._swept = transport, mode in ("system", "cuda"), False
        self._left: set[tuple[Literal["system", "cuda"], str]] = set()
        self.kind: Literal["system", "cuda"] | None = None
        if mode in ("system", "cuda"):
            self.kind = "system" if mode == "system" else "cuda"
        elif mode == "auto" and near:
            self.kind = "system"

    @contextmanager
    def shelf(self, question: Question, wanted: Mapping[str, Wanted], timeout: float | None) -> Iterator[Shelf]:
        """The question as it is to be sent; `wanted` are outputs whose type and shape are known beforehand.

        Raises
        ------
        BackendError
            When shared memory was asked for and cannot be had.
        """
        slots, size = _lay_out(question, wanted)
        region = self._region(size) if self._insists or size >= _WORTH else None
        if region is None:
            yield Shelf(question)
            return
        try:
            for name, slot in slots.items():
                if name in question.inputs:
                    region.write(slot.offset, question.inputs[name])
            try:
                if self._register(region, timeout):
                    placed = {name: replace(slot, region=region.name) for name, slot in slots.items()}
                    yield Shelf(replace(question, slots=placed), region)
                else:
                    yield Shelf(question)
            finally:
                self._unregister(region)
        finally:
            region.close()

    def tidy(self, patience_s: float) -> None:
        """Make the server forget what it still used when its request ended; what it does not let go of in time, the next client sweeps."""
        end, pause = time.monotonic() + patience_s, 0.001
        while self._left and time.monotonic() < end:
            for region in list(self._left):
                if self._forgotten(*region):
                    self._left.discard(region)
            if self._left:
                time.sleep(pause)
                pause = min(2 * pause, 0.1)

    def _unregister(self, region: SystemRegion | CudaRegion) -> None:
        self._left.add((region.registration[0], region.name))
        self.tidy(MOMENT_S)

    def _forgotten(self, kind: Literal["system", "cuda"], name: str) -> bool:
        """Whether there is nothing more to do about a region. A server refuses while a request uses it, and a moment longer."""
        try:
            self._transport.unregister(kind, name, TIDY_S)
        except Failure as failure:
            return "in use" not in failure.text
        return True

    def _region(self, size: int) -> SystemRegion | CudaRegion | None:
        if self.kind is None:
            return None
        try:
            return CudaRegion(size) if self.kind == "cuda" else SystemRegion(size)
        except BackendError:
            raise
        except RuntimeError as err:  # how CuPy says that there is no GPU, or no memory left on it
            raise BackendError(f"no {size / 1e6:.0f} MB of a GPU's memory ({err}); use shared_memory system or off") from err
        except OSError as err:
            if self._insists:
                raise BackendError(
                    f"no {size / 1e6:.0f} MB of shared memory ({err.strerror or err}); free some, or use shared_memory off"
                ) from err
            logger.info("no %.0f MB of shared memory (%s): the image is sent", size / 1e6, err.strerror or err)
            return None

    def _register(self, region: SystemRegion | CudaRegion, timeout: float | None) -> bool:
        """Whether the server sees the region."""
        try:
            self._transport.register(region, timeout)
        except Failure as failure:
            if failure.reason in ("unavailable", "late", "cancelled"):
                raise
            if self._insists:
                raise BackendError(
                    f"the server cannot use this process's shared memory ({failure.text}); use shared_memory off"
                ) from failure
            logger.info("the server cannot use this process's shared memory (%s): images are sent", failure.text)
            self.kind = None
            return False
        if region.registration[0] == "system" and not self._swept:
            self._sweep(timeout)
        return True

    def _sweep(self, timeout: float | None) -> None:
        """Make the server forget what killed clients left: it sees this machine's memory, and their region is no longer in it."""
        self._swept = True
        if not _MEMORY.is_dir():
            return
        with suppress(Failure):
            for name, key in self._transport.system_regions(timeout).items():
                if name.startswith(_PREFIX) and not (_MEMORY / key.removeprefix("/")).exists():
                    self._transport.unregister("system", name, TIDY_S)


def _lay_out(question: Question, wanted: Mapping[str, Wanted]) -> tuple[dict[str, Slot], int]:
    """Where each large tensor lies, and the bytes of all; the region has no name yet."""
    sizes = {name: array.nbytes for name, array in question.inputs.items() if array.nbytes >= _SMALL}
    sizes |= {name: prod(shape) * DTYPES[kind].itemsize for name, (kind, shape) in wanted.items()}
    slots, at = {}, 0
    for name, size in sizes.items():
        slots[name] = Slot("", at, size)
        at += -(-size // _ALIGN) * _ALIGN
    return slots, at
