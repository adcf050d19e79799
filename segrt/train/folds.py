"""TRAIN, one configuration: its folds are trained, each is validated with the bundle it makes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..arrays import ProgressFn
from ..bundle import Bundle
from ..engines import resolve_device
from ..errors import BackendError
from ..files import write_atomic
from ..networks import build, build_empty, count_parameters, initialize
from ..report.curves import write_curves
from ..spec import ModelSpec
from .augment import Augmentation
from .cache import Prepared
from .cases import Dataset
from .checkpoint import Weights
from .config import TrainConfig
from .configuration import Configuration
from .loader import Batches, Stream, share
from .loop import Job, ProgressStep, train
from .override import choose_loss
from .pictures import draw_predictions, draw_samples
from .processes import processes, rank
from .records import count_flops, environment
from .splits import Split, scored_on
from .targets import class_names
from .validate import Summary, validate

logger = logging.getLogger(__name__)


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
            weight=share(configuration.batch_size, rank(), processes()).weight(processes()),
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
            grey=config.grey if training else 0.0,
            grey_channel=config.grey_channel,
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
        draw_samples(fold)
    table = fold.folder / "profile.txt"
    told = table.is_file()
    finished = train(fold.job, fold.device, progress=fold.show.step)
    if first and not told and table.is_file():
        fold.show.stage(f"fold {fold.name}: time by operation\n{table.read_text(encoding='utf-8')}")
    if first:
        write_curves(fold.folder / "curves.png", {f"fold {fold.name}": fold.folder})
    return finished


def validate_fold(fold: Fold, dataset: Dataset, *, previous: Path | None) -> Summary:
    """Make the fold's own bundle and run its held-back cases through the runtime."""
    weights = fold.weights
    cases = f"{len(fold.split.validation)} cases" if fold.name != "all" else f"its own {len(fold.split.validation)} training cases"
    fold.show.stage(f"validating fold {fold.name} on {cases} (weights of iteration {weights.iteration})")
    bundle = Bundle.create(fold.folder / "bundle", fold.spec, weights={fold.name: weights.tensors}, force=True)
    names, folder = fold.split.validation, fold.folder / "validation"
    summary = validate(dataset, names, bundle, folder, device=runtime_device(fold.device), previous=previous, progress=fold.show.cases)
    draw_predictions(fold, dataset, summary)
    fold.show.stage(f"fold {fold.name}: mean Dice {summary.mean_dice:.4f}, mean IoU {summary.mean_iou:.4f} {scored_on([fold.name])}")
    return summary


def runtime_device(device: torch.device) -> str:
    """Give the device the runtime validates on: beside the training, unless it lacks what it needs there."""
    try:
        return resolve_device(str(device))
    except BackendError as err:
        logger.warning("validation runs on the CPU, not on %s: %s", device, err)
        return "cpu"


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
        "profile.txt",
    )
    files = {f"fold_{name}/{file}": fold.folder / file for name, fold in folds.items() for file in wanted}
    files |= {f"fold_{name}/summary.json": fold.folder / "validation" / "summary.json" for name, fold in folds.items()}
    return {name: path.read_bytes() for name, path in files.items() if path.is_file()}
