"""PyTorch on the CPU: the reference every compiled engine is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import FloatArray, require
from ..bundle import Bundle
from ..errors import BackendError
from ..spec import UNetSpec


class TorchEngine:
    """A torch module in evaluation mode."""

    def __init__(self, network: Any, *, dimensions: int, precision: str = "fp32", batch: int = 1) -> None:
        self._network = network.eval()
        self._dimensions = dimensions
        self._precision = precision
        self.batch = batch
        self.held_bytes = 0
        self.device = "cpu"
        self.name = f"pytorch, cpu, {precision}"

    def __call__(self, patches: FloatArray) -> FloatArray:
        """Run the network; see `Engine`."""
        torch = require("torch", extra="export")
        squeezed = np.ascontiguousarray(patches[:, :, 0] if self._dimensions == 2 else patches)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16"):
            # one at a time: torch picks its algorithm by the batch, and equal patches must give equal logits
            logits = np.concatenate([self._network(torch.from_numpy(patch[None])).float().numpy() for patch in squeezed])
        return np.ascontiguousarray(logits[:, :, None] if self._dimensions == 2 else logits)

    def close(self) -> None:
        """Release the network."""
        del self._network


def open_member(bundle: Bundle, member: str, precision: str, threads: int, device: str) -> TorchEngine:
    """Build the network of the spec and load a member's weights.

    `threads` is torch's own process-wide setting and is left alone: set it with torch.set_num_threads.
    """
    if precision not in ("fp32", "bf16"):
        raise BackendError(f"PyTorch on a CPU serves fp32 and bf16, not {precision}")
    spec = bundle.spec
    if not isinstance(spec.network, UNetSpec):
        raise BackendError(
            f"{bundle.path}: network family {spec.network.family!r} has no PyTorch form; use backend openvino or onnxruntime"
        )
    path = bundle.weights_path(member)
    if not path.is_file():
        raise BackendError(f"{path} is missing: this bundle runs from its ONNX file; use backend openvino or onnxruntime")
    require("torch", extra="export")
    from ..networks import build, load_weights

    safetensors = require("safetensors", extra="export")
    try:
        weights = require("safetensors.torch", extra="export").load_file(str(path))
    except (safetensors.SafetensorError, OSError) as err:
        raise BackendError(f"{path}: not readable as safetensors ({err}); copy the bundle again") from err
    network = build(spec.network)
    load_weights(network, weights, where=str(path))
    return TorchEngine(network, dimensions=spec.dimensions, precision=precision)
