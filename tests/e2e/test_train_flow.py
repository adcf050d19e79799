"""The TRAIN flow in one process: cascades, the best configuration, a V-Net, regions, and what earlier runs left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_jobs import write_dataset

from segrt.bundle import Bundle
from segrt.errors import InputError, SpecError
from segrt.export.scoring import remembered
from segrt.io import read_labels
from segrt.predictor import Predictor
from segrt.spec import SpacingTarget
from segrt.train.config import TrainConfig, make_config
from segrt.train.dataset import open_dataset
from segrt.train.fingerprint import measure
from segrt.train.folds import Show
from segrt.train.kept import digest_of
from segrt.train.loop import Step
from segrt.train.nnunet_spec import cascade
from segrt.train.plan import plan_nnunet
from segrt.train.run import train_model
from segrt.train.splits import split_of
from segrt.train.validate import load_summary

SHORT: dict[str, Any] = {
    "iterations": 2,
    "width": 0.125,
    "validation_interval": 2,
    "validation_batches": 1,
    "workers": 0,
    "split": "sorted:0.6",
}


def _config(model: str = "nnunet", **changes: Any) -> TrainConfig:
    return make_config(model, **{**SHORT, "device": "cpu", **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data")


def _same_as_validation(bundle: Bundle, validation: Path, data: Path, **options: Any) -> None:
    """The bundle gives the label maps of the validation."""
    with Predictor(bundle, backend="pytorch", device="cpu", postprocess=False) as predictor:
        for case in load_summary(validation).cases:
            found = predictor(data / "imagesTr" / f"{case.name}_0000.nii.gz", **{k: v / f"{case.name}.nii.gz" for k, v in options.items()})
            np.testing.assert_array_equal(found.labels, read_labels(case.prediction)[0])


def test_a_vnet_goes_back_onto_the_images_own_grid(tmp_path: Path, data: Path) -> None:
    """Its images are resized to a fixed shape; PaddleSeg's exported V-Net did not know that (#3298)."""
    config = _config("vnet", patch=(16, 16, 16), batch_size=2)
    bundle = train_model(data, tmp_path / "m", config)
    assert bundle is not None
    assert bundle.spec.inference.patch == (16, 16, 16)
    counts = load_summary(tmp_path / "m.train" / "vnet" / "fold_0" / "validation").cases[0].overlaps["ball"]
    assert counts.tp + counts.fp + counts.fn + counts.tn == 16 * 20 * 24
    _same_as_validation(bundle, tmp_path / "m.train" / "vnet" / "fold_0" / "validation", data)


def test_all_folds_become_members_and_validation_covers_every_case(tmp_path: Path, data: Path) -> None:
    bundle = train_model(data, tmp_path / "m", _config(split="kfold", folds=("0", "1", "2", "3", "4"), configuration="2d", batch_size=4))
    assert bundle is not None
    assert bundle.spec.members == ("0", "1", "2", "3", "4")
    values = json.loads((bundle.path / "reports" / "summary.json").read_text())
    assert [case["name"] for case in values["metric_per_case"]] == [f"ball_{i:03d}" for i in range(5)]
    held_back = remembered(bundle)
    assert held_back is not None
    for fold in bundle.spec.members:
        of_fold = json.loads((bundle.path / "reports" / f"fold_{fold}" / "summary.json").read_text())
        names = [case["name"] for case in of_fold["metric_per_case"]]
        assert [case.name for case in held_back.cases if case.member == fold] == names


def test_training_on_everything(tmp_path: Path, data: Path) -> None:
    """PaddleSeg#3234, #3320: no fold held back; nothing is chosen on cases it learned by heart, nor called a validation."""
    said = list[str]()
    bundle = train_model(data, tmp_path / "m", _config(folds=("all",), profile=(1, 2)), show=Show(stage=said.append))
    assert bundle is not None
    assert bundle.spec.members == ("all",)
    assert "post-processing, none: fold all holds no case back that it could be chosen on" in said
    assert bundle.spec.postprocess == ()
    assert any(text.startswith("validating fold all on its own 5 training cases") for text in said)
    assert [text for text in said if "mean Dice" in text] == [text for text in said if "on its own training cases" in text]
    assert "on its own training cases" in (bundle.path / "reports" / "dice.tex").read_text()
    assert not any("in validation" in text for text in said)
    assert any(text.startswith("segrt ") and "torch " in text for text in said)
    assert any(text.startswith("device cpu; ") and "GB of memory free" in text for text in said)
    assert any(text.startswith("fold all: time by operation\n") and "Self CPU %" in text for text in said)
    with pytest.raises(InputError, match="the training held no case back"):
        remembered(bundle)


def _cascade_plan(path: Path, data: Path) -> Path:
    """The dataset's plan with a low-resolution stage that its small images do not need."""
    dataset = open_dataset(data)
    plan = plan_nnunet(dataset, measure(dataset))
    full = plan.configurations["3d_fullres"]
    coarse = SpacingTarget(spacing=(3.0, 3.0, 3.0))
    low = full.model_copy(update={"spec": full.spec.model_copy(update={"target": coarse})})
    more = {"3d_lowres": low, "3d_cascade_fullres": cascade(full, "3d_lowres")}
    path.write_text(plan.model_copy(update={"configurations": plan.configurations | more}).to_json())
    return path


