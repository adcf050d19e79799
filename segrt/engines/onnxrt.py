"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import FloatArray, require
from ..bundle import Bundle
from ..errors import BackendError


class OnnxRuntimeEngine:
    """An inference session with a free batch."""

    def __init__(self, session: Any, *, dimensions: int, batch: int) -> None:
        self._session = session
        self._dimensions = dimensions
        self.batch = batch
        self.held_bytes = 0
        self.device = "cpu"
        self.name = "onnxruntime, cpu, fp32"

    def __call__(self, patches: FloatArray) -> FloatArray:
        """Run the network; see `Engine`."""
        squeezed = patches[:, :, 0] if self._dimensions == 2 else patches
        (logits,) = self._session.run(None, {self._session.get_inputs()[0].name: np.ascontiguousarray(squeezed)})
        expanded = logits[:, :, None] if self._dimensions == 2 else logits
        return np.asarray(expanded, np.float32)

    def close(self) -> None:
        """Release the session."""
        del self._session


def open_member(bundle: Bundle, member: str, precision: str, threads: int, device: str) -> OnnxRuntimeEngine:
    """Open a member's ONNX file on the CPU provider."""
    if precision != "fp32":
        raise BackendError(f"ONNX Runtime on a CPU serves fp32 only, not {precision}; use backend openvino")
    ort = require("onnxruntime", extra="ort")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(bundle.onnx_path(member)), options, providers=["CPUExecutionProvider"])
    return OnnxRuntimeEngine(session, dimensions=bundle.spec.dimensions, batch=1 if bundle.spec.dimensions == 3 else 4)
