"""Stage 1 of `gpu.py`: what the machine can do at best, which is what everything else is held against."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
from _gpu_setting import Arrays, Setting, Skip

from segrt.device import device_number, get_xp, to_device, to_host


def identity(setting: Setting) -> dict[str, Any]:
    """Name, driver and state of the GPU."""
    if not setting.on_gpu:
        return {"name": "simulated"}
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device_number(setting.device))
    found = {
        "name": properties["name"].decode(),
        "capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
    }
    if shutil.which("nvidia-smi"):
        asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu,memory.used"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
        found["nvidia_smi"] = dict(zip(asked.split(","), done.stdout.strip().split("\n")[0].split(", "), strict=False))
    return found


def copy(setting: Setting) -> dict[str, Any]:
    """Device-to-device copy, bytes read and written."""
    source = Arrays(setting.device).floats(2**10 if setting.toy else 2**30)
    target = get_xp(source).empty(source.shape, source.dtype)

    def run() -> None:
        target[...] = source

    figures = setting.timed(run, runs=15)
    return figures | {"bytes": 2 * source.nbytes, "bytes_per_s": 2000 * source.nbytes / figures["median_ms"]}


def matrix(setting: Setting) -> dict[str, Any]:
    """Products of random matrices: the rate of the units that convolutions run on."""
    import torch

    size, place = (64, "cpu") if not setting.on_gpu else (8192, "cuda")
    rates = {}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
        figures = _torch_timed(setting, lambda a=a, b=b: a @ b)
        rates[name] = 2 * size**3 / (figures / 1000)
    return {"size": size, "flop_per_s": rates, "note": "fp32 without TF32"}


def _torch_timed(setting: Setting, function: Callable[[], Any]) -> float:
    """Median milliseconds in torch's own stream."""
    if not setting.on_gpu:
        return setting.timed(function)["median_ms"]
    import torch

    times = []
    for _ in range(13):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return sorted(times[3:])[5]


def transfer(setting: Setting) -> dict[str, Any]:
    """A case up and its labels down, as the pipeline moves them."""
    image = np.random.default_rng(0).integers(-1000, 1000, setting.full.image).astype(np.int16)
    there = to_device(image, setting.device)
    assert (to_host(there) == image).all()
    up, down = setting.timed(lambda: to_device(image, setting.device)), setting.timed(lambda: to_host(there))
    rates = {name: 1000 * image.nbytes / figures["median_ms"] for name, figures in (("up", up), ("down", down))}
    return {"up": up, "down": down, "bytes": image.nbytes, "bytes_per_s": rates}


def launches(setting: Setting) -> dict[str, Any]:
    """What a launch costs when there is nothing to do."""
    from segrt.kernels.normalize import clip_shift_scale

    if not setting.on_gpu:
        raise Skip("a simulated launch costs what the loop costs")
    tiny = Arrays(setting.device).image(1, 1, 32)

    def run() -> None:
        for _ in range(100):
            clip_shift_scale(tiny, 0, 1, 0, 1)

    return {"microseconds": 10 * setting.timed(run)["median_ms"]}


JOBS = {"identity": identity, "copy": copy, "matrix": matrix, "transfer": transfer, "launches": launches}
