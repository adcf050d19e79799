"""Which form of each CUDA C kernel wins on the GPU at hand, and by how much over the thread body of the same text.

    python benchmarks/gpu_variants.py [argmax] [blend] [cubic] [linear] [fused] [all]   # all parts but `all` by default; 2-3 minutes
    python benchmarks/gpu_variants.py one "resample + argmax, fp32"                     # one kernel and nothing else, for ncu
    python benchmarks/gpu_variants.py --json variants.json argmax

A line: milliseconds on the device (events, median of seven), bytes (each input read once, each output written once) per second, their share
of a copy's, and the host's milliseconds for one call. Every form is checked against the CPU first and, at full size, against the thread
body on the GPU. What wins belongs into the TUNING tables of `segrt.kernels._cuda`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from _gpu_kernels import KERNELS, check
from _gpu_setting import FULL, Arrays

from segrt.errors import SegrtError
from segrt.kernels._cuda import logits, native, splines

DEVICE = "cuda:0"
# what a kernel may fail with: results that differ, no room, no such code
FAILURES = (AssertionError, SegrtError, MemoryError, cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError)
FORMS: dict[str, tuple[dict[str, int], list[str], tuple[str, ...], list[tuple[int, ...]]]] = {
    "argmax": (logits.TUNING, ["argmax, fp32", "argmax, fp16"], ("AHEAD", "GROUPS"), [(8, 1), (4, 1), (4, 2), (16, 1), (2, 2)]),
    "blend": (
        logits.TUNING,
        ["blend 4 windows, fp16", "blend 4 windows, fp32", "blend 8 windows, fp16"],
        ("CHUNK", "BLEND_BLOCKS"),
        [(8, 4), (4, 5), (16, 3), (8, 6), (2, 6)],
    ),
    "cubic": (
        splines.TUNING,
        ["resample image, cubic", "resample image, cubic, separate z", "minimum and maximum"],
        ("SPAN", "WARPS"),
        [(32, 4), (48, 4), (64, 4), (32, 8), (24, 4), (16, 8)],
    ),
    "linear": (
        splines.TUNING,
        ["resample image, linear", "resample image, nearest"],
        ("RZ", "RY"),
        [(4, 2), (2, 2), (4, 1), (4, 4), (8, 1)],
    ),
    "fused": (
        logits.TUNING,
        ["resample + argmax, fp32", "resample + argmax, fp16", "resample + argmax, fp32, separate z", "resample + paint, fp32"],
        ("RZ", "RY", "BLOCKS"),
        [(4, 2, 2), (4, 1, 4), (8, 1, 2), (4, 2, 3), (2, 2, 4), (8, 2, 2), (4, 4, 2), (1, 1, 6)],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(FORMS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.parts[:1] == ["one"]:
        call, _ = KERNELS[args.parts[1]](Arrays(DEVICE), FULL)
        for _ in range(2):
            call()
        cupy.cuda.Device().synchronize()
        return
    bench = _Bench()
    for part in args.parts:
        if part == "all":
            bench.as_they_are()
        else:
            bench.forms(*FORMS[part])
        if args.json:
            args.json.write_text(json.dumps(bench.results, indent=1) + "\n", encoding="utf-8")


class _Bench:
    def __init__(self) -> None:
        self.results: dict[str, dict[str, float]] = {}
        self._filler = cupy.empty(1 << 31, cupy.uint8)
        source = cupy.ones(1 << 29, cupy.float32)
        target = cupy.empty_like(source)
        self._copy = 2 * source.nbytes / self._time(lambda: cupy.copyto(target, source))[0]
        print(f"copy {self._copy / 1e6:.0f} GB/s", flush=True)

    def as_they_are(self) -> None:
        """Every kernel of gpu.py: what of its figure there is the host's?"""
        for name, job in KERNELS.items():
            self._row(name, *job(Arrays(DEVICE), FULL))
            cupy.get_default_memory_pool().free_all_blocks()

    def forms(self, tuning: dict[str, int], names: list[str], options: tuple[str, ...], settings: list[tuple[int, ...]]) -> None:
        """Every kernel in every form, then its thread body."""
        usual = dict(tuning)
        for name in names:
            made = KERNELS[name](Arrays(DEVICE), FULL)
            for values in settings:
                tuning.update(zip(options, values, strict=True))
                label = f"{name} {' '.join(f'{o}={v}' for o, v in zip(options, values, strict=True))}"
                try:
                    check(KERNELS[name], DEVICE)
                    self._row(label, *made)
                except FAILURES as err:
                    print(f"{label} failed: {type(err).__name__}: {' '.join(str(err).split())[:300]}", flush=True)
            tuning.update(usual)
            self._against_body(name, *made)
            del made
            cupy.get_default_memory_pool().free_all_blocks()

    def _against_body(self, name: str, call: Callable[[], Any], moved: int) -> None:
        # blending adds to what is there, and two numbers are no array
        ours = None if name.startswith("blend") or name == "minimum and maximum" else call()
        native.use_cuda_c(False)
        self._row(f"{name} thread body", call, moved)
        if ours is not None:
            body = call()
            worst = float(cupy.abs(body.astype(cupy.float32) - ours).max()) if body.dtype.kind == "f" else int((body != ours).sum())
            print(f"{name}: at full size, largest difference from the thread body (or labels that differ): {worst}", flush=True)
        native.use_cuda_c(True)

    def _row(self, name: str, call: Callable[[], Any], moved: int) -> None:
        ms, host = self._time(call)
        self.results[name] = {"ms": ms, "host_ms": host, "bytes": moved, "share": moved / ms / self._copy}
        print(
            f"{name:64s} {ms:8.3f} ms {moved / ms / 1e6:6.0f} GB/s {100 * moved / ms / self._copy:4.0f} %  host {host:.3f} ms", flush=True
        )

    def _time(self, call: Callable[[], Any], *, runs: int = 7, count: int = 5) -> tuple[float, float]:
        """Medians: (milliseconds on the device, milliseconds until the host is free again)."""
        for _ in range(2):
            call()
        cupy.cuda.Device().synchronize()
        times, host = [], []
        for _ in range(runs):
            begun = time.perf_counter()
            call()
            host.append(1e3 * (time.perf_counter() - begun))
            cupy.cuda.Device().synchronize()
            first, last = cupy.cuda.Event(), cupy.cuda.Event()
            # the GPU is kept busy first, so that the host is ahead of it when the first event comes
            for value in range(3):
                self._filler.fill(value)
            first.record()
            for _ in range(count):
                call()
            last.record()
            last.synchronize()
            times.append(cupy.cuda.get_elapsed_time(first, last) / count)
        return statistics.median(times), statistics.median(host)


if __name__ == "__main__":
    native.use_cuda_c(True)
    main()
