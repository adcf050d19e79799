"""`check_dataset` finds every problem of every case and names the files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import write_case

from segrt.errors import InputError
from segrt.train.check import CheckReport, check_dataset
from segrt.train.dataset import open_dataset

SHAPE = (3, 4, 5)


def write_dataset(folder: Path, cases: int = 4) -> Path:
    """Cases a, b, c, ... with labels 0, 1 and 2."""
    rng = np.random.default_rng(0)
    for name in "abcdefgh"[:cases]:
        write_case(folder / "imagesTr" / f"{name}_0000.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        write_case(folder / "labelsTr" / f"{name}.nii.gz", labels())
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}, "numTraining": cases}
    (folder / "dataset.json").write_text(json.dumps(described | {"file_ending": ".nii.gz"}))
    return folder


def labels() -> np.ndarray:
    return np.resize(np.asarray((0, 1, 2), np.uint8), SHAPE)


def test_a_sound_dataset_has_no_problems(tmp_path: Path) -> None:
    report = check_dataset(open_dataset(write_dataset(tmp_path)))
    assert report.ok
    assert report.warnings == ()
    assert report.voxels == {"background": 80, "liver": 80, "spleen": 80}
    report.require_ok()
    assert CheckReport.model_validate_json(report.to_json()) == report


Change = Callable[[Path], Any]
CHANGES: dict[str, tuple[Change, str, str]] = {
    "label map removed": (lambda f: (f / "labelsTr" / "b.nii.gz").unlink(), "missing", r"^b\.nii\.gz of case b is missing$"),
    "image removed": (lambda f: (f / "imagesTr" / "b_0000.nii.gz").unlink(), "missing", r"^b_0000\.nii\.gz of case b is missing$"),
    "NaN in the image": (
        lambda f: write_case(f / "imagesTr" / "b_0000.nii.gz", np.full(SHAPE, np.nan, np.float32)),
        "image",
        r"^b_0000\.nii\.gz has 60 NaN or infinite voxels",
    ),
    "not an image": (lambda f: (f / "imagesTr" / "b_0000.nii.gz").write_bytes(b"x" * 400), "image", r"b_0000\.nii\.gz"),
    "NaN in the labels": (
        lambda f: write_case(f / "labelsTr" / "b.nii.gz", np.full(SHAPE, np.nan, np.float32)),
        "labels",
        r"^b\.nii\.gz has 60 NaN or infinite voxels",
    ),
    "labels that are not whole": (
        lambda f: write_case(f / "labelsTr" / "b.nii.gz", np.full(SHAPE, 0.5, np.float32)),
        "labels",
        r"^b\.nii\.gz holds 60 values that are not whole numbers \(such as 0\.5\)",
    ),
    "unknown label": (
        lambda f: write_case(f / "labelsTr" / "b.nii.gz", labels() * 2),
        "values",
        r"^b\.nii\.gz holds values that are no labels of dataset .*: 4 \(20 voxels\); its labels are 0, 1, 2$",
    ),
    "other shape": (
        lambda f: write_case(f / "labelsTr" / "b.nii.gz", np.zeros((3, 4, 6), np.uint8)),
        "geometry",
        r"^b\.nii\.gz does not lie on the grid of b_0000\.nii\.gz: it has shape",
    ),
    "other spacing": (
        lambda f: write_case(f / "labelsTr" / "b.nii.gz", labels(), (1.0, 2.0, 1.0)),
        "geometry",
        r"^b\.nii\.gz does not lie on the grid of b_0000\.nii\.gz: it has spacing",
    ),
    "other place": (
        lambda f: write_case(f / "labelsTr" / "b.nii.gz", labels(), origin=(0.0, 5.0, 0.0)),
        "geometry",
        r"^b\.nii\.gz does not lie on the grid of b_0000\.nii\.gz: it has another position",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_problem_is_named_with_its_case_and_files(tmp_path: Path, what: str) -> None:
    change, kind, sentence = CHANGES[what]
    dataset = open_dataset(write_dataset(tmp_path))
    change(tmp_path)
    report = check_dataset(dataset)
    (problem,) = report.problems
    assert (problem.case, problem.kind) == ("b", kind)
    assert [Path(file).name for file in problem.files] == ["b_0000.nii.gz", "b.nii.gz"]
    assert re.search(sentence, problem.message), problem.message
    assert not report.ok
    with pytest.raises(InputError, match=r"cannot be trained on: "):
        report.require_ok()


def test_several_problems_of_a_case_are_all_told(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path))
    write_case(tmp_path / "imagesTr" / "a_0000.nii.gz", np.full(SHAPE, np.inf, np.float32))
    write_case(tmp_path / "labelsTr" / "a.nii.gz", labels() + np.float32(0.5))
    write_case(tmp_path / "labelsTr" / "c.nii.gz", np.full((3, 4, 6), 9, np.uint8))
    report = check_dataset(dataset)
    assert [(p.case, p.kind) for p in report.problems] == [("a", "image"), ("a", "labels"), ("c", "geometry"), ("c", "values")]
    with pytest.raises(InputError, match=r"; and 1 more$"):
        report.require_ok()


def test_wrong_number_of_channels(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path))
    report = check_dataset(dataclasses.replace(dataset, channels=("CT", "PET")))
    assert [p.kind for p in report.problems] == ["image"] * 4
    assert "a_0000.nii.gz has 1 channel, dataset" in report.problems[0].message
    assert report.problems[0].message.endswith("has 2 (CT, PET)")


def test_what_may_be_on_purpose_is_a_warning(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path))
    for name in "abcd":
        write_case(tmp_path / "labelsTr" / f"{name}.nii.gz", (labels() == 1).astype(np.float32 if name == "b" else np.uint8))
    write_case(tmp_path / "labelsTr" / "c.nii.gz", np.zeros(SHAPE, np.uint8))
    report = check_dataset(dataset)
    assert report.ok
    assert report.warnings == (
        "b.nii.gz stores its labels as float32; they are whole numbers, so they are taken",
        "1 case has no foreground: c",
        "no case has label 'spleen'",
    )


def test_a_flat_image_among_volumes_is_a_problem(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        for name in "abc":
            array = np.ones((1, 4, 5), np.uint8) if name == "b" else np.ones(SHAPE, np.uint8)
            flat = {"spacing": (999.0, 1.0, 1.0), "dimensions": 2} if name == "b" else {}
            write_case(tmp_path / part / f"{name}{'.png' if name == 'b' else '.nii.gz'}", array, **flat)
    report = check_dataset(open_dataset(tmp_path, labels={"all": 1}))
    assert [(p.case, p.kind) for p in report.problems] == [("b", "dimensions")]
    assert report.problems[0].message.startswith("b.png is 2-D, most images of dataset")


def test_workers_and_progress_change_nothing(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path))
    (tmp_path / "labelsTr" / "c.nii.gz").unlink()
    calls: list[tuple[int, int]] = []
    report = check_dataset(dataset, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 4) for k in range(1, 5)]
    assert check_dataset(dataset, workers=2) == report


def test_regions_count_all_their_values(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    report = check_dataset(open_dataset(folder, labels={"both": [1, 2], "spleen": 2, "ignore": 9}, class_order=[1, 2]))
    assert report.voxels == {"background": 80, "both": 160, "spleen": 80}


def test_real_data_is_sound(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "b_hippocampus", labels={"anterior": 1, "posterior": 2})
    report = check_dataset(dataclasses.replace(dataset, cases=dataset.cases[:8]))
    assert report.ok
    assert min(report.voxels.values()) > 0
