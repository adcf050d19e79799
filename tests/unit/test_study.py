"""The optimizer study without a training: what each run is told, how cores are shared, tables, picture, and what is refused."""

from __future__ import annotations

import csv
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from train_jobs import write_dataset

from segrt.cli import study as study_command
from segrt.cli.studying import StudyBars, per_run, print_study
from segrt.errors import InputError, SpecError
from segrt.report.curves import write_comparison
from segrt.report.tables import write_panels, write_rows
from segrt.train.config import make_config
from segrt.train.loop import Step
from segrt.train.records import Records
from segrt.train.study_jobs import share_cores
from segrt.train.study_plan import RECIPES, plan_runs
from segrt.train.study_results import RunRecord, Study, load_study


# ------------------------------------------------------------------ runs
def test_every_model_meets_every_optimizer() -> None:
    runs = plan_runs(["nnunet", "vnet"], ["sgd", "adamw"], iterations=10)
    assert [run.name for run in runs] == ["nnunet-sgd", "nnunet-adamw", "vnet-sgd", "vnet-adamw"]
    assert [(run.config.model, run.config.optimizer) for run in runs] == [tuple(run.name.split("-")) for run in runs]
    assert {run.config.seed for run in runs} == {make_config().seed}
    assert [run.config.lr for run in runs] == [RECIPES[run.config.model][run.config.optimizer]["lr"] for run in runs]


def test_a_value_may_be_for_a_run_an_optimizer_or_a_model() -> None:
    rates = {"vnet-sgd": "0.5", "sgd": "0.25", "vnet": "0.125"}
    runs = plan_runs(["nnunet", "vnet"], ["sgd", "adam"], iterations=10, lr=rates, width="0.5", patch={"vnet": ("16", "16", "16")})
    assert [run.config.lr for run in runs] == [0.25, RECIPES["nnunet"]["adam"]["lr"], 0.5, 0.125]
    assert [run.config.width for run in runs] == [0.5] * 4
    assert [run.config.patch for run in runs] == [None, None, (16, 16, 16), (16, 16, 16)]


def test_minutes_are_not_cut_short_by_a_recipes_iterations() -> None:
    (run,) = plan_runs(["vnet"], ["adam"], minutes=600)
    assert run.config.iterations > 10**8
    assert run.config.length == "600 minutes"
    assert not run.config.schedule_by_epoch


