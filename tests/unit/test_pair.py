"""Pairs: two models in one bundle, opened, checked, moved, run and recorded like one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import CountingEngine, banded, make_bundle, make_spec, nearest, volume_of, write_case

from segrt import Predictor, predict_many
from segrt.assemble import Flow, assemble
from segrt.bundle import Bundle
from segrt.device_plan import plan_device
from segrt.engines.function import FunctionEngine
from segrt.errors import BackendError, InputError, SpecError
from segrt.infer import infer
from segrt.io import find_cases, read_labels
from segrt.memory import case_bytes
from segrt.preprocess import preprocess
from segrt.restore import MEAN_BYTES
from segrt.slabs import Load
from segrt.spec import Channel, KeepLargest, Label, NoNorm, PreviousStage, Resampling, SpacingTarget
from segrt.volume import Grid
from segrt.windows import Planes

IMAGE = banded((9, 14, 11), seed=4)
SPACING = (3.0, 1.5, 2.0)
FLAT = make_spec(patch=(1, 8, 8), target=SpacingTarget(spacing=(None, 1.0, 1.3)))
DEEP = make_spec(patch=(4, 6, 8), target=SpacingTarget(spacing=(2.0, 1.6, 2.0)))


def first(x: np.ndarray) -> np.ndarray:
    """Three classes that answer differently from `second` in many places."""
    return np.concatenate([1 - x, np.sin(3 * x), 0.4 * x], axis=1)


def second(x: np.ndarray) -> np.ndarray:
    return np.concatenate([0.5 - 0.1 * x, x, 2 * np.cos(2 * x)], axis=1)


def pair_bundle(path: Path, spec: Any = FLAT, partner: Any = DEEP, **options: Any) -> Bundle:
    other = make_bundle(path / "other", partner, centres=(0, 1.4, 1.8), previous=options.pop("partner_previous", None))
    make_bundle(path / "pair", spec, partner=other, **options)
    shutil.rmtree(other.path)  # a pair is one folder
    return Bundle.open(path / "pair")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return pair_bundle(tmp_path)


def noisy(seed: int = 0) -> np.ndarray:
    image = IMAGE + np.random.default_rng(seed).normal(0, 0.7, IMAGE.shape)
    image[:2] = image[:, :3] = 0
    return image.astype(np.float32)


def alone(bundle: Bundle, **options: Any) -> list[Predictor]:
    """Both models of a pair opened on their own."""
    assert bundle.partner is not None
    single = Bundle(bundle.path, bundle.spec.model_copy(update={"partner": None}))
    return [Predictor(single, postprocess=False, **options), Predictor(bundle.partner, postprocess=False, **options)]


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_labels_are_those_of_the_mean_of_both_models_probabilities(bundle: Bundle, device: str) -> None:
    engines = [FunctionEngine(function, device=device) for function in (first, second)]
    assert bundle.partner is not None
    single = Bundle(bundle.path, bundle.spec.model_copy(update={"partner": None}))
    volumes = [
        Predictor(model, engines=[engine], device="cpu")((noisy(), SPACING), probabilities=True).probabilities
        for model, engine in zip((single, bundle.partner), [FunctionEngine(f) for f in (first, second)], strict=True)
    ]
    assert volumes[0] is not None
    assert volumes[1] is not None
    mean = (volumes[0] + volumes[1]) / 2
    predictor = Predictor(bundle, engines=engines, device="cpu")
    result = predictor((noisy(), SPACING), probabilities=True)
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities, mean, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(result.labels, mean.argmax(0))
    np.testing.assert_array_equal(predictor((noisy(), SPACING)).labels, result.labels)
    # and neither model alone says the same
    assert all((volume.argmax(0) != result.labels).any() for volume in volumes)
    assert not result.labels[:2].any(), "outside the crop background is certain"
    assert (result.probabilities[0, :2] == 1).all()


def test_regions_are_painted_where_the_mean_exceeds_the_threshold(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"values": (1, 2, 3), "activation": "sigmoid"}
    spec = make_spec(patch=(1, 8, 8), target=FLAT.target, **changes)
    bundle = pair_bundle(tmp_path, spec, make_spec(patch=(4, 6, 8), target=DEEP.target, **changes))
    result = Predictor(bundle, engines=[FunctionEngine(first), FunctionEngine(second)])((noisy(), SPACING), probabilities=True)
    assert result.probabilities is not None
    expected = np.zeros(IMAGE.shape, int)
    for value, channel in zip((1, 2, 3), result.probabilities, strict=True):
        expected[channel > 0.5] = value
    np.testing.assert_array_equal(result.labels, expected)
    assert (result.probabilities[:, :2] == 0).all()
    assert len(np.unique(result.labels)) == 4


def test_the_bundles_own_engines_and_every_option(tmp_path: Path) -> None:
    spec = make_spec(patch=(1, 8, 8), mirror_axes=(1, 2), members=("0", "1"), postprocess=(KeepLargest(values=(1, 2)),))
    bundle = pair_bundle(tmp_path, spec, make_spec(patch=(4, 6, 8), mirror_axes=(0,), members=("0", "1")))
    said: list[tuple[int, int]] = []
    with Predictor(bundle, backend="onnxruntime", folds=["1"], step=0.25, threads=1) as predictor:
        result = predictor((IMAGE, SPACING), progress=lambda done, total: said.append((done, total)))
        assert [engine.name.split(",")[0] for engine in predictor.all_engines] == ["onnxruntime"] * 2
    assert predictor.partner is not None
    assert predictor.partner.members == predictor.members == ("1",)
    windows = result.windows[0]
    assert said[-1] == (windows, windows)
    assert {total for _, total in said} == {windows}
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert set(result.seconds) == {"read", "previous", "preprocess", "network", "restore", "postprocess"}
    # post-processing is the pair's own, after the mean
    raw = Predictor(bundle, backend="onnxruntime", postprocess=False)((IMAGE, SPACING)).labels
    assert ((result.labels != 0) <= (raw != 0)).all()
    with pytest.raises(BackendError, match="was closed"):
        predictor((IMAGE, SPACING))


def test_a_gpus_path_gives_the_same(bundle: Bundle) -> None:
    host, device = (
        Predictor(bundle, backend="onnxruntime", device=name)((noisy(), SPACING), probabilities=True) for name in ("cpu", "simulated")
    )
    assert host.probabilities is not None
    assert device.probabilities is not None
    np.testing.assert_allclose(device.probabilities, host.probabilities, atol=1e-5)
    close = np.diff(np.sort(host.probabilities, axis=0)[-2:], axis=0)[0] < 1e-4
    np.testing.assert_array_equal(device.labels[~close], host.labels[~close])


@pytest.mark.parametrize("probabilities", [False, True])
def test_both_loops_end_and_let_their_logits_go(probabilities: bool) -> None:
    """Post-processing is planned for a GPU without them."""
    specs = [make_spec(patch=(1, 8, 8)), make_spec(patch=(4, 6, 8))]
    volume = volume_of(noisy())
    held: list[str] = []
    flows = []
    for spec in specs:
        data, placement = preprocess(volume, spec)
        inferred = infer(data, [FunctionEngine(first)], spec, starts_per_slab=1)
        flows.append(Flow(watched(inferred, held), placement, spec))
    labels, _ = assemble(flows, probabilities=probabilities)
    assert labels.shape == IMAGE.shape
    assert held == ["ended", "ended"]


def watched(planes: Iterable[Planes], ended: list[str]) -> Iterator[Planes]:
    yield from planes
    ended.append("ended")


def test_half_sums(bundle: Bundle) -> None:
    half = Predictor(bundle, accumulate="float16")((noisy(), SPACING), probabilities=True)
    volumes = [predictor((noisy(), SPACING), probabilities=True).probabilities for predictor in alone(bundle, accumulate="float16")]
    assert half.probabilities is not None
    # an interpolated logit may be rounded to the next float16
    np.testing.assert_allclose(half.probabilities, sum(volumes) / 2, atol=2e-3)  # type: ignore[arg-type, operator]


def test_resampling_that_no_kernel_fuses(tmp_path: Path) -> None:
    cubic = make_spec(patch=(4, 6, 8), target=DEEP.target, resample_logits=Resampling(order=3))
    result = Predictor(pair_bundle(tmp_path, FLAT, cubic))((noisy(), SPACING), probabilities=True)
    volumes = [predictor((noisy(), SPACING), probabilities=True).probabilities for predictor in alone(Bundle.open(tmp_path / "pair"))]
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities, sum(volumes) / 2, atol=1e-6)  # type: ignore[arg-type, operator]


def test_a_pair_with_a_cascade_runs_its_first_stage(tmp_path: Path) -> None:
    low = make_bundle(tmp_path / "low", make_spec(patch=(4, 6, 8)))
    cascade = make_spec(patch=(4, 6, 8), previous=PreviousStage(values=(1, 2)))
    bundle = pair_bundle(tmp_path, make_spec(), cascade, partner_previous=low)
    seen: list[np.ndarray] = []

    def watch(patches: np.ndarray) -> np.ndarray:
        seen.append(patches[:, 1:])
        return nearest((0, 1, 2))(patches[:, :1])

    engines = [FunctionEngine(nearest((0, 1, 2))), FunctionEngine(watch)]
    assert (Predictor(bundle, engines=engines)((IMAGE, (1.0, 1.0, 1.0))).labels == IMAGE).all()
    assert any(part.any() for part in seen)
    seen.clear()
    given = np.zeros(IMAGE.shape, np.uint8)
    predictor = Predictor(bundle, engines=engines, previous_stage=False)
    assert predictor.takes_previous
    predictor((IMAGE, (1.0, 1.0, 1.0)), previous=given)
    assert not any(part.any() for part in seen)
    with pytest.raises(InputError, match="holds no first stage; pass its labels"):
        predictor((IMAGE, (1.0, 1.0, 1.0)))


def test_engines_of_both_are_closed(bundle: Bundle) -> None:
    engines = [CountingEngine(first), CountingEngine(second)]
    Predictor(bundle, engines=engines).close()
    assert [engine.closed for engine in engines] == [1, 1]


def test_a_folder_of_cases_and_its_record(bundle: Bundle, tmp_path: Path) -> None:
    for name in "ab":
        write_case(tmp_path / "images" / f"{name}_0000.nii.gz", IMAGE, SPACING)
    with Predictor(bundle) as predictor:
        results = predict_many(find_cases(tmp_path / "images", 1), tmp_path / "out", predictor, probabilities=True)
        expected = predictor((IMAGE, SPACING)).labels
    assert [result.status for result in results] == ["done", "done"]
    np.testing.assert_array_equal(read_labels(tmp_path / "out" / "a.nii.gz")[0], expected)
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(record["settings"]["engines"]) == 2
    assert record["bundle_sha256"] == bundle.fingerprint
    assert np.load(tmp_path / "out" / "a.npz")["probabilities"].shape == (3, *IMAGE.shape)


# ------------------------------------------------------------------ the folder
def test_a_pair_is_one_folder_that_can_be_moved(bundle: Bundle, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", bundle.path)
    shutil.unpack_archive(archive, tmp_path / "elsewhere" / "model")
    moved = Bundle.open(tmp_path / "elsewhere" / "model")
    assert moved.fingerprint == bundle.fingerprint
    assert moved.partner is not None
    assert moved.partner.spec.dimensions == 3


def test_a_copy_of_a_pair_replaces_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    make_bundle(tmp_path / "old")
    assert bundle.partner is not None
    Bundle.create(tmp_path / "old", FLAT, partner=bundle.partner, force=True)
    assert (tmp_path / "old" / "partner" / "model.json").read_bytes() == (bundle.partner.path / "model.json").read_bytes()


def weighted(path: Path) -> Bundle:
    """A pair that has weights; what they mean does not matter here."""
    other = Bundle.create(path / "other", DEEP, weights={"0": {"a": np.zeros(3, np.float32)}})
    return Bundle.create(path / "pair", FLAT, weights={"0": {"a": np.ones(3, np.float32)}}, partner=other)


@pytest.mark.parametrize(
    ("file", "said"),
    [("model.json", "model.json is not what this pair was made with"), ("weights/0.safetensors", "weights/0.safetensors is not what")],
)
def test_another_partner_is_refused(tmp_path: Path, file: str, said: str) -> None:
    bundle = weighted(tmp_path)
    path = bundle.path / "partner" / file
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"tiny"', b'"taken"') if file == "model.json" else content[:-1] + b"\x01")
    with pytest.raises(SpecError, match=said):
        Bundle.open(bundle.path)
    path.write_bytes(content)
    Bundle.open(bundle.path)


def test_engines_may_be_built_for_the_partner_and_weights_left_out(tmp_path: Path) -> None:
    """Steps only ever add files; a bundle may be shipped without its weights once it has ONNX files."""
    bundle = weighted(tmp_path)
    folder = bundle.path / "partner"
    for name in ("onnx", "engines/openvino-x", "reports"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "onnx" / "0.onnx").write_bytes(b"not read here")
    before = bundle.partner.identity if bundle.partner else None
    assert Bundle.open(bundle.path).spec.partner == before
    (folder / "weights" / "0.safetensors").unlink()
    Bundle.open(bundle.path)


def test_a_pair_without_its_partner(bundle: Bundle) -> None:
    shutil.rmtree(bundle.path / "partner")
    with pytest.raises(SpecError, match=r"partner: no such bundle"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("partner", "said"),
    [
        (make_spec(values=(0, 1)), "a pair needs two models of the same head"),
        (make_spec(labels=(Label(name="liver", values=(1,)), Label(name="spleen", values=(2,)))), "the same labels"),
        (make_spec(channels=(Channel(name="MR", normalization=NoNorm()),)), r"the same channels, got \('CT',\) and \('MR',\)"),
    ],
)
def test_models_that_cannot_be_averaged_are_no_pair(tmp_path: Path, partner: Any, said: str) -> None:
    other = make_bundle(tmp_path / "other", partner)
    with pytest.raises(SpecError, match=said):
        Bundle.create(tmp_path / "pair", FLAT, partner=other)
    assert not (tmp_path / "pair").exists()


def test_a_pair_is_no_partner(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not a pair itself"):
        Bundle.create(tmp_path / "more", FLAT, partner=bundle)


def test_the_fingerprint_follows_the_partner(bundle: Bundle, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "o", DEEP, centres=(0, 1, 3))
    make_bundle(tmp_path / "p", FLAT, partner=other)
    assert Bundle.open(tmp_path / "p").fingerprint != bundle.fingerprint


# ------------------------------------------------------------------ memory
LARGE = Grid((400, 512, 512), (2.0, 0.8, 0.8))
ORGANS = make_spec(values=range(105), patch=(96, 128, 128), target=SpacingTarget(spacing=(2.5, 1.5, 1.5)))
SLICES = make_spec(values=range(105), patch=(1, 256, 256), target=SpacingTarget(spacing=(None, 1.5, 1.5)))


def test_the_peak_of_a_pair_is_not_the_sum_of_both() -> None:
    """Neither model's probabilities are ever whole on the image's own grid, on the CPU nor on a GPU."""
    both = case_bytes(SLICES, LARGE, 2, partner=ORGANS)
    each = [case_bytes(spec, LARGE, 2, probabilities=True) for spec in (SLICES, ORGANS)]
    whole = 4 * 105 * 400 * 512 * 512
    assert min(each) > whole
    assert both < whole / 10
    assert both < sum(case_bytes(spec, LARGE, 2) for spec in (SLICES, ORGANS)) + 2 * MEAN_BYTES
    loads = [Load(SLICES, batch=8, engine=10**9), Load(ORGANS, engine=3 * 10**9)]
    planned = plan_device(loads, LARGE, 2, free=24 * 10**9)
    assert all(planned.starts)
    assert planned.peak < sum(plan_device([load], LARGE, 2, free=24 * 10**9).peak for load in loads)
    assert plan_device(loads, LARGE, 2, free=24 * 10**9, probabilities=True).peak == planned.peak, "those go to the host slab by slab"
    assert plan_device(loads, LARGE, 2, free=140 * 10**9).starts == (None, None)


def test_a_partner_turned_otherwise_holds_its_logits_whole() -> None:
    turned = ORGANS.model_copy(update={"transpose": (2, 1, 0)})
    loads = [Load(ORGANS), Load(turned)]
    assert plan_device(loads, LARGE, 2, free=20 * 10**9).starts == (1, None)
    with pytest.raises(BackendError, match=r"mean 0\.11 GB"):
        plan_device(loads, LARGE, 2, free=8 * 10**9)
