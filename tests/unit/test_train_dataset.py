"""`open_dataset` understands every layout and says in one sentence what is wrong with one."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from factories import write_case

from segrt.errors import InputError
from segrt.io import write_image
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.check import check_dataset
from segrt.train.config import make_config
from segrt.train.dataset import open_dataset, read_training_case
from segrt.train.dataset_json import read_labels
from segrt.train.npy import check_intensities, parse_npy_window
from segrt.volume import Grid

SHAPE = (3, 4, 5)
LABELS = {"background": 0, "liver": 1, "spleen": 2}


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 100, SHAPE).astype(np.int16)


def labels(values: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    return np.resize(np.asarray(values, np.uint8), SHAPE)


def write_json(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(values))


def nnunet_raw(folder: Path, cases: tuple[str, ...] = ("b", "a"), channels: int = 1, ending: str = ".nii.gz", **values: Any) -> Path:
    for case in cases:
        for k in range(channels):
            write_case(folder / "imagesTr" / f"{case}_{k:04d}{ending}", image(k))
        write_case(folder / "labelsTr" / f"{case}{ending}", labels())
    names = {str(k): ("CT", "PET")[k] for k in range(channels)}
    write_json(folder, **{"channel_names": names, "labels": LABELS, "numTraining": len(cases), "file_ending": ending} | values)
    return folder


def decathlon(folder: Path, cases: tuple[str, ...] = ("b", "a"), **values: Any) -> Path:
    for case in cases:
        write_4d(folder / "imagesTr" / f"{case}.nii.gz", np.stack([image(), image(1)]))
        write_case(folder / "labelsTr" / f"{case}.nii.gz", labels())
    training = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]
    named = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema", "2": "core"}}
    write_json(folder, **named | {"training": training, "numTraining": len(cases)} | values)
    return folder


def write_4d(path: Path, data: np.ndarray) -> None:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    # LPS as segrt writes it, which NIfTI calls RAS
    nibabel.save(nibabel.Nifti1Image(data.transpose(3, 2, 1, 0), np.diag((-1.0, -1.0, 1.0, 1.0))), path)


def write_colours(path: Path, data: np.ndarray) -> None:
    """(Y, X, 3) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(data, isVector=True), str(path))


def pairs(folder: Path, cases: tuple[str, ...] = ("b", "a"), suffix: str = ".nii.gz") -> Path:
    for case in cases:
        write_case(folder / "images" / f"{case}{suffix}", image())
        write_case(folder / "labels" / f"{case}{suffix}", labels())
    return folder


def npy_lists(folder: Path) -> Path:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for case in "abc":
        np.save(folder / "images" / f"{case}.npy", image().astype(np.float32))
        np.save(folder / "labels" / f"{case}.npy", labels().astype(np.int32))
    (folder / "train_list.txt").write_text("images/c.npy labels/c.npy\nimages/a.npy labels/a.npy\n\n")
    (folder / "val_list.txt").write_text("images/b.npy labels/b.npy\n")
    return folder


# ------------------------------------------------------------------ layouts
def test_what_a_dataset_says_itself_is_not_asked_for(tmp_path: Path) -> None:
    folder = npy_lists(tmp_path / "lists")
    with pytest.raises(
        InputError, match=r"train_list\.txt names its images and label maps itself; leave image_suffix and label_suffix out"
    ):
        open_dataset(folder / "train_list.txt", image_suffix="_image")
    folder = nnunet_raw(tmp_path / "raw")
    with pytest.raises(InputError, match=r"dataset\.json names its images and label maps itself"):
        open_dataset(folder / "dataset.json", label_suffix="_truth")
    with pytest.raises(InputError, match="image_suffix: expected how image names end"):
        open_dataset(folder, image_suffix=())
    with pytest.raises(InputError, match=r"grey masks hold one structure, .*raw has background, liver, spleen; leave the threshold out"):
        open_dataset(folder, mask_threshold=0)


