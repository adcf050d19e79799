"""CUDA C compiled as C++ and run thread by thread on the host, reads through `fetch` checked: what it computes is tested without a GPU.

Threads run one after the other; where those of a block wait for each other, the next one goes on where it waited. `RawModule` stands in
for CuPy's, `cuda_c_on_host` for CuPy and its GPU, so that a whole case goes the way it goes there.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np

from segrt.kernels._cuda import native
from tests.cuda_sources import part_of

# a header of its own, compiled once for all: it takes longer than the kernels
_LIBRARIES = """
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>
#include <ucontext.h>
"""
_SHIM = """
#include "libraries.h"
using std::min;
using std::max;
#define HOST 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define __syncthreads() BARRIER()
#define HOLD(kind, value)
struct Index { int x, y, z; };
static Index blockIdx, threadIdx, blockDim, gridDim;
static float shared_memory[1 << 14];
#define SHARED(name) float* name = shared_memory
// a thread that waits gives way to the next one of its block
struct Waiting {
    ucontext_t context;
    Index thread;
    bool done;
    std::vector<char> stack = std::vector<char>(1 << 16);
};
static ucontext_t block_context;
static Waiting* running;
static std::function<void()> body_of_thread;
static void run_thread() {
    body_of_thread();
    running->done = true;
}
#define BARRIER() swapcontext(&running->context, &block_context)
static double __dmul_rn(double a, double b) { return a * b; }
static double __dadd_rn(double a, double b) { return a + b; }
template <class To, class From> static To same_bits(From from) { To to; __builtin_memcpy(&to, &from, sizeof to); return to; }
static float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
static float from_half(unsigned short bits) { return (float)same_bits<_Float16>(bits); }
static unsigned short to_half(float value) { return same_bits<unsigned short>((_Float16)value); }
static unsigned short to_bfloat16(float value) {
    const unsigned bits = same_bits<unsigned>(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#ifndef KIND
static float widen(float value) { return value; }
static float widen(unsigned short bits) { return from_half(bits); }
#endif
static double round_half(double value) { return (double)(_Float16)value; }
static const char *first_byte, *last_byte;
static long outside;
extern "C" void guard(const void* first, long bytes) { first_byte = (const char*)first; last_byte = first_byte + bytes; outside = 0; }
extern "C" long strays() { return outside; }
template <class T> static T fetch(const T* address) {
    if ((const char*)address < first_byte || (const char*)(address + 1) > last_byte) { ++outside; return T(); }
    return *address;
}
static float fetch_sum(const float* address) { return *address; }
static void store_sum(float* address, float value) { *address = value; }
template <class Body> static void each(Index count, Index& index, Body body) {
    for (index.z = 0; index.z < count.z; ++index.z)
        for (index.y = 0; index.y < count.y; ++index.y)
            for (index.x = 0; index.x < count.x; ++index.x) body();
}
template <auto F> struct Runner;
template <class... A, void (*F)(A...)> struct Runner<F> {
    static void run(int waiting, const int* grid, const int* block, A... a) {
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {block[0], block[1], block[2]};
        if (!waiting) return each(gridDim, blockIdx, [&] { each(blockDim, threadIdx, [&] { F(a...); }); });
        static std::vector<Waiting> threads;
        threads.resize(block[0] * block[1] * block[2]);
        body_of_thread = [&] { F(a...); };
        each(gridDim, blockIdx, [&] {
            size_t n = 0;
            Index mine;
            each(blockDim, mine, [&] {
                Waiting& thread = threads[n++];
                thread.thread = mine;
                thread.done = false;
                getcontext(&thread.context);
                thread.context.uc_link = &block_context;
                thread.context.uc_stack.ss_sp = thread.stack.data();
                thread.context.uc_stack.ss_size = thread.stack.size();
                makecontext(&thread.context, run_thread, 0);
            });
            for (size_t left = n; left > 0;) {
                left = 0;
                for (Waiting& thread : threads) {
                    if (thread.done) continue;
                    running = &thread;
                    threadIdx = thread.thread;
                    swapcontext(&block_context, &thread.context);
                    left += !thread.done;
                }
            }
        });
    }
};
"""

_DEVICES = count(1000)  # what is loaded belongs to one
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w")
_TYPES = {"f4": ctypes.c_float, "f8": ctypes.c_double, "i4": ctypes.c_int32, "i8": ctypes.c_int64, "u4": ctypes.c_uint32}


def compiler() -> str | None:
    """A C++ compiler, where there is one."""
    return shutil.which("g++")


def run_on_host(call: native.Call) -> None:
    """Run a call on arrays that lie on the host; none of its reads of logits may leave them."""
    options = tuple(f"-D{name}={value}" for name, value in call.options)
    kernel = RawModule(native.source_text(call.source), options).get_function(call.kernel)
    kernel(call.grid, call.block, call.arguments, shared_mem=call.shared)


class RawModule:
    """What `cupy.RawModule` is on a GPU, for memory of the host."""

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        self._code, self._defines = code, tuple(option for option in options if option.startswith("-D"))

    def get_function(self, name: str) -> Callable[..., None]:
        """One kernel, to be called with grid, block, arguments and `shared_mem`: 0 says that no thread waits for another."""
        library = _library(part_of(self._code, name), self._defines)

        def kernel(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_mem: int = 1) -> None:
            arrays = [a for a in arguments if isinstance(a, np.ndarray)]
            if arrays:
                start, stop = np.lib.array_utils.byte_bounds(np.asarray(max(arrays, key=lambda a: a.ndim)))
                library.guard(ctypes.c_void_p(start), ctypes.c_long(stop - start))
            _run(library, name, shared_mem > 0, grid, block, arguments)
            assert library.strays() == 0

        return kernel


@contextmanager
def cuda_c_on_host() -> Iterator[list[str]]:
    """Have CUDA C work on simulated arrays inside the block, through all that launches it on a GPU: the kernels that ran."""
    ran: list[str] = []

    class Module(RawModule):
        def get_function(self, name: str) -> Callable[..., None]:
            kernel = super().get_function(name)
            return lambda *arguments, **options: (ran.append(name), kernel(*arguments, **options))[1]

    device = next(_DEVICES)
    cupy = SimpleNamespace(RawModule=Module, cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: device)))
    with patch.object(native, "require", lambda *_, **__: cupy), patch.object(native, "Simulated", ()):
        native.use_cuda_c(True)
        try:
            yield ran
        finally:
            native.use_cuda_c(False)


def _run(library: Any, kernel: str, waiting: bool, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    sizes = ((ctypes.c_int * 3)(*s, *(1,) * (3 - len(s))) for s in (grid, block))
    run = ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(library, f"run_{kernel}").value)
    run.argtypes = None
    run(ctypes.c_int(waiting), *sizes, *(_argument(a) for a in arguments))


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p(value) if isinstance(value, int) else _TYPES[value.dtype.str[1:]](value)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    (folder / "libraries.h").write_text(_LIBRARIES)
    _compile([*_FLAGS, "-x", "c++-header", str(folder / "libraries.h")])
    return folder


@cache
def _library(source: str, defines: tuple[str, ...]) -> Any:
    names = re.findall(r'^extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(', source, re.MULTILINE)
    runners = (f'extern "C" void* run_{name}; void* run_{name} = (void*)&Runner<{name}>::run;\n' for name in names)
    path = _folder() / f"{crc32(repr((source, defines)).encode()):08x}"
    path.with_suffix(".cpp").write_text(_SHIM + source + "\n" + "".join(runners))
    _compile([*_FLAGS, "-shared", *defines, "-o", f"{path}.so", f"{path}.cpp"])
    library = ctypes.CDLL(f"{path}.so")
    library.strays.restype = ctypes.c_long
    return library


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([compiler() or "g++", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
