"""ONNX Runtime on the CPU and, by CUDA, on memory that lies on a GPU."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, FloatArray, require
from ..bundle import Bundle
from ..device import device_number, open_stream, use_device
from ..errors import BackendError
from ..files import sha256
from . import check_onnx, read_build
from .batches import gpu_batch, in_batches, smaller_batch_after_memory_error

logger = logging.getLogger(__name__)

_CUDA = "CUDAExecutionProvider"
# the algorithm by cuDNN's rule, not by timing: two runs may time two algorithms the fastest, and give the same patches other bytes
CUDA_SETTINGS = {"cudnn_conv_algo_search": "HEURISTIC", "cudnn_conv_use_max_workspace": "1", "use_tf32": "0"}
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntimeEngine:
    """An inference session that reads patches and writes logits where they lie, through I/O binding."""

    def __init__(self, session: Any, *, name: str, dimensions: int, batch: int, device: str, stream: Any = None) -> None:
        self._session = session
        self._dimensions = dimensions
        self._input, self._output = session.get_inputs()[0], session.get_outputs()[0]
        self._dtype = output_type(session)
        self._number = device_number(device)
        self._stream = stream
        # CUDA's provider keeps one set of library handles for a stream; runs on a CPU do not get in each other's way
        self._lock: Any = nullcontext() if self._number is None else threading.Lock()
        self.batch = batch
        self.held_bytes = 0
        self.device = device
        self.name = name

    def __call__(self, patches: FloatArray) -> Array:
        """Run the network; see `Engine`."""
        size = len(patches) if self.device == "cpu" else self.batch
        with self._lock, use_device(self.device), smaller_batch_after_memory_error(self), runtime_errors(self.name):
            return in_batches(patches, size, int(self._output.shape[1]), self._dtype, self._run)

    def close(self) -> None:
        """Release the session."""
        del self._session

    def _run(self, part: Any, out: Any) -> None:
        place = ("cpu", 0) if self._number is None else ("cuda", self._number)
        binding = self._session.io_binding()
        binding.bind_input(self._input.name, *place, np.float32, self._shape(part), _address(part))
        binding.bind_output(self._output.name, *place, self._dtype, self._shape(out), _address(out))
        with self._in_order() as options:
            self._session.run_with_iobinding(binding, options)

    def _shape(self, array: Any) -> tuple[int, ...]:
        """A 2-D network's memory is the same without the axis of one plane."""
        return tuple(array.shape[:2] + array.shape[5 - self._dimensions :])

    @contextmanager
    def _in_order(self) -> Iterator[Any]:
        """Run options for work that comes after what CuPy's current stream holds and before what follows there."""
        if self._number is None:
            yield None
            return
        cupy = require("cupy", extra="cuda")
        options, current = require("onnxruntime", extra="gpu").RunOptions(), cupy.cuda.get_current_stream()
        if self._stream is None:
            current.synchronize()  # and ONNX Runtime waits for its own stream before it returns
            yield options
            return
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._stream.wait_event(current.record())
        yield options
        current.wait_event(self._stream.record())


