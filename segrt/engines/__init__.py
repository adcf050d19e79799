"""Engines: patches in, logits out; all that a backend needs ends in this folder."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ..arrays import Array, FloatArray
from ..bundle import Bundle
from ..device import count_gpus, device_number, memory_errors
from ..errors import BackendError
from ..files import sha256

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Backend = Literal["auto", "openvino", "onnxruntime", "pytorch", "tensorrt", "tensorrt-rtx"]


class Engine(Protocol):
    """What runs a network.

    1. Calling it maps patches (N, C, Z, Y, X) float32 to logits (N, K, Z, Y, X); both are C-contiguous, N is free. Logits are float32;
       on a GPU they may be float16.
    2. The patches are not kept and not changed; the logits belong to the caller.
    3. Equal patches give equal logits, whatever else is in the call.
    4. `batch` is the N it likes best; `name` says backend, device and precision in a log line.
    5. Several threads may call it at once; they may have to wait for each other.
    6. `held_bytes` is the memory it holds and needs while it runs, as measured when it was built; 0 when nobody measured. What its calls
       take of a GPU's free memory is estimated, unless it knows: `batches.Measured`.
    7. `device` ("cpu", "cuda:0", "simulated") is where patches have to lie and logits will lie. On a GPU it works in CuPy's current
       stream and does not wait for it; when the GPU's memory does not suffice it raises MemoryError, and a smaller N may do.
    """

    name: str
    batch: int
    held_bytes: int
    device: str

    def __call__(self, patches: FloatArray) -> Array:
        """Run the network."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; it is not called afterwards."""
        ...


# backend -> "module:function" with the signature (bundle, member, precision, threads, device) -> Engine; without device for _ONLY_CPU
_OPENERS = {
    "openvino": "openvino:open_member",
    "onnxruntime": "onnxrt:open_member",
    "pytorch": "pytorch:open_member",
    "tensorrt": "trt:open_member",
    "tensorrt-rtx": "rtx:open_member",
}
_ONLY_CPU, _ONLY_GPU = ("openvino",), ("tensorrt", "tensorrt-rtx")
# what "auto" tries on a GPU; TensorRT-RTX compiles at its first run and was not verified by a build, so it has to be asked for
_GPU_ORDER = {"tensorrt": "trt:open_member", "onnxruntime": "onnxrt:open_exact", "pytorch": "pytorch:open_member"}


def open_engine(
    bundle: Bundle,
    member: str,
    *,
    backend: Backend = "auto",
    precision: Precision | None = None,
    threads: int = 0,
    device: str = "cpu",
) -> Engine:
    """Open the engine of one member.

    Parameters
    ----------
    backend : "auto" takes on the CPU OpenVINO when the bundle has an ONNX file, else PyTorch on the weights; on a GPU the first that opens
        of a TensorRT engine built for it, ONNX Runtime (fp16: with a typed file) and PyTorch, and a warning says why others did not
    precision : fp32 on the CPU and fp16 on a GPU by default
    threads : CPU threads, 0 for all
    device : "cpu", "cuda:N" or "simulated", see `resolve_device`; a backend of the CPU on another device copies patches and logits

    Raises
    ------
    BackendError
        When the backend is not installed, cannot serve this precision here, or a file is not the one that was built.
    """
    return open_alike(bundle, member, (device,), backend=backend, precision=precision, threads=threads)[0]


def open_alike(
    bundle: Bundle, member: str, devices: Sequence[str], *, backend: Backend = "auto", precision: Precision | None = None, threads: int = 0
) -> list[Engine]:
    """Open an engine of one member on each device, all of one backend: which of them a window meets must not change its logits.

    Parameters and errors are those of `open_engine`; "auto" takes the first backend that opens on every GPU.
    """
    if backend != "auto" and backend not in _OPENERS:
        raise BackendError(f"unknown backend {backend!r}; expected auto, {', '.join(_OPENERS)}")
    if backend == "auto" and device_number(devices[0]) is not None:
        engines = _open_first(bundle, member, precision, threads, devices)
    else:
        chosen = _cpu_backend(bundle, member) if backend == "auto" else backend
        engines = [_open(bundle, member, chosen, precision, threads, device) for device in devices]
    for engine in engines:
        logger.info("member %s of %s runs on %s", member, bundle.path, engine.name)
    return engines


def _cpu_backend(bundle: Bundle, member: str) -> str:
    path = bundle.onnx_path(member)
    if path.is_file():
        return "openvino"
    logger.warning("%s is missing: member %s runs on PyTorch, which is slower; make it with %s", path, member, bundle.build_command)
    return "pytorch"


