"""segrt-train: each flag, exit codes, and errors as one sentence. Trainings themselves are in tests/e2e/test_train.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from train_jobs import write_dataset

from segrt.cli import train as train_command
from segrt.cli.training import TrainBars, ending_on_signals, epoch_text, is_first, join_processes, step_text
from segrt.io import read_volume
from segrt.train.epoch import EpochMeans
from segrt.train.loop import Step


class Answer(NamedTuple):
    code: int
    err: str


Run = Callable[..., Answer]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plans of all tests share: the check and the fingerprint."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["segrt-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            train_command.main()
        return Answer(int(left.value.code or 0), " ".join(capsys.readouterr().err.split()))

    return command


def refusal(answer: Answer) -> str:
    assert answer.code == 2
    assert "Traceback" not in answer.err
    return answer.err[answer.err.index("error: ") :]


THIN = "1,2,2/2,2,2/2,2,2/2,2,2"
FLAGS: list[tuple[list[str], str, Any]] = [
    (["--config", "2d"], "configuration", "2d"),
    (["-c", "2d"], "configuration", "2d"),
    (["--find-best", "-c", "2d,3d_fullres"], "configuration", "2d"),
    (["-c", "2d+3d_fullres"], "configuration", "2d+3d_fullres"),
    (["--fold", "0,3"], "folds", ["0", "3"]),
    (["-f", "all"], "folds", ["all"]),
    (["--split", "sorted:0.8"], "split", "sorted:0.8"),
    (["--patients", "(.+)"], "patients", "(.+)"),
    (["--planner", "resenc_m"], "planner", "resenc_m"),
    (["--planner", "v1"], "planner", "v1"),
    (["--memory-gb", "6"], "memory_gb", 6),
    (["--iters", "77"], "iterations", 77),
    (["--minutes", "1.5"], "minutes", 1.5),
    (["--epochs", "200"], "iterations", 50_000),
    (["--batch-size", "3"], "batch_size", 3),
    (["--model", "unetpp", "--epochs", "7"], "passes", 7),
    (["--model", "unet", "--epochs", "7"], "passes", 7),
    (["--patch", "8,16,16"], "patch", [8, 16, 16]),
    (["--model", "unetpp", "--size", "32"], "patch", [1, 32, 32]),
    (["--model", "unetpp", "--size", "32,48"], "patch", [1, 32, 48]),
    (["--model", "unetpp", "--mode", "fast"], "mode", "fast"),
    (["--model", "unetpp", "--dropout", "0.5"], "dropout", 0.5),
    (["--lrf", "0.1"], "lrf", 0.1),
    (["--schedule", "step", "--step-epochs", "10,20"], "step_epochs", [10, 20]),
    (["--loss", "hybrid"], "loss", "hybrid"),
    (["--width", "0.5"], "width", 0.5),
    (["--no-deep-supervision"], "deep_supervision", False),
    (["--deep-supervision"], "deep_supervision", True),
    (["--optimizer", "adamw"], "optimizer", "adamw"),
    (["--lr", "0.5"], "lr", 0.5),
    (["--momentum", "0.5"], "momentum", 0.5),
    (["--no-nesterov"], "nesterov", False),
    (["--nesterov"], "nesterov", True),
    (["--optimizer", "adam", "--betas", "0.8,0.95"], "betas", [0.8, 0.95]),
    (["--weight-decay", "0.5"], "weight_decay", 0.5),
    (["--l1", "0.5"], "l1", 0.5),
    (["--schedule", "cosine"], "schedule", "cosine"),
    (["--schedule-by-iteration"], "schedule_by_epoch", False),
    (["--iters", "20", "--schedule-by-epoch"], "schedule_by_epoch", True),
    (["--power", "2"], "power", 2),
    (["--end-lr", "0.001"], "end_lr", 0.001),
    (["--decay-iters", "99"], "decay_iterations", 99),
    (["--schedule", "step", "--step-iters", "98"], "step_iterations", 98),
    (["--schedule", "step", "--gamma", "0.5"], "gamma", 0.5),
    (["--loss", "mixed"], "loss", "mixed"),
    (["--coefficients", "0.5,2"], "coefficients", [0.5, 2]),
    (["--class-weights", "0.5,1,2"], "class_weights", [0.5, 1, 2]),
    (["--loss", "mixed", "--class-weights", "batch"], "class_weights", "batch"),
    (["--batch-dice"], "batch_dice", True),
    (["--image-dice"], "batch_dice", False),
    (["--augmentation", "none"], "augmentation", "none"),
    (["--mirroring"], "mirroring", True),
    (["--no-mirroring"], "mirroring", False),
    (["--oversampling", "0.5"], "oversampling", 0.5),
    (["--precision", "bf16"], "precision", "bf16"),
    (["--clip", "0"], "clip", 0),
    (["--accumulation", "4"], "accumulation", 4),
    (["--compile"], "compile", True),
    (["--seed", "5"], "seed", 5),
    (["--workers", "0"], "workers", 0),
    (["--validation-interval", "9"], "validation_interval", 9),
    (["--validation-batches", "8"], "validation_batches", 8),
    (["--save-interval", "7"], "save_interval", 7),
    (["--log-interval", "6"], "log_interval", 6),
    (["--keep", "5"], "keep", 5),
    (["--weights", "best"], "weights", "best"),
    (["--model", "vnet", "--window", "abdomen"], "window", "abdomen"),
    (["--model", "vnet", "--window=-100,50"], "window", [-100, 50]),
    (["--model", "vnet", "--sliding"], "sliding", True),
    (["--model", "vnet", "--resampling", "cubic"], "resampling", "cubic"),
    (["--model", "vnet", "--elu"], "elu", True),
    (["--model", "vnet", "--kernels", THIN, "--strides", THIN], "kernels", [[1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]),
    (["--model", "vnet", "--kernels", THIN, "--strides", THIN], "strides", [[1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]),
    (["--loss", "mixed", "--dice-activation", "softmax"], "dice_activation", "softmax"),
    (["--cache-dtype", "float16"], "cache", "float16"),
    (["--cache-storage", "npy"], "storage", "npy"),
    (["--profile"], "profile", [10, 20]),
    (["--device", "cpu"], "device", "cpu"),
]


@pytest.mark.parametrize(("flags", "field", "value"), FLAGS, ids=[" ".join(flags) for flags, _, _ in FLAGS])
def test_each_flag_reaches_the_configuration(run: Run, data: Path, work: Path, flags: list[str], field: str, value: object) -> None:
    workers = [] if "--workers" in flags else ["--workers", "0"]
    answer = run(data, "--plan-only", "--work", work, *workers, *flags)
    assert answer.code == 0, answer.err
    assert json.loads((work / "config.json").read_text())[field] == value


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config", "3d_cascade_fullres"], "only for images of more than four patches, so choose another (--config)"),
        (["--fold", "7"], "fold 7: split 'kfold' has folds 0 to 4; choose of these, or all"),
        (["--fold", "first"], "fold: expected a number or all, got 'first'"),
        (["--split", "sorted:0.6", "--fold", "1"], "fold 1: split 'sorted:0.6' has one fold, 0"),
        (["--split", "nowhere.json"], "split: 'nowhere.json' is neither"),
        (["--patients", "(.+)_"], "1 patients cannot be split into 5 folds"),
        (["--config", "3d_lowres"], "configuration: expected one the plan has (2d, 3d_fullres), got '3d_lowres'"),
        (["--config", "2d+3d_lowres"], "configuration: expected one the plan has (2d, 3d_fullres), got '3d_lowres'"),
        (["--find-best", "--config", "2d,3d_lowres"], "configuration: expected one the plan has (2d, 3d_fullres), got '3d_lowres'"),
        (["--class-weights", "1,2"], "class_weights: expected one number for each of the 3 classes (background first)"),
        (["--grey-channel", "red"], "grey_channel: it only matters with grey above 0, so nothing would read red; leave it out"),
        (["--grey", "0.2"], "grey: expected several channels and augmentation 'nnunet', got 1 of"),
        (["--class-weights", "batch"], "class_weights: 'batch' belongs to loss 'mixed'"),
        (["--loss", "bce"], "loss: 'bce' needs one logit per structure"),
        (["--augmentation", "article", "--config", "2d"], "augmentation: 'article' turns volumes"),
        (["--patch", "9,16,16"], "its side is a multiple of"),
    ],
)
def test_a_plan_alone_is_refused_what_its_training_would_be(run: Run, data: Path, work: Path, flags: list[str], sentence: str) -> None:
    assert sentence in refusal(run(data, "--plan-only", "--work", work, "--workers", "0", *flags))


def test_the_plan_alone(run: Run, data: Path) -> None:
    answer = run(data, "-o", "balls", "--plan-only", "--workers", "0")
    assert answer.code == 0
    assert "plan: balls.train/plan.json (2d, 3d_fullres)" in answer.err
    assert "3d_fullres, to be trained: patch " in answer.err
    assert "2d, not chosen: patch " in answer.err
    assert "prepared cases of 3d_fullres need about " in answer.err
    plan = json.loads(Path("balls.train/plan.json").read_text())
    reasons = plan["configurations"]["3d_fullres"]["reasons"]
    assert "patch" in reasons
    for choice, reason in reasons.items():
        assert f"{choice}: {reason}" in answer.err
    assert not Path("balls").exists()


def test_a_plan_of_ones_own(run: Run, data: Path, work: Path) -> None:
    assert run(data, "--plan-only", "--work", work, "--workers", "0").code == 0
    plan = json.loads((work / "plan.json").read_text())
    plan["configurations"]["3d_fullres"]["batch_size"] = 7
    Path("own.json").write_text(json.dumps(plan))
    assert run(data, "--plan-only", "--work", "other", "--workers", "0", "--plan", "own.json").code == 0
    assert json.loads(Path("other/plan.json").read_text())["configurations"]["3d_fullres"]["batch_size"] == 7
    assert "not.json" in refusal(run(data, "--plan-only", "--work", "other", "--workers", "0", "--plan", "not.json"))


def test_what_a_dataset_does_not_say(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    for case in range(3):
        (folder / "scans").mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "imagesTr" / f"ball_{case:03d}_0000.nii.gz", folder / "scans" / f"s{case}_image.nii.gz")
        shutil.copy(data / "labelsTr" / f"ball_{case:03d}.nii.gz", folder / "scans" / f"s{case}_truth.nii.gz")
    suffixes = ["--image-suffix", "_image", "--label-suffix", "_truth", "--channels", "CT", "--fold", "all"]
    assert run(folder, "--plan-only", "--work", "w", "--workers", "0", *suffixes).code == 0
    spec = json.loads(Path("w/plan.json").read_text())["configurations"]["3d_fullres"]["spec"]
    assert [(c["name"], c["normalization"]["kind"]) for c in spec["channels"]] == [("CT", "ct")]


def test_labels_that_nobody_named(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    for part, source in (("images", "imagesTr"), ("labels", "labelsTr")):
        shutil.copytree(data / source, folder / part)
    Path("labels.json").write_text('{"ball": [2, 5], "bright ball": 5, "ignore": 9, "regions_class_order": [2, 5]}')
    answer = run(folder, "--plan-only", "--work", "w", "--workers", "0", "--fold", "all", "--labels", "labels.json")
    assert answer.code == 0, answer.err
    spec = json.loads(Path("w/plan.json").read_text())["configurations"]["3d_fullres"]["spec"]
    assert spec["labels"] == [{"name": "ball", "values": [2, 5]}, {"name": "bright ball", "values": [5]}]
    assert (spec["head"]["activation"], spec["ignore"]) == ("sigmoid", 9)


def test_arrays_that_a_window_made(run: Run, data: Path) -> None:
    """The trained model gets real images: what 0 and 255 of the arrays stand for has to be said, and the plan's window is of that."""
    lists = write_arrays(data, Path("lists"))
    arrays = (
        lists,
        "--plan-only",
        "--work",
        "w",
        "--workers",
        "0",
        "--fold",
        "0",
        "--model",
        "vnet",
        "--channels",
        "CT",
        "--patch",
        "16,16,16",
    )
    assert "channel CT gets a window of them; say which ones 0 and 255 stand for (--npy-window -1200,600)" in refusal(run(*arrays))
    assert "npy_window: expected article, abdomen, none, or a number" in refusal(run(*arrays, "--npy-window", "lung"))
    assert run(*arrays, "--npy-window", "article").code == 0
    fingerprint = json.loads(Path("w/reports/fingerprint.json").read_text())
    assert 300 < fingerprint["intensities"][0]["percentile_99_5"] <= 600.01
    spec = json.loads(Path("w/plan.json").read_text())["configurations"]["vnet"]["spec"]
    assert spec["channels"][0]["normalization"] == {"kind": "hu_window", "lower": -1200.0, "upper": 600.0, "scale": 255.0}
    assert "npy_window: it tells what .npy files hold" in refusal(run(data, "--plan-only", "--work", "o", "--npy-window", "article"))


