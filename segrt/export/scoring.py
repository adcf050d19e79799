"""BUILD: cases whose truth is known, those a training held back or those of two folders, to score a model on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, ProgressFn
from ..bundle import Bundle
from ..errors import InputError
from ..io import find_cases, read_labels, read_volume
from ..io.peek import find_labels
from ..metrics import Overlap, overlaps
from ..predictor import Predictor
from ..spec import ModelSpec
from ..volume import Volume

# in a bundle's reports; written by training
REMEMBERED = "validation.json"


@dataclass(frozen=True)
class ScoredCase:
    """One image with its truth, and the member that has not seen it; None for all members."""

    name: str
    images: tuple[Path, ...]
    labels: Path
    member: str | None = None


@dataclass(frozen=True)
class Validation:
    """Cases to score on.

    Attributes
    ----------
    cases : in their order
    source : where they come from, for reports
    threshold : grey values above it are foreground in the truth; None where the truth holds labels
    """

    cases: tuple[ScoredCase, ...]
    source: str
    threshold: float | None = None

    def truth(self, case: ScoredCase, volume: Volume, spec: ModelSpec) -> Array:
        """Read the truth (Z, Y, X) of a case in the model's label values; an InputError when it does not fit the image or the model."""
        labels = self._read(case.labels)
        if labels.shape != volume.grid.shape:
            raise InputError(f"{case.labels}: has shape {labels.shape}, its image {volume.name} has {volume.grid.shape}")
        if self.threshold is not None:
            return np.where(labels > self.threshold, max(spec.head.values), 0).astype(spec.label_dtype)
        known = {0, *spec.head.values, *([] if spec.ignore is None else [spec.ignore])}
        if unknown := [int(v) for v in np.unique(labels) if int(v) not in known]:
            raise InputError(
                f"{case.labels}: holds {unknown[0]}, which is no label of model {spec.name!r} ({', '.join(map(str, sorted(known)))}); "
                "when it is a grey mask, say above which value it is foreground with --mask-threshold"
            )
        return labels

    def _read(self, path: Path) -> Array:
        if self.threshold is None:
            return read_labels(path)[0]
        volume = read_volume(path)
        grey: Array = volume.data[0]
        if (volume.data != grey).any():
            raise InputError(f"{path}: has colours, expected a grey mask")
        return grey


@dataclass(frozen=True)
class Score:
    """Dice and IoU, means over the cases that have a structure (in truth or prediction) and then over structures; NaN without any.

    `where_present` is the Dice over the cases whose truth has the structure.
    """

    dice: float
    iou: float
    where_present: float


def remembered(bundle: Bundle) -> Validation | None:
    """Give the cases the training of a bundle held back, as its reports name them; None when nothing was written of any.

    Raises
    ------
    InputError
        When the report is damaged, or a file it names is gone; or when the training held no case back.
    """
    path = bundle.path / "reports" / REMEMBERED
    if not path.is_file():
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(
            ScoredCase(str(case["name"]), tuple(Path(file) for file in case["images"]), Path(case["labels"]), member)
            for member in bundle.spec.members
            for case in values["members"].get(member, ())
        )
        threshold = None if values["mask_threshold"] is None else float(values["mask_threshold"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(f"{path}: not a readable list of validation cases ({err}); name folders with --images and --labels") from err
    if not cases:
        raise InputError(f"{path}: the training held no case back (fold all does not); name folders with --images and --labels")
    for case in cases:
        if missing := [file for file in (*case.images, case.labels) if not file.exists()]:
            raise InputError(f"{missing[0]}: this validation case of {path} is gone; name folders with --images and --labels")
    return Validation(cases, f"the {len(cases)} cases the training held back", threshold)


def in_folders(
    images: str | Path, labels: str | Path, channels: int, *, mask_suffix: str | None = None, threshold: float | None = None
) -> Validation:
    """Pair the images of a folder with the label files of another.

    Parameters
    ----------
    mask_suffix : what replaces an image's suffix in its label file's name, such as "_mask.png"; by default the names are the same
    threshold : see `Validation`

    Raises
    ------
    InputError
        When there is no image, or one has no label file.
    """
    root = Path(labels)
    cases = []
    for case in find_cases(images, channels):
        if mask_suffix and case.files[0].name.endswith(mask_suffix):
            continue  # images and masks may share a folder
        file = root / f"{case.name}{mask_suffix}" if mask_suffix else _same_name(root, case.name)
        if not file.is_file():
            raise InputError(f"{file}: image {case.files[0].name} has no such mask; check --labels and --mask-suffix")
        cases.append(ScoredCase(case.name, case.files, file))
    if not cases:
        raise InputError(f"{images}: holds only files that end with {mask_suffix}; expected images")
    return Validation(tuple(cases), f"{len(cases)} cases of {Path(images).name}", threshold)


def _same_name(root: Path, name: str) -> Path:
    try:
        return find_labels(root, name)
    except InputError as err:
        raise InputError(f"{err}; where names of masks end otherwise, say how with --mask-suffix") from err


def score(bundles: Sequence[Bundle], validation: Validation, options: Mapping[str, Any], progress: ProgressFn | None = None) -> list[Score]:
    """Score several models on the same cases, each of which is read once.

    Parameters
    ----------
    bundles : models of the same channels and labels
    options : of `Predictor`
    progress : called with (cases done, cases in all)

    Raises
    ------
    InputError, BackendError
        When a case cannot be read or does not fit, or an engine not be opened.
    """
    found = [list[Mapping[str, Overlap]]() for _ in bundles]
    done = 0
    for member, group in groupby(sorted(validation.cases, key=_member), key=_member):
        with ExitStack() as stack:
            folds = (member,) if member else None
            opened = [stack.enter_context(Predictor(bundle, folds=folds, **options)) for bundle in bundles]
            for case in group:
                for one, counted in zip(found, _count(case, validation, opened), strict=True):
                    one.append(counted)
                done += 1
                if progress:
                    progress(done, len(validation.cases))
    spec = bundles[0].spec
    return [_summarize(cases, tuple(spec.names)) for cases in found]


def _member(case: ScoredCase) -> str:
    return case.member or ""


def _count(case: ScoredCase, validation: Validation, predictors: Sequence[Predictor]) -> list[Mapping[str, Overlap]]:
    """How each predictor's labels of a case overlap its truth, by structure."""
    spec = predictors[0].spec
    volume = read_volume(list(case.images) if len(case.images) > 1 else case.images[0], [channel.name for channel in spec.channels])
    truth = validation.truth(case, volume, spec)
    return [overlaps(truth, predictor(volume).labels, spec.names, ignore=spec.ignore) for predictor in predictors]


def _summarize(cases: Sequence[Mapping[str, Overlap]], structures: Sequence[str]) -> Score:
    def mean(values: Sequence[float]) -> float:
        known = [value for value in values if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    dice = mean([mean([case[name].dice for case in cases]) for name in structures])
    iou = mean([mean([case[name].iou for case in cases]) for name in structures])
    present = mean([mean([case[name].dice for case in cases if case[name].tp + case[name].fn]) for name in structures])
    return Score(dice, iou, present)
