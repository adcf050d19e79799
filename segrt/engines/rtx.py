"""TensorRT-RTX through its ONNX Runtime plugin: for GeForce and RTX cards, compiled for the card when it is opened."""

from __future__ import annotations

import threading
from typing import Any

from ..arrays import require
from ..bundle import Bundle
from ..device import device_number
from ..errors import BackendError
from .batches import gpu_batch
from .onnxrt import OnnxRuntimeEngine, model_file, runtime_errors

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_WHEEL = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
_registering = threading.Lock()


def open_member(bundle: Bundle, member: str, precision: str, threads: int, device: str) -> OnnxRuntimeEngine:
    """Open a member's ONNX file (in fp16: the typed one) on the plugin's provider.

    Raises
    ------
    BackendError
        When the plugin is not installed, does not load, or serves no GPU with the number of `device`.
    """
    path, precision = model_file(bundle, member, precision)
    ort = require("onnxruntime", extra="gpu")
    provider = register(ort)
    found = pick_device(ort.get_ep_devices(), provider, device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with runtime_errors(f"{path} on {device}"):
        options.add_provider_for_devices([found], {})
        session = ort.InferenceSession(str(path), options, enable_fallback=0)
    name = f"tensorrt-rtx, {device}, {precision}"
    batch = gpu_batch(bundle.spec.inference.patch)
    return OnnxRuntimeEngine(session, name=name, dimensions=bundle.spec.dimensions, batch=batch, device=device)


def register(ort: Any) -> str:
    """Make the plugin known to this process's ONNX Runtime, once; its provider's name comes out.

    Raises
    ------
    BackendError
        When the plugin is not installed or does not load.
    """
    try:
        plugin = require(_PLUGIN, extra="gpu")
    except BackendError as err:
        raise BackendError(f"backend tensorrt-rtx needs ONNX Runtime's plugin for it; install it with: pip install {_WHEEL}") from err
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendError(f"onnxruntime {ort.__version__} cannot load plugins; install 1.24 or newer")
    provider = str(plugin.get_ep_name())
    with _registering:
        if not any(found.ep_name == provider for found in ort.get_ep_devices()):
            _load(ort, plugin, provider)
    return provider


def _load(ort: Any, plugin: Any, provider: str) -> None:
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", extra="gpu")
    try:
        ort.register_execution_provider_library(provider, plugin.get_library_path())
    except state.Fail as err:
        # it stays registered when it found no device the first time, and a second time is an error
        if "already registered" not in str(err):
            raise BackendError(f"{_WHEEL} does not load: {' '.join(str(err).split())}; an NVIDIA driver for CUDA 13 is needed") from err


def pick_device(devices: Any, provider: str, device: str) -> Any:
    """The provider's entry for GPU number N of "cuda:N".

    Raises
    ------
    BackendError
        When the provider serves no GPU here, or not this one.
    """
    fitting = [found for found in devices if found.ep_name == provider]
    number = device_number(device)
    for place, found in enumerate(fitting):
        if _cuda_number(found, place) == number:
            return found
    served = f"it serves {len(fitting)} here" if fitting else "it serves none here (GeForce and RTX cards of sm_75, 86, 89 and 12x)"
    raise BackendError(f"TensorRT-RTX does not serve {device}: {served}; use backend tensorrt, onnxruntime or pytorch")


def _cuda_number(found: Any, place: int) -> int:
    """CUDA's number of a GPU as the provider tells it; else its place in the provider's list."""
    return int({**found.ep_metadata, **found.ep_options}.get("device_id", place))
