"""`plan_unetpp`: whole pictures or windows, one logit for one structure, and the recipe around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import volume_of, write_case

from segrt.errors import InputError, SpecError
from segrt.preprocess import preprocess
from segrt.restore import restore
from segrt.spec import Head, ShapeTarget, SpacingTarget, UNetPPSpec, WindowNorm, ZScoreNorm, parse_spec
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.config import make_config
from segrt.train.configuration import Plan
from segrt.train.fingerprint import Fingerprint
from segrt.train.losses import build_loss
from segrt.train.optim import learning_rate
from segrt.train.override import choose_configuration
from segrt.train.plan import plan_unetpp


def make_dataset(channels: tuple[str, ...] = ("red", "green", "blue"), labels: Any = None, **changes: Any) -> Dataset:
    fields: dict[str, Any] = {"name": "tumours", "folder": Path(), "channels": channels}
    fields |= {"labels": labels or {"background": (0,), "tumour": (255,)}, "cases": (TrainingCase("a", (Path("a"),), Path("b")),)}
    return Dataset(**fields | changes)


def make_fingerprint(channels: int = 3, shapes: Any = ((1, 300, 200),), spacing: Any = (999.0, 1.0, 1.0)) -> Fingerprint:
    values = {"mean": 80.0, "median": 90.0, "std": 60.0, "min": 0.0, "max": 255.0, "percentile_00_5": 10.0, "percentile_99_5": 240.0}
    return Fingerprint(spacings=(spacing,) * len(shapes), shapes=shapes, intensities=(values,) * channels, relative_size=1.0)


def planned(dataset: Dataset | None = None, fingerprint: Fingerprint | None = None, **options: Any) -> Any:
    dataset = dataset or make_dataset()
    plan = plan_unetpp(dataset, fingerprint or make_fingerprint(len(dataset.channels)), **options)
    return plan.configurations[options.get("family", "unetpp")]


def test_pictures_of_one_structure() -> None:
    configuration = planned()
    spec = configuration.spec
    assert spec.head == Head(activation="sigmoid", values=(255,))
    assert [(label.name, label.values) for label in spec.labels] == [("tumour", (255,))]
    assert spec.target == ShapeTarget(shape=(1, 304, 192))
    assert spec.inference.patch == (1, 304, 192)
    assert (spec.inference.step, spec.inference.mirror_axes) == (1.0, ())
    assert configuration.flips == (1, 2)
    assert spec.network == UNetPPSpec(family="unetpp", in_channels=3, out_channels=1, deep_supervision=True)
    assert [c.normalization for c in spec.channels] == [ZScoreNorm()] * 3
    assert configuration.batch_size == 16
    assert parse_spec(spec.model_dump(by_alias=True)) == spec
    assert "one logit" in configuration.reasons["head"]


def test_its_unet_has_one_head() -> None:
    configuration = planned(family="unet")
    assert configuration.spec.network == UNetPPSpec(family="unet", in_channels=3, out_channels=1)
    assert not configuration.deep_supervision


def test_options_reach_the_network() -> None:
    network = planned(width=0.25, deep_supervision=False, mode="fast", dropout=0.5).spec.network
    assert network.features == (8, 16, 32, 64, 128)
    assert (network.deep_supervision, network.mode, network.dropout) == (False, "fast", 0.5)


def test_several_structures_exclude_each_other() -> None:
    spec = planned(make_dataset(labels={"background": (0,), "a": (1,), "b": (2,)})).spec
    assert spec.head == Head(activation="softmax", values=(0, 1, 2))


def test_mixed_sizes_become_their_median_and_large_ones_are_made_smaller() -> None:
    dataset = make_dataset(cases=tuple(TrainingCase(name, (Path(name),), Path("b")) for name in "acd"))
    mixed = planned(dataset, make_fingerprint(shapes=((1, 100, 100), (1, 250, 190), (1, 260, 300))))
    assert mixed.spec.inference.patch == (1, 256, 192)
    assert planned(fingerprint=make_fingerprint(shapes=((1, 3000, 2000),))).spec.inference.patch == (1, 512, 336)


def test_the_size_of_pictures_is_the_files_own_not_that_without_black_borders(tmp_path: Path) -> None:
    image = write_case(tmp_path / "a.png", np.zeros((1, 64, 80), np.uint8), (999, 1, 1), dimensions=2)
    dataset = make_dataset(("grey",), cases=(TrainingCase("a", (image,), image),))
    assert planned(dataset, make_fingerprint(1, shapes=((1, 20, 20),))).spec.inference.patch == (1, 64, 80)


def test_patches_of_pictures() -> None:
    spec = planned(shape=(1, 64, 96), sliding=True).spec
    assert spec.target == SpacingTarget(spacing=(None, 1.0, 1.0))
    assert (spec.inference.patch, spec.inference.step, spec.inference.blending) == ((1, 64, 96), 0.5, "gaussian")


def test_volumes_in_3d_and_slice_by_slice() -> None:
    dataset, fingerprint = make_dataset(("CT",)), make_fingerprint(1, shapes=((40, 200, 200),), spacing=(5.0, 0.8, 0.8))
    whole = planned(dataset, fingerprint).spec
    assert (whole.network.dimensions, whole.inference.patch) == (3, (48, 64, 64))
    assert whole.target == SpacingTarget(spacing=(5.0, 0.8, 0.8))
    assert whole.channels[0].normalization == WindowNorm(lower=-1200, upper=600)
    slices = planned(dataset, fingerprint, shape=(1, 128, 128)).spec
    assert (slices.network.dimensions, slices.target) == (2, SpacingTarget(spacing=(None, 0.8, 0.8)))
    assert planned(dataset, fingerprint, shape=(32, 64, 64)).spec.target == ShapeTarget(shape=(32, 64, 64))


def test_the_way_back_is_to_the_pictures_own_size() -> None:
    spec = planned(make_dataset(("grey",)), make_fingerprint(1), shape=(1, 64, 64)).spec
    volume = volume_of(np.random.default_rng(0).integers(0, 255, (1, 1, 37, 51)).astype(np.uint8), spacing=(999.0, 1.0, 1.0))
    data, placement = preprocess(volume, spec)
    assert data.shape == (1, 1, 64, 64)
    logits = np.full((1, 1, 64, 64), -1.0, np.float32)
    logits[..., 16:48, 16:48] = 1
    labels = restore(logits, placement, spec)
    assert labels.shape == (1, 37, 51)
    assert set(np.unique(labels)) == {0, 255}
    assert abs((labels > 0).mean() - 0.25) < 0.05


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": (1, 60, 64)}, "expected multiples of 16 on axis y, got 60"),
        ({"shape": (16, 64, 64)}, "patch: dataset tumours holds pictures, so z is 1"),
        ({"width": 0.01}, "width: expected 1/32 to 64 times"),
        ({"fingerprint": make_fingerprint(1)}, "the fingerprint is of 1 channels, dataset tumours has 3"),
    ],
)
def test_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        planned(**options)


def test_no_mirroring() -> None:
    plan = Plan.model_validate(plan_unetpp(make_dataset(), make_fingerprint()).model_dump(by_alias=True))
    assert choose_configuration(plan, make_config("unetpp")).flips == (1, 2)
    assert choose_configuration(plan, make_config("unetpp", mirroring=False)).flips == ()


# ------------------------------------------------------------------ the recipe
def test_lengths_are_passes_over_the_training_cases() -> None:
    config = make_config("unetpp", passes=30).with_epoch(230, 16)
    assert (config.epoch, config.iterations, config.epochs) == (15, 450, 30)
    assert (config.validation_interval, config.save_interval) == (15, 15)
    assert make_config("unetpp", iterations=7).with_epoch(230, 16).iterations == 7
    by_clock = make_config("unetpp", minutes=3)
    assert (by_clock.passes, by_clock.iterations) == (None, 250_000)
    assert make_config("nnunet").with_epoch(230, 2) == make_config("nnunet")


def test_cosine_ends_at_a_share_of_the_rate() -> None:
    config = make_config("unetpp", lr=0.1, lrf=0.2, passes=10, schedule_by_epoch=True).with_epoch(64, 16)
    assert config.schedule == "cosine"
    for epoch in range(10):
        expected = 0.1 * (((1 + np.cos(np.pi * epoch / 10)) / 2) * (1 - 0.2) + 0.2)
        assert learning_rate(config, epoch * config.epoch, 40) == pytest.approx(expected)
    assert learning_rate(config, 40, 40) == pytest.approx(0.02)
    assert learning_rate(config, 0, 40, spent=1.0) == pytest.approx(0.02)


def test_step_falls_after_epochs_10_and_20() -> None:
    config = make_config("unetpp", schedule="step", lr=1.0, passes=30).with_epoch(64, 16)
    rates = [learning_rate(config, 4 * epoch, 120) for epoch in range(30)]
    np.testing.assert_allclose(rates, [1.0] * 10 + [0.1] * 10 + [0.01] * 10)


def test_constant() -> None:
    config = make_config("unetpp", schedule="constant", lr=0.5).with_epoch(64, 16)
    assert learning_rate(config, 399, 400) == 0.5


# ------------------------------------------------------------------ losses
def _reference(logits: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Binary cross-entropy over all pixels, and the mean over images of the soft Dice, in float64."""
    p = 1 / (1 + np.exp(-logits))
    bce = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()
    axes = (1, 2, 3)
    dice = (2 * (p * truth).sum(axes) + 1e-5) / (p.sum(axes) + truth.sum(axes) + 1e-5)
    return float(bce), float(dice.mean())


@pytest.mark.parametrize("kind", ["bce", "hybrid"])
def test_losses_against_their_formulas(kind: Any) -> None:
    import torch

    spec = planned().spec
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=(3, 1, 8, 8)) for _ in range(4)]
    truth = rng.integers(0, 2, (3, 1, 8, 8))
    truth[2] = 0
    loss, _ = build_loss(spec, kind=kind, deep_supervision=True)([torch.from_numpy(h) for h in heads], torch.from_numpy(truth))
    each = [_reference(head, truth) for head in heads]
    expected = np.mean([bce if kind == "bce" else 0.5 * bce - dice for bce, dice in each])
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_hybrid_of_labels_that_exclude_each_other() -> None:
    import torch

    spec = planned(make_dataset(labels={"background": (0,), "a": (1,), "b": (2,)}), deep_supervision=False).spec
    logits, target = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randint(0, 3, (2, 8, 8))
    loss, parts = build_loss(spec, kind="hybrid")(logits, target)
    assert float(loss) == pytest.approx(float(0.5 * parts["ce"] + parts["dice"]), rel=1e-12)
    with pytest.raises(SpecError, match="loss: 'bce' needs one logit per structure"):
        build_loss(spec, kind="bce")
