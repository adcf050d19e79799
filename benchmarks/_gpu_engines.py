"""Stage 3 of `gpu.py`: one window of the default-size nnU-Net through every GPU engine, against the arithmetic floor."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_setting import CLASSES, Setting, Skip

from segrt.bundle import Bundle
from segrt.device import to_device, to_host
from segrt.engines import Engine, open_engine
from segrt.engines.pytorch import TorchEngine
from segrt.errors import BackendError

# relative error against torch fp32 on the CPU that a precision may have, random weights
_LARGEST_ERROR = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.15}


def count_flop(bundle: Bundle) -> int:
    """Floating-point operations of one window: two for each product of the convolutions."""
    import torch

    from segrt.networks import build_empty

    total = 0

    def add(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        # a transposed convolution that strides by its kernel multiplies each input voxel once with each weight
        voxels = inputs[0][0, 0].numel() if isinstance(module, torch.nn.ConvTranspose3d) else output[0, 0].numel()
        total += 2 * voxels * module.weight.numel()

    network = build_empty(bundle.spec.network)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            module.register_forward_hook(add)
    # heads below full resolution are never called
    network(torch.empty((1, bundle.spec.in_channels, *bundle.spec.inference.patch), device="meta"))
    return total


def open_torch(setting: Setting, precision: str, batch: int, *, compiled: bool = False) -> TorchEngine:
    """PyTorch with a batch of our choice."""
    import torch
    from safetensors.torch import load_file

    from segrt.networks import build, load_weights

    if setting.on_gpu and not torch.cuda.is_available():
        raise Skip("this torch has no CUDA")
    network = build(setting.bundle.spec.network)
    load_weights(network, load_file(str(setting.bundle.weights_path("0"))))
    how: dict[str, Any] = {"dimensions": 3, "precision": precision, "device": setting.device, "compiled": compiled}
    return TorchEngine(network, classes=CLASSES, batch=batch, **how)


def open_onnxruntime(setting: Setting, precision: str, batch: int) -> Engine:
    """ONNX Runtime, on a typed file for fp16."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise Skip("onnxruntime is not installed")
    import onnxruntime

    if setting.on_gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Skip(f"onnxruntime {onnxruntime.__version__} as installed has no CUDA provider")
    export(setting)
    engine = open_engine(setting.bundle, "0", backend="onnxruntime", precision=precision, device=setting.device)  # type: ignore[arg-type]
    engine.batch = batch
    return engine


def open_tensorrt(setting: Setting, precision: str, batch: int) -> Engine:
    """TensorRT, with a plan that the stage before has built for this GPU."""
    plan = plan_path(setting, precision, batch)
    if not plan.is_file():
        raise Skip("no plan: run the stage plans until it is complete, with the same --work")
    from segrt.engines.trt import open_plan

    return open_plan(plan, device=setting.device, precision=precision)


def plan_path(setting: Setting, precision: str, batch: int) -> Path:
    """Where this GPU's plan of the network is or will be."""
    if importlib.util.find_spec("tensorrt") is None:
        raise Skip("tensorrt is not installed")
    if not setting.on_gpu:
        raise Skip("TensorRT needs a GPU")
    from segrt.engines.trt import this_machine
    from segrt.engines.trt_plan import engine_key

    return setting.bundle.engine_path(engine_key(this_machine(setting.device), precision, batch)) / "0.plan"


def build_plan(precision: str, batch: int) -> Callable[[Setting], dict[str, Any]]:
    """A job that builds a plan, or finds the one that an earlier call with this folder built."""

    def run(setting: Setting) -> dict[str, Any]:
        try:
            plan = plan_path(setting, precision, batch)
        except BackendError as err:
            raise Skip(str(err)) from err
        begun, found = time.perf_counter(), plan.is_file()
        if not found:
            from segrt.export.engine import build_engine
            from segrt.export.tensorrt import TensorRTOptions

            export(setting)
            # what one build has measured the next one need not
            options = TensorRTOptions(batch=batch, timing_cache=setting.work / "timing.cache")
            how: dict[str, Any] = {"precision": precision, "device": setting.device, "force": True}
            build_engine(setting.bundle, backend="tensorrt", tensorrt=options, **how)
        return {"bytes": plan.stat().st_size, "seconds": time.perf_counter() - begun, "found": found}

    return run


