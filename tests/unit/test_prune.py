"""Levels of a UNet++: smaller networks in the same bundle, never mixed up, each with its price."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from factories import make_bundle, make_spec, unet_bundle
from safetensors.numpy import load_file

from segrt.bundle import Bundle
from segrt.cli import build as build_command
from segrt.cli import predict as predict_command
from segrt.engines import open_engine
from segrt.engines.openvino import engine_key
from segrt.engines.trt_plan import Machine, find_plan
from segrt.errors import BackendError, InputError, SpecError
from segrt.export.build import build_model
from segrt.export.prune import Level, recommend
from segrt.export.scoring import Score
from segrt.io import read_labels, write_image
from segrt.networks import build, count_parameters, initialize
from segrt.predictor import Predictor
from segrt.spec import UNetPPSpec
from segrt.volume import Grid

TINY = UNetPPSpec(family="unetpp", in_channels=1, out_channels=1, features=(4, 4, 6, 6, 8), deep_supervision=True)
FLAT = (999.0, 1.0, 1.0)


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def unetpp_bundle(path: Path, network: UNetPPSpec = TINY, seed: int = 0) -> Bundle:
    """An untrained UNet++ whose normalisations and biases are not those of a start."""
    made, generator = build(network), torch.Generator().manual_seed(seed)
    initialize(made, generator=generator)
    for name, tensor in made.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.3, generator=generator)
    spec = make_spec(values=(1,), activation="sigmoid", patch=(1, 32, 32), network=network)
    return Bundle.create(path, spec, weights={"0": made.state_dict()})


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle built whole and at L1 and L2."""
    path = tmp_path_factory.mktemp("pruned") / "bundle"
    build_model(unetpp_bundle(path).path, device="cpu", prune=("L2", "L1", "L4"))
    return path


