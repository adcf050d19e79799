"""segrt-study from a dataset to tables: runs are segrt-train's own, one that fails ends no other, an interrupted study goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import run_command
from train_jobs import write_dataset

from segrt.bundle import Bundle
from segrt.errors import InputError, SpecError
from segrt.files import sha256
from segrt.report.curves import read_rows
from segrt.train.run import train_model
from segrt.train.study import run_study
from segrt.train.study_plan import plan_runs
from segrt.train.study_results import RunRecord, Study, load_study

SMALL = (
    "--cores",
    "1",
    "--width",
    "0.125",
    "--batch-size",
    "2",
    "--patch",
    "vnet=16,16,16",
    "--workers",
    "0",
    "--split",
    "sorted:0.6",
    "--device",
    "cpu",
)
ROOT = Path(__file__).resolve().parents[2]


def _start(data: Path, folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from segrt.cli.study import main; main()", str(data), "-o", str(folder), *SMALL, *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _run(data: Path, folder: Path, *flags: str) -> tuple[int, str, str]:
    done = run_command("study", data, "-o", folder, *SMALL, *flags, code=None)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


FLAGS = ("--models", "vnet", "--optimizers", "sgd,adam,adamw", "--iters", "4", "--lr", "sgd=1e30", "--validation-batches", "1")
FLAGS += ("--no-mirroring", "--no-deep-supervision", "--l1", "adamw=1e-6", "--cache-storage", "npy")


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, one of which cannot end well."""
    folder = tmp_path_factory.mktemp("study") / "study"
    code, out, err = _run(data, folder, *FLAGS)
    assert code == 3, err
    assert "vnet-sgd    failed: the loss became " in out
    assert "best: " in out
    return folder


