"""TensorRT on an NVIDIA GPU: a plan built for it, run on CuPy's memory in the order of CuPy's current stream."""

from __future__ import annotations

import logging
import threading
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, require
from ..bundle import Bundle
from ..device import device_number, memory_errors, use_device
from ..errors import BackendError
from . import trt_api
from .batches import in_batches, smaller_batch_after_memory_error
from .compiled import check_window
from .trt_plan import Machine, find_plan

logger = logging.getLogger(__name__)


class TensorRTEngine:
    """A plan with one profile of 1 to `batch` windows.

    Everything runs in a stream of the engine's own, which waits for the caller's stream and the caller's stream for it: TensorRT is slow in
    the default stream, a CUDA graph cannot be captured there, and threads with streams of their own take turns at the shared buffers.
    The logits are copied out of the engine's buffer (for 16-bit logits some 2 % of a large window's time), because a CUDA graph writes to
    fixed addresses.
    """

    def __init__(self, plan: bytes, *, device: str, precision: str, compatible: bool = False) -> None:
        trt, self._cupy = trt_api.load(), require("cupy", extra="cuda")
        self.device = f"cuda:{device_number(device)}"
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        self._trt, self._log = trt, trt_api.make_logger(trt)
        with use_device(self.device):
            # TensorRT keeps a pointer to the logger, and the engine one to the runtime: both live as long as this object
            self._runtime, self._engine = deserialize(trt, self._log, plan, compatible)
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            self._before, self._after = (self._cupy.cuda.Event(disable_timing=True) for _ in range(2))
        names = [self._engine.get_tensor_name(n) for n in range(self._engine.num_io_tensors)]
        self._input, self._output = sorted(names, key=lambda n: self._engine.get_tensor_mode(n) != trt.TensorIOMode.INPUT)
        self.batch = int(self._engine.get_tensor_profile_shape(self._input, 0)[2][0])
        self.window = tuple(int(n) for n in self._engine.get_tensor_shape(self._input))[1:]  # channels first
        self._logits_shape = tuple(int(n) for n in self._engine.get_tensor_shape(self._output))[1:]
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        buffers = self.batch * (self._bytes(self._input, self.window) + 2 * self._bytes(self._output, self._logits_shape))
        self.held_bytes = len(plan) + trt_api.largest_workspace_bytes(self._engine) + buffers
        self.name = f"tensorrt {trt.__version__}, {self.device}, {precision}, batch {self.batch}"

    def __call__(self, patches: Array) -> Array:
        """Run the network; see `Engine`."""
        with self._lock, use_device(self.device), smaller_batch_after_memory_error(self):
            try:
                return in_batches(patches, self.batch, self._logits_shape[0], self._types[self._output], self._run)
            except (MemoryError, RuntimeError):
                # the buffers of a batch that was too much must not stand in the way of a smaller one
                self._drop_lanes()
                raise

    keeps = True  # its lanes

    def call_bytes(self, windows: int, each: int) -> int:
        """What a lane still takes: the plan is in the GPU's memory already, and the lane of another batch size makes room."""
        if windows in self._lanes:
            return 0
        one = self._bytes(self._input, self.window) + self._bytes(self._output, self._logits_shape)
        kept = sum(lane.nbytes for lane in self._lanes.values())
        # for fewer windows TensorRT may ask for less than for the largest batch, but only a context could tell
        return max(0, trt_api.largest_workspace_bytes(self._engine) + windows * one - kept)

    def _run(self, patches: Any, logits: Any) -> None:
        """Compute `logits` (n, K, Z, Y, X) of `patches` (n, C, Z, Y, X), both on the device."""
        current = self._cupy.cuda.get_current_stream()
        self._before.record(current)
        self._stream.wait_event(self._before)
        with self._stream:
            lane = self._lane(len(patches))
            lane.patches[...] = patches.reshape(lane.patches.shape)
            lane.run(self._stream)
            logits.reshape(lane.logits.shape)[...] = lane.logits
        self._after.record(self._stream)
        current.wait_event(self._after)

    def _lane(self, count: int) -> _Lane:
        """The lane of a batch size, made at its first use."""
        if count not in self._lanes:
            self._drop_lanes()  # a case that leaves less room has calls of fewer windows
            self._lanes[count] = self._new_lane(count)
        return self._lanes[count]

    def _new_lane(self, count: int) -> _Lane:
        context = trt_api.new_context(self._trt, self._engine)
        if context is None or not context.set_input_shape(self._input, (count, *self.window)):
            raise BackendError(f"{self.name} cannot prepare a batch of {count}: {trt_api.last_errors(self._log)}")
        lane = _Lane(
            context,
            self._cupy.empty((count, *self.window), self._types[self._input]),
            self._cupy.empty((count, *self._logits_shape), self._types[self._output]),
            self._cupy.empty(max(1, trt_api.workspace_bytes(self._engine, context)), np.uint8),
            self._log,
        )
        trt_api.lend_memory(context, lane.workspace.data.ptr, lane.workspace.nbytes)
        context.set_tensor_address(self._input, lane.patches.data.ptr)
        context.set_tensor_address(self._output, lane.logits.data.ptr)
        return lane

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return prod(shape) * int(self._types[name].itemsize)

    def close(self) -> None:
        """Wait for what still runs and release plan and memory."""
        with self._lock, use_device(self.device):
            self._drop_lanes()
            del self._engine, self._runtime

    def _drop_lanes(self) -> None:
        self._stream.synchronize()
        self._lanes.clear()


