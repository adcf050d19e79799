"""Splits: nnU-Net's folds, the shares, and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from segrt.errors import InputError
from segrt.train.splits import Split, choose_split, kfold, make_splits

NAMES = [f"case_{i:02d}" for i in range(12)]
KNOWN = [
    ("case_00", "case_03", "case_08"),
    ("case_07", "case_10", "case_11"),
    ("case_06", "case_09"),
    ("case_01", "case_04"),
    ("case_02", "case_05"),
]


@pytest.mark.parametrize("count", [5, 7, 12, 210])
def test_folds_are_those_of_scikit_learn(count: int) -> None:
    sklearn = pytest.importorskip("sklearn.model_selection")
    names = [f"{i:03d}" for i in range(count)]
    expected = sklearn.KFold(5, shuffle=True, random_state=12345).split(names)
    for split, (train, validation) in zip(kfold(names), expected, strict=True):
        assert split == Split(tuple(np.array(names)[train]), tuple(np.array(names)[validation]))


def test_folds_of_twelve_cases_as_written_down_once() -> None:
    """Known output, for machines without scikit-learn."""
    assert [split.validation for split in kfold(NAMES)] == KNOWN


def test_order_of_the_names_does_not_matter() -> None:
    """MedicalSeg's lists came from an unsorted listing: what was trained on depended on the file system."""
    for how in ("kfold", "shuffled:0.75", "sorted:0.75"):
        assert make_splits(NAMES, how) == make_splits(NAMES[::-1], how)


def test_a_fold_beyond_those_there_are_is_refused() -> None:
    """nnU-Net makes a random split of such a number without a word."""
    with pytest.raises(InputError, match=r"^fold 7: split 'kfold' has folds 0 to 4; choose of these, or all$"):
        choose_split(NAMES, "kfold", "7")
    with pytest.raises(InputError, match="has folds 0 to 4"):
        choose_split(NAMES, "kfold", "5", dict(zip(NAMES, NAMES, strict=True)))


def test_all_trains_and_validates_on_every_case() -> None:
    assert choose_split(NAMES, "kfold", "all") == Split(tuple(NAMES), tuple(NAMES))


def test_sorted_share_takes_the_first_names() -> None:
    names = [f"hippocampus_{i:03d}" for i in range(210)]
    split = choose_split(names, "sorted:0.8", "0")
    assert (len(split.train), len(split.validation)) == (168, 42)
    assert split.validation == tuple(names[168:])


def test_shuffled_share_is_the_same_every_time_and_not_the_first_names() -> None:
    split = choose_split(NAMES, "shuffled:0.75", "0")
    assert len(split.train) == 9
    assert split == choose_split(NAMES, "shuffled:0.75", "0")
    assert split.train != tuple(NAMES[:9])


def test_own_splits(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps([{"train": NAMES[3:], "val": NAMES[:3]}, {"train": NAMES[:3], "val": NAMES[3:]}]))
    assert choose_split(NAMES, str(path), "1") == Split(tuple(NAMES[:3]), tuple(NAMES[3:]))
    with pytest.raises(InputError, match="has folds 0 to 1"):
        choose_split(NAMES, str(path), "2")


@pytest.mark.parametrize(
    ("folds", "sentence"),
    [
        ([{"train": ["nobody"], "val": ["case_00"]}], "names nobody, which is no case"),
        ([{"train": ["case_00"], "val": ["case_00"]}], "has case_00 in train and in val"),
        ([{"train": [], "val": ["case_00"]}], "leave none for training"),
        ([{"train": ["case_00"], "val": []}], "leave none for validation"),
        ([{"train": ["case_00"]}], "expected a list of folds"),
        ({}, "expected a list of folds"),
    ],
)
def test_bad_split_files(tmp_path: Path, folds: object, sentence: str) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(folds))
    with pytest.raises(InputError, match=sentence):
        make_splits(NAMES, str(path))


@pytest.mark.parametrize(
    ("how", "fold", "sentence"),
    [
        ("kfold", "first", "expected a number or all"),
        ("kfold", "00", "expected a number or all"),
        ("kfold", "²", "expected a number or all"),
        ("sorted:1.5", "0", "expected a share"),
        ("sorted:half", "0", "expected a share"),
        ("sorted:0.01", "0", "leave none for training"),
        ("no.json", "0", "neither kfold"),
        ("sorted:0.5", "1", "has one fold, 0"),
    ],
)
def test_bad_words(how: str, fold: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        choose_split(NAMES, how, fold)


def test_too_few_cases() -> None:
    with pytest.raises(InputError, match="4 cases cannot be split into 5 folds"):
        kfold(NAMES[:4])