def write_arrays(data: Path, folder: Path) -> Path:
    """The balls' images as the article's arrays, 0..255, in lists for training and validation."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for case in range(4):
        values = read_volume(data / "imagesTr" / f"ball_{case:03d}_0000.nii.gz").data[0].astype(np.float32)
        values = (values - values.min()) * (255 / np.ptp(values))
        np.save(folder / "images" / f"{case}.npy", values)
        np.save(folder / "labels" / f"{case}.npy", read_volume(data / "labelsTr" / f"ball_{case:03d}.nii.gz").data[0])
    lines = [f"images/{case}.npy labels/{case}.npy\n" for case in range(4)]
    (folder / "train_list.txt").write_text("".join(lines[:3]))
    (folder / "val_list.txt").write_text(lines[3])
    return folder


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--window", "zscore"], "window: it only matters with model vnet, unetpp or unet"),
        (["--model", "vnet", "--memory-gb", "4"], "memory_gb: it only matters with model nnunet"),
        (["--no-pairs"], "pairs: it only matters with find_best"),
        (["--plan", "plan.json", "--planner", "resenc_m"], "planner: it only matters with a plan made here"),
        (["--config", ""], "--config: expected a configuration such as 3d_fullres, got none"),
        (["--fold", ""], "training: folds: expected at least one, such as 0"),
        (["--config", "2d,3d_fullres"], "several configurations are only trained to find the best one; add --find-best"),
        (["--iters", "5", "--epochs", "5"], "--iters and --epochs say the same thing"),
        (["--model", "segnet"], "training: model: expected 'nnunet', 'vnet', 'unetpp' or 'unet', got 'segnet'"),
        (["--model", "unetpp", "--size", "big"], "--size: expected a number such as 256, or height,width"),
        (["--model", "unetpp", "--size", "64", "--patch", "1,64,64"], "--size and --patch say the same thing"),
        (["--model", "unetpp", "--patch", "20,20,20"], "multiples of 16"),
        (["--lrf", "0.1", "--end-lr", "0.1"], "lrf: it and end_lr say the same thing"),
        (["--step-epochs", "20,10"], "step_epochs: expected rising numbers"),
        (["--loss", "hybrid", "--coefficients", "1,2"], "coefficients: loss hybrid has its own"),
        (["--patients", "("], "patients: '(' is no pattern"),
        (["--patients", "x+"], "patients: 'x+' finds no patient in 5 of 5 names, such as ball_000"),
        (["--lr", "-1"], "training: lr: "),
        (["--optimizer", "sgdd"], "training: optimizer: expected 'sgd', 'adam' or 'adamw', got 'sgdd'"),
        (["--patch", "8,8"], "training: patch"),
        (["--fold", "0,0"], "folds: expected no fold twice"),
        (["--config", "3d_lowres"], "configuration: expected one the plan has (2d, 3d_fullres), got '3d_lowres'"),
        (["--config", "2d+2d"], "configuration: a pair is two different ones, such as 2d+3d_fullres, got '2d+2d'"),
        (["--config", "2d+3d_lowres"], "configuration: expected one the plan has (2d, 3d_fullres), got '3d_lowres'"),
        (["--patch", "9,16,16"], "its side is a multiple of"),
        (["--fold", "first"], "fold: expected a number or all, got 'first'"),
        (["--split", "nowhere.json"], "split: 'nowhere.json' is neither"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--planner", "huge"], "training: planner"),
        (["--model", "vnet", "--patch", "20,20,20"], "multiples of 16"),
        (["--model", "vnet", "--strides", "2,2,2"], "strides: expected three whole numbers above 0 (z, y, x) for each of four steps down"),
        (["--elu"], "elu: it only matters with model vnet"),
        (["--cache-storage", "zarr"], "storage: expected 'blosc2' or 'npy', got 'zarr'"),
        (["--labels", "nowhere.json"], "nowhere.json: not a readable file of labels"),
    ],
)
def test_sentences(run: Run, data: Path, work: Path, flags: list[str], sentence: str) -> None:
    length = [] if "--iters" in flags else ["--iters", "1"]
    assert sentence in refusal(run(data, "-o", "m", "--work", work, "--workers", "0", *length, *flags))
    assert not Path("m").exists()


def test_no_dataset(run: Run, tmp_path: Path) -> None:
    assert "nowhere" in refusal(run(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(run(tmp_path / "empty"))


def test_a_dataset_with_a_wrong_label_names_the_file(run: Run, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", cases=2)
    described = json.loads((folder / "dataset.json").read_text())
    described["labels"] = {"background": 0, "ball": 2}
    (folder / "dataset.json").write_text(json.dumps(described))
    sentence = refusal(run(folder, "--workers", "0", "--split", "sorted:0.5"))
    assert "cannot be trained on" in sentence
    assert "ball_000.nii.gz" in sentence


def test_an_image_without_label_is_in_the_report(run: Run, tmp_path: Path) -> None:
    """Though what is left could not be split into five folds either."""
    folder = write_dataset(tmp_path / "data", cases=3)
    (folder / "labelsTr" / "ball_001.nii.gz").unlink()
    sentence = refusal(run(folder, "--workers", "0", "--work", "w"))
    assert "cannot be trained on: ball_001_0000.nii.gz has no label map in" in sentence
    assert sentence.endswith("(see w/reports/dataset.json)")
    (problem,) = json.loads(Path("w/reports/dataset.json").read_text())["problems"]
    assert (problem["case"], problem["kind"]) == ("ball_001", "missing")
    assert problem["files"] == [str(folder / "imagesTr" / "ball_001_0000.nii.gz")]


def test_a_problem_that_left_no_trace_is_looked_for_again(run: Run, tmp_path: Path) -> None:
    """A permission that was given later changes no file's name, size or time: the report of the first run still had the problem."""
    folder = write_dataset(tmp_path / "data", cases=2)
    image = folder / "imagesTr" / "ball_000_0000.nii.gz"
    times, content = image.stat(), image.read_bytes()
    command = (folder, "--plan-only", "--work", "w", "--workers", "0", "--fold", "all")
    image.write_bytes(bytes(len(content)))
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "ball_000_0000.nii.gz" in refusal(run(*command))
    image.write_bytes(content)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(*command).code == 0
    Path("w/reports/dataset.json").write_text("{")
    assert "w/reports/dataset.json: not a readable JSON file" in refusal(run(*command))


