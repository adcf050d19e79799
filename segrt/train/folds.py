"""TRAIN, one configuration: its folds are trained, each is validated with the bundle it makes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..arrays import Array, ProgressFn
from ..bundle import Bundle
from ..engines import resolve_device
from ..errors import BackendError
from ..files import write_atomic
from ..io import read_labels
from ..networks import build, build_empty, count_parameters, initialize
from ..report.curves import write_curves
from ..report.predictions import spread, write_errors
from ..report.samples import write_samples
from ..spec import ModelSpec
from .augment import Augmentation
from .cache import Prepared
from .cases import Dataset
from .checkpoint import Weights
from .config import TrainConfig
from .configuration import Configuration
from .dataset import read_training_case
from .epoch import mean_of
from .loader import Batches, Stream
from .loop import Job, ProgressStep, train
from .override import choose_loss
from .processes import processes, rank
from .records import count_flops, environment
from .splits import Split
from .validate import Summary, validate

logger = logging.getLogger(__name__)

_SHOWN = 8  # samples in the picture


def _silent(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Show:
    """What a training tells while it runs: `stage` a line of text, `cases` (done, all) of a stage, `step` each iteration."""

    stage: Callable[[str], None] = _silent
    cases: ProgressFn | None = None
    step: ProgressStep | None = None


@dataclass(frozen=True)
class Fold:
    """One fold of one configuration.

    Attributes
    ----------
    name : "0", "1", ... or "all"; the member's name in the bundle
    split : its cases
    folder : its checkpoints and records
    """

    name: str
    split: Split
    configuration: Configuration
    prepared: Prepared
    config: TrainConfig
    folder: Path
    device: torch.device
    show: Show = field(default_factory=Show)

    @property
    def spec(self) -> ModelSpec:
        """The model this fold alone is."""
        return self.configuration.spec.model_copy(update={"members": (self.name,)})

    @property
    def digest(self) -> str:
        """SHA-256 of all that the weights depend on beside the config: the plan, the prepared data, the split."""
        plan = self.configuration.model_dump(mode="json", exclude={"reasons"} | ({"flips"} if self.configuration.flips is None else set()))
        values = [plan, self.prepared.digest, self.split.train, self.split.validation]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def job(self) -> Job:
        """What the loop runs."""
        configuration, spec, config = self.configuration, self.configuration.spec, self.config
        supervised = configuration.deep_supervision

        def build_network() -> nn.Module:
            network = build(spec.network, deep_supervision=supervised)
            initialize(network)
            return network

        return Job(
            build=build_network,
            loss=choose_loss(configuration, config, distributed=processes() > 1),
            batches=self.batches("training"),
            validation=self.batches("validation"),
            classes=class_names(spec),
            head=spec.head,
            config=config,
            folder=self.folder,
            plan=self.digest,
        )

    def batches(self, stream: Stream) -> Batches:
        """Batches of this fold's cases, this process's share of each."""
        training = stream == "training"
        config = self.config
        augmentation: Augmentation = config.augment if training else "none"
        return Batches(
            self.prepared.select(self.split.train if training else self.split.validation),
            self.configuration,
            augmentation=augmentation,
            oversampling=config.oversampling,
            seed=config.seed,
            stream=stream,
            workers=config.workers if training else min(config.workers, 1),
            rank=rank(),
            processes=processes(),
            pin=self.device.type == "cuda",
        )

    @property
    def weights(self) -> Weights:
        """The trained weights."""
        return self.job.checkpoints.chosen()


def train_fold(fold: Fold) -> bool:
    """Train a fold from its newest checkpoint to its end; False when a signal stopped it. Its folder then holds records and pictures."""
    first = rank() == 0
    if first:
        fold.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(fold.folder / "config.json", fold.config.to_json())
        _describe(fold)
        _draw_samples(fold)
    finished = train(fold.job, fold.device, progress=fold.show.step)
    if first:
        write_curves(fold.folder / "curves.png", {f"fold {fold.name}": fold.folder})
    return finished


def validate_fold(fold: Fold, dataset: Dataset, *, previous: Path | None) -> Summary:
    """Make the fold's own bundle and run its held-back cases through the runtime."""
    weights = fold.weights
    fold.show.stage(f"validating fold {fold.name} on {len(fold.split.validation)} cases (weights of iteration {weights.iteration})")
    bundle = Bundle.create(fold.folder / "bundle", fold.spec, weights={fold.name: weights.tensors}, force=True)
    names, folder = fold.split.validation, fold.folder / "validation"
    summary = validate(dataset, names, bundle, folder, device=runtime_device(fold.device), previous=previous, progress=fold.show.cases)
    _draw_predictions(fold, dataset, summary)
    fold.show.stage(f"fold {fold.name}: mean Dice {summary.mean_dice:.4f}, mean IoU {summary.mean_iou:.4f}")
    return summary


