"""Engines made of engines: mirrored copies averaged, an engine of the CPU in a device's pipeline, one batch over several engines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import numpy as np

from ..arrays import Array, FloatArray
from ..device import to_device, to_host
from . import Engine


class Mirrored:
    """Average an engine over all flips of `axes` (0 = z, 1 = y, 2 = x), summed in nnU-Net's order: none, single axes, pairs, all.

    For engines of the host; on a device mirrored windows are entries of a batch.
    """

    def __init__(self, engine: Engine, axes: Sequence[int]) -> None:
        self._engine = engine
        self._flips = list(chain.from_iterable(combinations(sorted(axes), n) for n in range(1, len(axes) + 1)))
        self.name = f"{engine.name}, {len(self._flips) + 1} mirrored passes"
        self.batch = engine.batch
        self.held_bytes = engine.held_bytes
        self.device = engine.device

    def __call__(self, patches: FloatArray) -> Array:
        """Average over all flips; see `Engine`."""
        total = self._engine(patches)
        for flip in self._flips:
            axes = tuple(axis + 2 for axis in flip)
            total += np.flip(self._engine(np.ascontiguousarray(np.flip(patches, axes))), axes)
        total /= len(self._flips) + 1
        return total

    def close(self) -> None:
        """Close the engine inside."""
        self._engine.close()


class Hosted:
    """Run an engine of the host in the pipeline of `device`: patches come to the host, logits go to the device."""

    def __init__(self, engine: Engine, device: str) -> None:
        self._engine = engine
        self.name = f"{engine.name}, for {device}"
        self.batch = engine.batch
        self.held_bytes = engine.held_bytes
        self.device = device

    def __call__(self, patches: FloatArray) -> Array:
        """Run the engine inside on host memory; see `Engine`."""
        logits: Array = to_device(self._engine(to_host(patches)), self.device)
        return logits

    def close(self) -> None:
        """Close the engine inside."""
        self._engine.close()
