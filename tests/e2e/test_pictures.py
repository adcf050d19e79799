"""A handful of pictures with grey masks: segrt-train --model unetpp, segrt-build, segrt-predict; masks in the input's size and format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from commands import run_command

PATIENTS, SIZES = 6, ((40, 48), (56, 44))
PNG = b"\x89PNG"


def write(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(data, isVector=data.ndim == 3), str(path))


def read(path: Path) -> np.ndarray:
    array: np.ndarray = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    return array


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colour pictures of two sizes for each patient, a bright disk in them; masks are grey at their edges."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for patient in range(PATIENTS):
        for number in range(2):
            height, width = SIZES[patient % 2]
            y, x = np.mgrid[:height, :width]
            distance = np.hypot(y - rng.integers(14, 26), x - rng.integers(14, 26))
            picture = rng.integers(0, 90, (height, width, 3)) + (distance < 9)[..., None] * 150
            write(folder / "images" / f"P{patient}_{number}.png", picture.astype(np.uint8))
            write(folder / "masks" / f"P{patient}_{number}_mask.png", (np.clip(9 - distance, 0, 1) * 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, str]:
    bundle = tmp_path_factory.mktemp("trained") / "tumour"
    pairing = ["--masks", data / "masks", "--image-suffix", ".png", "--mask-suffix", "_mask.png", "--mask-threshold", "0"]
    small = ["--epochs", "12", "--width", "0.125", "--size", "48", "--batch-size", "4", "--lr", "0.02"]
    quick = ["--workers", "0", "--validation-batches", "1", "--schedule", "step", "--step-epochs", "8,10", "--augmentation", "none"]
    answer = run_command("train", data / "images", *pairing, "--model", "unetpp", "-o", bundle, *small, *quick, "--weights", "last")
    return bundle, answer.stderr


def test_a_training_says_what_it_does_and_keeps_it(trained: tuple[Path, str]) -> None:
    bundle, said = trained
    reports = bundle / "reports" / "fold_0"
    assert "fold 0: 4 patients to train on, 2 held back: P" in said
    assert "training fold 0 for 12 epochs of 2 iterations" in said
    assert sum(line.startswith("epoch ") and "IoU" in line for line in said.splitlines()) == 12
    split = json.loads((reports / "split.json").read_text())
    assert {name.split("_")[0] for name in split["val"]} == set(split["patients"]["val"])
    assert not set(split["patients"]["val"]) & set(split["patients"]["train"])
    rates = [float(line.split(",")[-1]) for line in (reports / "epochs.csv").read_text().splitlines()[1:]]
    np.testing.assert_allclose(rates, [2e-2] * 8 + [2e-3] * 2 + [2e-4] * 2)
    for picture in ("curves.png", "samples.png", "predictions.png"):
        assert (reports / picture).read_bytes().startswith(PNG)
    summary = json.loads((bundle / "reports" / "summary.json").read_text())["foreground_mean"]
    assert 0 < summary["IoU"] < summary["Dice"] <= 1
    assert f"mean Dice {summary['Dice']:.4f}, mean IoU {summary['IoU']:.4f}" in said


def test_masks_come_back_in_the_pictures_size_and_format(tmp_path: Path, data: Path, trained: tuple[Path, str]) -> None:
    bundle, _ = trained
    run_command("build", bundle)
    answer = run_command("predict", data / "images", tmp_path / "out", "--model", bundle)
    names = sorted(path.name for path in (data / "images").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").glob("P*")) == names
    found = 0
    for name in names:
        mask = read(tmp_path / "out" / name)
        assert mask.shape == read(data / "images" / name).shape[:2]
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
        found += int((mask > 0).sum())
    assert found, "it learned to find something"
    assert "overview.png" in answer.stdout
    assert (tmp_path / "out" / "overview.png").read_bytes().startswith(PNG)


def test_an_overview_is_a_choice(tmp_path: Path, data: Path, trained: tuple[Path, str]) -> None:
    run_command("predict", data / "images" / "P0_0.png", tmp_path / "out", "--model", trained[0], "--backend", "pytorch", "--no-overview")
    assert not (tmp_path / "out" / "overview.png").exists()
    run_command("predict", data / "images" / "P0_0.png", tmp_path / "two", "--model", trained[0], "--backend", "pytorch", "--overview")
    assert (tmp_path / "two" / "overview.png").exists()
