"""Cases with a known truth: those a training held back, those of two folders, and what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as itk
from factories import make_bundle, make_spec

from segrt.bundle import Bundle
from segrt.errors import InputError
from segrt.export.scoring import ScoredCase, in_folders, remembered, score

CPU = {"device": "cpu"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Labels 0, 1 and 2 where a picture is nearest to them; two members."""
    return make_bundle(tmp_path / "bundle", make_spec(patch=(1, 16, 16), members=("0", "1")))


def write(path: Path, data: Any) -> Path:
    """A grey picture (Y, X), or a coloured one (Y, X, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    itk.WriteImage(itk.GetImageFromArray(np.asarray(data, np.uint8), isVector=data.ndim == 3), str(path))
    return path


def halves(left: int, right: int) -> Any:
    picture = np.full((16, 16), left)
    picture[:, 8:] = right
    return picture


def test_dice_and_iou_are_means_over_cases_and_then_structures(tmp_path: Path, bundle: Bundle) -> None:
    write(tmp_path / "images/a.png", halves(1, 2))
    write(tmp_path / "labels/a.png", halves(1, 2))
    write(tmp_path / "images/b.png", halves(1, 0))  # found where it is not
    write(tmp_path / "labels/b.png", halves(0, 0))
    (found,) = score([bundle], in_folders(tmp_path / "images", tmp_path / "labels", 1), CPU)
    assert found.dice == pytest.approx(((1 + 0) / 2 + 1) / 2)
    assert found.iou == pytest.approx(((1 + 0) / 2 + 1) / 2)
    assert found.where_present == 1


def test_nothing_to_find_and_nothing_found_is_no_score(tmp_path: Path, bundle: Bundle) -> None:
    write(tmp_path / "images/a.png", halves(0, 0))
    write(tmp_path / "labels/a.png", halves(0, 0))
    (found,) = score([bundle], in_folders(tmp_path / "images", tmp_path / "labels", 1), CPU)
    assert math.isnan(found.dice)


def test_grey_masks_are_cut_at_their_threshold(tmp_path: Path) -> None:
    binary = make_bundle(tmp_path / "bundle", make_spec(values=(0, 255), patch=(1, 16, 16)), centres=(0, 3))
    write(tmp_path / "all/a.png", halves(0, 3))
    write(tmp_path / "all/a_mask.png", halves(90, 101))
    validation = in_folders(tmp_path / "all", tmp_path / "all", 1, mask_suffix="_mask.png", threshold=100)
    assert [case.name for case in validation.cases] == ["a"]
    assert score([binary], validation, CPU)[0].dice == 1


@pytest.mark.parametrize(
    ("labels", "threshold", "sentence"),
    [
        (halves(0, 7), None, "a.png: holds 7, which is no label of model 'tiny' .*--mask-threshold"),
        (np.zeros((16, 15)), None, r"a.png: has shape \(1, 16, 15\), its image a.* has \(1, 16, 16\)"),
        (np.stack([halves(0, 1), halves(0, 2), halves(0, 3)], 2), 0, "a.png: has colours, expected a grey mask"),
    ],
)
def test_a_truth_that_does_not_fit_is_named(tmp_path: Path, bundle: Bundle, labels: Any, threshold: float | None, sentence: str) -> None:
    write(tmp_path / "images/a.png", halves(1, 2))
    write(tmp_path / "labels/a.png", labels)
    with pytest.raises(InputError, match=sentence):
        score([bundle], in_folders(tmp_path / "images", tmp_path / "labels", 1, threshold=threshold), CPU)


def remember(bundle: Bundle, values: Any) -> None:
    (bundle.path / "reports").mkdir(exist_ok=True)
    (bundle.path / "reports" / "validation.json").write_text(values if isinstance(values, str) else json.dumps(values))


def test_what_a_training_held_back_is_scored_by_the_member_that_has_not_seen_it(tmp_path: Path, bundle: Bundle) -> None:
    assert remembered(bundle) is None
    files = {name: write(tmp_path / f"{name}.png", halves(1, 2)) for name in ("a", "b")}
    cases = {name: [{"name": name, "images": [str(file)], "labels": str(file)}] for name, file in files.items()}
    remember(bundle, {"mask_threshold": None, "members": {"0": cases["a"], "1": cases["b"], "gone": cases["a"]}})
    found = remembered(bundle)
    assert found is not None
    assert found.cases == (ScoredCase("a", (files["a"],), files["a"], "0"), ScoredCase("b", (files["b"],), files["b"], "1"))
    told = []
    scores = score([bundle, bundle], found, CPU, progress=lambda done, total: told.append((done, total)))
    assert [one.dice for one in scores] == [1.0, 1.0]
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("values", ["{", "[]", {"members": {}}, {"mask_threshold": None, "members": {"0": [{"name": "a"}]}}])
def test_a_damaged_list_of_cases_is_named(bundle: Bundle, values: Any) -> None:
    remember(bundle, values)
    with pytest.raises(InputError, match=r"validation.json: not a readable list of validation cases .*--images and --labels"):
        remembered(bundle)


def test_a_case_that_is_gone_is_named(tmp_path: Path, bundle: Bundle) -> None:
    file = str(write(tmp_path / "a.png", halves(1, 2)))
    remember(bundle, {"mask_threshold": 0, "members": {"0": [{"name": "a", "images": [file], "labels": str(tmp_path / "b.png")}]}})
    with pytest.raises(InputError, match=r"b.png: this validation case of .* is gone; name folders with --images and --labels"):
        remembered(bundle)


def test_a_folder_of_masks_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a_mask.png", halves(0, 1))
    with pytest.raises(InputError, match=r"holds only files that end with _mask.png; expected images"):
        in_folders(tmp_path, tmp_path, 1, mask_suffix="_mask.png")


@pytest.mark.parametrize("members", [{"all": []}, {}])
def test_a_training_that_held_nothing_back_says_so(bundle: Bundle, members: Any) -> None:
    remember(bundle, {"mask_threshold": None, "members": members})
    with pytest.raises(InputError, match=r"validation.json: the training held no case back .*name folders with --images and --labels"):
        remembered(bundle)
