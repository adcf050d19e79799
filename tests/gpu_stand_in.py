"""A GPU that is none: the names of CuPy that are called here, on NumPy's memory, by the rules of CUDA's streams at their worst.

What is launched in a stream waits in its list until something waits for it: `synchronize`, a stream that waits for its event, a blocking
copy; a stream of which `ahead` is set does its work at once instead. Fresh memory is full of NaN. So a wait that is missing, or a buffer
that is filled again too early, gives wrong numbers here every time, where a GPU gives them now and then.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class ndarray(np.ndarray):  # noqa: N801 - CuPy's name
    """An array in the GPU's memory: NumPy's functions refuse it."""

    __module__ = "cupy"  # by which ours know it
    gpu: Gpu

    def __array_finalize__(self, source: Any) -> None:
        self.gpu = getattr(source, "gpu", None)  # type: ignore[assignment]

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("NumPy was given an array of the GPU")

    __array_function__ = __array_ufunc__

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.plain.__array_interface__["data"][0])

    @property
    def device(self) -> Any:  # type: ignore[override]
        return nullcontext()

    @property
    def plain(self) -> Any:
        return self.view(np.ndarray)

    def reshape(self, *shape: Any) -> Any:  # type: ignore[override]
        made = super().reshape(*shape)
        if not self.size or np.may_share_memory(made.plain, self.plain):
            return made
        copied = self.gpu.empty(self.shape, self.dtype)
        copied[...] = self
        return copied.reshape(*shape)

    def __setitem__(self, key: Any, value: Any) -> None:
        assert not isinstance(value, np.ndarray) or isinstance(value, ndarray), "CuPy copies nothing of the host's by an assignment"
        target, source = self.plain[key], value.plain if isinstance(value, ndarray) else value
        self.gpu.current.add(lambda: np.copyto(target, source, casting="unsafe"))

    def get(self, *, stream: Stream, out: Any, blocking: bool) -> Any:
        source = self.plain
        stream.add(lambda: np.copyto(out, source))
        if blocking:
            stream.synchronize()
        return out

    def set(self, array: Any, *, stream: Stream) -> None:
        target = self.plain
        stream.add(lambda: np.copyto(target, array))


class Event:
    """A place in a stream."""

    def __init__(self, *, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None
        self.place = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.added

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.work_off(self.place)


class Graph:
    """Work that was recorded."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.launches = 0

    def launch(self, stream: Stream) -> None:
        self.launches += 1
        for work in self.work:
            stream.add(work)


class Stream:
    """Work in its order, done as late as possible, or at once."""

    def __init__(self, gpu: Gpu, *, non_blocking: bool = False) -> None:
        self.gpu, self.ptr, self.ahead = gpu, next(gpu.numbers), False
        self.waiting: deque[Callable[[], None]] = deque()
        self.added = self.done = 0
        self.graph: Graph | None = None
        gpu.streams[self.ptr] = self

    def add(self, work: Callable[[], None]) -> None:
        if self.graph is not None:
            self.graph.work.append(work)
            return
        with self.gpu.lock:
            self.waiting.append(work)
            self.added += 1
        if self.ahead:
            self.work_off(self.added)

    def work_off(self, place: int) -> None:
        with self.gpu.lock:
            while self.waiting and self.done < place:
                self.done += 1
                self.waiting.popleft()()

    def synchronize(self) -> None:
        if self.graph is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported")
        self.work_off(self.added)

    def wait_event(self, event: Event) -> None:
        stream, place = event.stream, event.place
        if stream is not None:
            self.add(lambda: stream.work_off(place))

    def begin_capture(self) -> None:
        self.gpu.fails("begin_capture")
        self.graph = Graph()

    def end_capture(self) -> Graph:
        graph, self.graph = self.graph, None
        self.gpu.fails("end_capture")
        assert graph is not None
        self.gpu.graphs.append(graph)
        return graph

    def __enter__(self) -> Stream:
        self.gpu.entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.entered.pop()


