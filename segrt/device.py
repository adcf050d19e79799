"""Where arrays lie: host memory, a CUDA device (CuPy), or a simulated device that takes the GPU's path on the CPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from .arrays import Array, require
from .errors import BackendError, InputError

_STAGE_BYTES = 1 << 24


class Simulated(np.ndarray):
    """An array on the simulated device: it can be cut, turned, filled and passed to kernels, and nothing else.

    NumPy's functions refuse it as they refuse an array on a GPU, so what forgets to move an array fails here too.
    """

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        raise TypeError(f"numpy.{ufunc.__name__} was given an array on the simulated device; bring it to the host first")

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{func.__name__} was given an array on the simulated device; bring it to the host first")


def _on_simulated(name: str) -> Any:
    function = getattr(np, name)

    def made(*args: Any, **kwargs: Any) -> Simulated:
        plain = (np.asarray(a) if isinstance(a, np.ndarray) else a for a in args)
        result: Simulated = function(*plain, **kwargs).view(Simulated)
        return result

    return made


# all that stages and kernels ask of CuPy: memory; arithmetic is done by our kernels
_SIMULATED_XP = SimpleNamespace(**{name: _on_simulated(name) for name in ("asarray", "ascontiguousarray", "empty", "full", "zeros")})


def get_xp(array: Any) -> Any:
    """Return what makes arrays where `array` lies: numpy, cupy, or the simulated device; asarray, ascontiguousarray, empty, full, zeros."""
    if isinstance(array, Simulated):
        return _SIMULATED_XP
    return require("cupy", extra="cuda") if _is_cupy(array) else np


def on_device(array: Any) -> bool:
    """Whether the array lies on a GPU or on the simulated device."""
    return isinstance(array, Simulated) or _is_cupy(array)


def _is_cupy(array: Any) -> bool:
    return type(array).__module__.split(".")[0] == "cupy"


def to_device(array: Array, device: str) -> Any:
    """Copy a host array to `device` ("cpu", "cuda", "cuda:1", "simulated"); C-contiguous there. "cpu" gives the array itself.

    Raises
    ------
    BackendError
        When there is no such device or CuPy is not installed.
    """
    if device == "cpu":
        return array
    if device == "simulated":
        return np.array(array, order="C").view(Simulated)
    with use_device(device):
        # CuPy has no types of the other byte order
        return _upload(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def to_host(array: Any) -> Array:
    """Copy a device's array to the host; a host array is given back as it is."""
    if isinstance(array, Simulated):
        return np.array(array)
    if not _is_cupy(array):
        host: Array = array
        return host
    with array.device:
        return _download(array)


def use_device(device: str) -> Any:
    """Context in which CuPy allocates and launches on `device`; nothing for "cpu" and "simulated".

    Raises
    ------
    BackendError
        When there is no such device, no driver, or CuPy is not installed.
    InputError
        When `device` is not "cpu", "simulated", "cuda" or "cuda:N".
    """
    number = device_number(device)
    if number is None:
        return nullcontext()
    return require("cupy", extra="cuda").cuda.Device(number)


def open_stream(device: str) -> Any:
    """Return a CUDA stream of a device's own, to be given to `compute_on`; None for "cpu" and "simulated"; errors as `use_device`."""
    if device_number(device) is None:
        return None
    with use_device(device):
        return require("cupy", extra="cuda").cuda.Stream(non_blocking=True)


@contextmanager
def compute_on(device: str, stream: Any) -> Iterator[None]:
    """Allocate and launch on `device`, in `stream` from `open_stream`, inside the block."""
    if stream is None:
        yield
        return
    memory = require("cupy", extra="cuda").cuda
    with use_device(device), memory.using_allocator(patient(memory.get_allocator())), stream:
        yield


def patient(allocate: Callable[[int], Any]) -> Callable[[int], Any]:
    """Make an allocator that has PyTorch give back the memory it keeps, and tries again, before it says that there is none."""

    def again(size: int) -> Any:
        try:
            return allocate(size)
        except MemoryError:
            torch = _torch_on_gpu()
            if torch is None:
                raise
            torch.empty_cache()
            return allocate(size)

    return again


