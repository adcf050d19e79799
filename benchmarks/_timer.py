"""What every benchmark shares: the timer, peak memory, and results written with machine, versions and commit."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("numpy", "numba", "scipy", "scikit-image", "connected-components-3d", "torch", "openvino", "onnxruntime", "SimpleITK")
PACKAGES += ("cupy-cuda13x", "cupy-cuda12x", "numba-cuda", "onnxruntime-gpu", "tensorrt", "tensorrt-cu13", "nvidia-cudnn-cu13")


def measure(function: Callable[[], Any], *, repeats: int = 7, warmup: int = 2) -> dict[str, float]:
    """Run `function` a few times; return median, fastest and slowest wall seconds, and the number of runs."""
    for _ in range(warmup):
        function()
    seconds = []
    gc.collect()
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "runs": repeats}


def median_in_turn(functions: Mapping[str, Callable[[], Any]], *, runs: int = 7) -> dict[str, float]:
    """Median wall seconds of each function, run one after the other `runs` times, so that a busy moment hits all; one warm-up each."""
    for function in functions.values():
        function()
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def extra_bytes(function: Callable[[], Any]) -> int | None:
    """Growth of this process's peak resident memory while `function` runs; None where the system does not tell."""
    gc.collect()
    try:
        # freed memory the C library still holds would hide what the call asks for
        ctypes.CDLL(None).malloc_trim(0)
        # 5 resets the peak that /proc/self/status reports
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        result = function()
        grown = _status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None
    del result
    return max(grown, 0)


def environment() -> dict[str, Any]:
    """What a figure belongs to: machine, versions of the packages, commit of this project."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def write_results(name: str, results: Mapping[str, Any], *, toy: bool = False) -> None:
    """Write results/<name>.json; a toy run only shows that its results can be written."""
    text = json.dumps({"benchmark": name, **results}, indent=1) + "\n"
    if toy:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def machine() -> dict[str, Any]:
    """CPU model and its widest vectors, usable cores, memory, load at the time of writing."""
    model, vectors = platform.processor(), None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        values = dict(line.replace("\t", "").split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        model = values.get("model name", model).strip()
        flags = values.get("flags", "").split()
        vectors = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model, "vectors": vectors, "cores": cores, "memory_bytes": memory, "load_1min": load, "system": platform.platform()}


def versions() -> dict[str, str]:
    """Python and every package of interest that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit this code was run from, marked when files differ from it; 'unknown' outside a checkout."""
    try:
        run = {"capture_output": True, "text": True, "check": True, "cwd": RESULTS.parent}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "--", "../segrt"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
