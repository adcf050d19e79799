"""Calls of `src/logits.cu`: blending and labels for arrays without gaps; other arrays are left to the bodies of `blend` and `labels`."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .native import MOST_BLOCKS, THREADS, Call, Options, across

_WIDEST = 16  # bytes of one load
_MOST_BYTES = 2**32 - 1  # of a class: offsets are counted in 32 bits
_MOST_VALUES = 2**31 - 1

# what a thread makes of one kernel, see the source; guesses, until `benchmarks/gpu.py --only variants` has run on a GPU
TUNING: dict[str, int] = {"GROUPS": 1, "AHEAD": 8, "CHUNK": 8, "BLEND_BLOCKS": 4, "RZ": 4, "RY": 2, "BLOCKS": 2}


def blend_call(box: Any, logits: Any, entries: Any, tables: tuple[Any, ...], scale: float) -> Call | None:
    """Add the windows of `entries` (N, 10), which start relative to `box` (K, z, y, x), to it; see `blend.blend`."""
    classes, deep, high, wide = box.shape
    step, step_z, step_y, step_x = (n // box.itemsize for n in box.strides)
    if not (logits.flags.c_contiguous and all(t.flags.c_contiguous for t in tables)) or (wide > 1 and step_x != 1):
        return None
    if max(deep, high) > MOST_BLOCKS or logits[0, 0].size > _MOST_VALUES:
        return None
    block = across(wide), THREADS // across(wide)
    steps = np.int64(step), np.int64(step_z), np.int64(step_y)
    sizes = (np.int32(n) for n in (classes, high, wide))
    windows = (np.int32(n) for n in logits.shape[2:])
    arguments = box, *steps, *sizes, logits, *windows, entries, np.int32(len(entries)), *tables, np.float32(scale)
    options = _options(logits.dtype, np.dtype(np.uint8), "CHUNK", "BLEND_BLOCKS")
    return Call("logits", "blend", options, (-(-wide // block[0]), -(-high // block[1]), deep), block, arguments)


def label_call(logits: Any, values: Any, regions: bool, bound: float, out: Any) -> Call | None:
    """Label every voxel of `logits` (K, Z, Y, X); see `labels.label`."""
    if not (_without_gaps(logits) and out.flags.c_contiguous):
        return None
    step, voxels = _step(logits), out.size
    vector = _WIDEST // logits.itemsize
    while vector > 1 and (step % vector or voxels % vector or _address(logits) % (vector * logits.itemsize) or _address(out) % vector):
        vector //= 2
    options = (*_options(logits.dtype, out.dtype, "AHEAD"), ("VEC", vector), ("GROUPS", TUNING["GROUPS"] * max(1, 4 // vector)))
    blocks = -(-voxels // (vector * dict(options)["GROUPS"] * THREADS))
    arguments = logits, np.int64(step), np.int32(len(logits)), np.int64(voxels), values, np.float32(bound), out
    return Call("logits", "painted" if regions else "largest", options, (blocks,), (THREADS,), arguments)


def resampled_call(logits: Any, lower: Any, fraction: Any, values: Any, rule: tuple[bool, float, bool], out: Any) -> Call | None:
    """Label a grid of another shape; `lower` and `fraction` (float64) hold z's, y's and x's, see `labels.label_resampled`."""
    (classes, *size), (deep, high, wide), (regions, bound, half) = logits.shape, out.shape, rule
    if not _without_gaps(logits) or size[2] < 2 or prod(size) * logits.itemsize > _MOST_BYTES:
        return None
    block = across(wide), THREADS // across(wide)
    options = (*_options(logits.dtype, out.dtype, "RZ", "BLOCKS"), ("RY", rows(regions)))
    tile = TUNING["RZ"], rows(regions) * block[1], block[0]
    blocks = prod(-(-n // t) for n, t in zip(out.shape, tile, strict=True))
    steps = (np.int64(n // out.itemsize) for n in out.strides)
    source = logits, np.int64(_step(logits)), *(np.int32(n) for n in (classes, *size))
    arguments = *source, lower, fraction, *(np.int32(n) for n in (deep, high, wide)), values, np.float32(bound), np.int32(half), out, *steps
    return Call("logits", "painted_resampled" if regions else "largest_resampled", options, (blocks,), block, arguments)


def rows(regions: bool) -> int:
    """Rows of the result that a thread makes; painting decides class by class, and has no registers for more than one."""
    return 1 if regions else TUNING["RY"]


def _options(dtype: Any, labels: Any, *names: str) -> Options:
    return ("HALF", int(dtype == np.float16)), ("WIDE", int(labels.itemsize == 2)), *((name, TUNING[name]) for name in names)


def _without_gaps(logits: Any) -> bool:
    """Whether the voxels of a class follow each other in memory."""
    dense: bool = logits[0].flags.c_contiguous
    return dense and logits.dtype in (np.float32, np.float16)


def _step(logits: Any) -> int:
    """From a class to the next, in elements."""
    return int(logits.strides[0]) // int(logits.itemsize)


def _address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)
