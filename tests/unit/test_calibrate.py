"""INT8: quantised on windows of the user's images, verified like every engine, and never made up on the fly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from factories import banded, make_bundle, make_spec, unet_bundle, write_case

from segrt.bundle import Bundle
from segrt.engines import open_engine
from segrt.engines.openvino import engine_key
from segrt.errors import BackendError, BuildError, InputError
from segrt.export.calibrate import WINDOWS, calibration_windows, quantize
from segrt.export.engine import build_engine
from segrt.export.verify import _choose, checked_windows
from segrt.io import find_cases, read_labels, write_image
from segrt.phantom import make_phantom
from segrt.pipeline import predict_many
from segrt.predictor import Predictor
from segrt.spec import PreviousStage

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "bundle"


@pytest.fixture
def demo(tmp_path: Path) -> Bundle:
    """The trained phantom model, without weights or engines."""
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(tmp_path / "demo")


def write_phantom(path: Path, seed: int) -> Path:
    image, _, grid = make_phantom(np.random.default_rng(seed), spacing=(6.0, 3.0, 3.0))
    write_image(path, image, grid)
    return path


def test_a_trained_model_keeps_its_labels_in_int8(demo: Bundle, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_phantom(images / "a_0000.nii.gz", 31)
    report = build_engine(demo, precision="int8", calibration=images)
    (check,) = report["members"].values()
    assert check["passed"]
    assert check["label_agreement"] >= 0.995
    assert 0.9 < check["mean_dice"] <= 1
    with Predictor(demo, tta=False, precision="int8") as eight, Predictor(demo, tta=False) as full:
        assert "int8" in eight.engines[0].name
        image = write_phantom(tmp_path / "b_0000.nii.gz", 32)
        (result,) = predict_many(find_cases(image, 1), tmp_path / "out", eight)
        assert (read_labels(tmp_path / "out" / "b.nii.gz")[0] == full(image).labels).mean() > 0.998
    assert result.status == "done"
    assert sum(count > 0 for count in result.voxels.values()) > 10


def test_without_images_a_phantom_calibrates_and_says_so(demo: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    assert calibration_windows(demo, None).ndim == 5
    assert "--calibration" in caplog.text


def test_windows_come_from_every_image(tmp_path: Path) -> None:
    bundle = unet_bundle(tmp_path / "b")
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        write_case(images / f"{name}_0000.nii.gz", rng.normal(size=(20, 20, 20)).astype(np.float32))
    windows = calibration_windows(bundle, images)
    assert 3 <= len(windows) <= WINDOWS
    assert windows.shape[1:] == (bundle.spec.in_channels, *bundle.spec.inference.patch)


def test_a_second_stage_sees_what_the_first_one_finds(tmp_path: Path) -> None:
    """All channels empty would set ranges that no case has, and check an engine on what it never meets."""
    low = make_bundle(tmp_path / "low", make_spec())
    bundle = make_bundle(tmp_path / "b", make_spec(previous=PreviousStage(values=(1, 2))), previous=low)
    images = tmp_path / "images"
    images.mkdir()
    case = write_case(images / "a_0000.nii.gz", banded((12, 14, 10)))
    for windows in (calibration_windows(bundle, images), checked_windows(bundle, case)):
        image, found = windows[:, 0], windows[:, 1:]
        assert found.any(axis=(0, 2, 3, 4)).all()
        assert all((found[:, value - 1] == (image == value)).all() for value in (1, 2))


def test_without_a_first_stage_there_are_no_labels_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec(previous=PreviousStage(values=(1, 2))))
    case = write_case(tmp_path / "a_0000.nii.gz", banded((12, 14, 10)))
    assert not checked_windows(bundle, case)[:, 1:].any()
    assert "holds no first stage" in caplog.text


@pytest.mark.parametrize("cases", [1, 40])
def test_ranges_are_not_those_of_the_strongest_contrast_alone(tmp_path: Path, cases: int) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec())
    images = tmp_path / "images"
    images.mkdir()
    image = np.random.default_rng(0).normal(0, 0.1, (16, 16, 64)).astype(np.float32)
    image[..., 32:] *= 100
    for number in range(cases):
        write_case(images / f"{number:02}_0000.nii.gz", image)
    windows = calibration_windows(bundle, images)
    strong = [window.std() > 5 for window in windows]
    assert len(windows) == (8 if cases == 1 else WINDOWS)
    # six in ten windows reach into the strong half
    assert len(windows) // 2 <= sum(strong) <= len(windows) * 7 // 8
    assert (windows == calibration_windows(bundle, images)).all()


def test_windows_are_spread_over_what_the_strongest_leave() -> None:
    assert _choose([3, 9, 1, 2, 8, 5, 4, 7], 4, 2, 0.5) == [1, 4, 2, 6]
    assert _choose([3, 9, 1], 8, 4, 0.5) == [1, 0, 2]
    assert _choose([3, 9, 1], 1, 0, 0.5) == [1]
    assert sorted(_choose(list(range(9)), 9, 4, 0.5)) == list(range(9))


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    bundle = unet_bundle(tmp_path / "b")
    with pytest.raises(InputError, match="nowhere"):
        calibration_windows(bundle, tmp_path / "nowhere")


def test_2d_models_are_quantised_slice_by_slice(tmp_path: Path) -> None:
    bundle = unet_bundle(tmp_path / "b", dimensions=2)
    bundle = bundle.update_spec(bundle.spec.model_copy(update={"members": ("0",)}))
    report = build_engine(bundle, precision="int8", force=True)
    assert set(report["members"]) == {"0"}
    engine = open_engine(bundle, "0", precision="int8")
    patches = np.random.default_rng(0).normal(size=(3, bundle.spec.in_channels, *bundle.spec.inference.patch)).astype(np.float32)
    assert engine(patches).shape == (3, bundle.spec.classes, *bundle.spec.inference.patch)
    engine.close()


def test_an_int8_engine_is_built_never_improvised(demo: Bundle) -> None:
    with pytest.raises(BackendError, match=r"no verified int8 engine for this machine; make one with: segrt-build .* --int8"):
        open_engine(demo, "0", precision="int8")


def test_what_nncf_cannot_quantise_is_a_sentence(demo: Bundle, tmp_path: Path) -> None:
    demo.onnx_path("0").write_bytes(b"no model")
    windows = np.zeros((1, demo.spec.in_channels, *demo.spec.inference.patch), np.float32)
    with pytest.raises(BuildError, match=r"0\.onnx could not be quantised: "):
        quantize(demo, "0", windows, tmp_path / "q.xml")
    assert not (demo.engine_path(engine_key("int8"))).exists()
