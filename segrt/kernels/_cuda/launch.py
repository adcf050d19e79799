"""One text per kernel, two compilers: a thread body becomes a CUDA kernel, and a bounds-checked loop where there is no GPU.

A body is a plain function `body(z, y, x, *arrays and scalars)` that does the work of one thread. `thread_kernel` makes a CUDA kernel of it
and, for `simulated` arrays (see `segrt.device`), a loop over all threads on the CPU, one after the other and with every index checked: the
same text at a speed that whole images bear. `cuda_simulator` runs them under Numba's own CUDA simulator instead, thread by thread.

Rules for bodies: no bare float literal (those are float64), no print, nothing of NumPy but scalar types and functions; what they call is
marked `@scalar`; shared results are written by one thread each, or by integer atomics; never by floating-point ones, so that repeated runs
give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from inspect import signature
from threading import Lock
from types import FunctionType
from typing import Any, Literal
from zlib import crc32

import numba
import numpy as np
from numba import njit

from ...arrays import Array, Shape3, require
from ...device import Simulated
from ...errors import BackendError, InputError

# untyped, and the simulator takes the real module's place
cuda: Any = import_module("numba.cuda")
config: Any = numba.config
typeof: Any = numba.typeof
# small images make small grids, and nobody who segments one can do anything about it
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

Target = Literal["cuda", "loop"]

_THREADS, _WARP = 256, 32
_MOST_BLOCKS = 65535  # along y and z
# threads that meet at a kernel's first launch crash numba-cuda, the whole process with it; Python lets one of them launch at a time anyway
_ONE_AT_A_TIME = Lock()
_simulate_cuda = False
_record: list[Launch] | None = None

_SOURCES: dict[Target, str] = {
    "cuda": """
def {name}(deep, high, wide, {parameters}):
    x = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    y = cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y
    z = cuda.blockIdx.z * cuda.blockDim.z + cuda.threadIdx.z
    if z < deep and y < high and x < wide:
        body(z, y, x, {parameters})
""",
    "loop": """
def {name}_loop(deep, high, wide, {parameters}):
    for z in range(deep):
        for y in range(high):
            for x in range(wide):
                body(z, y, x, {parameters})
