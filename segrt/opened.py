"""PREDICT: a model whose engines are open, and how its windows run; a pair has two, whose loops take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .arrays import FloatArray, ProgressFn, Shape3
from .device_plan import plan_device
from .engines import Engine
from .infer import Inferred, infer, share_progress
from .memory import engine_bytes
from .slabs import Load, plan_host
from .spec import ModelSpec
from .volume import Placement
from .windows import Accumulate, plan_windows

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
        """What the model asks of the machine."""
        # one runs at a time; what nobody measured is estimated for 16-bit activations
        held = max(engine.held_bytes or engine.batch * engine_bytes(self.spec, 1) // 2 for engine in self.engines)
        return Load(self.spec, self.batch, held, self.step, 2 ** len(self.mirror_axes))

    def count_windows(self, shape: Shape3) -> int:
        """Windows of a working array of `shape` (z, y, x), over all engines."""
        return len(plan_windows(shape, self.spec.inference, step=self.step)) * len(self.engines)

    def run(self, data: FloatArray, *, starts_per_slab: int | None = None, progress: ProgressFn | None = None) -> Inferred:
        """Give the window loop over a working array (C, Z, Y, X), which runs when its logits are asked for; see `infer`."""
        return infer(
            data,
            self.engines,
            self.spec,
            step=self.step,
            accumulate=self.accumulate,
            mirror_axes=self.mirror_axes,
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
    starts = _starts(models, [placement for _, placement in worked], itemsize, free, probabilities)
    totals = [model.count_windows(placement.shape) for model, (_, placement) in zip(models, worked, strict=True)]
    return [
        model.run(data, starts_per_slab=count, progress=tell)
        for model, (data, _), count, tell in zip(models, worked, starts, share_progress(progress, totals), strict=True)
    ]


def _starts(
    models: Sequence[OpenModel], placements: Sequence[Placement], itemsize: int, free: int | None, probabilities: bool
) -> Sequence[int | None]:
    """How much of its logits each model holds at a time; None for all."""
    loads = [model.load for model in models]
    if free is not None:
        return plan_device(loads, placements[0].grid, itemsize, free=free, probabilities=probabilities).starts
    if models[0].accumulate == "float16" or (probabilities and len(models) == 1):
        return [None] * len(models)
    return plan_host(loads, placements)
