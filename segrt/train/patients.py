"""Whose images a dataset's cases are, by their names, so that a split keeps those of one patient together; TRAIN, before the split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import InputError
from ..io.cases import PICTURE_SUFFIXES, image_suffix
from .cases import Dataset
from .config import PICTURES, TrainConfig

Patients = Mapping[str, str]

_NUMBERED = re.compile(r"(.+?)[-_. ]+\d+")
_FEWEST = 5  # patients to split by: as many as there are folds
_TOLD = 2  # patients to warn of: one is the number of a picture
_SHOWN = 10  # patients a sentence names


def find_patients(dataset: Dataset, config: TrainConfig) -> Patients | None:
    """Give case -> patient, or None where cases are split one by one.

    "auto" takes what comes before a last number that stands apart in the name (`TCGA_CS_4943_20000902_10`: `TCGA_CS_4943_20000902`), for
    pictures that a UNet++ or U-Net is trained on, and only where that makes at least five patients, some of which have several pictures.

    Raises
    ------
    InputError
        When the pattern is none, or does not fit a case's name.
    """
    names = [case.name for case in dataset.cases]
    if config.patients == "none" or (config.patients == "auto" and config.model not in PICTURES):
        return None
    return guess_patients(dataset, _FEWEST) if config.patients == "auto" else match_patients(names, config.patients)


def guess_patients(dataset: Dataset, fewest: int = _TOLD) -> Patients | None:
    """Case -> what comes before a last number that stands apart in its name; None unless cases are pictures of so many patients or more.

    Two kinds of pictures (`benign_1`, `malignant_1`) look like two patients, so few are warned of and not split by.
    """
    if any(image_suffix(case.images[0]) not in PICTURE_SUFFIXES for case in dataset.cases):
        return None
    found = {case.name: match[1] if (match := _NUMBERED.fullmatch(case.name)) else case.name for case in dataset.cases}
    return found if fewest <= len(set(found.values())) < len(found) else None


def match_patients(names: Sequence[str], pattern: str) -> Patients:
    """Case -> what a pattern finds at the start of its name: its first group, or all of it.

    Raises
    ------
    InputError
        When the pattern is none, or does not fit a name.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as err:
        raise InputError(f"patients: {pattern!r} is no pattern ({err}); expected one such as '(.+)_\\d+'") from err
    found = {name: match[1 if compiled.groups else 0] for name in names if (match := compiled.match(name))}
    if missing := [name for name in names if not found.get(name)]:
        raise InputError(f"patients: {pattern!r} finds no patient in {len(missing)} of {len(names)} names, such as {missing[0]}")
    return found


def torn_patients(patients: Patients, train: Sequence[str], validation: Sequence[str]) -> str:
    """Say which patients have images on both sides, or ""."""
    both = sorted({patients[name] for name in train} & {patients[name] for name in validation})
    if not both:
        return ""
    have = f"{len(both)} patient{'s have' if len(both) > 1 else ' has'}"
    return f"by their names {have} images on both sides of the split, so validation will look better than it is: {name_some(both)}"


def name_some(patients: Sequence[str]) -> str:
    """The first of them, and how many more."""
    return ", ".join(patients[:_SHOWN]) + (f" and {len(patients) - _SHOWN} more" if len(patients) > _SHOWN else "")
