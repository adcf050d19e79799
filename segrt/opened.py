"""PREDICT: a model whose engines are open, and how its windows run; a pair has two, whose loops take turns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .arrays import FloatArray, ProgressFn, Shape3
from .device_plan import plan_device
from .engines import Engine
from .engines.batches import call_bytes, keeps
from .infer import Inferred, infer, share_progress
from .memory import engine_bytes
from .slabs import Load, plan_host
from .spec import ModelSpec
from .volume import Placement
from .windows import Accumulate, plan_windows

logger = logging.getLogger(__name__)

Worked: TypeAlias = tuple[FloatArray, Placement]


@dataclass(frozen=True)
class OpenModel:
    """One model, ready to run.

    Attributes
    ----------
    engines : one per member
    step, accumulate : see `Predictor`
    mirror_axes : flips that are entries of the engines' batches
    """

    spec: ModelSpec
    engines: Sequence[Engine]
    step: float | None
    accumulate: Accumulate
    mirror_axes: Sequence[int]

    @property
    def device(self) -> str:
        """Where the engines want their patches."""
        return self.engines[0].device

    @property
    def batch(self) -> int:
        """Windows the engines like best in a call."""
        return max(engine.batch for engine in self.engines)

    @property
    def load(self) -> Load:
        """What the model asks of the machine, and what with half the windows in a call, a quarter, ... one."""
        return self._load(self.batch)

    def _load(self, batch: int) -> Load:
        each = engine_bytes(self.spec, 1) // 2  # what engines do not know of themselves is estimated for 16-bit activations
        calls = [(engine, call_bytes(engine, min(batch, engine.batch), each)) for engine in self.engines]
        # one runs at a time, but some keep what they took
        needed = sum(taken for engine, taken in calls if keeps(engine))
        needed += max((taken for engine, taken in calls if not keeps(engine)), default=0)
        less = self._load(batch // 2) if batch > 1 else None
        return Load(self.spec, batch, needed, self.step, 2 ** len(self.mirror_axes), less)

    def count_windows(self, shape: Shape3) -> int:
        """Windows of a working array of `shape` (z, y, x), over all engines."""
        return len(plan_windows(shape, self.spec.inference, step=self.step)) * len(self.engines)

    def run(
        self, data: FloatArray, *, batch: int | None = None, starts_per_slab: int | None = None, progress: ProgressFn | None = None
    ) -> Inferred:
        """Give the window loop over a working array (C, Z, Y, X), which runs when its logits are asked for; see `infer`."""
        return infer(
            data,
            self.engines,
            self.spec,
            step=self.step,
            accumulate=self.accumulate,
            mirror_axes=self.mirror_axes,
            batch=batch,
            starts_per_slab=starts_per_slab,
            progress=progress,
        )


def run_models(
    models: Sequence[OpenModel],
    worked: Sequence[Worked],
    itemsize: int,
    *,
    free: int | None,
    probabilities: bool,
    progress: ProgressFn | None,
) -> list[Inferred]:
    """Give each model's window loop over its own working array of an image.

    Parameters
    ----------
    itemsize : bytes a voxel of the image takes
    free : bytes of a GPU that all of this may take, the working arrays included; None on the host
    probabilities : they are asked for, see `plan_device`
    progress : called with (windows done, windows in all) of all the models
    """
    how = _plan(models, [placement for _, placement in worked], itemsize, free, probabilities)
    totals = [model.count_windows(placement.shape) for model, (_, placement) in zip(models, worked, strict=True)]
    return [
        model.run(data, starts_per_slab=starts, batch=batch, progress=tell)
        for model, (data, _), (starts, batch), tell in zip(models, worked, how, share_progress(progress, totals), strict=True)
    ]


def _plan(
    models: Sequence[OpenModel], placements: Sequence[Placement], itemsize: int, free: int | None, probabilities: bool
) -> list[tuple[int | None, int | None]]:
    """How much of its logits each model holds at a time, and how many windows a call has at most; None for all, and for any number."""
    loads = [model.load for model in models]
    if free is not None:
        plan = plan_device(loads, placements[0].grid, itemsize, free=free, probabilities=probabilities)
        for model, batch in zip(models, plan.batches, strict=True):
            if batch < model.batch:
                logger.warning("%s: %d windows at once do not fit beside this case; going on with %d", model.device, model.batch, batch)
        return list(zip(plan.starts, plan.batches, strict=True))
    whole = models[0].accumulate == "float16" or (probabilities and len(models) == 1)
    starts = [None] * len(models) if whole else plan_host(loads, placements)
    return [(count, None) for count in starts]