@pytest.mark.slow
def test_a_cascade_trains_its_first_stage_first(tmp_path: Path, data: Path) -> None:
    plan = _cascade_plan(tmp_path / "plan.json", data)
    config = _config(split="kfold", configuration="3d_cascade_fullres")
    bundle = train_model(data, tmp_path / "m", config, plan=plan)
    assert bundle is not None
    assert bundle.previous is not None
    assert bundle.spec.members == ("0",)
    assert bundle.previous.spec.members == ("0", "1", "2", "3", "4")
    work = tmp_path / "m.train"
    labels = work / "3d_lowres" / "labels"
    assert sorted(path.name for path in labels.iterdir()) == [f"ball_{i:03d}.nii.gz" for i in range(5)]
    _same_as_validation(bundle, work / "3d_cascade_fullres" / "fold_0" / "validation", data, previous=labels)
    with Predictor(bundle, device="cpu", backend="pytorch") as predictor:
        assert predictor(data / "imagesTr" / "ball_000_0000.nii.gz").labels.shape == (16, 20, 24)


@pytest.mark.slow
def test_a_cascade_may_be_half_of_a_pair(tmp_path: Path, data: Path) -> None:
    """Scored with the first-stage labels its second stage was trained on; the bundle predicts that stage itself."""
    plan = _cascade_plan(tmp_path / "plan.json", data)
    bundle = train_model(data, tmp_path / "m", _config(split="kfold", configuration="3d_fullres+3d_cascade_fullres"), plan=plan)
    assert bundle is not None
    assert bundle.partner is not None
    assert bundle.partner.previous is not None
    assert bundle.spec.previous is None
    work = tmp_path / "m.train"
    scored = work / "3d_fullres+3d_cascade_fullres" / "fold_0" / "validation"
    _same_as_validation(bundle, scored, data, previous=work / "3d_lowres" / "labels")
    with Predictor(bundle, device="cpu", backend="pytorch") as predictor:
        assert predictor(data / "imagesTr" / "ball_000_0000.nii.gz").labels.shape == (16, 20, 24)


def test_a_cascade_needs_labels_of_every_case(tmp_path: Path, data: Path) -> None:
    plan = _cascade_plan(tmp_path / "plan.json", data)
    with pytest.raises(InputError, match="3d_lowres: no fold holds case ball_000 back"):
        train_model(data, tmp_path / "m", _config(configuration="3d_cascade_fullres"), plan=plan)


def test_the_best_configuration_becomes_the_bundle(tmp_path: Path, data: Path) -> None:
    said: list[str] = []
    bundle = train_model(data, tmp_path / "m", _config(), candidates=("2d", "3d_fullres"), pairs=False, show=Show(stage=said.append))
    assert bundle is not None
    assert bundle.partner is None
    scores = json.loads((bundle.path / "reports" / "configurations.json").read_text())
    values = {name: entry["mean_dice"] for name, entry in scores["configurations"].items()}
    assert scores["best"] == max(values, key=lambda name: values[name])
    assert bundle.spec.dimensions == (2 if scores["best"] == "2d" else 3)
    assert any(text.startswith("mean Dice in validation: 2d ") for text in said)


def test_regions(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    described = json.loads((folder / "dataset.json").read_text())
    described |= {"labels": {"background": 0, "both": [2, 5], "bright": [5]}, "regions_class_order": [2, 5]}
    (folder / "dataset.json").write_text(json.dumps(described))
    bundle = train_model(folder, tmp_path / "m", _config())
    assert bundle is not None
    assert bundle.spec.head.activation == "sigmoid"
    values = json.loads((bundle.path / "reports" / "summary.json").read_text())
    assert set(values["mean"]) == {"(2, 5)", "5"}
    _same_as_validation(bundle, tmp_path / "m.train" / "3d_fullres" / "fold_0" / "validation", folder)


def test_a_dataset_that_changed_is_read_again_and_its_checkpoints_refused(tmp_path: Path) -> None:
    """Caches are not trusted because they exist."""
    folder = write_dataset(tmp_path / "data")
    before = digest_of(open_dataset(folder))
    assert train_model(folder, tmp_path / "m", _config()) is not None
    image = folder / "imagesTr" / "ball_000_0000.nii.gz"
    image.write_bytes((folder / "imagesTr" / "ball_001_0000.nii.gz").read_bytes())
    assert digest_of(open_dataset(folder)) != before
    said: list[str] = []
    with pytest.raises(SpecError, match="was trained for another plan"):
        train_model(folder, tmp_path / "m", _config(), force=True, show=Show(stage=said.append))
    assert "measuring 5 cases" in said


def test_other_settings_need_another_work_folder(tmp_path: Path, data: Path) -> None:
    assert train_model(data, tmp_path / "m", _config()) is not None
    with pytest.raises(
        SpecError, match=r"was trained with lr 0.01 \(now 0.1\); go on with the same settings or choose another work folder"
    ):
        train_model(data, tmp_path / "m", _config(lr=0.1), force=True)
    assert train_model(data, tmp_path / "n", _config(lr=0.1), work=tmp_path / "other") is not None


def test_once_more_trains_nothing(tmp_path: Path, data: Path) -> None:
    steps: list[Step] = []
    first = train_model(data, tmp_path / "m", _config(), show=Show(step=steps.append))
    count = len(steps)
    again = train_model(data, tmp_path / "m", _config(), show=Show(step=steps.append), force=True)
    assert count == len(steps) == 2
    assert first is not None
    assert again is not None
    assert first.fingerprint == again.fingerprint


def test_the_datasets_own_split(data: Path) -> None:
    dataset = replace(open_dataset(data), split=(("ball_003", "ball_001"), ("ball_000",)))
    assert split_of(dataset, _config(split="auto"), "0").train == ("ball_001", "ball_003")
    assert len(split_of(dataset, _config(split="kfold"), "0").train) == 4
    with pytest.raises(InputError, match="brings one split of its own, fold 0"):
        split_of(dataset, _config(split="auto"), "1")