def test_lists_may_name_files_with_spaces(tmp_path: Path) -> None:
    folder = npy_lists(tmp_path / "lists")
    for part in ("images", "labels"):
        (folder / part / "c.npy").rename(folder / part / "müller c  1.npy")
    (folder / "train_list.txt").write_text("images/müller c  1.npy  labels/müller c  1.npy\nimages/a.npy labels/a.npy\n", encoding="utf-8")
    assert [case.name for case in open_dataset(folder).cases] == ["a", "b", "müller c  1"]
    (folder / "train_list.txt").write_text("images/no file.npy labels/no file.npy\n")
    with pytest.raises(InputError, match=r"train_list\.txt, line 1: expected an image and a label map"):
        open_dataset(folder)


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\); check its name and permissions"):
        open_dataset(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\)"):
        open_dataset(tmp_path, masks=tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize(("part", "mode"), [("", 0), ("imagesTr", 0), ("imagesTr", 0o444), ("labelsTr", 0), ("labelsTr", 0o444)])
def test_a_folder_without_permission(tmp_path: Path, part: str, mode: int) -> None:
    folder = nnunet_raw(tmp_path / "raw")
    (folder / part).chmod(mode)
    try:
        with pytest.raises(InputError, match=r"raw.* cannot be read .*Permission denied"):
            open_dataset(folder)
    finally:
        (folder / part).chmod(0o755)


def test_nnunet_raw_folders(tmp_path: Path) -> None:
    folder = nnunet_raw(tmp_path / "Dataset001_Belly", channels=2)
    write_case(folder / "imagesTs" / "z_0000.nii.gz", image())
    write_case(folder / "imagesTs" / "z_0001.nii.gz", image())
    dataset = open_dataset(folder)
    assert dataset.name == "Dataset001_Belly"
    assert dataset.channels == ("CT", "PET")
    assert dataset.labels == {"background": (0,), "liver": (1,), "spleen": (2,)}
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert [p.name for p in dataset.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert [case.name for case in dataset.tests] == ["z"]
    assert not dataset.regions
    volume, read = read_training_case(dataset.cases[0], dataset)
    assert volume.data.shape == (2, *SHAPE)
    assert volume.name == "a"
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, labels())
    assert open_dataset(folder / "dataset.json").cases == dataset.cases


def test_nnunet_lists_of_files(tmp_path: Path) -> None:
    write_case(tmp_path / "here" / "x.nii.gz", image())
    write_case(tmp_path / "there" / "y.nii.gz", labels())
    entry = {"images": ["here/x.nii.gz"], "label": str(tmp_path / "there" / "y.nii.gz")}
    write_json(tmp_path, channel_names={"0": "CT"}, labels=LABELS, numTraining=1, file_ending=".nii.gz", dataset={"case": entry})
    dataset = open_dataset(tmp_path)
    assert dataset.cases == (TrainingCase("case", (tmp_path / "here" / "x.nii.gz",), tmp_path / "there" / "y.nii.gz"),)
    read_training_case(dataset.cases[0], dataset)


def test_regions_and_ignore(tmp_path: Path) -> None:
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    dataset = open_dataset(nnunet_raw(tmp_path, labels=regions, regions_class_order=[1, 2, 3]))
    assert dataset.regions
    assert dataset.class_order == (1, 2, 3)
    assert dataset.ignore == 4
    assert dataset.values == (0, 1, 2, 3)
    assert list(dataset.foreground.items()) == [("whole", (1, 2, 3)), ("core", (2, 3)), ("enhancing", (3,))]


def test_decathlon_folders_split_their_fourth_axis_into_channels(tmp_path: Path) -> None:
    folder = decathlon(tmp_path, test=["./imagesTs/t.nii.gz", "./imagesTs/gone.nii.gz"])
    write_4d(folder / "imagesTs" / "t.nii.gz", np.stack([image(), image(1)]))
    dataset = open_dataset(folder)
    assert dataset.channels == ("FLAIR", "T1w")
    assert dataset.labels == {"background": (0,), "edema": (1,), "core": (2,)}
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert [case.name for case in dataset.tests] == ["t"]
    volume, read = read_training_case(dataset.cases[0], dataset)
    np.testing.assert_array_equal(volume.data, np.stack([image(), image(1)]))
    np.testing.assert_array_equal(read, labels())


def test_lists_that_leave_out_the_channel_number(tmp_path: Path) -> None:
    """As nnU-Net v1 writes them."""
    for k in range(2):
        write_case(tmp_path / "imagesTr" / f"a_{k:04d}.nii.gz", image(k))
    write_case(tmp_path / "labelsTr" / "a.nii.gz", labels())
    training = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    write_json(tmp_path, modality={"0": "CT", "1": "PET"}, labels={"0": "background", "1": "a", "2": "b"}, training=training)
    dataset = open_dataset(tmp_path)
    assert [p.name for p in dataset.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert read_training_case(dataset.cases[0], dataset)[0].data.shape[0] == 2


def test_nnunet_raw_with_all_colours_in_one_picture(tmp_path: Path) -> None:
    write_colours(tmp_path / "imagesTr" / "a_0000.png", np.arange(126, dtype=np.uint8).reshape(6, 7, 3))
    write_case(tmp_path / "labelsTr" / "a.png", np.ones((1, 6, 7), np.uint8), (999, 1, 1), dimensions=2)
    write_json(tmp_path, channel_names={"0": "R", "1": "G", "2": "B"}, labels={"background": 0, "a": 1}, numTraining=1, file_ending=".png")
    dataset = open_dataset(tmp_path)
    assert read_training_case(dataset.cases[0], dataset)[0].data.shape == (3, 1, 6, 7)


def test_pairs_of_folders(tmp_path: Path) -> None:
    dataset = open_dataset(pairs(tmp_path), channels=["CT"])
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert dataset.labels == {"background": (0,), "label 1": (1,), "label 2": (2,)}


def test_pairs_with_a_file_per_channel(tmp_path: Path) -> None:
    for k in range(2):
        write_case(tmp_path / "images" / f"p1_{k:04d}.nii.gz", image(k))
    write_case(tmp_path / "images" / "p_2019.nii.gz", image())
    for case in ("p1", "p_2019"):
        write_case(tmp_path / "masks" / f"{case}.nii.gz", labels())
    dataset = open_dataset(tmp_path)
    assert [(case.name, len(case.images)) for case in dataset.cases] == [("p1", 2), ("p_2019", 1)]
    assert dataset.channels == ("channel 0", "channel 1")
    with pytest.raises(InputError, match=r"p_2019\.nii\.gz has 1 channel, dataset .* has 2 \(channel 0, channel 1\)"):
        read_training_case(dataset.cases[1], dataset)


def test_pairs_of_images_and_label_maps_of_another_format(tmp_path: Path) -> None:
    write_case(tmp_path / "images" / "a.nrrd", image())
    write_case(tmp_path / "labels" / "a.nii.gz", labels())
    dataset = open_dataset(tmp_path)
    read_training_case(dataset.cases[0], dataset)


def test_pairs_by_how_names_end(tmp_path: Path) -> None:
    for patient in ("p2", "p1"):
        write_case(tmp_path / patient / "CT_image.nii.gz", image(1))
        write_case(tmp_path / patient / "PET_image.nii.gz", image())
        write_case(tmp_path / patient / "PET_mask.nii.gz", labels())
    one = open_dataset(tmp_path, image_suffix="PET_image", label_suffix="PET_mask")
    assert [case.name for case in one.cases] == ["p1", "p2"]
    two = open_dataset(tmp_path, image_suffix=("PET_image", "CT_image"), label_suffix="PET_mask", channels=["PET", "CT"])
    assert [p.name for p in two.cases[0].images] == ["PET_image.nii.gz", "CT_image.nii.gz"]
    assert read_training_case(two.cases[0], two)[0].data.shape[0] == 2


def test_pairs_by_the_end_of_the_label_maps_name_alone(tmp_path: Path) -> None:
    for name in ("x_2", "x_1"):
        write_case(tmp_path / "deep" / f"{name}.nii.gz", image())
        write_case(tmp_path / "deep" / f"{name}_mask.nii.gz", labels())
    assert [case.name for case in open_dataset(tmp_path, label_suffix="_mask").cases] == ["x_1", "x_2"]


def test_one_end_for_images_and_label_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"label_suffix: expected one that tells label maps from images \(_x\), got '_x'"):
        open_dataset(tmp_path, image_suffix="_x", label_suffix="_x")


def test_equal_names_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    for folder in ("p1", "p2"):
        write_case(tmp_path / folder / "scan.nii.gz", image())
        write_case(tmp_path / folder / "scan_seg.nii.gz", labels())
    assert [case.name for case in open_dataset(tmp_path, label_suffix="_seg").cases] == ["p1_scan", "p2_scan"]


def test_npy_lists(tmp_path: Path) -> None:
    """SEEDS 2.12 g: lists came from an unsorted listing, so that pairs hung on the file system; here both names stand in one line."""
    folder = npy_lists(tmp_path)
    dataset = open_dataset(folder)
    assert [case.name for case in dataset.cases] == ["a", "b", "c"]
    assert dataset.split == (("a", "c"), ("b",))
    volume, read = read_training_case(dataset.cases[0], dataset)
    np.testing.assert_array_equal(volume.data[0], image())
    np.testing.assert_array_equal(read, labels())
    assert [case.name for case in open_dataset(folder / "val_list.txt").cases] == ["b"]


def test_npy_intensities_go_back_to_where_their_window_took_them_from(tmp_path: Path) -> None:
    """So that a model trained on the article's arrays is given a window of its own, and with it images as scanners write them."""
    dataset = open_dataset(npy_lists(tmp_path), npy_window=(-1200, 600))
    np.save(tmp_path / "images" / "a.npy", np.resize(np.asarray([0, 170, 255], np.float32), SHAPE))
    volume, _ = read_training_case(dataset.cases[0], dataset)
    np.testing.assert_allclose(np.unique(volume.data), (-1200, 0, 600), atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "changes", "channel"),
    [
        (("CT",), {"model": "vnet"}, "CT"),
        (("CT",), {"model": "nnunet"}, "CT"),
        (("CT",), {"model": "unet"}, "CT"),
        (("MR",), {"model": "vnet", "window": "percentile"}, "MR"),
        (("MR",), {"model": "vnet", "window": (0, 100)}, "MR"),
        (("MR",), {"model": "vnet"}, ""),
        (("MR",), {"model": "nnunet"}, ""),
        (("CT",), {"model": "vnet", "window": "zscore"}, ""),
    ],
)
def test_arrays_of_unknown_intensities_get_no_window(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, channels: tuple[str, ...], changes: dict[str, Any], channel: str
) -> None:
    """PaddleSeg#3298: arrays that a window had made 0..255 were windowed once more, and real images came out wrong."""
    folder, config = npy_lists(tmp_path), make_config(**changes)
    with caplog.at_level(logging.WARNING):
        if channel:
            with pytest.raises(InputError, match=f"npy_window: .* channel {channel} gets a window of them; say .*--npy-window -1200,600"):
                check_intensities(open_dataset(folder, channels=channels), config)
        else:
            check_intensities(open_dataset(folder, channels=channels), config)
            assert "npy_window tells it" in caplog.text
            caplog.clear()
        check_intensities(open_dataset(folder, channels=channels, npy_window=parse_npy_window("none")), config)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"liver": 1, "ignore": 9}', {"labels": {"liver": 1, "ignore": 9}, "class_order": ()}),
        ('{"labels": {"0": "background", "1": "liver"}}', {"labels": {"background": 0, "liver": 1}, "class_order": ()}),
        ('{"a": [1, 2], "b": 2, "regions_class_order": [1, 2]}', {"labels": {"a": [1, 2], "b": 2}, "class_order": (1, 2)}),
        ("[]", "expected a JSON object, got a list"),
        ("{}", "labels: expected names and values, such as"),
        ("{", "not a readable file of labels"),
        ('{"liver": "one"}', r"labels\.liver: expected a label value or a list of them, got 'one'"),
    ],
)
def test_a_file_of_labels(tmp_path: Path, text: str, expected: Any) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=f"labels.json: {expected}"):
            read_labels(path)
    else:
        assert read_labels(path) == expected