def export(setting: Setting) -> None:
    """ONNX files of the bundle, fp32 and typed fp16."""
    from segrt.export.onnx import export_onnx
    from segrt.export.typed import write_typed

    if not setting.bundle.onnx_path("0-fp16").is_file():
        export_onnx(setting.bundle)
        write_typed(setting.bundle, "0")


@cache
def window(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """A window of noise and the logits of torch fp32 on the CPU, kept for the next process."""
    path = setting.work / "window.npz"
    if not path.is_file():
        patch = np.random.default_rng(5).normal(size=(1, 1, *setting.full.patch)).astype(np.float32)
        np.savez(path, patch=patch, logits=open_engine(setting.bundle, "0", backend="pytorch")(patch))
    stored = np.load(path)
    return stored["patch"], stored["logits"]


def measure(opened: Callable[..., Engine], precision: str, batch: int, **how: Any) -> Callable[[Setting], dict[str, Any]]:
    """A stage's job: one engine, checked, then timed on batches of different noise."""

    def run(setting: Setting) -> dict[str, Any]:
        patch, expected = window(setting)
        try:
            engine = opened(setting, precision, batch, **how)
        except BackendError as err:
            raise Skip(str(err)) from err
        noise = np.random.default_rng(6).normal(size=(batch, 1, *setting.full.patch)).astype(np.float32)
        noise[-1:] = patch
        patches = to_device(noise, setting.device)
        answer = to_host(engine(patches))
        logits = answer[-1:].astype(np.float32)
        error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        assert error <= _LARGEST_ERROR[precision], error
        agreement = float((logits.argmax(1) == expected.argmax(1)).mean())
        figures = setting.timed(lambda: engine(patches), runs=9, warmup=3)
        flop = count_flop(setting.bundle)
        result = {
            "engine": engine.name,
            "ms_per_window": figures["median_ms"] / batch,
            "flop_per_window": flop,
            "flop_per_s": 1000 * flop * batch / figures["median_ms"],
            "relative_error": error,
            "label_agreement": agreement,
            "logits": str(answer.dtype),
        }
        engine.close()
        return figures | result

    return run


def arithmetic(setting: Setting) -> dict[str, Any]:
    """The network in numbers: parameters, operations, and the fewest bytes of its activations in 16 bits."""
    from segrt.networks import build_empty, count_parameters

    bundle = setting.bundle
    return {
        "parameters": count_parameters(build_empty(bundle.spec.network)),
        "flop_per_window": count_flop(bundle),
        "input_and_output_bytes": (4 * bundle.spec.in_channels + 2 * CLASSES) * prod(setting.full.patch),
    }


# the one that the stage case needs comes first
PLANS: dict[str, Callable[[Setting], dict[str, Any]]] = {f"tensorrt fp16, batch {n}": build_plan("fp16", n) for n in (4, 1, 8)}
JOBS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "arithmetic": arithmetic,
    **{f"pytorch fp16, batch {n}": measure(open_torch, "fp16", n) for n in (1, 4, 8)},
    "pytorch bf16, batch 4": measure(open_torch, "bf16", 4),
    "pytorch fp32, batch 4": measure(open_torch, "fp32", 4),
    **{f"onnxruntime fp16, batch {n}": measure(open_onnxruntime, "fp16", n) for n in (1, 4, 8)},
    "onnxruntime fp32, batch 4": measure(open_onnxruntime, "fp32", 4),
    **{f"tensorrt fp16, batch {n}": measure(open_tensorrt, "fp16", n) for n in (1, 4, 8)},
    "pytorch fp16 compiled, batch 4": measure(open_torch, "fp16", 4, compiled=True),
    "pytorch fp16 compiled, batch 1": measure(open_torch, "fp16", 1, compiled=True),
}
