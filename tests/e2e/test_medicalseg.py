"""segrt-train --from-medicalseg: from the article's files to a bundle, with what the command line says on top."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from train_jobs import write_dataset

from segrt.bundle import Bundle
from segrt.cli import train as train_command
from segrt.spec import VNetSpec, WindowNorm

CONFIGS = Path(__file__).parents[1] / "medicalseg" / "configs"
TINY = ["--iters", "2", "--validation-batches", "1", "--workers", "0", "--split", "sorted:0.6", "--device", "cpu"]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CONFIGS, tmp_path / "configs")

    def command(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["segrt-train", *map(str, arguments)])
        caplog.clear()
        with pytest.raises(SystemExit) as left:
            train_command.main()
        said = capsys.readouterr()
        logged = [record.getMessage() for record in caplog.records]
        return Answer(int(left.value.code or 0), said.out, "\n".join([said.err, *logged]))

    return command


def test_a_vnet_is_trained_as_its_file_says(run: Run, data: Path) -> None:
    """Optimizer, schedule, loss and patch; the command line makes it short and small."""
    Path("configs/amos/tiny.yml").write_text(
        """_base_: vnet.yml
batch_size: 2
train_dataset:
  transforms:
    - {type: RandomResizedCrop3D, size: [16, 32, 16], scale: [0.9, 1.0]}
    - {type: RandomRotation3D, degrees: 15}
optimizer: {type: AdamW, weight_decay: 0.02}
lr_scheduler: {decay_steps: 30000, learning_rate: 0.004}
loss:
  types:
    - type: MixedLoss
      losses: [{type: CrossEntropyLoss, weight: [0.5, 2, 1]}, {type: DiceLoss, sigmoid_norm: False}]
      coef: [0.25, 0.75]
  coef: [2]
"""
    )
    answer = run(data, "--from-medicalseg", "configs/amos/tiny.yml", "-o", "m", "--width", "0.0625", "--patch", "16,32,16", *TINY)
    assert answer.code == 0, answer.err
    assert "tiny.yml: num_classes (16): dataset data has 3 with its background" in answer.err
    config = json.loads(Path("m.train/vnet/fold_0/config.json").read_text())
    assert (config["optimizer"], config["weight_decay"], config["betas"]) == ("adamw", 0.02, [0.9, 0.999])
    assert (config["loss"], config["coefficients"], config["class_weights"]) == ("mixed", [0.5, 1.5], [0.5, 2, 1])
    assert (config["dice_activation"], config["batch_size"], config["schedule"]) == ("softmax", 2, "poly")
    assert config["transforms"] == {"scale": [0.9, 1.0], "ratio": [3 / 4, 4 / 3], "degrees": 15, "flip": 0}
    with Path("m.train/vnet/fold_0/training.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(rates, [0.004, 0.004 * 0.5**0.9], rtol=1e-5)
    bundle = Bundle.open(Path("m"))
    assert bundle.spec.inference.patch == (16, 32, 16)
    assert bundle.spec.channels[0].normalization == WindowNorm(lower=-1200, upper=600)
    assert isinstance(bundle.spec.network, VNetSpec)
    assert "optimizer.weight_decay" in (bundle.path / "reports" / "medicalseg.txt").read_text()


def test_an_nnunet_is_trained_as_its_file_says(run: Run, data: Path) -> None:
    flags = ["--config", "3d_fullres", "--fold", "0", "--width", "0.125", "--patch", "8,16,16"]
    answer = run(data, "--from-medicalseg", "configs/amos/nnunet.yml", "-o", "m", *flags, *TINY)
    assert answer.code == 0, answer.err
    config = json.loads(Path("m.train/3d_fullres/fold_0/config.json").read_text())
    assert (config["optimizer"], config["weight_decay"], config["lr"]) == ("adamw", 0.01, 0.01)
    assert (config["loss"], config["batch_dice"], config["deep_supervision"], config["clip"]) == ("dice_ce", False, True, 12)
    assert Bundle.open(Path("m")).spec.inference.patch == (8, 16, 16)


def test_the_plan_alone_shows_what_was_understood(run: Run, data: Path) -> None:
    answer = run(data, "--from-medicalseg", "configs/amos/vnet.yml", "--plan-only", "--workers", "0", "--lr", "0.5")
    assert answer.code == 0, answer.err
    rows = {line.split()[0]: line for line in answer.out.splitlines() if line.strip()}
    assert rows["optimizer.type"].split() == ["optimizer.type", "sgd", "sgd"]
    assert rows["lr_scheduler.learning_rate"].endswith("lr as you say instead")
    assert "! the rate would be 0 from iteration 15000 on" in rows["lr_scheduler.decay_steps"]
    plan = json.loads(Path("segrt_model.train/plan.json").read_text())
    assert plan["configurations"]["vnet"]["spec"]["inference"]["patch"] == [128, 128, 128]
    assert json.loads(Path("segrt_model.train/config.json").read_text())["lr"] == 0.5


def test_the_files_own_dataset_is_found_beside_it(run: Run, data: Path) -> None:
    file = ["--from-medicalseg", "configs/amos/vnet.yml", "--plan-only", "--workers", "0"]
    missing = run(*file)
    assert missing.code == 2
    assert "DATASET is missing: " in missing.err
    assert "give the dataset's folder" in missing.err
    shutil.copytree(data, "data/competition_phase0")
    found = run(*file)
    assert found.code == 0, found.err
    assert "competition_phase0" in found.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--from-medicalseg", "configs/none.yml"], "none.yml cannot be read (No such file or directory)"),
        (["--from-medicalseg", "configs/amos/vnet.yml", "--model", "nnunet"], "describes a vnet, not a nnunet"),
        (["--from-medicalseg", "configs/amos/vnet.yml", "--medicalseg-root", "elsewhere"], "does not lie in"),
        (["--from-medicalseg", "configs/amos/vnet.yml", "--lr", "-1"], "training: lr: "),
        (["--from-medicalseg", "configs/amos/vnet.yml", "--patch", "20,20,20"], "multiples of 16"),
        (["--from-medicalseg", "configs/amos/nnunet.yml"], "so choose another (--config)"),
        (["--class-weights", "1,2"], "class_weights: expected one number for each of the 3 classes (background first)"),
        (["--class-weights", "batch"], "class_weights: 'batch' belongs to loss 'mixed'"),
        (["--medicalseg-root", "configs"], "--medicalseg-root belongs to --from-medicalseg"),
    ],
)
def test_sentences(run: Run, data: Path, flags: list[str], sentence: str) -> None:
    answer = run(data, *TINY, "--fold", "0", *flags)
    assert answer.code == 2
    assert sentence in " ".join(answer.err.split())
    assert "Traceback" not in answer.err


def test_without_a_file_a_dataset_is_needed(run: Run) -> None:
    answer = run("--plan-only")
    assert answer.code == 2
    assert "error: DATASET is missing; give a folder of images with labels" in answer.err
