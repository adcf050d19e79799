"""TRAIN, pairs of configurations: their names, and how the mean of both models' probabilities does on the cases each fold held back.

nnU-Net keeps the probabilities of every validation on disk for this (1.7 GB a case before compression, for 16 classes on an abdominal CT)
and averages files. Here both models of a fold run once more, through the runtime's own pair and slab by slab: nothing is stored, and what
is scored is what the bundle will predict.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from .folds import runtime_device
from .splits import scored_on
from .validate import Summary, merge, validate
from .work import Trained, Work

_BETWEEN = "+"


def split_pair(name: str) -> tuple[str, ...]:
    """Give the configurations a name stands for: "2d+3d_fullres" is a pair, others are one.

    Raises
    ------
    InputError
        When they are more than two, or the same.
    """
    parts = tuple(name.split(_BETWEEN))
    if len(parts) > 2 or not all(parts) or len(set(parts)) < len(parts):
        raise InputError(f"configuration: a pair is two different ones, such as 2d+3d_fullres, got {name!r}")
    return parts


def name_candidates(own: str, wanted: Sequence[str] | None, planned: Iterable[str], *, pairs: bool) -> tuple[str, ...]:
    """Give the names of what is trained and compared: nnU-Net's order, configurations and then every pair of them.

    Parameters
    ----------
    own : the configuration, or pair, to train when nothing is to be compared
    wanted : what is to be compared, all that is planned when empty; None to compare nothing
    """
    if wanted is None:
        return (own,)
    names = tuple(dict.fromkeys(wanted or planned))
    singles = [name for name in names if len(split_pair(name)) == 1]
    more = [_BETWEEN.join(pair) for pair in combinations(singles, 2)] if pairs else []
    return tuple(dict.fromkeys((*names, *more)))


def validate_candidate(place: Work, parts: Sequence[Trained]) -> Summary:
    """Give the scores of a configuration, or of a pair of them, on the cases that the folds asked for held back."""
    folds = place.config.folds
    if len(parts) == 1:
        return parts[0].summary_of(folds)
    return merge([_validate_fold(place, parts, fold) for fold in folds])


def _validate_fold(place: Work, parts: Sequence[Trained], fold: str) -> Summary:
    """The fold's two models as a bundle of their own, for as long as they are scored."""
    one, other = (trained.folds[fold] for trained in parts)
    name = _BETWEEN.join(trained.name for trained in parts)
    cases, folder = one.split.validation, place.fold(name, fold)
    place.show.stage(f"{name}: validating fold {fold} on {len(cases)} cases, mean of both")
    partner = Bundle.open(other.folder / "bundle")
    bundle = Bundle.create(folder / "bundle", one.spec, weights={fold: one.weights.tensors}, partner=partner, force=True)
    device = runtime_device(place.device)
    summary = validate(
        place.dataset, cases, bundle, folder / "validation", device=device, previous=_first_labels(place, parts), progress=place.show.cases
    )
    shutil.rmtree(bundle.path)
    place.show.stage(f"{name}, fold {fold}: mean Dice {summary.mean_dice:.4f} {scored_on([fold])}")
    return summary


def _first_labels(place: Work, parts: Sequence[Trained]) -> Path | None:
    """Folder of a cascade's first-stage labels, which its second stage was trained with."""
    stages = [trained.configuration.previous for trained in parts if trained.configuration.previous is not None]
    return place.folder / stages[0] / "labels" if stages else None
