"""Trainings of a UNet++ whose level is then built and used: windows of 16-bit pictures with two structures, and volumes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import SimpleITK
from train_jobs import write_dataset

from segrt.cli import build, predict, train
from segrt.io import read_labels

Segrt: TypeAlias = Callable[..., str]
QUICK = ["--epochs", "8", "--width", "0.125", "--lr", "0.02", "--workers", "0", "--validation-batches", "1", "--augmentation", "none"]


@pytest.fixture
def segrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Segrt:
    """Run a command in this process, where what it imports and compiles is there already; what it printed comes out."""

    def run(main: Callable[[], None], *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["segrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        assert not left.value.code, captured.err
        return captured.out + captured.err

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Grey pictures of 16 bits and two sizes; a bright and a very bright disk in each."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(5):
        height, width = ((40, 48), (56, 44))[number % 2]
        y, x = np.mgrid[:height, :width]
        labels = np.zeros((height, width), np.uint8)
        labels[np.hypot(y - rng.integers(10, 14), x - rng.integers(10, 14)) < 8] = 1
        labels[np.hypot(y - rng.integers(28, 30), x - rng.integers(28, 30)) < 8] = 2
        grey = (rng.integers(0, 9000, labels.shape) + labels * np.uint16(20000)).astype(np.uint16)
        for folder, data in (("images", grey), ("masks", labels)):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(data), str(tmp_path / folder / f"p{number}.png"))
    return tmp_path


def labels_at_level(segrt: Segrt, folder: Path, images: Path, out: Path) -> dict[str, np.ndarray]:
    """Build level L1 and predict with it; labels by file name come out."""
    # two engines to compile and verify, of which ONNX Runtime's are ready sooner
    told = segrt(build.main, folder, "--prune", "L1", "--device", "cpu", "--backend", "onnxruntime")
    assert "recommended: L" in told
    table = json.loads((folder / "reports" / "prune.json").read_text())
    assert table["L1"]["parameters"] < table["L4"]["parameters"]
    assert table["validation"] == "the 1 cases the training held back"
    segrt(predict.main, images, out, "--model", folder, "--level", "L1", "--backend", "onnxruntime", "--no-overview")
    assert json.loads((out / "predictions.json").read_text())["settings"]["level"] == "L1"
    return {path.name: read_labels(path)[0] for path in sorted(out.iterdir()) if path.suffix != ".json"}


def test_windows_of_16_bit_pictures_with_several_structures(segrt: Segrt, tmp_path: Path, pictures: Path) -> None:
    said = segrt(
        train.main,
        *(pictures / "images", "--masks", pictures / "masks", "--model", "unetpp", "-o", tmp_path / "m", *QUICK),
        *("--sliding", "--patch", "1,32,32", "--batch-size", "4"),
    )
    assert "mean Dice" in said
    spec = json.loads((tmp_path / "m" / "model.json").read_text())
    assert (spec["head"]["activation"], spec["head"]["values"], spec["inference"]["patch"]) == ("softmax", [0, 1, 2], [1, 32, 32])
    found = labels_at_level(segrt, tmp_path / "m", pictures / "images", tmp_path / "out")
    assert list(found) == [f"p{number}.png" for number in range(5)]
    for name, labels in found.items():
        truth = read_labels(pictures / "masks" / name)[0]
        assert labels.shape == truth.shape
        # a level that has learned nothing would find one of them everywhere
        assert (labels == truth).mean() > 0.6


def test_volumes(segrt: Segrt, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    segrt(train.main, data, "--model", "unetpp", "-o", tmp_path / "m", *QUICK, "--patch", "16,16,32", "--batch-size", "2")
    spec = json.loads((tmp_path / "m" / "model.json").read_text())
    assert spec["network"]["dimensions"] == 3
    found = labels_at_level(segrt, tmp_path / "m", data / "imagesTr", tmp_path / "out")
    assert list(found) == [f"ball_{number:03d}.nii.gz" for number in range(5)]
    for labels in found.values():
        assert labels.shape == (16, 20, 24)
        assert set(np.unique(labels)) <= {0, 2, 5}