def test_an_existing_bundle_is_kept(run: Run, data: Path) -> None:
    Path("m").mkdir()
    Path("m/model.json").write_text("{}")
    assert "pass --force" in refusal(run(data, "-o", "m"))
    Path("other").mkdir()
    Path("other/file").write_text("")
    assert "exists and is not a bundle" in refusal(run(data, "-o", "other", "--force"))


def test_folders_that_cannot_be_are_refused_before_anything_is_read(run: Run, data: Path) -> None:
    Path("file").write_text("")
    assert refusal(run(data, "-o", "file")).startswith("error: file: exists and is not a bundle")
    assert refusal(run(data, "-o", "file/m")) == "error: file is no folder, or lies in a file; choose another output"
    assert refusal(run(data, "-o", "file/a/m")) == "error: file/a is no folder, or lies in a file; choose another output"
    assert refusal(run(data, "-o", "m", "--work", "file")) == "error: file is no folder, or lies in a file; choose another work folder"
    assert refusal(run(data, "-o", "/proc/m")).startswith("error: nothing can be written into /proc (")


def test_verbose_logs(run: Run, data: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(train_command, "configure_logging", lambda *, verbose: seen.append(verbose))
    run(data, "--plan-only", "--work", work, "--workers", "0", "--verbose")
    run(data, "--plan-only", "--work", work, "--workers", "0")
    assert seen == [True, False]


def test_the_line_of_an_iteration() -> None:
    step = Step(20, 100, 0.5, 0.25, 0.01, 1.5, 0.25, 90.4)
    assert step_text(step) == "loss 0.5000, Dice 0.2500, lr 1.00e-02, batch 1.500 s, reader 0.250 s, ETA 0:01:30"


def test_the_line_of_an_epoch() -> None:
    means = EpochMeans(3, 10, 0.5, 0.8, 0.66667, 0.75, 0.6, 0.01)
    expected = "epoch 3/12: mean loss 0.5000, Dice 0.8000, IoU 0.6667, validation Dice 0.7500, validation IoU 0.6000, lr 1.00e-02"
    assert epoch_text(means, 115) == expected


def test_in_a_pipe_there_are_lines_and_none_from_the_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with TrainBars(2, quiet=quiet) as bars:
            bars.show.stage("training [fold 0]")
            assert bars.show.cases is not None
            assert bars.show.step is not None
            bars.show.cases(1, 2)
            for i in range(1, 6):
                bars.show.step(Step(i, 5, 0.5, None, 0.01, 1.5, 0.25, 0.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["training [fold 0]", "iteration 2/5", "iteration 4/5", "iteration 5/5"]


def test_alone_there_is_no_group() -> None:
    assert is_first({})
    assert is_first({"RANK": "0"})
    assert not is_first({"RANK": "1"})
    with join_processes({}, "auto") as device:
        assert device == "auto"


class _StopsInTheEnd:
    """An object in whose finaliser a signal arrives."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_even_where_python_drops_its_exception(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with ending_on_signals({}):
            _StopsInTheEnd(number)
            for _ in range(1000):
                time.sleep(0.01)

    with pytest.raises(typer.Exit) as left:
        work()
    assert left.value.exit_code == 130
    assert capfd.readouterr().err == "stopped; the same command goes on from here\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_of_a_group_keep_their_own_way_of_ending() -> None:
    with ending_on_signals({"WORLD_SIZE": "2"}):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
