"""Verification: which windows an engine is held to, and what is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import UNET_3D, CountingEngine, make_bundle, make_spec, nearest, unet_bundle, write_case

from segrt.arrays import FloatArray
from segrt.bundle import Bundle
from segrt.engines import open_engine
from segrt.engines.openvino import engine_key
from segrt.errors import BackendError, BuildError
from segrt.export.build import build_model
from segrt.export.engine import build_engine
from segrt.export.verify import can_run_reference, compare, sample_windows, stored_reference, verify
from segrt.files import sha256
from segrt.spec import (
    Channel,
    CTNorm,
    ModelSpec,
    Normalization,
    PreviousStage,
    RescaleNorm,
    RGBNorm,
    ShapeTarget,
    SpacingTarget,
    WindowNorm,
    ZScoreNorm,
)

CT = CTNorm(lower=-900, upper=600, mean=40, std=300)


def with_norms(*norms: Normalization, **changes: Any) -> ModelSpec:
    channels = tuple(Channel(name=f"c{i}", normalization=n) for i, n in enumerate(norms))
    return make_spec(channels=channels, **{"patch": (16, 32, 32)} | changes)


@pytest.mark.parametrize(
    "spec",
    [
        with_norms(CT, target=SpacingTarget(spacing=(5.0, 2.0, 2.0))),
        with_norms(ZScoreNorm(masked=True), RescaleNorm()),
        with_norms(RGBNorm(), RGBNorm(), RGBNorm(), patch=(1, 32, 32)),
        with_norms(WindowNorm(lower=-100, upper=240), target=ShapeTarget(shape=(16, 32, 32)), blending="uniform"),
        with_norms(CT, previous=PreviousStage(values=(1, 2))),
        with_norms(CT, patch=(1, 40, 40)),
        with_norms(CT, transpose=(2, 1, 0), target=SpacingTarget(spacing=(0.1, 90.0, 2.0))),
    ],
)
def test_the_phantom_suits_any_model(spec: ModelSpec) -> None:
    windows = sample_windows(spec)
    assert windows.shape[1:] == (spec.in_channels, *spec.inference.patch)
    assert 1 <= len(windows) <= 2
    assert windows.dtype == np.float32
    assert np.isfinite(windows).all()
    assert windows[0].std() > 0
    assert windows[0].std() >= windows[-1].std()


def test_windows_of_a_sample_image_are_cut_after_preprocessing(tmp_path: Path) -> None:
    image = np.zeros((20, 20, 20), np.int16)
    image[10:, 10:, 10:] = np.random.default_rng(0).integers(0, 1000, (10, 10, 10))
    path = write_case(tmp_path / "x.nii.gz", image)
    windows = sample_windows(make_spec(crop_nonzero=False), path, count=3)
    assert windows.shape == (3, 1, 8, 8, 8)
    assert (windows[0] > 0).mean() > 0.3
    assert sample_windows(make_spec(previous=PreviousStage(values=(1,))), path).shape[1] == 2


def logits_of(labels: list[int]) -> FloatArray:
    """(1, 3, 1, 1, n): the class of each voxel leads by one."""
    return np.eye(3, dtype=np.float32)[labels].T.reshape(1, 3, 1, 1, len(labels))


def test_compare_counts_errors_and_labels() -> None:
    reference, found = logits_of([0, 1, 2, 1]), logits_of([0, 1, 2, 2])
    report = compare(reference, found, make_spec())
    assert report["label_agreement"] == 0.75
    assert report["max_abs_difference"] == 1.0
    assert report["relative_error"] == pytest.approx(np.sqrt(2 / 4))
    assert report["voxels"] == 4
    assert report["finite"]
    assert not report["all_background"]


def test_compare_sees_what_half_precision_does_wrong() -> None:
    reference = logits_of([0, 1, 2, 1])
    broken = reference.copy()
    broken[0, 0, 0, 0, 0] = np.nan
    assert not compare(reference, broken, make_spec())["finite"]
    assert compare(reference, logits_of([0, 0, 0, 0]), make_spec())["all_background"]
    assert not compare(logits_of([0, 0]), logits_of([0, 0]), make_spec())["all_background"]


def test_compare_paints_regions() -> None:
    spec = make_spec(values=(1, 2, 3), activation="sigmoid")
    reference = 4 * logits_of([0, 1]) - 2
    assert compare(reference, reference * 2, spec)["label_agreement"] == 1
    assert compare(reference, -reference, spec)["label_agreement"] == 0


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return unet_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits: logits, ""),
        (lambda logits: logits * np.float32("nan"), "NaN or infinity"),
        (lambda logits: logits * 0, "only background"),
        (lambda logits: np.roll(logits, 1, 1), "at least 0.9995 are needed"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_what_falls_short_has_a_reason(bundle: Bundle, change: Any, reason: str, stored: bool) -> None:
    inner = open_engine(bundle, "0")
    report = verify(
        CountingEngine(lambda patches: change(inner(patches))), bundle, "0", "fp32", windows=None if stored else sample_windows(bundle.spec)
    )
    assert report["reference"] == ("logits stored at export" if stored else "torch fp32")
    assert report["passed"] == (not reason)
    assert reason in report["reason"]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage", "another member"])
def test_a_reference_that_cannot_be_used_is_named(bundle: Bundle, damage: str) -> None:
    path = bundle.path / "onnx" / "reference.npz"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"x" * 500, "another member": content}[damage])
    with pytest.raises(BuildError, match=r"reference\.npz: no usable reference for member"):
        stored_reference(bundle, "9" if damage == "another member" else "0")


def stored(tmp_path: Path, spec: ModelSpec, centres: tuple[float, ...]) -> Bundle:
    """A bundle of ONNX files alone, whose stored logits are those of `centres`."""
    bundle = make_bundle(tmp_path / "b", spec)
    inputs = np.random.default_rng(0).uniform(0, 2, (1, 1, *spec.inference.patch)).astype(np.float32)
    logits = nearest(centres)(inputs)[:, :, ::3, ::3, ::3]
    np.savez(bundle.path / "onnx" / "reference.npz", inputs=inputs, logits_0=logits, stride=[3, 3, 3])
    return bundle


def test_a_bundle_without_weights_is_held_to_its_stored_logits(tmp_path: Path) -> None:
    bundle = stored(tmp_path, make_spec(), (0, 1, 2))
    assert not can_run_reference(bundle)
    _, (report,) = build_model(bundle.path)
    assert report["members"]["0"]["reference"] == "logits stored at export"
    assert report["members"]["0"]["passed"]
    assert open_engine(bundle, "0").held_bytes > 0


def test_an_engine_that_falls_short_is_kept_only_by_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = stored(tmp_path, make_spec(), (0, 1.3, 2))
    with pytest.raises(BuildError, match=r"engine of member '0' is refused: it gives the reference's label to 0\.\d+ of voxels"):
        build_engine(bundle)
    assert not bundle.engine_path(engine_key("fp32")).exists()
    report = build_engine(bundle, force=True)
    assert report["forced"]
    with caplog.at_level(logging.WARNING):
        open_engine(bundle, "0")
    assert "has not passed verification (kept by --force" in caplog.text


def test_nothing_to_export_from(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    (bundle.path / "onnx" / "build.json").unlink()
    with pytest.raises(BackendError, match="is not the file that was exported"):
        build_model(bundle.path)
    shutil.rmtree(bundle.path / "onnx")
    Bundle.create(tmp_path / "w", make_spec(), weights={"0": {"w": np.zeros(1, np.float32)}})
    with pytest.raises(BuildError, match="needs the weights and torch"):
        build_model(tmp_path / "w")


def test_a_cascade_builds_its_first_stage_too(tmp_path: Path) -> None:
    low = unet_bundle(tmp_path / "low", 2)
    spec = make_spec(previous=PreviousStage(values=(1, 2)), network=UNET_3D.model_copy(update={"in_channels": 3}))
    from segrt.networks import build

    bundle = Bundle.create(tmp_path / "b", spec, weights={"0": build(spec.network).state_dict()}, previous=low)
    before = sha256(tmp_path / "b" / "previous" / "onnx" / "0.onnx")
    build_model(bundle.path, backend="onnxruntime")
    assert bundle.previous is not None
    assert (bundle.previous.path / "reports" / "verify-onnxruntime-cpu-fp32.json").is_file()
    assert sha256(bundle.previous.onnx_path("0")) == before
