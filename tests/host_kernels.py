"""CUDA C compiled as C++ and run thread by thread on the host, reads through `fetch` checked: what it computes is tested without a GPU.

Threads run one after the other; where they wait for each other, those of a block are threads of the host.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
static float widen(float value) { return value; }
static float widen(unsigned short bits) { _Float16 half; __builtin_memcpy(&half, &bits, 2); return (float)half; }
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
    library = _library(call.source, call.options, call.kernel)
    guarded = max((a for a in call.arguments if isinstance(a, np.ndarray)), key=lambda a: a.ndim)
    start, stop = np.lib.array_utils.byte_bounds(np.asarray(guarded))
    library.guard(ctypes.c_void_p(start), ctypes.c_long(stop - start))
    sizes = ((ctypes.c_int * 3)(*s, *(1,) * (3 - len(s))) for s in (call.grid, call.block))
    run = ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(library, f"run_{call.kernel}").value)
    run.argtypes = None
    run(ctypes.c_int(call.shared > 0), *sizes, *(_argument(a) for a in call.arguments))
    assert library.strays() == 0


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return _TYPES[value.dtype.str[1:]](value)


@cache
def _library(source: str, options: tuple[tuple[str, int], ...], kernel: str) -> Any:
    folder = Path(tempfile.mkdtemp())
    text = _SHIM + native.source_text(source) + f'\nextern "C" void* run_{kernel}; void* run_{kernel} = (void*)&Runner<{kernel}>::run;\n'
    (folder / "host.cpp").write_text(text)
    defines = [f"-D{name}={value}" for name, value in options]
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


def spills(source: str, defines: dict[str, int], generation: int, folder: Path) -> dict[str, int]:
    """Bytes of registers that every kernel of a source spills on one generation of GPUs; skips where nothing compiles CUDA C."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the CUDA packages: pip install 'segrt[cuda]'")
    if shutil.which("ptxas") is None:
        pytest.skip("there is no ptxas")
    options = [f"-arch=compute_{generation}".encode(), b"-std=c++17", *(f"-D{k}={v}".encode() for k, v in defines.items())]
    _, program = nvrtc.nvrtcCreateProgram(native.source_text(source).encode(), source.encode(), 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS
    ptx = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, ptx)
    (folder / "ptx").write_bytes(ptx.rstrip(b"\0"))
    command = ["ptxas", "-v", f"-arch=sm_{generation}", "-o", str(folder / "cubin"), str(folder / "ptx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr, re.DOTALL)
    return {name: int(stores) + int(loads) for name, stores, loads in found}