@pytest.mark.parametrize(
    ("models", "changes", "error", "sentence"),
    [
        (
            ["nnunet"],
            {"lr": {"sdg": 1}},
            InputError,
            "lr: 'sdg' is no run, optimizer or model of this study; expected one of adam, nnunet, ",
        ),
        (["nnunet"], {"patch": {"sgd": (8, 8, 8)}}, InputError, r"patch: .* share their prepared cases, .* by model \(nnunet\), got 'sgd'"),
        (["nnunet", "nnunet"], {}, InputError, "models: expected each model once, got nnunet, nnunet"),
        ([], {}, InputError, "models: expected each model once, got none"),
        (["segnet"], {}, SpecError, "training: model: expected 'nnunet', 'vnet', 'unetpp' or 'unet', got 'segnet'"),
        (["vnet"], {"lr": {"sgd": -1}}, SpecError, "training: lr: .*got -1"),
    ],
)
def test_wrong_runs_are_refused(models: Any, changes: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        plan_runs(models, ["sgd", "adam"], **changes)


def test_what_an_option_says() -> None:
    assert per_run(None) is None
    assert per_run("0.01") == "0.01"
    assert per_run("8,16,16") == ("8", "16", "16")
    assert per_run("sgd=0.01, vnet-adamw=0.003") == {"sgd": "0.01", "vnet-adamw": "0.003"}
    assert per_run("nnunet=40,56,40,vnet=48,64,48") == {"nnunet": ("40", "56", "40"), "vnet": ("48", "64", "48")}
    assert per_run("3d_fullres", model="nnunet") == {"nnunet": "3d_fullres"}
    with pytest.raises(InputError, match=r"'0.1,sgd=0.01': expected one value for all runs, or NAME=VALUE from the first on"):
        per_run("0.1,sgd=0.01")


# ------------------------------------------------------------------ cores
def test_runs_at_once_share_no_core() -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert len(share_cores(1)[0]) == usable
    slots = share_cores(usable)
    assert len({core for slot in slots for core in slot}) == usable == len(slots)
    assert len(share_cores(1, 1)[0]) == 1
    for jobs, cores in ((usable + 1, None), (1, usable + 1), (0, None), (1, 0)):
        with pytest.raises(InputError, match=rf"jobs: {usable} cores can be used here, too few for {jobs} runs at once"):
            share_cores(jobs, cores)


# ------------------------------------------------------------------ tables and picture
PANELS = {
    "without": {"nnunet-sgd": {"left_kidney": 0.5, "liver": 0.75}, "vnet-sgd": {"left_kidney": 0.25, "liver": math.nan}},
    "with": {"nnunet-sgd": {"left_kidney": 0.5, "liver": 0.75}, "vnet-sgd": {"left_kidney": 0.625, "liver": math.nan}},
}


def test_tables_with_and_without_post_processing(tmp_path: Path) -> None:
    paths = write_panels(tmp_path / "dice", "post-processing", PANELS, caption="Dice & more")
    assert [path.name for path in paths] == ["dice.csv", "dice.md", "dice.tex"]
    rows = list(csv.reader(paths[0].read_text().splitlines()))
    assert rows == [
        ["organ", "post-processing", "nnunet-sgd", "vnet-sgd"],
        ["left_kidney", "without", "0.5", "0.25"],
        ["liver", "without", "0.75", ""],
        ["mean", "without", "0.625", "0.25"],
        ["left_kidney", "with", "0.5", "0.625"],
        ["liver", "with", "0.75", ""],
        ["mean", "with", "0.625", "0.625"],
    ]
    markdown = paths[1].read_text()
    assert markdown.startswith("Dice & more\n\nwithout post-processing:\n\n| organ | nnunet-sgd | vnet-sgd |\n|---|---|---|\n")
    assert "with post-processing:" in markdown
    assert "| left_kidney | 0.5000 | **0.6250** |" in markdown
    latex = paths[2].read_text()
    assert r"\caption{Dice \& more}" in latex
    assert r"\multicolumn{3}{l}{\emph{with post-processing}} \\" in latex
    assert r"left\_kidney & 0.5000 & \textbf{0.6250} \\" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1
    with pytest.raises(InputError, match="no run given"):
        write_panels(tmp_path / "none", "post-processing", {"without": {}}, caption="")


def test_tables_of_text(tmp_path: Path) -> None:
    paths = write_rows(tmp_path / "runs", [{"run": "a|b", "training (min)": "5.00"}], caption="Runs")
    assert paths[0].read_text() == "run,training (min)\na|b,5.00\n"
    assert paths[1].read_text() == "Runs\n\n| run | training (min) |\n|---|---|\n| a\\|b | 5.00 |\n"
    assert r"a|b & 5.00 \\" in paths[2].read_text()
    with pytest.raises(InputError, match="no row given"):
        write_rows(tmp_path / "none", [], caption="")


def _fill(folder: Path, last: int) -> Path:
    with Records(folder, ("liver",)) as records:
        for i in range(1, last + 1):
            records.training(i, {"loss": 1 / i, "dice": None, "lr": 0.01, "batch_cost": 0.5, "reader_cost": 0.1})
            if i % 4 == 0:
                records.validation(i, {"loss": 2 / i, "dice": 1 - 1 / i, "average": 0.4}, [0.5])
    return folder


def test_all_runs_in_one_picture(tmp_path: Path) -> None:
    runs = {("nnunet", "sgd"): [_fill(tmp_path / "a", 200), _fill(tmp_path / "b", 90)], ("vnet", "adam"): [_fill(tmp_path / "c", 3)]}
    write_comparison(tmp_path / "curves.png", runs)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no run given"):
        write_comparison(tmp_path / "none.png", {})


# ------------------------------------------------------------------ study.json
def _study(**changes: Any) -> Study:
    pairs = {"nnunet-sgd": (0.5, 0.5), "nnunet-adam": (0.75, 0.8), "vnet-sgd": (None, None)}
    runs = [
        {
            "name": name,
            "config": make_config(name.split("-")[0], optimizer=name.split("-")[1], iterations=9),  # type: ignore[arg-type]
            "cores": 2,
            "status": "finished",
            "validation": 4,
            "iterations": (9,),
            "training_s": (90.0,),
            "iteration_s": 10.0,
            "parameters": 1234,
            "dice": {"liver": {"without": pair[0], "with": pair[1]}},
            "mean_dice": {"without": pair[0], "with": pair[1]},
        }
        for name, pair in pairs.items()
    ]
    failed = RunRecord(
        name="vnet-adam", config=make_config("vnet", optimizer="adam"), cores=2, status="failed", error="the loss became nan"
    )
    records = (*(RunRecord.model_validate(run) for run in runs), failed)
    return Study(**{"schema": 1, "dataset": "amos", "digest": "0", "environment": {"cores": 2}, "runs": records, **changes})


def test_a_study_is_stored_as_it_is(tmp_path: Path) -> None:
    study = _study()
    (tmp_path / "study.json").write_text(study.to_json())
    assert load_study(tmp_path / "study.json") == study
    assert study.best is not None
    assert study.best.name == "nnunet-adam"
    assert [run.name for run in study.finished] == ["nnunet-sgd", "nnunet-adam", "vnet-sgd"]
    assert study.panels["with"]["nnunet-adam"] == {"liver": 0.8}
    assert math.isnan(study.panels["with"]["vnet-sgd"]["liver"])
    assert study.caption == (
        "Dice (1 is best) on amos, mean over 4 validation cases, after 9 iterations of training; best of a row in bold"
    )
    row = study.rows[1]
    assert (row["optimizer"], row["parameters"], row["training (min)"], row["with"]) == (
        "adam, betas 0.9, 0.999",
        "1,234",
        "1.50",
        "0.8000",
    )
    assert _study(runs=()).best is None


def test_what_is_no_study_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"schema": 2}')
    with pytest.raises(SpecError, match=r"study.json: no readable study .*choose another folder, or --force"):
        load_study(tmp_path / "study.json")


