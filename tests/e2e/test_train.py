"""From a folder of images to labels in a folder: segrt-train, segrt-build, segrt-predict; and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Command, run_command
from train_jobs import write_dataset

from segrt.bundle import Bundle
from segrt.files import sha256
from segrt.io import read_labels
from segrt.metrics import dice
from segrt.report.curves import read_rows
from segrt.train.validate import load_summary

TINY = ["--iters", "30", "--width", "0.125", "--validation-interval", "15", "--validation-batches", "1", "--workers", "0", "--lr", "0.02"]
LOADED = [*TINY[:-4], "--workers", "1", "--lr", "0.02", "--split", "sorted:0.6"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # sums over more threads may differ in their last digits


def _segrt(name: str) -> list[str]:
    return [sys.executable, "-c", f"from segrt.cli.{name} import main; main()"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """What was trained without a disturbance, its loader a process of its own."""
    path = tmp_path_factory.mktemp("undisturbed") / "balls"
    assert "ready for segrt-build and segrt-predict" in run_command("train", data, "-o", path, *LOADED, threads=1).stderr
    return path


def test_train_build_predict_give_the_dice_of_the_validation(tmp_path: Path, model: Path, data: Path) -> None:
    run_command("build", model, "--device", "cpu")
    summary = load_summary(model.with_name("balls.train") / "3d_fullres" / "fold_0" / "validation")
    assert [case.name for case in summary.cases] == ["ball_003", "ball_004"]
    assert summary.mean_dice > 0.3

    images = tmp_path / "images"
    images.mkdir()
    for case in summary.cases:
        (images / f"{case.name}_0000.nii.gz").symlink_to(data / "imagesTr" / f"{case.name}_0000.nii.gz")
    run_command("predict", images, tmp_path / "out", "-m", model, "--device", "cpu", "--no-postprocess")
    found: list[list[float]] = []
    for case in summary.cases:
        labels, _ = read_labels(tmp_path / "out" / f"{case.name}.nii.gz")
        truth, _ = read_labels(data / "labelsTr" / f"{case.name}.nii.gz")
        found.append(list(dice(truth, labels, [2, 5]).values()))
    assert np.mean(found) == pytest.approx(summary.mean_dice, abs=5e-4)

    # the steps were chosen from the very weights they are applied to
    bundle = Bundle.open(model)
    recorded = json.loads((model / "reports" / "weights.json").read_text())
    assert recorded["0"] == {"sha256": sha256(bundle.weights_path("0")), "iteration": 30}
    chosen = json.loads((model / "reports" / "postprocess.json").read_text())
    assert chosen["model"] == summary.model
    assert [step.model_dump(mode="json") for step in bundle.spec.postprocess] == chosen["steps"]
    reports = {path.relative_to(model / "reports").as_posix() for path in (model / "reports").rglob("*") if path.is_file()}
    wanted = {"dataset.json", "fingerprint.json", "plan.json", "summary.json", "dice.csv", "dice.md", "dice.tex"}
    assert (
        wanted | {f"fold_0/{name}" for name in ("curves.png", "samples.png", "training.csv", "config.json", "environment.json")} <= reports
    )


@pytest.mark.slow
def test_a_stopped_training_goes_on_with_the_same_command(tmp_path: Path, model: Path, data: Path) -> None:
    arguments = [str(data), "-o", str(tmp_path / "m"), *LOADED, "--save-interval", "100"]
    command, environment = [*_segrt("train"), *arguments, "--log-interval", "1"], os.environ | ONE_THREAD
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("iteration 5/"):
                os.killpg(process.pid, signal.SIGTERM)  # to its workers and their fork server too, as a cluster does
                break
        rest = process.stderr.read()
        assert process.wait() == 130, rest
    assert "stopped; the same command goes on from here" in rest
    assert not (tmp_path / "m").exists()
    told = run_command("train", *arguments, "-v", threads=1).stderr
    assert "going on from iteration" in told
    assert "measuring 5 cases" not in told  # check and fingerprint are kept
    # its losses are those of the undisturbed one, patches and augmentations included
    both = (tmp_path / "m", model)
    own, undisturbed = ([row["loss"] for row in read_rows(path / "reports" / "fold_0" / "training.csv")] for path in both)
    assert len(own) == 30
    assert own == undisturbed
    assert sha256(tmp_path / "m" / "weights" / "0.safetensors") == sha256(model / "weights" / "0.safetensors")
    # the bundle is there: once more is an error before anything is read
    assert "pass --force" in run_command("train", *arguments, code=2).stderr


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path, data: Path) -> None:
    """As torchrun starts them; their common loss is that of one process."""
    arguments = [str(data), *TINY, "--iters", "4", "--split", "sorted:0.8", "--device", "cpu", "--augmentation", "none"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    group = [Command("train", *arguments, "-o", tmp_path / "two", threads=1, environment=own) for own in ranks]
    for process in group:
        told = process.finish()
        assert told.returncode == 0, told.stderr
    run_command("train", *arguments, "-o", tmp_path / "one", threads=1)
    losses = [
        [float(line.split(",")[1]) for line in (tmp_path / name / "reports/fold_0/training.csv").read_text().splitlines()[1:]]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
