"""`Predictor`: a model opened once, then called on images; its `__call__` is the whole data flow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from .arrays import Array, ProgressFn, cpu_threads
from .assemble import Flow, assemble
from .bundle import Bundle
from .clock import Clock
from .device import compute_on, free_bytes, open_stream, to_device, to_host
from .device_plan import DevicePlan, plan_device
from .engines import Backend, Engine, Precision
from .errors import BackendError, InputError
from .frames import check_stream, in_groups, segment
from .io import read_volume
from .io.read import Source, read_previous
from .opened import OpenModel, run_models
from .opening import Engines, Options, choose_level, choose_members, divide_engines, open_model
from .postprocess import postprocess
from .preprocess import preprocess
from .spec import ModelSpec
from .volume import Grid, Segmentation, Volume
from .windows import Accumulate

Previous: TypeAlias = str | Path | Array


class Predictor:
    """Segment images with one bundle; engines are opened once and stay.

    Of a bundle that is a pair both models see the image, and their probabilities are averaged.

    Parameters
    ----------
    model : folder of a bundle, or an open `Bundle`
    folds : members to average; all by default
    level : "L1", "L2", ... of a UNet++ that `segrt-build --prune` has pruned; the whole network by default
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
    engines : engines to use instead of the bundle's own (one per fold, then those of a pair's partner), or a function that gives one for a
        bundle and a member; it is asked for those of a first stage and of a partner too

    Raises
    ------
    SpecError, BackendError
        When the bundle or an engine cannot be used.
    InputError
        When a fold or a level is not in the bundle.

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
        level: str | None = None,
        backend: Backend = "auto",
        precision: Precision | None = None,
        device: str = "auto",
        step: float | None = None,
        tta: bool = True,
        postprocess: bool = True,
        accumulate: Accumulate = "float32",
        threads: int = 0,
        previous_stage: bool = True,
        engines: Engines | None = None,
    ) -> None:
        options = Options(backend, precision, device, step, tta, accumulate, threads)
        self.bundle = choose_level(model if isinstance(model, Bundle) else Bundle.open(model), level, backend)
        self.spec: ModelSpec = self.bundle.spec
        self.members = choose_members(self.bundle, folds)
        self.step, self.accumulate, self.threads = step, accumulate, threads
        self.steps = self.spec.postprocess if postprocess else ()
        own, others = divide_engines(engines, self.bundle, self.members)
        self.engines, self.mirror_axes = open_model(self.bundle, self.members, options, own)
        self.device = self.engines[0].device
        self._stream = open_stream(self.device)
        how = options.beside(self.device)
        self.previous: Predictor | None = None
        if self.spec.previous and previous_stage and self.bundle.previous:
            # the second stage was trained on the first one's raw labels: no post-processing in between
            self.previous = Predictor(self.bundle.previous, postprocess=False, engines=others if callable(others) else None, **how)
        self.partner: Predictor | None = None
        if self.bundle.partner:
            how |= {"folds": folds, "previous_stage": previous_stage, "engines": others}
            self.partner = Predictor(self.bundle.partner, postprocess=False, **how)

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
        clock = Clock(self._stream)
        models = self._opened
        with cpu_threads(self.threads), compute_on(self.device, self._stream):
            with clock("read"):
                volume = read_volume(image, [channel.name for channel in self.spec.channels])
            with clock("previous"):
                stages = self._first_stages(volume, previous)
            with clock("preprocess"):
                image_there = self._uploaded(volume)
                worked = [preprocess(image_there, model.spec, previous=stage) for model, stage in zip(models, stages, strict=True)]
                del image_there
            free = None if self._stream is None else free_bytes(self.device) + sum(data.nbytes for data, _ in worked)
            inferred = run_models(models, worked, volume.data.itemsize, free=free, probabilities=probabilities, progress=progress)
            with clock("restore"):
                flows = [
                    Flow(clock.each("network", logits), placement, model.spec)
                    for model, logits, (_, placement) in zip(models, inferred, worked, strict=True)
                ]
                labels, scores = assemble(flows, probabilities=probabilities)
            with clock("postprocess"):
                labels = to_host(postprocess(labels, self.steps, voxel_mm3=volume.grid.voxel_mm3))
        windows = sum(part.windows for part in inferred), sum(part.shared for part in inferred)
        return Segmentation(labels, volume.grid, self.spec.names, volume.name, scores, clock.seconds, windows)

    def frames(self, frames: Iterable[Array], *, batch: int | None = None, spacing: tuple[float, float] = (1.0, 1.0)) -> Iterator[Array]:
        """Segment a stream of pictures as they come, several at a time; each gets the labels that a call would give it.

        Parameters
        ----------
        frames : (Y, X), (C, Y, X) or (Y, X, C) arrays of any real dtype and size; not modified
        batch : frames that are waited for and then run at once; what the engine likes best by default, 1 for the least delay
        spacing : (y, x) of a pixel in mm

        Yields
        ------
        (Y, X) labels of each frame, in their order

        Raises
        ------
        InputError
            When a frame does not fit the model, or the model sees volumes, is a cascade's second stage or a pair. The frames before it, and
            before any error of the stream's own, get their labels first.
        """
        check_stream(self.spec, pair=self.partner is not None)
        model = self._opened[0]
        for group in in_groups(frames, model.batch if batch is None else batch, self.spec, spacing):
            self._check_open()
            with cpu_threads(self.threads), compute_on(self.device, self._stream):
                labels = segment(group, model, self.steps)
            yield from labels

    @property
    def takes_previous(self) -> bool:
        """Whether a call may be given labels of a cascade's first stage."""
        return any(model.spec.previous is not None for model in self._models)

    @property
    def all_engines(self) -> list[Engine]:
        """Its own, then those of a pair's partner."""
        return [engine for model in self._models for engine in model.engines]

    @property
    def provenance(self) -> dict[str, object]:
        """What labels depend on besides the image: the bundle's fingerprint, and the settings that predictions.json records."""
        settings = {
            "members": self.members,
            "engines": [engine.name for engine in self.all_engines],
            "step": self.step or self.spec.inference.step,
            "accumulate": self.accumulate,
            "postprocess": [step.model_dump() for step in self.steps],
            "threads": self.threads,
            **({"level": self.bundle.level} if self.bundle.level else {}),
        }
        return {"bundle_sha256": self.bundle.fingerprint, "settings": settings}

    @property
    def engine_bytes(self) -> int:
        """Memory the engines hold and need while they run, as measured when they were built; 0 when one was not."""
        held = [engine.held_bytes for engine in self.all_engines]
        return sum(held) if all(held) else 0

    def device_plan(self, grid: Grid, itemsize: int, free: int, *, probabilities: bool = False) -> DevicePlan:
        """What an image of `grid`, with `itemsize` bytes a voxel, allocates on a GPU with `free` bytes; see `plan_device`."""
        return plan_device([model.load for model in self._opened], grid, itemsize, free=free, probabilities=probabilities)

    def close(self) -> None:
        """Release the engines."""
        for engine in self.engines:
            engine.close()
        self.engines = []
        for other in (self.previous, self.partner):
            if other is not None:
                other.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _models(self) -> tuple[Predictor, ...]:
        """This one, and the partner of a pair."""
        return (self,) if self.partner is None else (self, self.partner)

    @property
    def _opened(self) -> list[OpenModel]:
        self._check_open()
        return [OpenModel(m.spec, tuple(m.engines), m.step, m.accumulate, m.mirror_axes) for m in self._models]

    def _check_open(self) -> None:
        if not self.engines:
            raise BackendError(f"{self.bundle.path}: this Predictor was closed; open another one")

    def _uploaded(self, volume: Volume) -> Volume:
        """The volume where the engines work, once it is known to fit there."""
        if self._stream is not None:
            self.device_plan(volume.grid, volume.data.itemsize, free_bytes(self.device))
        return replace(volume, data=to_device(volume.data, self.device))

    def _first_stages(self, volume: Volume, previous: Previous | None) -> list[Array | None]:
        """Labels of a cascade's first stage on the image's grid: given, or predicted here; None for models that need none."""
        if previous is not None and not self.takes_previous:
            raise InputError(f"{volume.name}: model {self.spec.name!r} is not the second stage of a cascade; pass no labels to it")
        given = None if previous is None else read_previous(previous, volume.name, volume.grid)
        labels = (model._first_labels(volume) if given is None and model.spec.previous else given for model in self._models)
        return [found if model.spec.previous else None for model, found in zip(self._models, labels, strict=True)]

    def _first_labels(self, volume: Volume) -> Array:
        if self.previous is None:
            raise InputError(f"{volume.name}: the bundle holds no first stage; pass its labels (--previous DIR)")
        return self.previous(volume).labels