def test_one_value_is_ignored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels\.ignore: expected one value, got \[8, 9\]"):
        open_dataset(pairs(tmp_path), labels={"liver": 1, "spleen": 2, "ignore": [8, 9]})


def test_what_arrays_hold() -> None:
    assert parse_npy_window("article") == (-1200, 600)
    assert parse_npy_window("-160, 240") == (-160, 240)
    for text in ("240,-160", "1", "1,2,3", "lung", ""):
        with pytest.raises(InputError, match=r"npy_window: expected article, abdomen, none, or a number and a higher one"):
            parse_npy_window(text)


def test_images_with_a_unit_of_their_own_get_no_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"npy_window: it tells what \.npy files hold, and images of dataset .* are none; leave it out"):
        open_dataset(pairs(tmp_path), npy_window=(-1200, 600))


def test_grey_and_colour_pictures(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    write_colours(tmp_path / "images" / "a.png", data)
    write_case(tmp_path / "masks" / "a.png", (data[None, :, :, 0] > 99).astype(np.uint8) * 255, (999, 1, 1), dimensions=2)
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("red", "green", "blue")
    assert dataset.labels == {"background": (0,), "label 255": (255,)}
    volume, read = read_training_case(dataset.cases[0], dataset)
    assert volume.data.shape == (3, 1, 6, 7)
    assert volume.grid.dimensions == 2
    assert set(np.unique(read)) == {0, 255}


def test_labels_need_not_be_consecutive(tmp_path: Path) -> None:
    """SEEDS 2.12 q; they were remapped in sequence (h), so that 1 -> 2 and 2 -> 3 merged; here files keep their values."""
    folder = pairs(tmp_path)
    write_case(folder / "labels" / "a.nii.gz", labels((0, 5, 20)))
    write_case(folder / "labels" / "b.nii.gz", labels((0, 5)))
    dataset = open_dataset(folder, labels={"kidney": 5, "stone": 20})
    assert dataset.values == (0, 5, 20)
    assert set(np.unique(read_training_case(dataset.cases[0], dataset)[1])) == {0, 5, 20}


def test_real_folders(shared_data: Path) -> None:
    hippocampus = open_dataset(shared_data / "b_hippocampus", labels={"anterior": 1, "posterior": 2})
    assert len(hippocampus.cases) == 210
    assert [case.name for case in hippocampus.cases] == sorted(case.name for case in hippocampus.cases)
    pet = open_dataset(shared_data / "b_sts_pet", image_suffix="PET_image", label_suffix="PET_mask", channels=["PET"], labels={"tumour": 1})
    assert len(pet.cases) == 39
    assert pet.cases[0].name == "STS_002"
    assert len(open_dataset(shared_data / "a_openkbp_hn7", channels=["CT"], labels={str(k): k for k in range(1, 8)}).cases) == 38
    lgg = open_dataset(shared_data / "c_lgg2d", labels={"tumour": 255})
    assert len(lgg.cases) == 290
    for dataset in (hippocampus, pet, lgg):
        volume, read = read_training_case(dataset.cases[0], dataset)
        assert volume.grid.shape == read.shape
    tiff = open_dataset(shared_data / "c_lgg2d" / "full_patient_tif", label_suffix="_mask", labels={"tumour": 255})
    assert len(tiff.cases) == 20
    assert tiff.channels == ("red", "green", "blue")


# ------------------------------------------------------------------ one sentence for each bad input
def bad_json(**values: Any) -> Callable[[Path], Path]:
    return lambda folder: nnunet_raw(folder, **values)


def spoil(make: Callable[[Path], Path], change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make_and_change(folder: Path) -> Path:
        make(folder)
        change(folder)
        return folder

    return make_and_change


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no folder": (lambda folder: folder / "gone", r"gone does not exist; give a folder of training images"),
    "nothing to recognise": (lambda folder: folder, r"is no dataset: expected a dataset\.json, train_list\.txt, the folders images and"),
    "no dataset.json": (spoil(nnunet_raw, lambda f: (f / "dataset.json").unlink()), r"has imagesTr but no dataset\.json; it says what"),
    "broken json": (spoil(nnunet_raw, lambda f: (f / "dataset.json").write_text("{")), r"dataset\.json: not a readable dataset\.json"),
    "json list": (spoil(nnunet_raw, lambda f: (f / "dataset.json").write_text("[]")), r"dataset\.json: expected a JSON object, got a list"),
    "no labels": (bad_json(labels=None), r"dataset\.json: labels: expected names and values, such as"),
    "label of text": (bad_json(labels={"background": 0, "a": "x"}), r"labels\.a: expected a label value or a list of them, got 'x'"),
    "half a label": (bad_json(labels={"background": 0, "a": 1.5}), r"labels\.a: expected a label value or a list of them, got 1\.5"),
    "endless label": (
        bad_json(labels={"background": 0, "a": float("inf")}),
        r"labels\.a: expected a label value or a list of them, got inf",
    ),
    "ending of a number": (bad_json(file_ending=5), r"file_ending: expected a suffix such as '\.nii\.gz', got 5"),
    "no channels": (bad_json(channel_names={}), r"channel_names \(or modality\): expected numbers and names, such as"),
    "no background": (bad_json(labels={"liver": 1}), r"labels: expected 'background' with the value 0, got liver"),
    "only background": (bad_json(labels={"background": 0}), r"labels: there is only background, expected at least one structure"),
    "negative label": (bad_json(labels={"background": 0, "a": -1}), r"labels: expected values from 0 to 32767, got -1"),
    "large label": (bad_json(labels={"background": 0, "a": 40000}), r"labels: expected values from 0 to 32767, got 40000"),
    "value of two": (bad_json(labels={"background": 0, "a": 1, "b": 1}), r"labels: two names share one value in"),
    "ignored label": (bad_json(labels=LABELS | {"ignore": 2}), r"labels: 2 is both a label and the value to ignore"),
    "two ignored": (bad_json(labels=LABELS | {"ignore": [3, 4]}), r"labels\.ignore: expected one value, got \[3, 4\]"),
    "regions without order": (bad_json(labels={"background": 0, "a": [1, 2], "b": 2}), r"regions_class_order needs 2 values"),
    "order of text": (bad_json(regions_class_order="12"), r"regions_class_order: expected a list of label values, got '12'"),
    "wrong count": (bad_json(numTraining=3), r"numTraining is 3, found 2 cases; complete the copy or correct it"),
    "no label": (
        spoil(nnunet_raw, lambda f: [p.rename(p.with_name(f"x{p.name}")) for p in list((f / "labelsTr").iterdir())]),
        r"imagesTr: 2 of 2 images have no label map in .*labelsTr: a, b$",
    ),
    "no listed file": (
        spoil(decathlon, lambda f: (f / "labelsTr").rename(f / "elsewhere")),
        r"2 files that its list names are missing: .*labelsTr/a\.nii\.gz, .*labelsTr/b\.nii\.gz$",
    ),
    "no labelsTr": (
        spoil(nnunet_raw, lambda f: (f / "labelsTr").rename(f / "elsewhere")),
        r"labelsTr is missing; expected imagesTr and labelsTr beside dataset\.json",
    ),
    "missing channel": (
        spoil(bad_json(channels=2), lambda f: (f / "imagesTr" / "a_0001.nii.gz").unlink()),
        r"case 'a' lacks a_0001: the model needs 2 channels",
    ),
    "listed nonsense": (lambda f: decathlon(f, training=["a"]), r"training\.0: expected 'image' and 'label', got 'a'"),
    "listed case twice": (
        lambda f: decathlon(f, training=[{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}] * 2),
        r"case 'a' is there more than once; give every case its own name",
    ),
    "dataset of nonsense": (bad_json(dataset={"a": 1}), r"dataset\.a: expected 'images' \(a list of files\) and 'label' \(a file\), got 1"),
    "no pairs": (
        spoil(pairs, lambda f: [p.unlink() for p in [*(f / "images").iterdir(), *(f / "labels").iterdir()]]),
        r"images: found no image with a label map in",
    ),
    "two files of a case": (
        spoil(pairs, lambda f: write_case(f / "images" / "a.nrrd", image())),
        r"case 'a' is there twice \(a\.nii\.gz, a\.nrrd\); keep one of them",
    ),
    "line of one name": (
        spoil(npy_lists, lambda f: (f / "val_list.txt").write_text("images/a.npy\n")),
        r"val_list\.txt, line 1: expected an image and a label map, such as",
    ),
    "archive": (
        spoil(npy_lists, lambda f: (np.savez(f / "a.npz", a=1), (f / "a.npz").rename(f / "labels" / "a.npy"))),
        r"a\.npy is an archive of arrays, expected one array",
    ),
    "pickled array": (
        spoil(npy_lists, lambda f: np.save(f / "labels" / "a.npy", np.asarray([{}], object), allow_pickle=True)),
        r"a\.npy cannot be read as an array of numbers",
    ),
    "intensities as labels": (
        spoil(pairs, lambda f: write_case(f / "labels" / "a.nii.gz", np.arange(400, dtype=np.int16).reshape(4, 10, 10))),
        r"a\.nii\.gz: label maps hold more than 255 values, so they are no labels",
    ),
    "negative label map": (
        spoil(pairs, lambda f: write_case(f / "labels" / "a.nii.gz", labels().astype(np.int16) - 1)),
        r"a\.nii\.gz holds the value -1, expected labels from 0 on",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    make, sentence = BAD[what]
    with caplog.at_level(logging.CRITICAL), pytest.raises(InputError, match=sentence):
        open_dataset(make(tmp_path))


ALONE: dict[str, tuple[Callable[[Path], Path], str, list[str]]] = {
    "image without label": (
        spoil(nnunet_raw, lambda f: (f / "labelsTr" / "a.nii.gz").unlink()),
        r"^a_0000\.nii\.gz has no label map in .*labelsTr$",
        ["imagesTr/a_0000.nii.gz"],
    ),
    "label without image": (
        spoil(nnunet_raw, lambda f: (f / "imagesTr" / "a_0000.nii.gz").unlink()),
        r"^label map a\.nii\.gz has no image in .*imagesTr$",
        ["labelsTr/a.nii.gz"],
    ),
    "pair without label": (
        spoil(pairs, lambda f: (f / "labels" / "a.nii.gz").unlink()),
        r"^a\.nii\.gz has no label map in .*labels$",
        ["images/a.nii.gz"],
    ),
    "listed file gone": (
        spoil(decathlon, lambda f: (f / "labelsTr" / "a.nii.gz").unlink()),
        r"^a\.nii\.gz of case a is missing$",
        ["imagesTr/a.nii.gz", "labelsTr/a.nii.gz"],
    ),
    "line of a missing file": (
        spoil(npy_lists, lambda f: (f / "images" / "a.npy").unlink()),
        r"^a\.npy of case a is missing$",
        ["images/a.npy", "labels/a.npy"],
    ),
}


@pytest.mark.parametrize("what", ALONE)
def test_what_makes_no_case_is_reported_with_its_files(tmp_path: Path, what: str) -> None:
    make, sentence, files = ALONE[what]
    folder = make(tmp_path)
    (problem,) = check_dataset(open_dataset(folder)).problems
    assert (problem.case, problem.kind) == ("a", "missing")
    assert re.search(sentence, problem.message), problem.message
    assert [str(Path(file).relative_to(folder)) for file in problem.files] == files


def test_a_case_without_one_of_its_channels_is_named(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        write_case(tmp_path / patient / "ct.nii.gz", image())
        write_case(tmp_path / patient / "seg.nii.gz", labels())
    write_case(tmp_path / "p1" / "pet.nii.gz", image())
    suffixes: dict[str, Any] = {"image_suffix": ("ct", "pet"), "label_suffix": "seg"}
    dataset = open_dataset(tmp_path, **suffixes)
    assert [case.name for case in dataset.cases] == ["p1"]
    assert [(m.case, m.files, m.message) for m in dataset.missing] == [
        ("p2", (tmp_path / "p2" / "ct.nii.gz",), "case p2 has ct.nii.gz and lacks one of ct, pet")
    ]
    (tmp_path / "p1" / "pet.nii.gz").unlink()
    with pytest.raises(InputError, match=r"2 of 2 cases lack one of ct, pet: p1, p2"):
        open_dataset(tmp_path, **suffixes)


def _rewrite(dataset: Dataset, array: np.ndarray, **grid: Any) -> None:
    path = dataset.cases[0].labels
    assert path
    write_image(path, array, Grid(array.shape, **({"spacing": (1.0, 1.0, 1.0)} | grid)))


@pytest.mark.parametrize(
    ("array", "grid", "sentence"),
    [
        (labels((0, 1, 7)), {}, r"a\.nii\.gz holds values that are no labels of dataset .*: 7 \(20 voxels\); its labels are 0, 1, 2"),
        (labels() + np.float32(0.25), {}, r"a\.nii\.gz holds 60 values that are not whole numbers \(such as 0\.25\), expected labels"),
        (labels() * np.float32("nan"), {}, r"a\.nii\.gz has 60 NaN or infinite voxels of 60"),
        (np.zeros((3, 4, 6), np.uint8), {}, r"a\.nii\.gz does not lie on the grid of a_0000\.nii\.gz: it has shape \(3, 4, 6\) instead"),
        (labels(), {"spacing": (2.0, 1.0, 1.0)}, r"does not lie on the grid of a_0000\.nii\.gz: it has spacing \(2, 1, 1\) mm instead"),
        (labels(), {"origin": (9.0, 0.0, 0.0)}, r"does not lie on the grid of a_0000\.nii\.gz: it has another position in space"),
    ],
)
def test_bad_label_maps(tmp_path: Path, array: np.ndarray, grid: dict[str, Any], sentence: str) -> None:
    dataset = open_dataset(nnunet_raw(tmp_path))
    _rewrite(dataset, array, **grid)
    with pytest.raises(InputError, match=sentence):
        read_training_case(dataset.cases[0], dataset)


def test_bad_images(tmp_path: Path) -> None:
    dataset = open_dataset(nnunet_raw(tmp_path))
    case = dataset.cases[0]
    broken = image().astype(np.float32)
    broken[0, 0, 0] = np.nan
    write_case(case.images[0], broken)
    with pytest.raises(InputError, match=r"a_0000\.nii\.gz has 1 NaN or infinite voxels of 60"):
        read_training_case(case, dataset)
    write_4d(case.images[0], np.stack([image()] * 3))
    with pytest.raises(InputError, match=re.escape(f"a_0000.nii.gz has 3 channels, dataset {dataset.name} has 1 (CT)")):
        read_training_case(case, dataset)
    case.images[0].write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"a_0000\.nii\.gz"):
        read_training_case(case, dataset)
    with pytest.raises(InputError, match="case t has no label map"):
        read_training_case(TrainingCase("t", dataset.cases[1].images), dataset)


def test_a_colour_label_map_is_refused(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        write_colours(tmp_path / part / "a.png", np.arange(126, dtype=np.uint8).reshape(6, 7, 3))
    with pytest.raises(InputError, match=r"a\.png has 3 channels, expected 1: a label map"):
        open_dataset(tmp_path)