def _open_first(bundle: Bundle, member: str, precision: Precision | None, threads: int, devices: Sequence[str]) -> list[Engine]:
    """Open the first backend that can serve all of these GPUs in this precision; what the others lack is logged."""
    if bundle.onnx_path(member).is_file():
        check_onnx(bundle, member)  # a damaged bundle is no reason to take another backend
    reasons = []
    for backend, opener in _GPU_ORDER.items():
        engines: list[Engine] = []
        try:
            for device in devices:
                engines.append(_open(bundle, member, backend, precision, threads, device, opener=opener))
        except BackendError as err:
            reasons.append(f"{backend}: {err}")
            for engine in engines:
                engine.close()
            continue
        for reason in reasons:
            logger.warning("member %s runs on %s, not on %s", member, " + ".join(engine.name for engine in engines), reason)
        return engines
    raise BackendError(f"no engine of member {member!r} runs on {', '.join(devices)}: {'; '.join(reasons)}")


def _open(bundle: Bundle, member: str, backend: str, precision: Precision | None, threads: int, device: str, *, opener: str = "") -> Engine:
    gpu = device_number(device) is not None
    if backend in _ONLY_GPU and not gpu:
        raise BackendError(f"backend {backend} runs on an NVIDIA GPU, not on device {device}; use backend auto, or --device cuda")
    if backend != "pytorch":
        check_onnx(bundle, member)
    chosen = precision or ("fp16" if gpu and backend not in _ONLY_CPU else "fp32")
    module, function = (opener or _OPENERS[backend]).split(":")
    open_member = getattr(importlib.import_module(f".{module}", __name__), function)
    engine: Engine
    if backend not in _ONLY_CPU:
        try:
            with memory_errors():
                engine = open_member(bundle, member, chosen, threads, device)
        except MemoryError as err:
            raise BackendError(f"the memory of {device} does not hold member {member!r} on {backend}: {err}") from err
        return engine
    engine = open_member(bundle, member, chosen, threads)
    if device == "cpu":
        return engine
    from .compose import Hosted

    return Hosted(engine, device)


def resolve_device(device: str = "auto") -> str:
    """Make "auto" and "cuda" concrete: "cpu", "cuda:N" or "simulated".

    Parameters
    ----------
    device : "auto" takes the first GPU that CUDA can use and the CPU without one; it costs nothing where CuPy or a driver is missing

    Raises
    ------
    BackendError
        When a GPU is asked for that is not there, or without CuPy.
    InputError
        When `device` is none of "auto", "cpu", "cuda", "cuda:N" and "simulated".
    """
    if device == "auto":
        return "cuda:0" if _finds_gpu() else "cpu"
    number = device_number(device)
    return device if number is None else f"cuda:{number}"


# a container may show one GPU under any number; the last is Windows' own GPU interface in WSL
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


def _finds_gpu(files: Sequence[str] = _DRIVER_FILES) -> bool:
    # importing CuPy takes a good part of a second, which machines without a GPU need not pay
    if importlib.util.find_spec("cupy") is None or (os.name == "posix" and not any(Path(file).exists() for file in files)):
        return False
    try:
        return count_gpus() > 0
    except BackendError as err:
        logger.warning("the CPU is used although there seems to be a GPU: %s", err)
        return False


def check_onnx(bundle: Bundle, member: str) -> str:
    """Compare a member's ONNX file with the hash written at export; the SHA-256 comes out.

    Raises
    ------
    BackendError
        When the file is missing, has no record, or is not the one that was exported.
    """
    path = bundle.onnx_path(member)
    if not path.is_file():
        raise BackendError(f"{path} is missing; make it with: {bundle.build_command}")
    found = sha256(path)
    expected = _recorded(path, "sha256")
    if expected != found:
        raise BackendError(
            f"{path} is not the file that was exported (SHA-256 {found[:12]}, onnx/build.json says {str(expected)[:12]}); "
            f"copy the bundle again or run: {bundle.build_command} --force"
        )
    _check_level(bundle, member, path)
    return found


def _check_level(bundle: Bundle, member: str, path: Path) -> None:
    """Raise a BackendError when a pruned network's file was made beside another export of the whole network."""
    if bundle.whole is None or member not in bundle.spec.members or not (whole := bundle.whole.onnx_path(member)).is_file():
        return
    if _recorded(path, "level_of") != sha256(whole):
        raise BackendError(f"{path} is a level of another network than {whole.name}; make it again with: {bundle.build_command}")


def _recorded(path: Path, what: str) -> str | None:
    """What onnx/build.json says of a file."""
    values = read_build(path.parent / "build.json").get(what, {})
    return values.get(path.stem) if isinstance(values, dict) else None


def read_build(path: Path) -> dict[str, Any]:
    """Read a build.json; an empty dictionary when there is none or it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