def _torch_on_gpu() -> Any:
    """torch.cuda where this process has computed with it; None elsewhere."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def wait_for(stream: Any) -> None:
    """Wait until what was launched in a stream is done; nothing for None."""
    if stream is not None:
        stream.synchronize()


def device_number(device: str) -> int | None:
    """Return N of "cuda:N" (0 for "cuda") after checking that it is there; None for "cpu" and "simulated"; errors as `use_device`."""
    if device in ("cpu", "simulated"):
        return None
    found = re.fullmatch(r"cuda(?::(\d+))?", device)
    if found is None:
        raise InputError(f"device: expected cpu, cuda, cuda:N or simulated, got {device!r}")
    number, count = int(found[1] or 0), count_gpus()
    if number >= count:
        raise BackendError(f"{device} is asked for and this machine has {_counted(count)}; use --device cpu, or check nvidia-smi")
    return number


def _counted(count: int) -> str:
    return {0: "no GPU that CUDA can use", 1: "one GPU, cuda:0"}.get(count, f"{count} GPUs, cuda:0 to cuda:{count - 1}")


def count_gpus() -> int:
    """Return how many GPUs CUDA can use here; 0 without a driver.

    Raises
    ------
    BackendError
        When CuPy is not installed.
    """
    cupy = require("cupy", extra="cuda")
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


def free_bytes(device: str) -> int:
    """Memory of a GPU that new arrays can take, with what CuPy and PyTorch keep of what they freed; 0 for other devices."""
    number = device_number(device)
    if number is None:
        return 0
    with use_device(device):
        cupy, torch = require("cupy", extra="cuda"), _torch_on_gpu()
        kept = torch.memory_reserved(number) - torch.memory_allocated(number) if torch else 0
        return int(cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes() + kept)


def give_back(device: str) -> None:
    """Give back what CuPy and PyTorch keep of the memory they freed: each has it out of the reach of all other libraries."""
    if device_number(device) is None:
        return
    with use_device(device):
        require("cupy", extra="cuda").get_default_memory_pool().free_all_blocks()
    torch = _torch_on_gpu()
    if torch is not None:
        torch.empty_cache()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the ways CUDA libraries say that memory ran out into MemoryError."""
    try:
        yield
    except MemoryError:  # CuPy's own is one
        raise
    except RuntimeError as err:
        if re.search(r"out of memory|OUT_OF_MEMORY|OutOfMemory|failed to allocate", str(err), re.IGNORECASE):
            raise MemoryError(str(err)) from err
        raise


def _upload(array: Array) -> Any:
    """Copy through two pinned buffers: while one is read by the device, the other is filled."""
    cupy = require("cupy", extra="cuda")
    result = cupy.empty(array.shape, array.dtype)
    target, source = result.reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8)
    stream = cupy.cuda.get_current_stream()
    stages = _stages(source.size)
    for turn, first in enumerate(range(0, source.size, _STAGE_BYTES)):
        (stage, ready), size = stages[turn % 2], min(_STAGE_BYTES, source.size - first)
        ready.synchronize()
        stage[:size] = source[first : first + size]
        target[first : first + size].set(stage[:size], stream=stream)
        ready.record(stream)
    # only then may the buffers go back to their pool, where another thread finds them
    stream.synchronize()
    return result


def _download(array: Any) -> Array:
    cupy = require("cupy", extra="cuda")
    source = cupy.ascontiguousarray(array).reshape(-1).view(np.uint8)
    result = np.empty(array.shape, array.dtype)
    target = result.reshape(-1).view(np.uint8)
    stream = cupy.cuda.get_current_stream()
    waiting: list[tuple[int, Array, Any]] = []
    stages = _stages(source.size)
    for turn, first in enumerate(range(0, source.size, _STAGE_BYTES)):
        if len(waiting) == 2:
            _drain(waiting.pop(0), target)
        (stage, ready), size = stages[turn % 2], min(_STAGE_BYTES, source.size - first)
        source[first : first + size].get(stream=stream, out=stage[:size], blocking=False)
        ready.record(stream)
        waiting.append((first, stage[:size], ready))
    for item in waiting:
        _drain(item, target)
    return result


def _drain(item: tuple[int, Array, Any], target: Array) -> None:
    first, stage, ready = item
    ready.synchronize()
    target[first : first + len(stage)] = stage


def _stages(size: int) -> list[tuple[Array, Any]]:
    """Two pinned buffers, each with the event that says when the device is done with it."""
    cupy, cupyx = require("cupy", extra="cuda"), require("cupyx", extra="cuda")
    return [(cupyx.empty_pinned(min(size, _STAGE_BYTES), np.uint8), cupy.cuda.Event(disable_timing=True)) for _ in range(2)]
