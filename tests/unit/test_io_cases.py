"""Which files of a folder make up which case."""

from __future__ import annotations

from pathlib import Path

import pytest

from segrt.errors import InputError
from segrt.io import Case, find_cases, output_name


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(128) + b"DICM" if path.suffix == ".dcm" or "slice" in name else b"x")
    return folder


def names(cases: list[Case]) -> dict[str, list[str]]:
    return {c.name: [f.name for f in c.files] for c in cases}


def test_channel_files(tmp_path: Path) -> None:
    touch(tmp_path, "b_0000.nii.gz", "b_0001.nii.gz", "a_0001.nii.gz", "a_0000.nii.gz", "notes.txt", ".hidden_0000.nii.gz")
    found = find_cases(tmp_path, 2)
    assert names(found) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"]}
    assert [c.name for c in found] == ["a", "b"]


def test_plain_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii.gz", "a.nrrd", "c_0000.mha", "d.1.nii.gz")
    assert names(find_cases(tmp_path, 1)) == {"a": ["a.nrrd"], "b": ["b.nii.gz"], "c": ["c_0000.mha"], "d.1": ["d.1.nii.gz"]}


def test_colour_pictures_are_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.png", "b.png", "c.JPG")
    assert names(find_cases(tmp_path, 3)) == {"a": ["a_0000.png"], "b": ["b.png"], "c": ["c.JPG"]}


def test_a_single_file(tmp_path: Path) -> None:
    touch(tmp_path, "ct_0000.nii.gz", "x.nrrd", "odd")
    assert names(find_cases(tmp_path / "ct_0000.nii.gz", 1)) == {"ct": ["ct_0000.nii.gz"]}
    assert names(find_cases(str(tmp_path / "x.nrrd"), 1)) == {"x": ["x.nrrd"]}
    assert names(find_cases(tmp_path / "odd", 1)) == {"odd": ["odd"]}


def test_only_one_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a.nrrd")
    assert names(find_cases(tmp_path, 1, ".nrrd")) == {"a": ["a.nrrd"]}


def test_dicom_folders(tmp_path: Path) -> None:
    touch(tmp_path, "p2/s1.dcm", "p1/slice", "empty/readme.txt")
    (tmp_path / "void").mkdir()
    found = find_cases(tmp_path, 1)
    assert [c.name for c in found] == ["p1", "p2"]
    assert found[0].files == (tmp_path / "p1",)
    assert find_cases(tmp_path / "p1", 1) == [Case("p1", (tmp_path / "p1",))]


def test_a_folder_named_by_a_dot_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "p1/slice")
    monkeypatch.chdir(tmp_path / "p1")
    assert find_cases(".", 1)[0].name == "p1"


@pytest.mark.parametrize(
    ("files", "channels", "words"),
    [
        (["a_0000.nii.gz"], 2, ["'a'", "lacks a_0001", "needs 2 channels", "found a_0000.nii.gz"]),
        (["a_0001.nii.gz"], 2, ["'a'", "lacks a_0000", "needs 2"]),
        (["a_0000.nii.gz", "a_0001.nii.gz"], 1, ["'a'", "a_0001.nii.gz too many", "needs 1 channel,"]),
        (["a_0000.nii.gz", "a_0002.nii.gz"], 2, ["'a'", "lacks a_0001", "a_0002.nii.gz too many"]),
        (["a.nii.gz", "a.nrrd"], 1, ["'a'", "more than once", "a.nii.gz", "a.nrrd"]),
        (["a.nii.gz", "a_0000.nii.gz"], 1, ["'a'", "more than once", "a.nii.gz", "a_0000.nii.gz"]),
        (["a_0000.nii.gz", "a_0000.mha"], 1, ["'a'", "more than once", "a_0000.mha"]),
        (["readme.txt"], 1, ["no image", "1 entr", ".nii.gz", "DICOM"]),
        ([], 1, ["empty folder", "expected images"]),
    ],
)
def test_bad_folders(tmp_path: Path, files: list[str], channels: int, words: list[str]) -> None:
    touch(tmp_path, *files)
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path, channels)
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_images_in_a_subfolder_are_pointed_at(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTs/a.nii.gz", "p1/study/slice", "notes/readme.txt")
    with pytest.raises(InputError, match=r"no image among its 3 entries.*; its subfolder imagesTs holds images, give that one$"):
        find_cases(tmp_path, 1)


def test_dicom_series_beside_images_are_named_as_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.nii.gz", "p1/slice", "notes/readme.txt")
    assert names(find_cases(tmp_path, 1)) == {"a": ["a.nii.gz"]}
    assert "left out: DICOM series beside image files (p1); give each of them by itself" in caplog.text


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere cannot be read as a folder.*No such file"):
        find_cases(tmp_path / "nowhere", 1)


@pytest.mark.parametrize(
    ("like", "suffix", "wanted"),
    [
        ("a_0000.nii.gz", None, "case.nii.gz"),
        ("a.nii", None, "case.nii"),
        ("a.MHA", None, "case.mha"),
        ("a.mhd", None, "case.mhd"),
        ("a.nhdr", None, "case.nrrd"),
        ("a.hdr.gz", None, "case.nii.gz"),
        ("a.jpeg", None, "case.png"),
        ("a.bmp", None, "case.bmp"),
        ("a.tif", None, "case.tif"),
        ("folder", None, "case.nii.gz"),
        ("a.nii.gz", ".nrrd", "case.nrrd"),
        ("a.nii.gz", "mha", "case.mha"),
    ],
)
def test_output_names(like: str, suffix: str | None, wanted: str) -> None:
    assert output_name("case", Path(like), suffix) == wanted


def test_output_of_a_folder_with_dots(tmp_path: Path) -> None:
    folder = tmp_path / "p.nii"
    folder.mkdir()
    assert output_name("p", folder) == "p.nii.gz"
