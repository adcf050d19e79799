"""Which cases a fold trains on and which it is validated with; TRAIN, before the first batch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from .cases import Dataset
from .config import TrainConfig
from .patients import Patients, find_patients

FOLDS, SEED = 5, 12345


@dataclass(frozen=True)
class Split:
    """Names of the cases of one fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def split_of(dataset: Dataset, config: TrainConfig, fold: str) -> Split:
    """The cases of one fold; the split "auto" is the dataset's own, else kfold, for a V-Net a shuffled share of .75.

    Raises
    ------
    InputError
        See `choose_split`; or when the dataset's own split is one fold and another is asked for.
    """
    own = dataset.split if config.split == "auto" else None
    patients = find_patients(dataset, config)
    if own is not None and fold == "0":
        return Split(*(tuple(sorted(names)) for names in own))
    if own is not None and fold != "all":
        raise InputError(f"fold {fold}: dataset {dataset.name} brings one split of its own, fold 0; use --split kfold for more")
    return choose_split([case.name for case in dataset.cases], _how(config), fold, patients)


def scored_on(folds: Iterable[str]) -> str:
    """Which cases folds are scored on, in words: all trains on those it is scored on too."""
    return "on its own training cases" if "all" in folds else "in validation"


def covering_folds(dataset: Dataset, config: TrainConfig, name: str) -> tuple[str, ...]:
    """Folds of `name`, a cascade's first stage, that together hold back every case.

    Raises
    ------
    InputError
        When the split's folds leave a case out.
    """
    if config.folds == ("all",):
        return ("all",)
    own = config.split == "auto" and dataset.split is not None
    count = 1 if own else len(make_splits([case.name for case in dataset.cases], _how(config), find_patients(dataset, config)))
    folds = tuple(str(fold) for fold in range(count))
    held = {case for fold in folds for case in split_of(dataset, config, fold).validation}
    for case in dataset.cases:
        if case.name not in held:
            raise InputError(
                f"{name}: no fold holds case {case.name} back, so the second stage of the cascade has no labels of it to learn from; "
                "use --split kfold, or --fold all"
            )
    return folds


def choose_split(names: Sequence[str], how: str, fold: str, patients: Patients | None = None) -> Split:
    """Give the cases of one fold.

    Parameters
    ----------
    names : of the cases; their order does not matter
    how : "kfold", "shuffled:SHARE", "sorted:SHARE", or the path of a JSON file; see `TrainConfig.split`
    fold : "0", "1", ... or "all", which trains on every case and validates on them too. (nnU-Net makes a random 80:20 split of a number
        beyond its five folds; here that is refused, for more often it is a slip.)
    patients : case -> patient; all cases of one are then on one side, and folds and shares count patients. A file says what it says

    Raises
    ------
    InputError
        When a split cannot be made of so few cases or has no such fold, or a file's split names an unknown case or one on both sides.
    """
    ordered = tuple(sorted(names))
    if fold == "all":
        return Split(ordered, ordered)
    if not (fold.isascii() and fold.isdigit() and fold == str(int(fold))):
        raise InputError(f"fold: expected a number or all, got {fold!r}")
    splits = make_splits(ordered, how, patients)
    if int(fold) >= len(splits):
        raise InputError(f"fold {fold}: split {how!r} has {_folds(len(splits))}; choose of these, or all")
    return splits[int(fold)]


def make_splits(names: Sequence[str], how: str, patients: Patients | None = None) -> tuple[Split, ...]:
    """All folds of `how`, of cases sorted by name; see `choose_split`."""
    ordered = tuple(sorted(names))
    kind, _, share = how.partition(":")
    if patients is not None and kind in ("kfold", "shuffled", "sorted"):
        units = _units(patients)
        if how == "kfold" and len(units) < FOLDS:
            raise InputError(f"{len(units)} patients cannot be split into {FOLDS} folds; use --split shuffled:0.75, or --patients none")
        return tuple(_of_cases(split, patients) for split in make_splits(units, how))
    if how == "kfold":
        return kfold(ordered)
    if kind in ("shuffled", "sorted") and share:
        return (_by_share(ordered, share, shuffled=kind == "shuffled"),)
    return _read(Path(how), ordered)