class _Lane:
    """One batch size: its context, the fixed addresses it works on and, after its first run, its CUDA graph.

    TensorRT wants a context for each captured graph.
    """

    def __init__(self, context: Any, patches: Any, logits: Any, workspace: Any, log: Any) -> None:
        self.context, self.patches, self.logits, self.workspace = context, patches, logits, workspace
        self._log = log
        self._graph: Any = None
        self._ran = False

    @property
    def nbytes(self) -> int:
        """Memory of the GPU it holds."""
        return int(self.patches.nbytes + self.logits.nbytes + self.workspace.nbytes)

    def run(self, stream: Any) -> None:
        """Launch the network in `stream`."""
        if self._graph is not None:
            self._graph.launch(stream)
            return
        self._launch(stream)
        if not self._ran:
            # TensorRT finishes its preparations in the first run, which is therefore not captured
            self._ran = True
            self._graph = self._capture(stream)

    def _launch(self, stream: Any) -> None:
        if not self.context.execute_async_v3(stream.ptr):
            raise BackendError(f"TensorRT could not run the network: {trt_api.last_errors(self._log)}")

    def _capture(self, stream: Any) -> Any:
        """Record a run as a CUDA graph; None, with a line in the log, where that does not work."""
        failures = (require("cupy", extra="cuda").cuda.runtime.CUDARuntimeError, BackendError)
        graph = None
        try:
            stream.begin_capture()
            try:
                self._launch(stream)
            finally:
                # also after a failure, which otherwise leaves the stream unusable
                graph = stream.end_capture()
        except failures as err:
            logger.info("the network runs without a CUDA graph, which could not be captured: %s", err)
            return None
        return graph


def open_member(bundle: Bundle, member: str, precision: str, threads: int, device: str) -> TensorRTEngine:
    """Open the plan built for this machine; `threads` has no meaning on a GPU. Errors as `find_plan`."""
    file, record = find_plan(bundle, member, precision, this_machine(device))
    compatible = record.get("compatible") is True
    engine = open_plan(file, device=device, precision=precision, compatible=compatible)
    check_window(bundle, file, engine.window, record)
    return engine


def open_plan(file: Path, *, device: str, precision: str, compatible: bool = False) -> TensorRTEngine:
    """Open a plan as it is; `open_member` checks first that it belongs to its bundle and machine.

    Raises
    ------
    BackendError
        When TensorRT does not accept it.
    MemoryError
        When the GPU's memory does not suffice.
    """
    try:
        return TensorRTEngine(file.read_bytes(), device=device, precision=precision, compatible=compatible)
    except BackendError as err:
        raise BackendError(f"{file}: {err}") from err


def this_machine(device: str) -> Machine:
    """Describe the GPU, driver and TensorRT at hand.

    Raises
    ------
    BackendError
        When there is no such GPU, or CuPy or TensorRT is missing.
    """
    number = device_number(device)
    if number is None:
        raise BackendError(f"TensorRT runs on an NVIDIA GPU, not on device {device}; use --device cuda")
    version, runtime = str(trt_api.load().__version__), require("cupy", extra="cuda").cuda.runtime
    properties, driver = runtime.getDeviceProperties(number), int(runtime.driverGetVersion())
    return Machine(
        gpu=properties["name"].decode(),
        capability=f"{properties['major']}.{properties['minor']}",
        driver=f"{driver // 1000}.{driver % 1000 // 10}",
        tensorrt=version,
    )


def deserialize(trt: Any, log: Any, plan: bytes, compatible: bool) -> tuple[Any, Any]:
    """(runtime, engine) of a plan; a BackendError holds what TensorRT says when it refuses."""
    try:
        runtime = trt.Runtime(log)
    except (TypeError, RuntimeError) as err:  # what the binding makes of a null pointer
        raise BackendError(f"TensorRT cannot start here: {trt_api.last_errors(log)}") from err
    # a compatible plan carries a runtime of its own, which is code; no other plan may
    if compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        with memory_errors():
            raise BackendError(f"TensorRT does not accept the plan: {trt_api.last_errors(log)}")
    return runtime, engine
