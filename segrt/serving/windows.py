"""Engines of a served model: its own, and those that another model of the same server runs; both stop when nobody waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import Array, FloatArray
from ..engines import Engine
from ..engines.batches import call_bytes
from ..errors import BackendError
from ..protocol import LOGITS, PATCHES
from .tensors import server_module, to_tensor, view
from .wire import reason_of

logger = logging.getLogger(__name__)

# a network's process that was lost is back within seconds
_WAITS_S = (0.2, 1.0, 3.0)


class Watched:
    """An engine that first asks whether anybody still waits; see `Engine`."""

    def __init__(self, engine: Engine, check: Callable[[], None]) -> None:
        self._engine, self._check = engine, check
        self.name, self.held_bytes, self.device = engine.name, engine.held_bytes, engine.device

    @property
    def batch(self) -> int:
        """The engine's own, which may become smaller."""
        return self._engine.batch

    @batch.setter
    def batch(self, count: int) -> None:
        self._engine.batch = count

    def __call__(self, patches: FloatArray) -> Array:
        """Run the engine, unless nobody waits."""
        self._check()
        return self._engine(patches)

    def call_bytes(self, windows: int, each: int) -> int:
        """The engine's own."""
        return call_bytes(self._engine, windows, each)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


class PatchCaller:
    """The engine of a network that another model of this server runs: its windows share batches with those of other requests.

    Parameters
    ----------
    model, version : who runs it
    batch : windows its engine likes best; with any other number sums would be rounded otherwise than by that engine itself
    told : gets the seconds that each call took
    check : raises when nobody waits any more; asked before each try
    """

    held_bytes = 0
    device = "cpu"

    def __init__(self, model: str, version: int, *, batch: int, told: Callable[[float], None], check: Callable[[], None]) -> None:
        self._model, self._version, self._told, self._check = model, version, told, check
        self.name, self.batch = f"model {model}, version {version}", batch

    def __call__(self, patches: FloatArray) -> Array:
        """Have the network run; see `Engine`."""
        start = time.perf_counter()
        parts = [self._ask(np.ascontiguousarray(patches[first : first + self.batch])) for first in range(0, len(patches), self.batch)]
        self._told(time.perf_counter() - start)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Nothing is held."""

    def _ask(self, patches: FloatArray) -> Array:
        """Logits of one batch, after a few tries where the network's process was lost: equal patches give equal logits."""
        for wait_s in (*_WAITS_S, None):
            self._check()
            response = self._send(patches)
            if not response.has_error():
                (logits,) = response.output_tensors()
                # the server's memory is read-only and short-lived; these logits belong to the caller
                return np.array(view(logits))
            error = response.error()
            if not _may_pass(error):
                raise BackendError(f"{self.name} refuses its windows ({error.message()}); the log of the server says more")
            if wait_s is not None:
                logger.warning("%s failed (%s); trying again in %g s", self.name, error.message(), wait_s)
                time.sleep(wait_s)
        raise BackendError(f"{self.name} does not answer ({error.message()}); try again later")

    def _send(self, patches: FloatArray) -> Any:
        request = server_module().InferenceRequest(
            model_name=self._model,
            model_version=self._version,
            requested_output_names=[LOGITS],
            inputs=[to_tensor(PATCHES, patches)],
        )
        return request.exec()


def _may_pass(error: Any) -> bool:
    """Whether another try may succeed: the server calls a process that died an internal failure."""
    return error.code() == server_module().TritonError.UNAVAILABLE or reason_of(error.message()) == "unavailable"
