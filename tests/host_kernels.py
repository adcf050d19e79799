"""CUDA C compiled as C++ and run thread by thread on the host, reads through `fetch` checked: what it computes is tested without a GPU.

Threads run one after the other; where they wait for each other, those of a block are threads of the host. `RawModule` stands in for CuPy's.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from segrt.kernels._cuda import native

_SHIM = """
#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>
#include <pthread.h>
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
static thread_local Index blockIdx, threadIdx;
static Index blockDim, gridDim;
static pthread_barrier_t barrier;
static float shared_memory[1 << 14];
#define SHARED(name) float* name = shared_memory
#define BARRIER() pthread_barrier_wait(&barrier)
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
        std::vector<std::thread> threads;
        pthread_barrier_init(&barrier, nullptr, block[0] * block[1] * block[2]);
        Index mine;
        each(blockDim, mine, [&] {
            threads.emplace_back([=] {
                threadIdx = mine;
                each(gridDim, blockIdx, [&] { F(a...); BARRIER(); });
            });
        });
        for (auto& thread : threads) thread.join();
        pthread_barrier_destroy(&barrier);
    }
};
"""

_TYPES = {"f4": ctypes.c_float, "f8": ctypes.c_double, "i4": ctypes.c_int32, "i8": ctypes.c_int64, "u4": ctypes.c_uint32}


def compiler() -> str | None:
    """A C++ compiler, where there is one."""
    return shutil.which("g++")


def run_on_host(call: native.Call) -> None:
    """Run a call on arrays that lie on the host; none of its reads of logits may leave them."""
    library = _library(native.source_text(call.source), tuple(f"-D{name}={value}" for name, value in call.options), (call.kernel,))
    guarded = max((a for a in call.arguments if isinstance(a, np.ndarray)), key=lambda a: a.ndim)
    start, stop = np.lib.array_utils.byte_bounds(np.asarray(guarded))
    library.guard(ctypes.c_void_p(start), ctypes.c_long(stop - start))
    _run(library, call.kernel, call.shared > 0, call.grid, call.block, call.arguments)
    assert library.strays() == 0


class RawModule:
    """What `cupy.RawModule` is on a GPU, for memory of the host; threads of a block run at the same time."""

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        names = re.findall(r'^extern "C" __global__ void (\w+)\(', code, re.MULTILINE)
        self._library = _library(code, tuple(option for option in options if option.startswith("-D")), tuple(names))

    def get_function(self, name: str) -> Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]:
        """One kernel, to be called with grid, block and arguments."""
        return lambda grid, block, arguments: _run(self._library, name, True, grid, block, arguments)


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
def _library(source: str, defines: tuple[str, ...], kernels: tuple[str, ...]) -> Any:
    folder = Path(tempfile.mkdtemp())
    runners = (f'extern "C" void* run_{name}; void* run_{name} = (void*)&Runner<{name}>::run;\n' for name in kernels)
    text = _SHIM + source + "\n" + "".join(runners)
    (folder / "host.cpp").write_text(text)
    command = [
        compiler(),
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-pthread",
        "-w",
        *defines,
        "-o",
        str(folder / "host.so"),
        str(folder / "host.cpp"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "host.so"))
    library.strays.restype = ctypes.c_long
    return library
