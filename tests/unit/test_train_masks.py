"""Pictures and their masks: pairing by how names end, grey masks, and one sentence for each thing that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from factories import write_case

from segrt.errors import InputError
from segrt.train.check import check_dataset
from segrt.train.dataset import open_dataset, read_training_case
from segrt.train.fingerprint import measure
from segrt.train.kept import digest_of

SIDES = (6, 7)


def write_picture(path: Path, data: np.ndarray) -> Path:
    """(Y, X) grey or (Y, X, 3) colour, of 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(data, isVector=data.ndim == 3), str(path))
    return path


def grey(seed: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, SIDES, dtype, endpoint=True)


def mask() -> np.ndarray:
    values = np.zeros(SIDES, np.uint8)
    values[2:5, 1:4] = 255
    values[2, 1] = 3  # what lossy files leave at an edge
    return values


def pictures(folder: Path, cases: str = "ba", image: str = ".png", label: str = "_mask.png", masks: str = "masks") -> Path:
    for seed, case in enumerate(cases):
        write_picture(folder / "images" / f"{case}{image}", grey(seed))
        write_picture(folder / masks / f"{case}{label}", mask())
    return folder


def opened(folder: Path, **changes: Any) -> Any:
    options = {"masks": folder / "masks", "image_suffix": ".png", "label_suffix": "_mask.png", "mask_threshold": 0, **changes}
    return open_dataset(folder / "images", **options)


def test_images_and_masks_are_paired_by_how_their_names_end(tmp_path: Path) -> None:
    dataset = opened(pictures(tmp_path / "brains"))
    assert dataset.name == "brains"
    assert [(case.name, case.images[0].name, case.labels.name) for case in dataset.cases] == [
        ("a", "a.png", "a_mask.png"),
        ("b", "b.png", "b_mask.png"),
    ]


def test_both_may_lie_in_one_folder(tmp_path: Path) -> None:
    folder = pictures(tmp_path, masks="images")
    dataset = opened(folder, masks=folder / "images")
    assert [(case.name, case.labels.name) for case in dataset.cases] == [("a", "a_mask.png"), ("b", "b_mask.png")]


def test_masks_may_lie_in_a_folder_among_the_images(tmp_path: Path) -> None:
    folder = pictures(tmp_path, masks="images/masks", label=".png")
    dataset = opened(folder, masks=folder / "images" / "masks", label_suffix=".png")
    assert [case.labels.parent.name for case in dataset.cases] == ["masks", "masks"]


def test_masks_of_another_format_and_of_equal_names(tmp_path: Path) -> None:
    folder = pictures(tmp_path, label=".tif")
    assert [case.labels.name for case in opened(folder, label_suffix=".tif").cases] == ["a.tif", "b.tif"]
    assert [case.labels.name for case in opened(folder, image_suffix=None, label_suffix=None).cases] == ["a.tif", "b.tif"]


@pytest.mark.parametrize(("threshold", "voxels"), [(0, 9), (2.5, 9), (3, 8), (127, 8)])
def test_what_is_above_the_threshold_is_foreground(tmp_path: Path, threshold: float, voxels: int) -> None:
    dataset = opened(pictures(tmp_path), mask_threshold=threshold)
    assert dataset.labels == {"background": (0,), "foreground": (255,)}
    _, labels = read_training_case(dataset.cases[0], dataset)
    assert (labels == 255).sum() == voxels
    assert (labels == 0).sum() == labels.size - voxels


def test_without_a_threshold_masks_keep_their_values(tmp_path: Path) -> None:
    dataset = opened(pictures(tmp_path), mask_threshold=None)
    assert dataset.values == (0, 3, 255)


def test_the_structure_has_the_name_and_value_it_is_given(tmp_path: Path) -> None:
    dataset = opened(pictures(tmp_path), labels={"tumour": 1})
    assert dataset.labels == {"background": (0,), "tumour": (1,)}
    assert set(np.unique(read_training_case(dataset.cases[0], dataset)[1])) == {0, 1}
    with pytest.raises(InputError, match="mask_threshold: grey masks hold one structure, got labels"):
        opened(pictures(tmp_path), labels={"tumour": 1, "oedema": 2})


def test_grey_masks_of_volumes_are_ones(tmp_path: Path) -> None:
    write_case(tmp_path / "images" / "a.nii.gz", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    write_case(tmp_path / "masks" / "a.nii.gz", np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5))
    dataset = open_dataset(tmp_path / "images", masks=tmp_path / "masks", mask_threshold=0.5)
    assert int(read_training_case(dataset.cases[0], dataset)[1].sum()) == 30


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("colours", [False, True])
def test_grey_and_colour_pictures_of_8_and_16_bits(tmp_path: Path, dtype: Any, colours: bool) -> None:
    folder = pictures(tmp_path, "a")
    data = np.stack([grey(seed, dtype) for seed in range(3)], -1) if colours else grey(0, dtype)
    write_picture(folder / "images" / "a.png", data)
    dataset = opened(folder)
    volume, _ = read_training_case(dataset.cases[0], dataset)
    np.testing.assert_array_equal(volume.data[:, 0], np.moveaxis(data, -1, 0) if colours else data[None])
    assert volume.data.dtype == dtype


def test_grey_masks_stored_as_colours(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    path = write_picture(folder / "masks" / "a_mask.png", np.stack([mask()] * 3, -1))
    dataset = opened(folder)
    assert (read_training_case(dataset.cases[0], dataset)[1] > 0).sum() == 9
    write_picture(path, np.stack([mask(), mask(), 255 - mask()], -1))
    with pytest.raises(InputError, match=r"a_mask\.png has colours, expected a grey mask"):
        read_training_case(dataset.cases[0], dataset)


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    write_picture(folder / "masks" / "b_mask.png", mask()[:5])
    report = check_dataset(opened(folder))
    assert [problem.message for problem in report.problems] == [
        "b_mask.png has 5 x 7 pixels, its image b.png 6 x 7; a mask is as large as its image"
    ]


def test_empty_masks_are_told(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    write_picture(folder / "masks" / "a_mask.png", mask() * 0)
    assert check_dataset(opened(folder)).warnings == ("1 case has no foreground: a",)
    write_picture(folder / "masks" / "b_mask.png", mask() * 0)
    with pytest.raises(InputError, match="none of the 2 masks has a pixel above 0, so there is nothing to learn"):
        measure(opened(folder))


def test_another_threshold_is_another_dataset(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    assert len({digest_of(opened(folder, mask_threshold=n)) for n in (None, 0, 127)}) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"masks": "gone"}, r"gone does not exist; give a folder of images and one of masks"),
        ({"masks": "images/a.png"}, r"a\.png is no folder; give a folder of images and one of masks"),
        ({"image_suffix": ".jpg"}, r"images: found no image whose name ends with \.jpg"),
        ({"label_suffix": "_seg.png"}, r"images: 2 of 2 images have no label map with a name that ends with _seg\.png in .*masks: a, b"),
    ],
)
def test_bad_folders(tmp_path: Path, changes: dict[str, str], sentence: str) -> None:
    folder = pictures(tmp_path)
    if "masks" in changes:
        changes = {"masks": str(folder / changes["masks"])}
    with pytest.raises(InputError, match=sentence):
        opened(folder, **changes)


def test_an_image_without_its_mask_is_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    (folder / "masks" / "a_mask.png").unlink()
    (missing,) = opened(folder).missing
    assert re.match(r"a\.png has no label map with a name that ends with _mask.png in .*masks$", missing.message), missing.message
