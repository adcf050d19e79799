"""Launches of CUDA C through CuPy, where a benchmark earns it; the thread bodies of this folder say the same and run without a GPU.

A call is a value, made of arrays wherever they lie, so that tests run it on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ...arrays import require
from ...device import Simulated

THREADS = 256
MOST_BLOCKS = 65535  # along y and z
MOST_SHARED = 48 * 1024  # bytes of a block that need no asking for

Options = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Call:
    """One launch: a kernel of `src/<source>.cu`, compiled with `options`; `shared` bytes of a block."""

    source: str
    kernel: str
    options: Options
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]
    shared: int = 0


# These kernels equal the thread bodies where they run as C++ on a CPU, and compile for every generation; no GPU has run them yet. Until one
# has, the thread bodies, which one has, do the work unless somebody asks for these: the commands do for SEGRT_CUDA_C=1.
_asked_for = False


def use_cuda_c(wanted: bool) -> None:
    """Have CUDA C do the work of this process from now on, or the thread bodies again."""
    global _asked_for
    _asked_for = wanted


def available(array: Any) -> bool:
    """Whether an array's work goes to CUDA C: it lies on a GPU, and it was asked for."""
    return _asked_for and not isinstance(array, Simulated)


def run(call: Call | None) -> bool:
    """Launch on CuPy's current stream; False when there is no call."""
    if call is None:
        return False
    cupy = require("cupy", extra="cuda")
    kernel = _kernel(call.source, call.kernel, call.options, cupy.cuda.runtime.getDevice())
    kernel(call.grid, call.block, call.arguments, shared_mem=call.shared)
    return True


def source_text(name: str) -> str:
    """The CUDA C of one file."""
    return (files(__package__ or "") / "src" / f"{name}.cu").read_text(encoding="utf-8")


def across(wide: int) -> int:
    """Threads along x: the most of 128 and 64 that leave no more than an eighth idle, else 32."""
    return next((n for n in (128, 64) if -wide % n <= wide // 8), 32)


@cache
def _kernel(source: str, kernel: str, options: Options, device: int) -> Any:
    return _module(source, options, device).get_function(kernel)


@cache
def _module(source: str, options: Options, device: int) -> Any:  # `device`: a module belongs to the GPU it was loaded on
    defines = tuple(f"-D{name}={value}" for name, value in options)
    return require("cupy", extra="cuda").RawModule(code=source_text(source), options=(*defines, "--std=c++17"))