def _units(patients: Patients) -> tuple[str, ...]:
    return tuple(sorted(set(patients.values())))


def _of_cases(split: Split, patients: Patients) -> Split:
    """A split of patients as one of their cases."""
    held = set(split.validation)
    return Split(*(tuple(sorted(name for name, patient in patients.items() if (patient in held) == side)) for side in (False, True)))


def kfold(names: Sequence[str], folds: int = FOLDS, seed: int = SEED) -> tuple[Split, ...]:
    """nnU-Net's folds: those of scikit-learn's KFold(folds, shuffle=True, random_state=seed) over the names as they stand.

    Raises
    ------
    InputError
        When there are fewer cases than folds.
    """
    if len(names) < folds:
        raise InputError(f"{len(names)} cases cannot be split into {folds} folds; train on all (fold all), or give a split file")
    order = np.arange(len(names))
    np.random.RandomState(seed).shuffle(order)
    return tuple(_split(names, part) for part in np.array_split(order, folds))


def _split(names: Sequence[str], validation: Sequence[int] | np.ndarray) -> Split:
    held = {int(i) for i in validation}
    return Split(
        tuple(name for i, name in enumerate(names) if i not in held),
        tuple(name for i, name in enumerate(names) if i in held),
    )


def _by_share(names: Sequence[str], share: str, *, shuffled: bool) -> Split:
    """The first `share` of the names trains; of the sorted ones, or of these after a seeded shuffle."""
    try:
        fraction = float(share)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise InputError(f"split: expected a share between 0 and 1 after the colon, got {share!r}")
    order = np.arange(len(names))
    if shuffled:
        np.random.default_rng(SEED).shuffle(order)
    return _check(_split(names, order[round(fraction * len(names)) :]))


def _read(path: Path, names: Sequence[str]) -> tuple[Split, ...]:
    """Folds from a file like nnU-Net's splits_final.json: a list of {"train": [...], "val": [...]}."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputError(
            f"split: {str(path)!r} is neither kfold, shuffled:SHARE, sorted:SHARE nor a readable JSON file of folds ({err})"
        ) from err
    if not isinstance(values, list) or not values or not all(_is_fold(fold) for fold in values):
        raise InputError(f'{path}: expected a list of folds like {{"train": ["case", ...], "val": ["case", ...]}}')
    splits = tuple(Split(tuple(sorted(fold["train"])), tuple(sorted(fold["val"]))) for fold in values)
    for number, split in enumerate(splits):
        if unknown := sorted({*split.train, *split.validation} - set(names)):
            raise InputError(f"{path}: fold {number} names {unknown[0]}, which is no case of the dataset")
        if both := sorted(set(split.train) & set(split.validation)):
            raise InputError(f"{path}: fold {number} has {both[0]} in train and in val; a case can only be on one side")
        _check(split)
    return splits


def _is_fold(values: object) -> bool:
    if not isinstance(values, dict) or not {"train", "val"} <= values.keys():
        return False
    return all(isinstance(values[key], list) and all(isinstance(name, str) for name in values[key]) for key in ("train", "val"))


def _check(split: Split) -> Split:
    if not split.train or not split.validation:
        count = len(split.train) + len(split.validation)
        raise InputError(f"split: {count} cases leave none for {'validation' if split.train else 'training'}; train on all (fold all)")
    return split


def _folds(count: int) -> str:
    return "one fold, 0" if count == 1 else f"folds 0 to {count - 1}"


def _how(config: TrainConfig) -> str:
    if config.split != "auto":
        return config.split
    return "shuffled:0.75" if config.model == "vnet" else "kfold"
