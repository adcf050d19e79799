"""An engine from a Python function: for custom models, and to run the whole pipeline without a network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arrays import FloatArray
from ..device import to_device, to_host
from ..errors import BackendError


class FunctionEngine:
    """Run `function`, which maps patches (N, C, Z, Y, X) float32 to logits (N, K, Z, Y, X), both on the host, whatever the device."""

    def __init__(
        self, function: Callable[[FloatArray], FloatArray], *, name: str = "function", batch: int = 1, device: str = "cpu"
    ) -> None:
        self._function = function
        self.name = name
        self.batch = batch
        self.held_bytes = 0
        self.device = device

    def __call__(self, patches: FloatArray) -> FloatArray:
        """Run the function; see `Engine`."""
        logits = np.asarray(self._function(to_host(patches)))
        if logits.ndim != 5 or logits.shape[0] != patches.shape[0] or logits.shape[2:] != patches.shape[2:]:
            raise BackendError(f"{self.name}: expected logits (N, K, Z, Y, X) for patches {patches.shape}, got {logits.shape}")
        result: FloatArray = to_device(np.array(logits, np.float32, order="C"), self.device)
        return result

    def close(self) -> None:
        """Nothing is held."""
