"""Pairs from beginning to end: segrt-train scores two configurations together, segrt-build and segrt-predict take them as one model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from train_jobs import write_dataset

from segrt.bundle import Bundle
from segrt.errors import InputError, SpecError
from segrt.io import read_labels
from segrt.metrics import dice
from segrt.predictor import Predictor
from segrt.train.config import make_config
from segrt.train.pairs import name_candidates, split_pair
from segrt.train.run import train_model
from segrt.train.validate import load_summary

PAIR = "2d+3d_fullres"
QUICK = {
    "iterations": 2,
    "width": 0.125,
    "validation_interval": 2,
    "validation_batches": 1,
    "workers": 0,
    "device": "cpu",
    "split": "kfold",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a training of two folds of two configurations; its bundle is the pair, whichever is best."""
    folder = tmp_path_factory.mktemp("pair")
    config = make_config("nnunet", **{**QUICK, "folds": ("0", "1"), "configuration": PAIR})  # type: ignore[arg-type]
    assert train_model(data, folder / "model", config, work=folder / "work") is not None
    return folder


def test_a_pair_is_one_bundle_that_predicts_what_was_scored(work: Path, data: Path) -> None:
    bundle = Bundle.open(work / "model")
    assert bundle.partner is not None
    assert (bundle.spec.dimensions, bundle.partner.spec.dimensions) == (2, 3)
    assert bundle.spec.members == bundle.partner.spec.members == ("0", "1")
    scored = [load_summary(work / "work" / PAIR / f"fold_{fold}" / "validation") for fold in "01"]
    for fold, summary in zip("01", scored, strict=True):
        with Predictor(bundle, folds=[fold], backend="pytorch", device="cpu", postprocess=False) as predictor:
            for case in summary.cases:
                labels = predictor(data / "imagesTr" / f"{case.name}_0000.nii.gz").labels
                np.testing.assert_array_equal(labels, read_labels(case.prediction)[0])
    # the bundles of single folds were only there to be scored
    assert not list((work / "work" / PAIR).rglob("model.json"))


def test_reports_tell_of_the_pair_and_of_each(work: Path) -> None:
    reports = work / "model" / "reports"
    pair, one = (json.loads((reports / name).read_text()) for name in ("summary.json", "summary_2d.json"))
    assert len(pair["metric_per_case"]) == len(one["metric_per_case"]) == 2
    assert pair["model"] != one["model"]
    chosen = json.loads((reports / "postprocess.json").read_text())
    assert chosen["model"] == pair["model"]
    assert (work / "model" / "partner" / "reports" / "summary.json").is_file()


@pytest.mark.slow
def test_build_and_predict_take_a_pair_like_any_bundle(work: Path, data: Path, tmp_path: Path) -> None:
    told = run_command("build", work / "model", "--device", "cpu").stdout
    assert "a pair with data in" in told
    bundle = Bundle.open(work / "model")
    for part in (bundle, bundle.partner):
        assert part is not None
        assert list((part.path / "engines").glob("openvino-*"))
    summary = load_summary(work / "work" / PAIR / "fold_1" / "validation")
    images = tmp_path / "images"
    images.mkdir()
    for case in summary.cases:
        (images / f"{case.name}_0000.nii.gz").symlink_to(data / "imagesTr" / f"{case.name}_0000.nii.gz")
    run_command("predict", images, tmp_path / "out", "-m", work / "model", "--device", "cpu", "--folds", "1", "--no-postprocess")
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(record["settings"]["engines"]) == 2
    assert record["bundle_sha256"] == bundle.fingerprint
    for case in summary.cases:
        labels, _ = read_labels(tmp_path / "out" / f"{case.name}.nii.gz")
        truth, _ = read_labels(data / "labelsTr" / f"{case.name}.nii.gz")
        assert list(dice(truth, labels, [2, 5]).values()) == pytest.approx(list(case.dice.values()), abs=5e-4)


def test_the_best_of_configurations_and_pairs(work: Path, data: Path) -> None:
    """Nothing is trained again: what the fixture trained is compared."""
    config = make_config("nnunet", **{**QUICK, "folds": ("0", "1")})  # type: ignore[arg-type]
    bundle = train_model(data, work / "best", config, work=work / "work", candidates=("2d", "3d_fullres"))
    assert bundle is not None
    scores = json.loads((bundle.path / "reports" / "configurations.json").read_text())
    values = {name: entry["mean_dice"] for name, entry in scores["configurations"].items()}
    assert list(values) == ["2d", "3d_fullres", PAIR]
    assert {entry["cases"] for entry in scores["configurations"].values()} == {2}
    assert scores["best"] == max(values, key=lambda name: values[name])
    assert (bundle.partner is not None) == (scores["best"] == PAIR)


def test_pairs_may_be_left_out(work: Path, data: Path) -> None:
    same = ("--iters", 2, "--width", 0.125, "--validation-interval", 2, "--validation-batches", 1, "--workers", 0, "--split", "kfold")
    flags = ("--find-best", "-c", "2d,3d_fullres", "--no-pairs", "-f", "0,1", "--device", "cpu", "--work", work / "work")
    run_command("train", data, "-o", work / "single", *same, *flags)
    scores = json.loads((work / "single" / "reports" / "configurations.json").read_text())
    assert list(scores["configurations"]) == ["2d", "3d_fullres"]
    assert Bundle.open(work / "single").partner is None


def test_candidates_are_named_in_nnunets_order() -> None:
    planned = ("2d", "3d_fullres", "3d_lowres")
    everything = ("2d", "3d_fullres", "3d_lowres", "2d+3d_fullres", "2d+3d_lowres", "3d_fullres+3d_lowres")
    assert name_candidates("3d_fullres", (), planned, pairs=True) == everything
    assert name_candidates("3d_fullres", (), planned, pairs=False) == planned
    assert name_candidates("3d_fullres", None, planned, pairs=True) == ("3d_fullres",)
    assert name_candidates("3d_fullres", ("2d", "2d+3d_lowres"), planned, pairs=True) == ("2d", "2d+3d_lowres")


@pytest.mark.parametrize("name", ["2d+2d", "2d+", "2d+3d_lowres+3d_fullres"])
def test_what_is_no_pair_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="a pair is two different ones, such as 2d"):
        split_pair(name)


def test_a_pair_of_something_unknown_is_refused(tmp_path: Path, data: Path) -> None:
    config = make_config("nnunet", **{**QUICK, "configuration": "2d+4d"})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="expected one the plan has"):
        train_model(data, tmp_path / "m", config)