""",
}


class Scalar:
    """A function of scalars (and arrays it indexes) that thread bodies call."""

    def __init__(self, function: Callable[..., Any], loop: Callable[..., Any] | None = None) -> None:
        self.functions: dict[Target, Any] = {"cuda": function, "loop": loop or function}
        self._compiled: dict[Target, Any] = {}
        self.__doc__ = function.__doc__

    def compiled(self, target: Target) -> Any:
        """The function for one compiler."""
        if target not in self._compiled:
            function = _bound(self.functions[target], target)
            self._compiled[target] = cuda.jit(device=True)(function) if target == "cuda" else njit(boundscheck=True)(function)
        return self._compiled[target]


def scalar(function: Callable[..., Any]) -> Any:  # a Scalar, which only compiled bodies can call
    """Mark a function that thread bodies call."""
    return Scalar(function)


class ThreadKernel:
    """A thread body and its two compiled forms."""

    def __init__(self, body: Callable[..., None], float64: bool) -> None:
        self.body = body
        self.float64 = float64
        self.name = body.__name__.lstrip("_")
        self.parameters = tuple(signature(body).parameters)[3:]
        self.__doc__ = body.__doc__

    @cached_property
    def cuda(self) -> Any:
        """The CUDA kernel (deep, high, wide, *arguments)."""
        if not config.ENABLE_CUDASIM:
            _check_numpy()
        return cuda.jit(self.source_function("cuda"), cache=not config.ENABLE_CUDASIM)

    @cached_property
    def loop(self) -> Callable[..., None]:
        """The loop over all threads (deep, high, wide, *arguments), compiled once for arrays of whatever strides."""
        loop: Any = njit(self.source_function("loop"), cache=True, nogil=True, boundscheck=True)
        compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

        def run(*arguments: Any) -> None:
            # Numba itself would compile it again for contiguous arrays, for each way they may be contiguous in
            types = tuple(_any_strides(typeof(argument)) for argument in arguments)
            if types not in compiled:
                compiled[types] = loop.compile(types)
            compiled[types](*arguments)

        return run

    def source_function(self, target: Target) -> Any:
        """The kernel as a Python function, with the file and line of the body so that Numba's cache finds and invalidates it.

        That cache only looks at the body's own file; a checksum in the name stands for what it calls in others.
        """
        source = _SOURCES[target].format(name=self.name, parameters=", ".join(self.parameters))
        code = compile("\n" * (self.body.__code__.co_firstlineno - 2) + source, self.body.__code__.co_filename, "exec")
        bound = _bound(self.body, target)
        body = cuda.jit(device=True)(bound) if target == "cuda" else njit(boundscheck=True)(bound)
        names: dict[str, Any] = {"cuda": cuda, "body": body, "__name__": self.body.__module__}
        exec(code, names)
        function = names[self.name if target == "cuda" else f"{self.name}_loop"]
        function.__qualname__ += f"_{crc32(_text_of(self.body).encode()):08x}"
        return function


def thread_kernel(*, float64: bool = False) -> Callable[[Callable[..., None]], ThreadKernel]:
    """Make a kernel of a thread body (z, y, x, *arguments); `float64` says that it means to compute in double precision."""
    return lambda body: ThreadKernel(body, float64)


def _bound(function: Callable[..., Any], target: Target) -> Any:
    """A copy of the function that sees the scalars it calls in the form of one compiler."""
    assert isinstance(function, FunctionType)
    names = {k: v.compiled(target) if isinstance(v, Scalar) else v for k, v in function.__globals__.items() if k in _names(function)}
    bound = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)
    bound.__qualname__ = function.__qualname__
    return bound


def _text_of(function: Callable[..., Any]) -> str:
    """What a function compiles to depends on: its code, the scalars it calls, and their constants."""
    assert isinstance(function, FunctionType)
    used = sorted((k, v) for k, v in function.__globals__.items() if k in _names(function))
    parts = [function.__code__.co_code.hex(), repr(function.__code__.co_consts)]
    for name, value in used:
        inner = value.functions.values() if isinstance(value, Scalar) else ()
        parts += [name, *(_text_of(f) for f in inner)] if inner else [name, repr(value) if np.isscalar(value) else ""]
    return "\n".join(parts)


def _names(function: FunctionType) -> set[str]:
    return set(function.__code__.co_names)


def _check_numpy() -> None:
    """Raise a BackendError when numba-cuda is older than this NumPy: it imports then, and fails at the first kernel."""
    try:
        import_module("numba.cuda.np.arrayobj")
    except AttributeError as err:
        raise BackendError(
            f"numba-cuda does not work with NumPy {np.__version__} ({err}); pip install 'segrt[cuda]' brings one it does"
        ) from err


def launch(kernel: ThreadKernel, shape: Shape3, *arguments: Any) -> None:
    """Run a kernel for every (z, y, x) of `shape`, on CuPy's current stream when its arrays lie on a GPU.

    Raises
    ------
    InputError
        When `shape` has more planes than one launch can have.
    BackendError
        When numba-cuda does not work with the installed NumPy.
    """
    assert len(arguments) == len(kernel.parameters), f"{kernel.name} takes {kernel.parameters}"
    assert not any(isinstance(a, float) and not isinstance(a, np.floating) for a in arguments), "a Python float is float64: pass np.float32"
    if min(shape) < 1:
        return
    if _record is not None:
        _record.append(Launch(kernel, shape, arguments))
    first = next(a for a in arguments if hasattr(a, "ndim") and a.ndim)
    if isinstance(first, Simulated) and not _simulate_cuda:
        kernel.loop(*shape, *(_for_loop(a) if isinstance(a, np.ndarray) else a for a in arguments))
        return
    # the simulator has no warps, and runs a thread of Python for each of a block, idle or not
    grid, block = _geometry(shape, 1 if isinstance(first, Simulated) else _WARP)
    if isinstance(first, Simulated):
        # in place: the simulator would copy what is not contiguous
        fake = cuda.devicearray.FakeCUDAArray
        with _ONE_AT_A_TIME:
            kernel.cuda[grid, block](*shape, *(fake(np.asarray(a)) if isinstance(a, np.ndarray) else a for a in arguments))
        return
    cupy = require("cupy", extra="cuda")
    with _ONE_AT_A_TIME:
        stream = _stream(cupy.cuda.get_current_stream().ptr)
        views = (_view(a.data.ptr, a.shape, _strides(a), a.dtype) if isinstance(a, cupy.ndarray) else a for a in arguments)
        kernel.cuda[grid, block, stream](*(np.int32(n) for n in shape), *views)


# Numba's names for CuPy's memory and streams take longer to make than a launch: equal ones are made once. They own nothing;
# the caller holds the arrays, and CuPy gives their memory to nobody but later work of the same stream
@lru_cache(1024)
def _view(address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: np.dtype[Any]) -> Any:
    described = {"shape": shape, "strides": strides, "typestr": dtype.str, "data": (address, False), "version": 3}
    return cuda.from_cuda_array_interface(described, sync=False)


def _strides(array: Any) -> tuple[int, ...] | None:
    """None says C-contiguous to Numba, whatever the strides of axes of one element are."""
    strides: tuple[int, ...] | None = None if array.flags.c_contiguous else array.strides
    return strides


@lru_cache(64)
def _stream(address: int) -> Any:
    return cuda.external_stream(address)


def _any_strides(kind: Any) -> Any:
    return kind.copy(layout="A") if isinstance(kind, numba.types.Array) else kind


def _for_loop(array: Array) -> Array:
    """Numba has no float16 on the CPU: bodies only read such arrays, and make float32 of what they read."""
    plain = np.asarray(array)
    return plain.astype(np.float32) if plain.dtype == np.float16 else plain


@dataclass(frozen=True)
class Launch:
    """A kernel that was run, over which shape and with which arguments."""

    kernel: ThreadKernel
    shape: Shape3
    arguments: tuple[Any, ...]


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect every launch inside the block: what a stage runs on a device, in order."""
    global _record
    _record = []
    try:
        yield _record
    finally:
        _record = None


