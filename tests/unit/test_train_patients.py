"""Patients: found in the names of cases, kept on one side of every split, named where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from segrt.errors import InputError
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.config import make_config
from segrt.train.folds import Show
from segrt.train.patients import find_patients, guess_patients, match_patients, torn_patients
from segrt.train.splits import choose_split, split_of
from segrt.train.start import record_split
from segrt.train.work import Work

LGG = [f"TCGA_{site}_{n}_20000101_{k}" for site in ("CS", "DU") for n in (4943, 4944, 6666) for k in (3, 7, 10, 12)]


def dataset(names: list[str], suffix: str = ".png") -> Dataset:
    cases = tuple(TrainingCase(name, (Path(name + suffix),), Path(name + "_mask" + suffix)) for name in sorted(names))
    return Dataset("d", Path(), ("grey",), {"background": (0,), "tumour": (255,)}, cases)


def test_the_default_is_what_comes_before_a_last_number() -> None:
    found = guess_patients(dataset(LGG))
    assert found is not None
    assert found["TCGA_CS_4943_20000101_10"] == "TCGA_CS_4943_20000101"
    assert len(set(found.values())) == 6


@pytest.mark.parametrize(
    "names",
    [
        [f"image_{k:03d}" for k in range(50)],  # one group: a number of the picture
        [f"{k}" for k in range(1, 200)],  # a number is no patient and picture in one
        [f"{kind}{k}" for kind in ("a", "b", "c", "d", "e", "f") for k in range(9)],
        [f"{c}_1" for c in "abcdefgh"],  # a picture of each
        ["anna", "berta", "carl", "dora", "emil", "fritz"],
    ],
)
def test_names_that_tell_no_patients(names: list[str]) -> None:
    assert guess_patients(dataset(names)) is None


def test_volumes_are_patients_themselves() -> None:
    assert guess_patients(dataset(LGG, ".nii.gz")) is None


def test_only_the_recipes_of_pictures_group_by_themselves() -> None:
    assert find_patients(dataset(LGG), make_config("unetpp")) is not None
    assert find_patients(dataset(LGG), make_config("unetpp", patients="none")) is None
    assert find_patients(dataset(LGG), make_config("nnunet")) is None
    assert find_patients(dataset(LGG), make_config("nnunet", patients="TCGA_[^_]+_[^_]+")) is not None


def test_a_pattern_gives_its_first_group_or_all_it_matches() -> None:
    assert match_patients(["a_b_1", "c_d_2"], "([^_]+_[^_]+)_") == {"a_b_1": "a_b", "c_d_2": "c_d"}
    assert match_patients(["a_b_1", "c_d_2"], "[^_]+") == {"a_b_1": "a", "c_d_2": "c"}


@pytest.mark.parametrize("pattern", ["(", "x+", "(x*)"])
def test_patterns_that_find_nobody(pattern: str) -> None:
    with pytest.raises(InputError, match="patients: "):
        match_patients(["a_1"], pattern)


@pytest.mark.parametrize("how", ["kfold", "shuffled:0.7", "sorted:0.7"])
def test_no_patient_is_on_both_sides(how: str) -> None:
    patients = match_patients(LGG, "(.+)_")
    for fold in ("0", "1", "4") if how == "kfold" else ("0",):
        split = choose_split(LGG, how, fold, patients)
        assert set(split.train) | set(split.validation) == set(LGG)
        assert not {patients[n] for n in split.train} & {patients[n] for n in split.validation}
        assert torn_patients(patients, split.train, split.validation) == ""


def test_folds_hold_every_patient_back_once() -> None:
    patients = match_patients(LGG, "(.+)_")
    held = [name for fold in "01234" for name in choose_split(LGG, "kfold", fold, patients).validation]
    assert sorted(held) == sorted(LGG)


def test_a_file_has_its_way_and_is_told_about(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps([{"train": LGG[1:], "val": LGG[:1]}]))
    split = split_of(dataset(LGG), make_config("unetpp", split=str(path)), "0")
    assert split.validation == (LGG[0],)
    assert torn_patients(match_patients(LGG, "(.+)_"), split.train, split.validation) == (
        "by their names 1 patient has images on both sides of the split, so validation will look better than it is: TCGA_CS_4943_20000101"
    )


def test_too_few_patients_for_five_folds() -> None:
    names = [f"p{k}_{n}" for k in range(3) for n in range(4)]
    with pytest.raises(InputError, match=r"3 patients cannot be split into 5 folds; use --split shuffled:0\.75"):
        split_of(dataset(names), make_config("unetpp", patients="(.+)_"), "0")
    assert len(split_of(dataset(names), make_config("unetpp", patients="(.+)_", split="sorted:0.7"), "0").validation) == 4


FEW = [f"p{k}_{n}" for k in range(3) for n in range(4)]


def told_of(names: list[str], tmp_path: Path, fold: str = "0", **options: Any) -> tuple[list[str], dict[str, Any]]:
    """What a training says of its split, and what it writes down."""
    said, config = list[str](), make_config("unetpp", **options)
    place = Work(tmp_path, dataset(names), config, torch.device("cpu"), tmp_path, Show(stage=said.append))
    record_split(place, fold, split_of(place.dataset, config, fold), tmp_path / "fold")
    return said, json.loads((tmp_path / "fold" / "split.json").read_text())


def test_too_few_patients_to_split_by_are_warned_of(tmp_path: Path) -> None:
    """They may as well be two kinds of pictures, so they are not split by."""
    assert find_patients(dataset(FEW), make_config("unetpp")) is None
    said, written = told_of(FEW, tmp_path)
    (warning,) = said
    assert warning.startswith("warning: by their names 2 patients have images on both sides of the split")
    assert warning.endswith("p0, p2; see --patients")
    assert "patients" not in written


def test_patients_that_are_not_wanted_are_told_in_a_line(tmp_path: Path) -> None:
    for names in (FEW, LGG):
        (line,), written = told_of(names, tmp_path, patients="none")
        assert line.startswith("fold 0: split one by one, by --patients none: by their names ")
        assert "patients" not in written


def test_a_split_that_tears_nobody_has_no_warning(tmp_path: Path) -> None:
    said, written = told_of(LGG, tmp_path)
    assert len(said) == 1
    assert said[0].startswith("fold 0: 4 patients to train on, 2 held back: TCGA_")
    assert len(written["patients"]["val"]) == 2
    assert told_of([f"image_{k:03d}" for k in range(50)], tmp_path)[0] == []
    assert told_of(FEW, tmp_path, split="sorted:0.67")[0] == []
    assert told_of(FEW, tmp_path, "all", folds=("all",))[0] == []


def test_real_slices(shared_data: Path) -> None:
    from segrt.train.dataset import open_dataset

    opened = open_dataset(shared_data / "c_lgg2d" / "images", masks=shared_data / "c_lgg2d" / "masks", mask_threshold=0)
    options: Any = {"patients": r"(TCGA_[^_]+_[^_]+)_"}
    for config in (make_config("unetpp"), make_config("unetpp", **options)):
        patients = find_patients(opened, config)
        assert patients is not None
        assert len(set(patients.values())) == 29
        split = split_of(opened, config, "0")
        assert (len(split.train), len(split.validation)) == (230, 60)