class Gpu:
    """One GPU of `size` bytes; `used` of them are taken. `failures` are calls of CUDA's that fail."""

    def __init__(self, size: int = 1 << 30) -> None:
        self.size, self.used, self.given_back = size, 0, 0
        self.numbers, self.lock = itertools.count(), threading.RLock()
        self.streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self.owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.graphs: list[Graph] = []
        self.failures: set[str] = set()
        self.pinned: list[Any] = []
        self._threads = threading.local()
        self.default = Stream(self)

    @property
    def entered(self) -> list[Stream]:
        if not hasattr(self._threads, "streams"):
            self._threads.streams = [self.default]
        streams: list[Stream] = self._threads.streams
        return streams

    @property
    def current(self) -> Stream:
        return self.entered[-1]

    def fails(self, call: str) -> None:
        if call in self.failures:
            raise CUDARuntimeError(f"{call} failed")

    def empty(self, shape: Any, dtype: Any = float) -> ndarray:
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        taken = count * dtype.itemsize
        if self.used + taken > self.size:
            raise OutOfMemoryError(f"Out of memory allocating {taken} bytes")
        owner = np.full(max(taken, 1), 255, np.uint8)
        self.owners[owner.__array_interface__["data"][0]] = owner
        self.used += taken
        weakref.finalize(owner, self._free, taken)
        made: ndarray = owner[:taken].view(dtype).reshape(shape).view(ndarray)
        made.gpu = self
        return made

    def _free(self, taken: int) -> None:
        self.used -= taken

    def full(self, shape: Any, value: Any, dtype: Any = float) -> ndarray:
        made = self.empty(shape, dtype)
        made[...] = value
        return made

    def ascontiguousarray(self, array: ndarray) -> ndarray:
        if array.flags.c_contiguous:
            return array
        made = self.empty(array.shape, array.dtype)
        made[...] = array
        return made

    def memory(self, address: int, size: int) -> Any:
        """The bytes at an address that was given out and not taken back."""
        owner = self.owners[address]
        assert size <= len(owner), f"{size} bytes asked for at an address with {len(owner)}"
        return owner[:size]

    def pin(self, shape: Any, dtype: Any) -> Any:
        self.pinned.append(shape)
        return np.full(shape, 255, np.uint8).astype(dtype)

    def modules(self) -> dict[str, ModuleType]:
        """What takes the places of cupy and cupyx in sys.modules."""
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda number: {"name": b"NVIDIA H200", "major": 9, "minor": 0},
            driverGetVersion=lambda: 13020,
            memGetInfo=lambda: (self.size - self.used, self.size),
        )
        cuda = SimpleNamespace(
            runtime=runtime,
            Device=lambda number: nullcontext(),
            Stream=lambda **options: Stream(self, **options),
            Event=Event,
            get_current_stream=lambda: self.current,
            get_allocator=lambda: None,
            using_allocator=lambda allocator: nullcontext(),
        )
        pool = SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=self._give_back)
        cupy, cupyx = ModuleType("cupy"), ModuleType("cupyx")
        zeros = lambda shape, dtype=float: self.full(shape, 0, dtype)  # noqa: E731
        names = {"cuda": cuda, "empty": self.empty, "full": self.full, "zeros": zeros, "ascontiguousarray": self.ascontiguousarray}
        cupy.__dict__.update(names, ndarray=ndarray, get_default_memory_pool=lambda: pool)
        cupyx.__dict__.update(empty_pinned=self.pin)
        for module in (cupy, cupyx):
            module.__spec__ = ModuleSpec(module.__name__, None)
        return {"cupy": cupy, "cupyx": cupyx}

    def _give_back(self) -> None:
        self.given_back += 1


def instead_of_cupy(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU that everything meets which imports CuPy during a test."""
    gpu = Gpu()
    for name, module in gpu.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return gpu


@contextmanager
def running_ahead(*streams: Any) -> Iterator[None]:
    """Have these streams do their work at once inside the block."""
    for stream in streams:
        stream.ahead = True
    try:
        yield
    finally:
        for stream in streams:
            stream.ahead = False
