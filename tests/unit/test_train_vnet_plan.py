"""`plan_vnet`: the article's recipe as a specification that carries all of its preprocessing, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import volume_of

from segrt.errors import InputError, SpecError
from segrt.preprocess import place_labels, preprocess
from segrt.restore import restore
from segrt.spec import NoNorm, ShapeTarget, SpacingTarget, VNetSpec, WindowNorm, ZScoreNorm, parse_spec
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.configuration import Plan, load_plan
from segrt.train.fingerprint import Fingerprint
from segrt.train.plan import plan_vnet

ORGANS = 15


def make_dataset(channels: tuple[str, ...] = ("CT",), **changes: Any) -> Dataset:
    labels = {"background": (0,), **{f"organ {k}": (k,) for k in range(1, ORGANS + 1)}}
    fields: dict[str, Any] = {"name": "amos", "folder": Path(), "channels": channels, "labels": labels}
    return Dataset(**fields | {"cases": (TrainingCase("a", (Path("a"),), Path("b")),)} | changes)


def make_fingerprint(channels: int = 1, shape: tuple[int, int, int] = (100, 512, 512)) -> Fingerprint:
    values = {"mean": 80.0, "median": 90.0, "std": 60.0, "min": -990.0, "max": 1800.0, "percentile_00_5": -120.0, "percentile_99_5": 310.0}
    return Fingerprint(spacings=((5.0, 0.7, 0.7),) * 3, shapes=(shape,) * 3, intensities=(values,) * channels, relative_size=1.0)


def vnet(dataset: Dataset | None = None, **options: Any) -> Any:
    dataset = dataset or make_dataset()
    return plan_vnet(dataset, make_fingerprint(len(dataset.channels)), **options).configurations["vnet"]


def test_the_articles_recipe() -> None:
    planned = vnet()
    spec = planned.spec
    assert [c.normalization for c in spec.channels] == [WindowNorm(lower=-1200, upper=600, scale=255)]
    assert spec.target == ShapeTarget(shape=(128, 128, 128))
    assert not spec.crop_nonzero
    assert (spec.resample_image.order, spec.resample_labels.order, spec.resample_logits.order) == (1, 0, 1)
    assert {spec.resample_image.separate, spec.resample_labels.separate, spec.resample_logits.separate} == {False}
    assert spec.head.activation == "softmax"
    assert spec.head.values == tuple(range(16))
    assert spec.inference.patch == (128, 128, 128)
    assert spec.inference.mirror_axes == ()
    assert spec.network == VNetSpec(in_channels=1, out_channels=16)
    assert planned.batch_size == 6
    assert not planned.deep_supervision
    assert parse_spec(spec.model_dump(by_alias=True)) == spec


@pytest.mark.slow
def test_its_network_has_the_articles_number_of_parameters() -> None:
    from segrt.networks import build

    assert sum(p.numel() for p in build(vnet().spec.network).parameters()) == 45_660_256


@pytest.mark.parametrize(
    ("window", "bounds"),
    [("article", (-1200, 600)), ("abdomen", (-160, 240)), ("percentile", (-120, 310)), ((0.0, 80.0), (0, 80))],
)
def test_windows(window: Any, bounds: tuple[float, float]) -> None:
    (channel,) = vnet(window=window).spec.channels
    assert channel.normalization == WindowNorm(lower=bounds[0], upper=bounds[1], scale=255)


def test_channels_that_are_not_ct_have_no_hounsfield_units() -> None:
    spec = vnet(make_dataset(("ct", "PET"))).spec
    assert [c.normalization.kind for c in spec.channels] == ["hu_window", "zscore"]
    assert spec.network.in_channels == 2
    assert vnet(window="zscore").spec.channels[0].normalization == ZScoreNorm()
    assert vnet(window="none").spec.channels[0].normalization == NoNorm()


def test_the_articles_window_as_its_numbers_are_printed() -> None:
    """-1000, 0, 40, 60 and 600 HU become 28.3, 170, 175.7, 178.5 and 255; what lies outside is clipped (SEEDS 2.12 h: it was not)."""
    image = np.resize(np.asarray((-2000, -1000, 0, 40, 60, 600, 3000, 40), np.int16), (16, 16, 16))
    spec = vnet(shape=(16, 16, 16)).spec
    data, _ = preprocess(volume_of(image), spec)
    np.testing.assert_allclose(data[0].ravel()[:7], (0, 28.333, 170, 175.667, 178.5, 255, 255), atol=1e-2)


def test_the_cubic_way() -> None:
    spec = vnet(resampling="cubic").spec
    assert (spec.resample_image.order, spec.resample_labels.order) == (3, 3)


def test_a_sliding_window_at_the_median_spacing() -> None:
    planned = vnet(sliding=True, shape=(64, 128, 128))
    spec = planned.spec
    assert spec.target == SpacingTarget(spacing=(5.0, 0.7, 0.7))
    assert spec.inference.blending == "uniform"
    assert spec.inference.step == 0.75
    assert vnet(sliding=True).spec.inference.step == 0.875
    assert planned.median_shape == (100, 512, 512)


def test_labels_go_there_and_back_on_the_images_own_grid() -> None:
    """The image is 20 x 30 x 24, the network sees 32^3: nothing of that is left in the result."""
    labels = np.zeros((20, 30, 24), np.int16)
    labels[5:15, 8:22, 6:18] = 3
    labels[8:12, 12:18, 9:15] = 15
    image = volume_of(labels.astype(np.float32) * 10, (2.0, 1.0, 1.5))
    spec = vnet(shape=(32, 32, 32), window=(0.0, 150.0)).spec
    data, placement = preprocess(image, spec)
    placed = place_labels(labels, image, spec, placement)
    assert data.shape[1:] == placed.shape == (32, 32, 32)
    assert set(np.unique(placed)) == {0, 3, 15}
    logits = (np.arange(16)[:, None, None, None] == placed).astype(np.float32)
    back = restore(logits, placement, spec)
    assert back.shape == labels.shape
    assert (back != labels).mean() < 0.01


def test_regions_and_a_width() -> None:
    labels = {"background": (0,), "whole": (1, 2), "core": (2,)}
    planned = vnet(make_dataset(labels=labels, class_order=(1, 2)), width=0.25, deep_supervision=True)
    assert planned.spec.head.activation == "sigmoid"
    assert planned.spec.head.values == (1, 2)
    assert planned.spec.network == VNetSpec(in_channels=1, out_channels=2, width=0.25, deep_supervision=True)
    assert planned.deep_supervision


def test_every_choice_has_its_reason_and_survives_the_file(tmp_path: Path) -> None:
    plan = plan_vnet(make_dataset(("CT", "PET")), make_fingerprint(2))
    reasons = plan.configurations["vnet"].reasons
    assert {"target", "normalization", "resampling", "network", "batch_size", "batch_dice", "deep_supervision", "mirroring"} <= set(reasons)
    assert all(reason.endswith(".") for reason in reasons.values())
    assert "CT: -1200..600 is mapped to 0..255; PET: " in reasons["normalization"]
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").write_text(plan.to_json().replace('"batch_size": 6', '"batch_size": 0'))
    with pytest.raises(SpecError, match=r"plan\.json: configurations\.vnet\.batch_size: expected greater than or equal to 1"):
        load_plan(tmp_path / "plan.json")
    assert isinstance(plan, Plan)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": (128, 128, 100)}, "shape: a V-Net halves its input four times: expected multiples of 16 on axis x, got 100"),
        ({"width": 0.01}, "width: expected 1/16 to 64 times the V-Net's 16 features, got 0.01"),
        ({"window": (5.0, 5.0)}, r"window: channel 'CT' would be mapped from 5\.\.5, expected a lower and a higher intensity"),
    ],
)
def test_what_cannot_be_planned(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        vnet(**options)


def test_single_slices_and_foreign_fingerprints_are_refused() -> None:
    with pytest.raises(InputError, match=r"dataset amos holds single slices, and a V-Net sees volumes; train an nnU-Net \(2d\) on it"):
        plan_vnet(make_dataset(), make_fingerprint(shape=(1, 256, 256)))
    with pytest.raises(InputError, match="the fingerprint is of 1 channels, dataset amos has 2; measure it again"):
        plan_vnet(make_dataset(("CT", "PET")), make_fingerprint())
