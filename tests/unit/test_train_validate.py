"""Validation: the runtime's own way on the image's own grid, nnU-Net's summary, kept only for the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import UNET_3D, make_spec
from train_jobs import write_dataset

from segrt.bundle import Bundle
from segrt.errors import InputError
from segrt.io import read_labels
from segrt.metrics import Overlap, dice
from segrt.networks import build
from segrt.predictor import Predictor
from segrt.spec import Channel, Label, SpacingTarget, ZScoreNorm
from segrt.train.dataset import open_dataset, read_training_case
from segrt.train.validate import CaseScores, Summary, load_summary, merge, validate


def _bundle(path: Path, seed: int = 0) -> Bundle:
    """A random network at another spacing than the images'."""
    spec = make_spec(
        values=(0, 2, 5),
        network=UNET_3D,
        channels=(Channel(name="MR", normalization=ZScoreNorm()),),
        labels=(Label(name="ball", values=(2,)), Label(name="bright ball", values=(5,))),
        target=SpacingTarget(spacing=(3.0, 3.0, 3.0)),
        mirror_axes=(0, 1, 2),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Bundle.create(path, spec, weights={"0": build(UNET_3D).state_dict()}, force=True)


def test_it_is_what_the_predictor_gives(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "data", cases=3))
    bundle, seen = _bundle(tmp_path / "bundle"), list[tuple[int, int]]()
    summary = validate(
        dataset, ["ball_002", "ball_000"], bundle, tmp_path / "out", device="cpu", progress=lambda *counts: seen.append(counts)
    )
    assert [case.name for case in summary.cases] == ["ball_000", "ball_002"]
    assert seen == [(1, 2), (2, 2)]
    with Predictor(bundle, backend="pytorch", device="cpu") as predictor:
        for case in (dataset.cases[0], dataset.cases[2]):
            volume, truth = read_training_case(case, dataset)
            expected = predictor(case.images[0]).labels
            written, grid = read_labels(tmp_path / "out" / f"{case.name}.nii.gz")
            np.testing.assert_array_equal(written, expected)
            assert volume.grid.mismatch(grid) is None
            scores = dice(truth, expected, [2, 5])
            found = next(c for c in summary.cases if c.name == case.name)
            assert list(found.dice.values()) == pytest.approx([scores[2], scores[5]], nan_ok=True)


def test_finished_cases_are_kept_for_the_same_weights_only(tmp_path: Path) -> None:
    """MedicalSeg loaded everything before it looked what was done, and trusted files by their existence."""
    dataset = open_dataset(write_dataset(tmp_path / "data", cases=2))
    out, names = tmp_path / "out", ["ball_000", "ball_001"]
    bundle = _bundle(tmp_path / "a")
    first = validate(dataset, names[:1], bundle, out, device="cpu")
    label = out / "ball_000.nii.gz"
    before = label.stat().st_mtime_ns
    both = validate(dataset, names, bundle, out, device="cpu")
    assert label.stat().st_mtime_ns == before
    assert both.cases[0] == first.cases[0]
    other = validate(dataset, names, _bundle(tmp_path / "b", seed=1), out, device="cpu")
    assert label.stat().st_mtime_ns != before
    assert other.model != both.model
    label.unlink()
    assert validate(dataset, names, _bundle(tmp_path / "b", seed=1), out, device="cpu") == other
    assert label.is_file()


def _summary() -> Summary:
    structures = {"whole": (1, 2), "core": (2,)}
    cases = (
        CaseScores("a", Path("p/a.nii.gz"), Path("r/a.nii.gz"), {"whole": Overlap(6, 2, 2, 90), "core": Overlap(0, 0, 0, 100)}),
        CaseScores("b", Path("p/b.nii.gz"), Path("r/b.nii.gz"), {"whole": Overlap(1, 0, 0, 9), "core": Overlap(1, 1, 1, 7)}),
    )
    return Summary(cases, structures, "abc")


def test_the_summary_is_nnunets(tmp_path: Path) -> None:
    summary = _summary()
    assert summary.dice == {"whole": (0.75 + 1) / 2, "core": 0.5}
    assert summary.mean_dice == pytest.approx((0.875 + 0.5) / 2)
    (tmp_path / "summary.json").write_text(summary.to_json())
    values = json.loads((tmp_path / "summary.json").read_text())
    assert values["foreground_mean"]["Dice"] == pytest.approx(summary.mean_dice)
    assert values["mean"]["(1, 2)"]["Dice"] == 0.875
    assert values["mean"]["2"]["TP"] == 0.5
    assert values["metric_per_case"][0]["metrics"]["2"] == {
        "Dice": None,
        "IoU": None,
        "TP": 0,
        "FP": 0,
        "FN": 0,
        "TN": 100,
        "n_pred": 0,
        "n_ref": 0,
    }
    assert load_summary(tmp_path) == summary


def test_a_structure_nobody_has_leaves_the_mean_alone() -> None:
    case = CaseScores("a", Path("a"), Path("a"), {"here": Overlap(1, 1, 1, 1), "nowhere": Overlap(0, 0, 0, 4)})
    summary = Summary((case,), {"here": (1,), "nowhere": (2,)}, "")
    assert summary.mean_dice == 0.5
    assert math.isnan(summary.dice["nowhere"])


def test_folds_together() -> None:
    one = _summary()
    other = Summary((CaseScores("a", Path("q"), Path("r"), one.cases[1].overlaps),), one.structures, "def")
    together = merge([one, other])
    assert [case.name for case in together.cases] == ["a", "b"]
    assert together.cases[0] == one.cases[0]
    assert together.model == "abc,def"


@pytest.mark.parametrize("text", ["", "{}", '{"structures": [], "metric_per_case": [1], "model": ""}'])
def test_no_summary(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(InputError, match="not a readable summary of a validation"):
        load_summary(tmp_path)