def _geometry(shape: Shape3, warp: int = _WARP) -> tuple[Shape3, Shape3]:
    """Blocks and threads, both (x, y, z): whole warps along x, the rest along y."""
    deep, high, wide = shape
    x = warp
    while x < min(wide, _THREADS):
        x *= 2
    y = 1
    while y < min(high, _THREADS // x):
        y *= 2
    grid = -(-wide // x), -(-high // y), deep
    if max(grid[1:]) > _MOST_BLOCKS:
        raise InputError(f"an array of {deep} x {high} x {wide} has too many planes or rows for one launch on a GPU")
    return grid, (x, y, 1)


@contextmanager
def cuda_simulator() -> Iterator[None]:
    """Run kernels on simulated arrays under Numba's CUDA simulator inside the block.

    Raises
    ------
    BackendError
        When Numba was imported without NUMBA_ENABLE_CUDASIM=1.
    """
    global _simulate_cuda
    if not config.ENABLE_CUDASIM:
        raise BackendError("Numba runs without its CUDA simulator; set NUMBA_ENABLE_CUDASIM=1 before it is imported")
    _simulate_cuda = True
    try:
        yield
    finally:
        _simulate_cuda = False


def _atomic_min(array: Array, index: int, value: int) -> Any:
    return cuda.atomic.min(array, index, value)


def _atomic_max(array: Array, index: int, value: int) -> Any:
    return cuda.atomic.max(array, index, value)


def _atomic_add(array: Array, index: int, value: int) -> Any:
    return cuda.atomic.add(array, index, value)


def _one_min(array: Array, index: int, value: int) -> Any:
    old = array[index]
    array[index] = min(old, value)
    return old


def _one_max(array: Array, index: int, value: int) -> Any:
    old = array[index]
    array[index] = max(old, value)
    return old


def _one_add(array: Array, index: int, value: int) -> Any:
    old = array[index]
    array[index] = old + value
    return old


# old = atomic_min(array, index, value): one-dimensional integer arrays only; the loop has one thread and needs no atomics
atomic_min: Any = Scalar(_atomic_min, _one_min)
atomic_max: Any = Scalar(_atomic_max, _one_max)
atomic_add: Any = Scalar(_atomic_add, _one_add)
