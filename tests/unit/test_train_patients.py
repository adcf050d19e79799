"""Patients: found in the names of cases, kept on one side of every split, named where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from segrt.errors import InputError
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.config import make_config
from segrt.train.patients import find_patients, guess_patients, match_patients, torn_patients
from segrt.train.splits import choose_split, split_of

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
        [f"{c}_{k}" for c in "ab" for k in range(20)],  # too few for five folds: more likely two kinds than two patients
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
        "1 patient has images on both sides of the split, so validation will look better than it is: TCGA_CS_4943_20000101; see --patients"
    )


def test_too_few_patients_for_five_folds() -> None:
    names = [f"p{k}_{n}" for k in range(3) for n in range(4)]
    with pytest.raises(InputError, match=r"3 patients cannot be split into 5 folds; use --split shuffled:0\.75"):
        split_of(dataset(names), make_config("unetpp", patients="(.+)_"), "0")
    assert len(split_of(dataset(names), make_config("unetpp", patients="(.+)_", split="sorted:0.7"), "0").validation) == 4


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
