"""`Predictor`: a model opened once, then called on images; its `__call__` is the whole data flow."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, get_args

import numpy as np

from .arrays import Array, FloatArray, ProgressFn, cpu_threads
from .bundle import Bundle
from .device import compute_on, free_bytes, get_xp, open_stream, to_device, to_host, wait_for
from .engines import Backend, Engine, Precision, open_engine, resolve_device
from .engines.compose import Mirrored, Spread
from .errors import BackendError, InputError
from .infer import Accumulate, Inferred, Planes, infer
from .io import read_labels, read_volume
from .io.read import Source
from .memory import HOST_LOGITS, DevicePlan, engine_bytes, plan_device, starts_per_slab
from .postprocess import postprocess
from .preprocess import preprocess
from .restore import can_restore_by_slab, restore, restore_probabilities, restore_slab
from .spec import ModelSpec
from .volume import Grid, Placement, Segmentation, Volume

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
Previous: TypeAlias = str | Path | Array


class Predictor:
    """Segment images with one bundle; engines are opened once and stay.

    Parameters
    ----------
    model : folder of a bundle, or an open `Bundle`
    folds : members to average; all by default
    backend, precision : see `segrt.engines.open_engine`
    device : "cpu", "cuda", "cuda:1", or "auto": the first GPU when there is one with an engine for it, else the CPU. Of several, as in
        "cuda:0,cuda:1", the first holds the case and all of them run its windows, to the same labels as one. "simulated" takes a GPU's
        path on the CPU, to find out without a GPU what it does
    step : window step as a fraction of the patch; the model's own by default
    tta : average over the model's mirrored axes
    postprocess : apply the model's post-processing
    accumulate : "float32", or "float16" to repeat nnU-Net's rounding bit by bit
    threads : CPU threads, 0 for all
    previous_stage : open the bundle of a cascade's first stage too; without it every call needs `previous`
    engines : engines to use instead of the bundle's own (one per fold)

    Raises
    ------
    SpecError, BackendError
        When the bundle or an engine cannot be used.
    InputError
        When a fold is not in the bundle.

    Examples
    --------
    >>> predictor = Predictor("liver/")                                   # doctest: +SKIP
    >>> segmentation = predictor("case_0000.nii.gz")                      # doctest: +SKIP
    >>> segmentation.labels.shape                                         # doctest: +SKIP
    (200, 512, 512)
    """

    def __init__(
        self,
        model: str | Path | Bundle,
        *,
        folds: Sequence[str] | None = None,
        backend: Backend = "auto",
        precision: Precision | None = None,
        device: str = "auto",
        step: float | None = None,
        tta: bool = True,
        postprocess: bool = True,
        accumulate: Accumulate = "float32",
        threads: int = 0,
        previous_stage: bool = True,
        engines: Sequence[Engine] | None = None,
    ) -> None:
        if step is not None and not 0 < step <= 1:
            raise InputError(f"step: expected 0 < step <= 1, got {step}")
        if accumulate not in get_args(Accumulate):
            raise InputError(f"accumulate: expected {' or '.join(get_args(Accumulate))}, got {accumulate!r}")
        if threads < 0:
            raise InputError(f"threads: expected 0 (all) or more, got {threads}")
        self.bundle = model if isinstance(model, Bundle) else Bundle.open(model)
        self.spec: ModelSpec = self.bundle.spec
        self.members = _choose(self.bundle, folds)
        self.step, self.accumulate, self.threads = step, accumulate, threads
        self.steps = self.spec.postprocess if postprocess else ()
        devices = _devices(device, accumulate)
        opened = list(engines or _open_engines(self.bundle, self.members, devices, device == "auto", backend, precision, threads))
        self.device = opened[0].device
        if accumulate == "float16" and self.device != "cpu":
            raise InputError(f"accumulate: float16 repeats the rounding of nnU-Net on a CPU; use float32 on {self.device}, or device cpu")
        axes = self.spec.inference.mirror_axes if tta else ()
        # flips are entries of a device's batches; an engine of the host makes them one by one
        self.mirror_axes = axes if self.device != "cpu" else ()
        self.engines: list[Engine] = [Mirrored(e, axes) if axes and self.device == "cpu" else e for e in opened]
        self._stream = open_stream(self.device)
        self.previous: Predictor | None = None
        if self.spec.previous and previous_stage and self.bundle.previous:
            # the second stage was trained on the first one's raw labels: no post-processing in between
            self.previous = Predictor(
                self.bundle.previous,
                backend=backend,
                precision=precision,
                device=self.device if device == "auto" else device,
                step=step,
                tta=tta,
                postprocess=False,
                accumulate=accumulate,
                threads=threads,
            )

    def __call__(
        self, image: Source, *, previous: Previous | None = None, probabilities: bool = False, progress: ProgressFn | None = None
    ) -> Segmentation:
        """Segment one image.

        Parameters
        ----------
        image : a path, a list of paths (one per channel), a SimpleITK image, a `Volume`, or (array (Z, Y, X) or (C, Z, Y, X), spacing
            (z, y, x) in mm); it is not modified
        previous : labels of a cascade's first stage, a path or a (Z, Y, X) array, when they were made elsewhere
        probabilities : also return (K, Z, Y, X) float32 probabilities
        progress : called with (windows done, windows in all)

        Returns
        -------
        Segmentation
            labels on the image's own grid

        Raises
        ------
        InputError
            When the image cannot be read or does not fit the model.
        """
        clock = _Clock(self._stream)
        with cpu_threads(self.threads), compute_on(self.device, self._stream):
            with clock("read"):
                volume = read_volume(image, [channel.name for channel in self.spec.channels])
            with clock("previous"):
                stage = self._first_stage(volume, previous)
            with clock("preprocess"):
                data, placement = preprocess(self._uploaded(volume), self.spec, previous=stage)
            inferred = self._infer(data, volume, placement, probabilities, progress)
            with clock("restore"):
                labels, scores = restore_planes(clock.each("network", inferred), placement, self.spec, probabilities=probabilities)
            with clock("postprocess"):
                labels = to_host(postprocess(labels, self.steps, voxel_mm3=volume.grid.voxel_mm3))
        windows = inferred.windows, inferred.shared
        return Segmentation(labels, volume.grid, self.spec.names, volume.name, scores, clock.seconds, windows)

    @property
    def engine_bytes(self) -> int:
        """Memory the engines hold and need while they run, as measured when they were built; 0 when one was not."""
        held = [engine.held_bytes for engine in self.engines]
        return sum(held) if all(held) else 0

    def device_plan(self, grid: Grid, itemsize: int, free: int, *, probabilities: bool = False) -> DevicePlan:
        """What an image of `grid`, with `itemsize` bytes a voxel, allocates on a GPU with `free` bytes; see `segrt.memory.plan_device`."""
        return plan_device(
            self.spec,
            grid,
            itemsize,
            free=free,
            batch=max(engine.batch for engine in self.engines),
            # one runs at a time; what nobody measured is estimated for 16-bit activations
            engine=max(engine.held_bytes or engine.batch * engine_bytes(self.spec, 1) // 2 for engine in self.engines),
            step=self.step,
            flips=2 ** len(self.mirror_axes),
            probabilities=probabilities,
        )

    def close(self) -> None:
        """Release the engines."""
        for engine in self.engines:
            engine.close()
        self.engines = []
        if self.previous is not None:
            self.previous.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _uploaded(self, volume: Volume) -> Volume:
        """The volume where the engines work, once it is known to fit there."""
        if not self.engines:
            raise BackendError(f"{self.bundle.path}: this Predictor was closed; open another one")
        if self._stream is not None:
            self.device_plan(volume.grid, volume.data.itemsize, free_bytes(self.device))
        return replace(volume, data=to_device(volume.data, self.device))

    def _infer(self, data: FloatArray, volume: Volume, placement: Placement, probabilities: bool, progress: ProgressFn | None) -> Inferred:
        starts = None
        if self._stream is not None:
            free = free_bytes(self.device) + data.nbytes
            starts = self.device_plan(volume.grid, volume.data.itemsize, free, probabilities=probabilities).starts_per_slab
        elif self.accumulate == "float32" and not probabilities and can_restore_by_slab(placement, self.spec):
            starts = starts_per_slab(self.spec, placement.shape, HOST_LOGITS, batch=self.engines[0].batch, step=self.step)
        return infer(
            data,
            self.engines,
            self.spec,
            step=self.step,
            accumulate=self.accumulate,
            mirror_axes=self.mirror_axes,
            starts_per_slab=starts,
            progress=progress,
        )

    def _first_stage(self, volume: Volume, previous: Previous | None) -> Array | None:
        """Labels of a cascade's first stage on the image's grid: given, or predicted here; None for other models."""
        if self.spec.previous is None:
            if previous is not None:
                raise InputError(f"{volume.name}: model {self.spec.name!r} is not the second stage of a cascade; pass no labels to it")
            return None
        if previous is None:
            if self.previous is None:
                raise InputError(f"{volume.name}: the bundle holds no first stage; pass its labels (--previous DIR)")
            return self.previous(volume).labels
        if isinstance(previous, str | Path):
            labels, grid = read_labels(previous)
            if difference := volume.grid.mismatch(grid):
                raise InputError(f"{previous}: labels of the previous stage are not on the grid of {volume.name}: {difference}")
            return labels
        return np.asarray(previous)


class _Clock:
    """Wall seconds per named stage; time inside another stage counts for the inner one alone."""

    def __init__(self, stream: Any) -> None:
        self.seconds: dict[str, float] = {}
        self._stream, self._inner = stream, 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, self._inner = time.perf_counter(), 0.0
        yield
        wait_for(self._stream)
        self.seconds[stage] = time.perf_counter() - start - self._inner

    def each(self, stage: str, items: Iterable[_T]) -> Iterator[_T]:
        """Yield the items, and count what making them takes as `stage`."""
        self.seconds[stage] = 0.0
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            item = next(iterator, None)
            wait_for(self._stream)
            self._inner += time.perf_counter() - start
            self.seconds[stage] = self._inner
            if item is None:
                return
            yield item
            wait_for(self._stream)  # what was done with it is the outer stage's


def restore_planes(
    planes: Iterable[Planes], placement: Placement, spec: ModelSpec, *, probabilities: bool
) -> tuple[Array, FloatArray | None]:
    """Labels on the image's grid from logits as they become final, and probabilities (on the host) when the logits are whole."""
    labels, scores, done = None, None, 0
    for part in planes:
        if part.logits.shape[1] == placement.shape[0]:
            scores = to_host(restore_probabilities(part.logits, placement, spec)) if probabilities else None
            labels = restore(part.logits, placement, spec)
            continue
        if labels is None:
            labels = get_xp(part.logits).zeros(placement.grid.shape, spec.label_dtype)
        done = restore_slab(part.logits, placement, spec, labels, first=part.first, ready=part.ready, done=done)
    assert labels is not None, "there is at least one window"
    return labels, scores


