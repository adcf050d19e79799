"""Pictures of a fold to be looked at: what its network learns from, and what it got right and wrong; TRAIN, beside its records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array
from ..io import read_labels
from ..report.predictions import spread, write_errors
from ..report.samples import write_samples
from .cases import Dataset
from .dataset import read_training_case
from .epoch import mean_of
from .loader import Batches
from .targets import class_names, class_values, label_values
from .validate import Summary

if TYPE_CHECKING:
    from .folds import Fold

_SHOWN = 8  # samples in the picture


def draw_samples(fold: Fold) -> None:
    """Write samples.png, once: the first patches as the network gets them, under the dataset's own label values and names."""
    path, spec = fold.folder / "samples.png", fold.spec
    if path.is_file():
        return
    source = Batches(
        fold.prepared.select(fold.split.train),
        fold.configuration,
        augmentation=fold.config.augment,
        grey=fold.config.grey,
        grey_channel=fold.config.grey_channel,
        oversampling=fold.config.oversampling,
        seed=fold.config.seed,
        workers=0,
    )
    samples: list[tuple[str, Array, Array]] = []
    colours = len(spec.channels)  # what follows them are labels of a stage before
    for data, targets, names in source():
        for image, target, name in zip(data[:, :colours].numpy(), targets[0].numpy(), names, strict=True):
            labels = label_values(target, spec)
            flat = labels.ndim == 2
            samples.append((name, image[:, None] if flat else image, labels[None] if flat else labels))
        if len(samples) >= _SHOWN:
            break
    write_samples(path, samples[:_SHOWN], dict(zip(class_values(spec), class_names(spec), strict=True)))


def draw_predictions(fold: Fold, dataset: Dataset, summary: Summary) -> None:
    """Write predictions.png: a page of the held-back cases with what was found, wrong and missed, the worst to the best."""
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