def open_member(bundle: Bundle, member: str, precision: str, threads: int, device: str) -> OnnxRuntimeEngine:
    """Open a member's ONNX file on the CPU provider, or on CUDA's: in fp16 from the typed file that `segrt-build
    --backend onnxruntime --device cuda --fp16` leaves.

    Raises
    ------
    BackendError
        When this installation has no CUDA provider, it does not load, or part of the network would run on the CPU.
    """
    if device == "cpu" and precision != "fp32":
        raise BackendError(f"ONNX Runtime on a CPU serves fp32 only, not {precision}; use backend openvino")
    path, precision = model_file(bundle, member, precision)
    ort = require("onnxruntime", extra="ort" if device_number(device) is None else "gpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    stream, providers = None, ["CPUExecutionProvider"]
    if device_number(device) is not None:
        check_cuda_provider(ort)
        stream = open_stream(device)
        providers = [_cuda_provider(ort, options, device, stream)]
    with runtime_errors(f"{path} on {device}"):
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    if stream is not None and _CUDA not in session.get_providers():
        raise BackendError(
            f"ONNX Runtime's CUDA provider did not load ({', '.join(session.get_providers())} did); check CUDA 13 and cuDNN 9"
        )
    dimensions, patch = bundle.spec.dimensions, bundle.spec.inference.patch
    batch = gpu_batch(patch) if device != "cpu" else (1 if dimensions == 3 else 4)
    name = f"onnxruntime, {device}, {precision}"
    return OnnxRuntimeEngine(session, name=name, dimensions=dimensions, batch=batch, device=device, stream=stream)


def open_exact(bundle: Bundle, member: str, precision: str, threads: int, device: str) -> OnnxRuntimeEngine:
    """Open as `open_member` does, but refuse fp16 without a typed file: other backends have it, and fp32 is many times slower on a GPU."""
    if precision == "fp16" and (lacks := _lacks_typed(bundle, member)):
        raise BackendError(lacks)
    return open_member(bundle, member, precision, threads, device)


def model_file(bundle: Bundle, member: str, precision: str) -> tuple[Path, str]:
    """The ONNX file for a precision, and the precision it has: fp32 instead of fp16 where no typed file was built of the one at hand."""
    if precision not in ("fp32", "fp16"):
        raise BackendError(f"ONNX Runtime serves fp32 and fp16, not {precision}; use backend tensorrt or pytorch")
    if precision == "fp32":
        return bundle.onnx_path(member), "fp32"
    if lacks := _lacks_typed(bundle, member):
        logger.warning("ONNX Runtime computes in fp32: %s", lacks)
        return bundle.onnx_path(member), "fp32"
    check_onnx(bundle, f"{member}-fp16")
    return bundle.onnx_path(f"{member}-fp16"), "fp16"


def _lacks_typed(bundle: Bundle, member: str) -> str:
    """What is to be done about a typed file that is missing, or of other weights; "" when it is there."""
    path, typed = bundle.onnx_path(member), bundle.onnx_path(f"{member}-fp16")
    # a new export drops this entry: the typed file of other weights stays behind
    made_of = read_build(path.with_name("build.json")).get("fp16_of", {})
    if typed.is_file() and path.is_file() and made_of.get(path.stem) == sha256(path):
        return ""
    return f"{typed} is missing or old; make it with: {bundle.build_command} --backend onnxruntime --device cuda --fp16"


def output_type(session: Any) -> Any:
    """NumPy type of a session's logits.

    Raises
    ------
    BackendError
        When the network does not map float32 to float32 or float16.
    """
    read, written = session.get_inputs()[0].type, session.get_outputs()[0].type
    if read != "tensor(float)" or written not in _TYPES:
        raise BackendError(f"the network maps {read} to {written}; expected float32 patches and float32 or float16 logits")
    return _TYPES[written]


@contextmanager
def runtime_errors(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors, of many unrelated classes, into MemoryError or BackendError."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", extra="ort")
    names = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    known: tuple[type[Exception], ...] = (RuntimeError, *(getattr(state, name) for name in names))
    try:
        yield
    except known as err:
        text = " ".join(str(err).split())
        if re.search(r"out of memory|Failed to allocate|smaller than requested|ALLOC_FAILED|bad allocation", text, re.IGNORECASE):
            raise MemoryError(text) from err
        raise BackendError(f"{what}: ONNX Runtime failed: {text}") from err


def check_cuda_provider(ort: Any) -> None:
    """Raise a BackendError when the installed ONNX Runtime was built without CUDA; left alone it would compute on the CPU."""
    available = ort.get_available_providers()
    if _CUDA not in available:
        raise BackendError(
            f"onnxruntime {ort.__version__} as installed has no CUDA provider (only {', '.join(available)}); "
            "pip uninstall onnxruntime, then: pip install 'segrt[gpu]'"
        )


def _cuda_provider(ort: Any, options: Any, device: str, stream: Any) -> Any:
    """Prepare session options for CUDA alone, and give the provider with its own."""
    ort.preload_dlls()  # CUDA and cuDNN from their pip packages
    # equal bytes in every run; and a network half of which runs on the CPU is refused, for it would be slower than either
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {
        **CUDA_SETTINGS,
        "device_id": str(device_number(device)),
        # what this takes CuPy cannot have
        "arena_extend_strategy": "kSameAsRequested",
        "user_compute_stream": str(stream.ptr),
    }
    return _CUDA, settings


def _address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)