def _scores(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


@pytest.mark.slow
def test_a_study_compares_what_did_not_fail(study: Path) -> None:
    found = load_study(study / "study.json")
    assert [(run.name, run.status) for run in found.runs] == [
        ("vnet-sgd", "failed"),
        ("vnet-adam", "finished"),
        ("vnet-adamw", "finished"),
    ]
    assert [(run.config.mirroring, run.config.deep_supervision, run.config.storage) for run in found.runs] == [(False, False, "npy")] * 3
    assert [run.config.l1 for run in found.runs] == [0, 0, 1e-6]
    assert "the loss became" in found.runs[0].error
    assert "ball_" in found.runs[0].error
    rows = _scores(study / "dice.csv")
    assert rows[0] == ["organ", "post-processing", "vnet-adam", "vnet-adamw"]
    assert [row[:2] for row in rows[1:]] == [[organ, pp] for pp in ("without", "with") for organ in ("ball", "bright ball", "mean")]
    for column, run in enumerate(found.finished, 2):
        assert run.mean_dice is not None
        assert [float(rows[3][column]), float(rows[6][column])] == pytest.approx([run.mean_dice.without, run.mean_dice.with_])
        assert (run.training, run.validation, run.iterations) == ((3,), 2, (4,))
        costs = [
            float(row["batch_cost"]) for row in read_rows(study / f"{run.name}.train" / run.config.configuration / "fold_0/training.csv")
        ]
        assert run.training_s[0] == pytest.approx(sum(costs), abs=1e-3)
    assert (study / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all((study / f"{name}.{kind}").is_file() for name in ("dice", "runs") for kind in ("csv", "md", "tex"))


def _train_alone(data: Path, folder: Path, record: RunRecord) -> Bundle:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the run had, for sums over more threads differ in their last digits
    try:
        bundle = train_model(data, folder, record.config)
    finally:
        torch.set_num_threads(threads)
    assert bundle is not None
    return bundle


@pytest.mark.slow
def test_a_run_is_segrt_trains_own(study: Path, data: Path, tmp_path: Path) -> None:
    (record,) = (run for run in load_study(study / "study.json").runs if run.name == "vnet-adamw")
    alone = _train_alone(data, tmp_path / "alone", record)
    bundle = Bundle.open(study / "vnet-adamw")
    assert sha256(bundle.weights_path("0")) == sha256(alone.weights_path("0"))
    assert bundle.spec == alone.spec
    assert (bundle.path / "reports" / "summary.json").is_file()
    assert (bundle.path / "reports" / "fingerprint.json").read_bytes() == (alone.path / "reports" / "fingerprint.json").read_bytes()


@pytest.mark.slow
def test_finished_runs_are_not_repeated(study: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.glob("*/weights/0.safetensors")}
    prepared = {path: path.stat().st_mtime_ns for path in (study / "shared" / "prepared").rglob("*")}
    code, _, err = _run(data, study, *FLAGS)
    assert code == 3
    assert err.count("finished before") == 2
    assert "vnet-sgd: failed" in err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in prepared} == prepared, "the cases were prepared once"


@pytest.mark.slow
def test_an_interrupted_study_goes_on(data: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    flags = ("--models", "vnet", "--iters", "15", "--validation-batches", "0", "--save-interval", "3", "-v", "--optimizers", "adam,adamw")
    process = _start(data, parts, *flags)
    end = time.monotonic() + 240
    while not list(parts.glob("vnet-adam.train/vnet/fold_0/checkpoints/iter_*")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the same command goes on from here" in err
    statuses = [run["status"] for run in json.loads((parts / "study.json").read_text())["runs"]]
    assert statuses == ["stopped", "waiting"]
    code, _, err = _run(data, parts, *flags)
    assert code == 0, err
    assert [run["status"] for run in json.loads((parts / "study.json").read_text())["runs"]] == ["finished", "finished"]
    (record,) = (run for run in load_study(parts / "study.json").runs if run.name == "vnet-adam")
    whole = _train_alone(data, tmp_path / "whole", record)
    assert sha256(parts / "vnet-adam" / "weights" / "0.safetensors") == sha256(whole.weights_path("0"))


def _tiny(data: Path, folder: Path, *, lr: float = 0.01, force: bool = False) -> Study:
    options = {
        "iterations": 1,
        "width": 0.125,
        "split": "sorted:0.6",
        "workers": 0,
        "validation_batches": 0,
        "batch_size": 2,
        "device": "cpu",
    }
    return run_study(data, folder, plan_runs(["nnunet"], ["adam"], lr=lr, **options), cores=1, force=force)


@pytest.mark.slow
def test_other_settings_are_refused_and_begin_again_when_forced(data: Path, tmp_path: Path) -> None:
    first = _tiny(data, tmp_path / "s")
    assert first.best is not None
    with pytest.raises(SpecError, match=r"nnunet-adam was trained with lr 0.01 \(now 0.02\); go on with .* or --force"):
        _tiny(data, tmp_path / "s", lr=0.02)
    assert _tiny(data, tmp_path / "s", lr=0.02, force=True).runs[0].config.lr == 0.02
    (tmp_path / "foreign" / "nnunet-adam").mkdir(parents=True)
    (tmp_path / "foreign" / "nnunet-adam" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already and of no study"):
        _tiny(data, tmp_path / "foreign", force=True)
    assert (tmp_path / "foreign" / "nnunet-adam" / "thesis.txt").is_file()


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_failed_run(data: Path, tmp_path: Path) -> None:
    options = {"iterations": 10**6, "width": 0.125, "split": "sorted:0.6", "workers": 0, "validation_batches": 0, "device": "cpu"}
    (run,) = plan_runs(["nnunet"], ["adam"], batch_size=2, **options)
    script = tmp_path / "killed.py"
    script.write_text(
        "import multiprocessing, os, signal, sys\n"
        "from segrt.train.folds import Show\n"
        "from segrt.train.study import StudyShow, run_study\n"
        "from segrt.train.study_plan import StudyRun\n"
        "from segrt.train.config import TrainConfig\n"
        "if __name__ == '__main__':\n"
        "    config = TrainConfig.model_validate_json(sys.argv[3])\n"
        "    kill = lambda name, step: [os.kill(p.pid, signal.SIGKILL) for p in multiprocessing.active_children()]\n"
        "    study = run_study(sys.argv[1], sys.argv[2], [StudyRun('one', config)], cores=1, show=StudyShow(Show(), step=kill))\n"
        "    print(study.runs[0].status, study.runs[0].error)\n"
    )
    command = [sys.executable, str(script), str(data), str(tmp_path / "s"), run.config.to_json()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.stdout.startswith("failed its process ended without a word (killed by signal 9, probably for want of memory)"), done.stderr