def _devices(device: str, accumulate: Accumulate) -> tuple[str, ...]:
    """The devices that a name or a comma list of names means; rounding as on a CPU is a reason for "auto" to take it."""
    if device == "auto" and accumulate == "float16":
        return ("cpu",)
    names = tuple(dict.fromkeys(resolve_device(name.strip()) for name in device.split(",")))
    if len(names) > 1 and not all(name.startswith("cuda:") for name in names):
        raise InputError(f"device: several can only be GPUs, such as cuda:0,cuda:1, got {device!r}")
    return names


def _open_engines(
    bundle: Bundle,
    members: Sequence[str],
    devices: Sequence[str],
    automatic: bool,
    backend: Backend,
    precision: Precision | None,
    threads: int,
) -> list[Engine]:
    """One engine per member; over several devices when there are several."""
    how: dict[str, Any] = {"backend": backend, "precision": precision, "threads": threads}
    try:
        opened = [[open_engine(bundle, member, device=device, **how) for device in devices] for member in members]
    except BackendError as err:
        if not automatic or tuple(devices) == ("cpu",):
            raise
        logger.warning("the CPU is used, for %s cannot be: %s", ", ".join(devices), err)
        return _open_engines(bundle, members, ("cpu",), False, backend, precision, threads)
    return [engines[0] if len(engines) == 1 else Spread(engines) for engines in opened]


def _choose(bundle: Bundle, folds: Sequence[str] | None) -> tuple[str, ...]:
    members = bundle.spec.members
    if folds is not None and tuple(folds) == ("all",) and "all" not in members:
        return members  # nnU-Net's own "all" is a member that was trained on every case
    # a fold may be given as a number or twice; it counts once
    folds = None if folds is None else tuple(dict.fromkeys(str(fold) for fold in folds))
    unknown = [fold for fold in folds or () if fold not in members]
    if unknown:
        raise InputError(f"{bundle.path}: no fold {', '.join(unknown)}; the bundle has {', '.join(members)}")
    return folds or members
