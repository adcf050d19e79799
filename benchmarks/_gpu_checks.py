"""Last stage of `gpu.py`, under compute-sanitizer: every kernel at an odd small size, those between convolutions, a small whole case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from _gpu_case import case
from _gpu_engines import open_torch
from _gpu_kernels import CUDA_C, KERNELS, Job, check
from _gpu_setting import Setting, Skip

from segrt.predictor import Predictor

# relative to float32: a rounding to 16 bits, and one more of what is normalised
_ROUNDED = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 2e-2}


def check_alone(job: Job) -> Callable[[Setting], dict[str, Any]]:
    """A kernel with every array in memory of its own, so that a step beside one is seen."""

    def run(setting: Setting) -> dict[str, Any]:
        if not setting.on_gpu:
            return {"largest_error": check(job, setting.device)}
        import cupy

        with cupy.cuda.using_allocator(None):  # no pool
            return {"largest_error": check(job, setting.device)}

    return run


def on_a_gpu(job: Callable[[Setting], dict[str, Any]]) -> Callable[[Setting], dict[str, Any]]:
    """A job that is left out elsewhere: only there CUDA C runs."""

    def run(setting: Setting) -> dict[str, Any]:
        if not setting.on_gpu:
            raise Skip("needs a GPU; the tests run CUDA C as C++")
        return job(setting)

    return run


def between_convolutions(precision: str) -> Callable[[Setting], dict[str, Any]]:
    """Normalisation, join and separation of channels against torch's own in float32."""

    def run(setting: Setting) -> dict[str, Any]:
        import torch
        from torch.nn import functional

        from segrt.engines.torch_fused import InstanceNormLeaky, JoinBiased, separate

        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        generator = torch.Generator().manual_seed(0)
        below, skip = (torch.randn((2, 40, 5, 7, 9), generator=generator).to(dtype) for _ in range(2))
        bias = torch.randn(40, generator=generator)
        there, beside = (x.to(setting.device).contiguous(memory_format=torch.channels_last_3d) for x in (below, skip))
        added = (below.float() + bias.view(1, -1, 1, 1, 1)).to(dtype)
        joined = JoinBiased(bias.to(setting.device))(there, beside)
        assert torch.equal(joined.cpu(), torch.cat((added, skip), 1))
        planes = torch.empty(below.shape, dtype=dtype if precision == "fp16" else torch.float32, device=setting.device)
        separate(there, planes)
        assert torch.equal(planes.cpu(), below.to(planes.dtype))
        norm = torch.nn.InstanceNorm3d(40, affine=True)
        expected = functional.leaky_relu(norm(below.float()), 0.01)
        found = InstanceNormLeaky(norm.to(setting.device), 0.01)(there)
        error = float((found.float().cpu() - expected).abs().max() / expected.abs().max())
        assert error <= _ROUNDED[precision], error
        return {"largest_error": error}

    return run


def whole_case(setting: Setting) -> dict[str, Any]:
    """The toy's case in float32 against the CPU: its network is one that our kernels serve too."""
    small = replace(setting, toy=True, work=setting.work / "checks")
    small.work.mkdir(exist_ok=True)
    image = case(small, small.full, "full")
    with Predictor(small.bundle, device="cpu", backend="pytorch", precision="fp32", tta=False) as predictor:
        expected = predictor(image).labels
    with Predictor(small.bundle, device=setting.device, tta=False, engines=[open_torch(small, "fp32", 4)]) as predictor:
        differing = float((predictor(image).labels != expected).mean())
    assert differing < 1e-3, differing
    return {"largest_error": differing, "labels_used": len(np.unique(expected))}


CHECKS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    **{name: check_alone(job) for name, job in KERNELS.items()},
    **{f"between convolutions, {precision}": on_a_gpu(between_convolutions(precision)) for precision in _ROUNDED},
    "a small case": whole_case,
}
IN_CUDA_C = {name: on_a_gpu(check_alone(KERNELS[name])) for name in CUDA_C}