@pytest.fixture
def bundle(pruned: Path, tmp_path: Path) -> Bundle:
    """A copy of it."""
    shutil.copytree(pruned, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command beside `bundle`, three pictures and their grey masks."""
    monkeypatch.chdir(bundle.path.parent)
    with Predictor(bundle, device="cpu") as predictor:
        for n in range(3):
            image, grid = picture(40, 36, seed=n), Grid((1, 40, 36), FLAT, dimensions=2)
            labels = predictor((image, FLAT)).labels
            for file, data in ((f"images/c{n}.png", image), (f"masks/c{n}_mask.png", labels * 200)):
                Path(file).parent.mkdir(exist_ok=True)
                write_image(Path(file), data, grid)

    def command(main: Callable[[], None], *arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["segrt", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return Answer(int(left.value.code or 0), captured.out, captured.err)

    return command


def picture(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (1, *shape)).astype(np.uint8)


def patches(count: int = 2) -> Any:
    return np.random.default_rng(5).normal(size=(count, 1, 1, 32, 32)).astype(np.float32) * 20


def test_a_level_is_a_smaller_graph_with_only_the_nodes_it_needs(bundle: Bundle) -> None:
    sizes = {}
    for level, nodes, heads in (("L1", 3, 1), ("L2", 6, 2), ("L4", 15, 4)):
        chosen = bundle.at_level(level)
        model = onnx.load(chosen.onnx_path("0"))
        assert sum(node.op_type == "Conv" for node in model.graph.node) == 2 * nodes + heads
        stored = sum(np.prod(tensor.dims) for tensor in model.graph.initializer)
        sizes[level] = chosen.onnx_path("0").stat().st_size
        assert stored < 1.2 * count_parameters(build(chosen.spec.network)), "running statistics of the norms come on top"
    assert sizes["L1"] < sizes["L2"] < sizes["L4"]
    assert bundle.at_level("L4") is bundle


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_every_backend_runs_a_level_as_the_mean_of_its_heads(bundle: Bundle, level: str) -> None:
    whole = build(bundle.spec.network, deep_supervision=True).eval()
    from segrt.export.onnx import load_member

    whole.load_state_dict(load_member(bundle, "0").state_dict())
    with torch.inference_mode():
        heads = whole(torch.from_numpy(patches()[:, :, 0]))[::-1]
    count = int(level[1:])
    wanted = (sum(heads[:count]) / count).numpy()[:, :, None]
    for backend in ("openvino", "onnxruntime", "pytorch"):
        answer = open_engine(bundle.at_level(level), "0", backend=backend)(patches())
        assert np.allclose(answer, wanted, atol=2e-3), backend


def test_records_name_the_level_and_its_own_files(bundle: Bundle) -> None:
    for level, key in ((None, engine_key("fp32")), ("L1", f"{engine_key('fp32')}-L1")):
        record = json.loads((bundle.path / "engines" / key / "build.json").read_text())
        assert (record["level"], record["key"], record["verified"]) == (level, key, True)
        assert json.loads((bundle.path / "reports" / f"verify-{key}.json").read_text())["key"] == key
    assert {p.name for p in (bundle.path / "engines").iterdir()} == {f"{engine_key('fp32')}{end}" for end in ("", "-L1", "-L2")}


def labels_of(bundle: Bundle, level: str | None, **options: Any) -> Any:
    with Predictor(bundle, level=level, device="cpu", **options) as predictor:
        return predictor((picture(40, 50), FLAT)).labels


def test_a_predictor_runs_the_level_it_is_given(bundle: Bundle) -> None:
    found = {level: labels_of(bundle, level) for level in (None, "L1", "L2", "L4")}
    assert np.array_equal(found[None], found["L4"])
    assert not np.array_equal(found["L1"], found["L2"])
    for level in ("L1", "L2"):
        assert np.array_equal(found[level], labels_of(bundle, level, backend="pytorch"))
    with Predictor(bundle, level="L1") as predictor:
        assert predictor.bundle.level == "L1"
        assert predictor.bundle.fingerprint != bundle.fingerprint


@pytest.mark.parametrize(
    ("file", "by", "sentence"),
    [
        ("engines/{key}-L1/0.blob", "engines/{key}-L2/0.blob", "is not the engine that was built"),
        ("engines/{key}-L1/0.blob", "engines/{key}/0.blob", "is not the engine that was built"),
        ("engines/{key}-L1/0.blob", None, "is not the engine that was built"),
        ("onnx/0-L1.onnx", "onnx/0-L2.onnx", "is not the file that was exported"),
        ("onnx/0-L1.onnx", "onnx/0.onnx", "is not the file that was exported"),
    ],
)
def test_another_levels_file_is_noticed(bundle: Bundle, file: str, by: str | None, sentence: str) -> None:
    target = bundle.path / file.format(key=engine_key("fp32"))
    if by:
        shutil.copy(bundle.path / by.format(key=engine_key("fp32")), target)
    else:
        content = bytearray(target.read_bytes())
        content[-1] ^= 1  # a fixed byte may be the one that is there: the engine is scrambled anew with every build
        target.write_bytes(content)
    with pytest.raises(BackendError, match=sentence) as refused:
        Predictor(bundle, level="L1", backend="openvino", device="cpu")
    how = "--force" if file.startswith("onnx") else "--fp32"
    assert str(refused.value).endswith(f"segrt-build {bundle.path} --prune L1 {how}")
    labels_of(bundle, "L2")
    labels_of(bundle, None)


def test_a_folder_of_engines_under_another_levels_name_is_noticed(bundle: Bundle) -> None:
    mine, other = (bundle.at_level(level).engine_path(engine_key("fp32")) for level in ("L1", "L2"))
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    with pytest.raises(BackendError, match="was compiled from another ONNX file"):
        Predictor(bundle, level="L1", backend="openvino", device="cpu")


def test_deleted_engines_are_compiled_from_the_levels_own_file(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    wanted = labels_of(bundle, "L1")
    shutil.rmtree(bundle.at_level("L1").engine_path(engine_key("fp32")))
    assert np.array_equal(labels_of(bundle, "L1"), wanted)
    assert "no compiled engine for this machine" in caplog.text


def test_a_level_nobody_made_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"has no level L3, only L1, L2, L4; make it with: segrt-build .* --prune L3"):
        Predictor(bundle, level="L3")
    bundle.at_level("L1").onnx_path("0").unlink()
    with pytest.raises(InputError, match=r"has no level L1, only L2, L4; make it with"):
        Predictor(bundle, level="L1")
    with Predictor(bundle, level="L3", backend="pytorch", device="cpu") as predictor:
        assert predictor((picture(32, 32), FLAT)).labels.shape == (1, 32, 32)


@pytest.mark.parametrize("level", ["L5", "L0", "2", "l1", ""])
def test_what_is_no_level_is_refused(bundle: Bundle, level: str) -> None:
    with pytest.raises(InputError, match="level: expected L1 or L2 or L3 or L4, got"):
        Predictor(bundle, level=level)


def test_models_without_levels_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only a UNet\\+\\+ has levels; this model's network is 'onnx'"):
        Predictor(make_bundle(tmp_path / "nearest"), level="L1")
    with pytest.raises(InputError, match="only a UNet\\+\\+ has levels; this model's network is 'plain_unet'"):
        build_model(unet_bundle(tmp_path / "unet").path, prune=("L1",))
    plain = unetpp_bundle(tmp_path / "plain", TINY.model_copy(update={"family": "unet", "deep_supervision": False}))
    with pytest.raises(InputError, match="this model's network is 'unet'"):
        plain.at_level("L4")
    alone = unetpp_bundle(tmp_path / "alone", TINY.model_copy(update={"deep_supervision": False}))
    with pytest.raises(InputError, match="expected L4, got 'L2'; it was trained without deep supervision"):
        build_model(alone.path, prune=("L2",))
    assert not (alone.path / "onnx").exists(), "refused before anything is built"


def test_levels_of_other_weights_are_refused_until_they_are_made_again(bundle: Bundle, tmp_path: Path) -> None:
    other = unetpp_bundle(tmp_path / "other", seed=1)
    shutil.copy(other.weights_path("0"), bundle.weights_path("0"))
    build_model(bundle.path, device="cpu", backend="onnxruntime", force=True)
    with pytest.raises(BackendError, match=r"0-L1.onnx is a level of another network than 0.onnx; make it again with: .* --prune L1"):
        Predictor(bundle, level="L1", device="cpu")
    build_model(bundle.path, device="cpu", backend="onnxruntime", prune=("L1",))
    assert np.array_equal(labels_of(bundle, "L1", backend="onnxruntime"), labels_of(bundle, "L1", backend="pytorch"))
    with pytest.raises(BackendError, match="was compiled from another ONNX file"):
        Predictor(bundle, level="L1", backend="openvino", device="cpu")


def test_the_fast_mode_keeps_one_head(tmp_path: Path) -> None:
    fast = unetpp_bundle(tmp_path / "fast", TINY.model_copy(update={"mode": "fast"}))
    build_model(fast.path, device="cpu", backend="onnxruntime", prune=("L1", "L2"))
    graph = onnx.load(fast.at_level("L2").onnx_path("0")).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 2 * 6 + 1
    with torch.inference_mode():
        network = build(fast.spec.network, deep_supervision=True).eval()
        from segrt.export.onnx import load_member

        network.load_state_dict(load_member(fast, "0").state_dict())
        wanted = network(torch.from_numpy(patches()[:, :, 0]))[2].numpy()[:, :, None]
    assert np.allclose(open_engine(fast.at_level("L2"), "0", backend="onnxruntime")(patches()), wanted, atol=2e-3)


def test_a_members_name_may_not_look_like_a_levels_file() -> None:
    spec = make_spec(values=(1,), activation="sigmoid", patch=(1, 32, 32), network=TINY)
    from segrt.spec import parse_spec

    with pytest.raises(SpecError, match=r"may not end like those of its other files .*, got '0-L2'"):
        parse_spec(spec.model_dump(mode="json") | {"members": ["0", "0-L2"]})


def test_a_plan_of_another_level_is_not_taken(tmp_path: Path, bundle: Bundle) -> None:
    machine = Machine("H200", "9.0", "13.0", "11.4.0")
    from segrt.engines.trt_plan import engine_key as plan_key
    from segrt.engines.trt_plan import make_record
    from segrt.files import sha256

    for name, batch in ((None, 4), ("L1", 8)):
        chosen = bundle.at_level(name) if name else bundle
        folder = chosen.engine_path(plan_key(machine, "fp16", batch))
        folder.mkdir(parents=True)
        (folder / "0.plan").write_bytes(str(name).encode())
        entry = {"onnx_sha256": sha256(chosen.onnx_path("0")), "sha256": sha256(folder / "0.plan")}
        record = make_record(machine, "fp16", batch, {"0": entry}, compatible=False, verified=True)
        (folder / "build.json").write_text(json.dumps(record | {"level": name}))
    assert find_plan(bundle, "0", "fp16", machine)[0].read_bytes() == b"None"
    assert find_plan(bundle.at_level("L1"), "0", "fp16", machine)[0].read_bytes() == b"L1"
    with pytest.raises(BackendError, match="has no TensorRT engine"):
        find_plan(bundle.at_level("L2"), "0", "fp16", machine)


def level(name: str, dice: float | None, where_present: float | None = None) -> Level:
    present = dice if where_present is None else where_present
    return Level(name, 1, 1.0, 1.0, 1.0, 1.0, None if dice is None or present is None else Score(dice, dice, present))


@pytest.mark.parametrize(
    ("scores", "drop", "wanted"),
    [
        ((0.80, 0.84, 0.85, 0.85), 0.005, "L3"),
        ((0.80, 0.845, 0.85, 0.85), 0.01, "L2"),
        ((0.86, 0.84, 0.85, 0.85), 0.0, "L1"),
        ((0.80, 0.84, 0.84, 0.85), 0.0, "L4"),
        ((None, None, None, None), 0.005, None),
        ((0.8, float("nan"), 0.8, 0.8), 0.005, None),
        ((float("nan"),) * 4, 0.005, None),
    ],
)
def test_the_smallest_level_within_the_loss_is_recommended(scores: tuple[float | None, ...], drop: float, wanted: str | None) -> None:
    assert recommend([level(f"L{n}", dice) for n, dice in enumerate(scores, 1)], drop) == wanted


def test_a_level_that_wins_by_finding_less_is_not_recommended() -> None:
    """Dice over all cases and over those with the structure: slices without any score 0 as soon as something is found in them."""
    found = [level("L1", 0.63, 0.70), level("L2", 0.684, 0.7327), level("L3", 0.66, 0.7601), level("L4", 0.667, 0.7627)]
    assert recommend(found, 0.005) == "L4"
    assert recommend(found, 0.01) == "L3"
    assert recommend(found, 0.05) == "L2"


SCORED = ("--images", "images", "--labels", "masks", "--mask-suffix", "_mask.png", "--mask-threshold", "0")


def test_the_table_has_every_level_with_its_price(run: Callable[..., Answer]) -> None:
    answer = run(build_command.main, "bundle", "--prune", "L1,L2", "--max-drop", "0", *SCORED)
    assert answer.code == 0, answer.err
    found = json.loads(Path("bundle/reports/prune.json").read_text())
    assert {"L1", "L2", "L4"} < found.keys()
    assert "L3" not in found
    assert found["L4"]["score"]["dice"] == found["L4"]["score"]["iou"] == 1.0
    assert found["recommended"] == "L4"
    assert found["L1"]["parameters"] == count_parameters(build(TINY.pruned(1)))
    assert all(found[name]["image_ms"] > found[name]["network_ms"] > 0 for name in ("L1", "L2", "L4"))
    assert [found[name]["published"] for name in ("L1", "L2", "L4")] == [3.5, 2.4, 1.0]
    assert (
        "recommended: L4, the smallest level that loses at most 0 of Dice, over all cases and over those with the structure" in answer.out
    )
    assert "one image of 40 x 36" in answer.out
    assert "Dice over 3 cases of images" in answer.out
    assert (found["device"], found["engine"].split(",")[0], found["runs"] >= 15) == ("cpu", "openvino", True)
    for suffix in ("csv", "md"):
        assert "L4 (recommended)" in Path(f"bundle/reports/prune.{suffix}").read_text()


def test_without_cases_there_is_no_recommendation(run: Callable[..., Answer]) -> None:
    answer = run(build_command.main, "bundle", "--prune", "L1", "--backend", "onnxruntime")
    assert answer.code == 0, answer.err
    assert "no Dice, and so no recommendation" in answer.out
    assert "Dice over" not in answer.out
    assert json.loads(Path("bundle/reports/prune.json").read_text())["recommended"] is None


def test_cases_that_are_gone_cost_the_scores_and_not_the_levels(run: Callable[..., Answer], caplog: pytest.LogCaptureFixture) -> None:
    case = {"name": "c0", "images": ["elsewhere/c0.png"], "labels": "elsewhere/c0_mask.png"}
    Path("bundle/reports/validation.json").write_text(json.dumps({"mask_threshold": 0, "members": {"0": [case]}}))
    answer = run(build_command.main, "bundle", "--prune", "L1", "--backend", "onnxruntime")
    assert answer.code == 0, answer.err
    assert "c0.png: this validation case of" in caplog.text
    assert "no Dice, and so no recommendation: name images and their masks with --images and --labels" in answer.out
    refused = run(build_command.main, "bundle", "--prune", "L1", "--max-drop", "0.01")
    assert (refused.code, "is gone; name folders with --images and --labels" in refused.err) == (2, True)


def test_a_training_on_all_cases_costs_the_scores_and_not_the_levels(run: Callable[..., Answer], caplog: pytest.LogCaptureFixture) -> None:
    Path("bundle/reports/validation.json").write_text(json.dumps({"mask_threshold": 0, "members": {"all": []}}))
    answer = run(build_command.main, "bundle", "--prune", "L1", "--backend", "onnxruntime")
    assert answer.code == 0, answer.err
    assert "levels are built without scores" in caplog.text
    assert "the training held no case back" in caplog.text
    assert "no Dice, and so no recommendation" in answer.out
    assert json.loads(Path("bundle/reports/prune.json").read_text())["recommended"] is None


@pytest.mark.parametrize("bias", [-9, 9])
def test_cases_without_any_structure_say_so(run: Callable[..., Answer], bias: float) -> None:
    weights = load_file("bundle/weights/0.safetensors")
    # nothing anywhere, or everything everywhere
    heads = {name: np.full_like(value, bias if name.endswith("bias") else 0) for name, value in weights.items() if name.startswith("heads")}
    Bundle.create("certain", Bundle.open("bundle").spec, weights={"0": weights | heads})
    for n in range(3):
        write_image(Path(f"masks/c{n}_mask.png"), np.zeros((1, 40, 36), np.uint8), Grid((1, 40, 36), FLAT, dimensions=2))
    answer = run(build_command.main, "certain", "--prune", "L1", "--backend", "onnxruntime", *SCORED)
    assert answer.code == 0, answer.err
    assert "no recommendation: in 3 cases of images there is nothing to find" in answer.out


def test_what_is_no_bundle_has_no_levels(run: Callable[..., Answer]) -> None:
    answer = run(build_command.main, "images", "--prune", "L1")
    assert (answer.code, "images: --prune takes the bundle of a UNet++, made by segrt-train --model unetpp" in answer.err) == (2, True)


def test_predict_runs_a_level_and_says_so(run: Callable[..., Answer], caplog: pytest.LogCaptureFixture) -> None:
    answer = run(predict_command.main, "images", "out", "--model", "bundle", "--level", "L1")
    assert answer.code == 0, answer.err
    assert json.loads(Path("out/predictions.json").read_text())["settings"]["level"] == "L1"
    labels, _ = read_labels(Path("out/c0.png"))
    with Predictor("bundle", level="L1") as predictor:
        assert np.array_equal(labels, predictor("images/c0.png").labels)
    assert run(predict_command.main, "images", "out", "--model", "bundle", "--level", "L2").code == 0
    assert "c0.png was made by another model or with other settings and is kept" in caplog.text
    refused = run(predict_command.main, "images", "out", "--model", "bundle", "--level", "L3")
    assert (refused.code, "has no level L3, only L1, L2, L4" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prune", "L7"), "level: expected L1 or L2 or L3 or L4, got 'L7'"),
        (("--prune", ","), "name at least one level"),
        (("--max-drop", "0.1"), "--max-drop belongs to --prune"),
        (("--images", "images", "--labels", "masks"), "--images belongs to --prune"),
        (("--prune", "L1", "--max-drop", "2"), "--max-drop: expected 0 <= x <= 1, got 2"),
        (("--prune", "L1", "--images", "images"), "--images and --labels belong together"),
        (("--prune", "L1", "--mask-threshold", "0"), "add --images and --labels"),
        (("--prune", "L1", "--images", "nowhere", "--labels", "masks"), "nowhere cannot be read as a folder"),
        (("--prune", "L1", "--images", "images", "--labels", "masks"), "where names of masks end otherwise, say how with --mask-suffix"),
        (
            ("--prune", "L1", "--images", "images", "--labels", "masks", "--mask-suffix", "_x.png"),
            "c0_x.png: image c0.png has no such mask",
        ),
    ],
)
def test_what_cannot_be_pruned_is_one_sentence(run: Callable[..., Answer], arguments: tuple[str, ...], sentence: str) -> None:
    answer = run(build_command.main, "bundle", *arguments)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert sentence in answer.err.splitlines()[-1]