# ------------------------------------------------------------------ what is shown
@pytest.mark.parametrize("terminal", [False, True])
def test_runs_at_once_are_shown_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with StudyBars() as bars:
        show = bars.show
        for iteration in (1, 2, 3):
            for name in ("nnunet-sgd", "vnet-sgd"):
                assert show.step is not None
                show.step(name, Step(iteration, 3, 0.5, 0.75, 0.01, 0.1, 0.01, 3.0 - iteration))
        show.stage("vnet-sgd", "finished")
        show.stage("nnunet-sgd", "finished")
    err = capsys.readouterr().err
    assert "vnet-sgd: finished" in err
    assert "Dice 0.7500" in err
    assert ("nnunet-sgd: iteration 3 of about 3, loss 0.5000" in err) is not terminal


def test_the_end_of_a_study_names_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_study(_study(), Path("study"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "nnunet-adam  mean Dice 0.7500, 0.8000 with post-processing"
    assert lines[2] == "vnet-sgd     mean Dice -, - with post-processing"
    assert lines[3] == "vnet-adam    failed: the loss became nan"
    assert lines[4].startswith(f"best: {Path('study') / 'nnunet-adam'}")


# ------------------------------------------------------------------ the command, refusing
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


WRONG = [
    (["--minutes", "-1"], "minutes"),
    (["--iters", "0"], "iterations"),
    (["--config", "nnunet="], "configuration"),
    (["--fold", "0,0"], "folds: expected no fold twice"),
    (["--fold", "a"], "fold: expected a number or all, got 'a'"),
    (["--split", "none"], "split: 'none' is neither kfold"),
    (["--planner", "resnet"], "planner"),
    (["--memory-gb", "-1"], "memory_gb"),
    (["--batch-size", "0"], "batch_size"),
    (["--batch", "sgd=0"], "batch_size"),
    (["--patch", "1,2"], "patch"),
    (["--width", "vnet=0"], "width"),
    (["--lr", "vnet-sgd=0"], "lr"),
    (["--momentum", "1"], "momentum"),
    (["--momentum", "0", "--nesterov"], "momentum: nesterov needs more than 0"),
    (["--momentum", "nnunet=0", "--no-nesterov", "--lr", "0"], "lr"),
    (["--weight-decay", "-1"], "weight_decay"),
    (["--schedule", "flat"], "schedule"),
    (["--loss", "focal"], "loss"),
    (["--augmentation", "much"], "augmentation"),
    (["--precision", "fp8"], "precision"),
    (["--clip", "-1"], "clip"),
    (["--seed", "-1"], "seed"),
    (["--workers", "-1"], "workers"),
    (["--validation-interval", "-1"], "validation_interval"),
    (["--validation-batches", "-1"], "validation_batches"),
    (["--save-interval", "-1"], "save_interval"),
    (["--weights", "first"], "weights"),
    (["--window", "bone"], "window"),
    (["--cache-dtype", "int8"], "cache"),
    (["--cache-storage", "zarr"], "storage"),
    (["--l1", "-1"], "l1"),
    (["--labels", "nowhere.json"], "nowhere.json: not a readable file of labels"),
    (["--masks", "nowhere"], "nowhere"),
    (["--mask-threshold", "0"], "mask_threshold: grey masks hold one structure"),
    (["--npy-window", "lung"], "npy_window: expected article, abdomen, none, or"),
    (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    (["--jobs", "1000"], "jobs: "),
    (["--cores", "1000"], "too few for 1 runs at once with 1000 cores each"),
    (["--models", "nnunet,segnet"], "model"),
    (["--optimizers", "rmsprop"], "optimizer"),
    (["--channels", "CT,T1"], "channel"),
    (["--image-suffix", "_t1", "--label-suffix", "_t1"], "suffix"),
    (["--minutes", "1", "--iters", "1"], "one budget for all runs: --minutes or --iters"),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_a_wrong_value_of_each_flag_is_a_sentence(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    budget = [] if {"--iters", "--minutes"} & set(flags) else ["--iters", "1"]
    monkeypatch.setattr(sys, "argv", ["segrt-study", str(data), "-o", str(tmp_path / "study"), *budget, *flags])
    with pytest.raises(SystemExit) as left:
        study_command.main()
    err = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2, err
    assert sentence in err[err.index("error: ") :]
    assert "Traceback" not in err


def test_a_study_has_a_budget(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["segrt-study", str(data)])
    with pytest.raises(SystemExit):
        study_command.main()
    assert "a study needs one budget for all runs: --minutes or --iters" in capsys.readouterr().err


def test_pairs_are_not_for_a_study() -> None:
    with pytest.raises(InputError, match="configuration: a study compares single models, not pairs, got '2d"):
        plan_runs(["nnunet"], ["sgd"], configuration={"nnunet": "2d+3d_fullres"}, iterations=1)