def runtime_device(device: torch.device) -> str:
    """Give the device the runtime validates on: beside the training, unless it lacks what it needs there."""
    try:
        return resolve_device(str(device))
    except BackendError as err:
        logger.warning("validation runs on the CPU, not on %s: %s", device, err)
        return "cpu"


def class_names(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the foreground channels of the network's output, in their order."""
    if spec.head.activation == "sigmoid":
        return tuple(label.name for label in spec.labels)
    named = {label.values[0]: label.name for label in spec.labels}
    return tuple(named.get(value, str(value)) for value in spec.head.values[1:])


def _describe(fold: Fold) -> None:
    """Parameters, work per patch and the machine: told and written down."""
    spec = fold.configuration.spec
    network = build_empty(spec.network)
    patch = spec.inference.patch[3 - spec.dimensions :]
    flops, parameters = count_flops(network, (1, spec.in_channels, *patch)), count_parameters(network)
    size = " x ".join(str(n) for n in patch)
    fold.show.stage(
        f"fold {fold.name}: {len(fold.split.train)} cases to train on, {parameters:,} parameters, "
        f"{flops / 1e9:.3g} GFLOP forward per patch of {size}, batch {fold.configuration.batch_size}, on {fold.device}"
    )
    values = environment(fold.device) | {"processes": processes(), "parameters": parameters, "flops_per_patch": flops}
    write_atomic(fold.folder / "environment.json", json.dumps(values, indent=1) + "\n")


def _draw_samples(fold: Fold) -> None:
    """A picture of the first patches as the network gets them, once."""
    path = fold.folder / "samples.png"
    if path.is_file():
        return
    source = Batches(
        fold.prepared.select(fold.split.train),
        fold.configuration,
        augmentation=fold.config.augment,
        oversampling=fold.config.oversampling,
        seed=fold.config.seed,
        workers=0,
    )
    samples: list[tuple[str, Array, Array]] = []
    for data, targets, names in source():
        for image, target, name in zip(data[:, 0].numpy(), targets[0].numpy(), names, strict=True):
            labels = _painted(target) if fold.spec.head.activation == "sigmoid" else target
            samples.append((name, _volume(image), _volume(labels)))
        if len(samples) >= _SHOWN:
            break
    write_samples(path, samples[:_SHOWN], dict(enumerate(class_names(fold.spec), 1)))


def _draw_predictions(fold: Fold, dataset: Dataset, summary: Summary) -> None:
    """A page of the held-back cases with what was found, wrong and missed, the worst to the best."""
    named = {case.name: case for case in dataset.cases}
    scored = [case for case in summary.cases if case.prediction.is_file()]
    scored.sort(key=lambda case: score if (score := mean_of(list(case.dice.values()))) is not None else 2.0)
    shown = []
    for case in (scored[i] for i in spread(len(scored))):
        volume, truth = read_training_case(named[case.name], dataset)
        if dataset.ignore is not None:
            truth = np.where(truth == dataset.ignore, 0, truth)
        shown.append((case.name, volume.data, truth, read_labels(case.prediction)[0]))
    write_errors(fold.folder / "predictions.png", shown)


def _volume(array: Array) -> Array:
    """A slice as a volume of one."""
    return array[None] if array.ndim == 2 else array


def _painted(regions: Array) -> Array:
    """(K, ...) of 0 and 1 -> (...) number of the last region from 1, as they overlap."""
    painted = np.zeros(regions.shape[1:], np.int16)
    for number, region in enumerate(regions, 1):
        painted[region > 0] = number
    return painted


def reports_of(folds: Mapping[str, Fold]) -> dict[str, bytes]:
    """What the folds' folders hold to be looked at, by its name in the bundle's reports."""
    wanted = (
        "config.json",
        "split.json",
        "environment.json",
        "training.csv",
        "validation.csv",
        "epochs.csv",
        "curves.png",
        "predictions.png",
        "samples.png",
        "profile.json",
    )
    files = {f"fold_{name}/{file}": fold.folder / file for name, fold in folds.items() for file in wanted}
    files |= {f"fold_{name}/summary.json": fold.folder / "validation" / "summary.json" for name, fold in folds.items()}
    return {name: path.read_bytes() for name, path in files.items() if path.is_file()}
