"""`build_engine` for TensorRT, from the ONNX file to an engine that is found again: only CuPy and TensorRT are stood in for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import make_bundle, make_spec, nearest
from gpu_stand_in import Gpu, instead_of_cupy
from onnx import TensorProto, helper
from trt_stand_in import WORKSPACE, TensorRT

from segrt import __version__
from segrt.bundle import Bundle
from segrt.device import to_device, to_host, use_device
from segrt.engines import open_engine
from segrt.errors import BackendError, BuildError
from segrt.export.build import is_built
from segrt.export.engine import build_engine
from segrt.export.tensorrt import TensorRTOptions, build_plan
from segrt.files import sha256

WINDOWS = np.random.default_rng(0).normal(1, 1, (2, 1, 8, 8, 8)).astype(np.float32)
KEY = "tensorrt-11.4.0.106-nvidia-h200-sm90-fp16-b16"  # 16 windows of 8 x 8 x 8 at most keep a large GPU busy
Build = Callable[..., dict[str, Any]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return instead_of_cupy(monkeypatch)


@pytest.fixture
def trt(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    trt = TensorRT(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Two members, and the logits that were stored when they were exported."""
    bundle = make_bundle(tmp_path / "liver", make_spec(members=("0", "1")))
    store_reference(bundle, (0, 1, 2))
    return bundle


def store_reference(bundle: Bundle, centres: tuple[float, ...]) -> None:
    logits = nearest(centres)(WINDOWS)
    np.savez(bundle.reference_path, inputs=WINDOWS, stride=np.array([1, 1, 1]), logits_0=logits, logits_1=logits)


@pytest.fixture
def build(trt: TensorRT, bundle: Bundle) -> Build:
    return lambda **options: build_engine(bundle, backend="tensorrt", device="cuda", **options)


def built(bundle: Bundle) -> list[str]:
    """Files under engines/."""
    folder = bundle.path / "engines"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------ what is built
def test_plans_lie_in_the_bundle_with_a_record_of_all_they_are_bound_to(build: Build, bundle: Bundle, trt: TensorRT) -> None:
    report = build()
    assert set(built(bundle)) == {"timing.cache", f"{KEY}/0.plan", f"{KEY}/1.plan", f"{KEY}/build.json"}
    folder = bundle.engine_path(KEY)
    members = {m: {"onnx_sha256": sha256(bundle.onnx_path(m)), "sha256": sha256(folder / f"{m}.plan")} for m in ("0", "1")}
    assert json.loads((folder / "build.json").read_text()) == {
        "key": KEY,
        "precision": "fp16",
        "batch": 16,
        "compatible": False,
        "gpu": "NVIDIA H200",
        "capability": "9.0",
        "driver": "13.2",
        "tensorrt": "11.4.0.106",
        "verified": True,
        "members": members,
        "level": None,
        "segrt": __version__,
    }
    assert json.loads((bundle.path / "reports" / f"verify-{KEY}.json").read_text()) == report
    assert (report["key"], report["forced"], sorted(report["members"])) == (KEY, False, ["0", "1"])
    for check in report["members"].values():
        assert check["engine"] == "tensorrt 11.4.0.106, cuda:0, fp16, batch 16"
        assert check["label_agreement"] == 1
    assert is_built(bundle, backend="tensorrt", device="cuda")
    assert not is_built(bundle, backend="tensorrt", device="cuda", precisions=("fp32",))


def test_what_was_built_is_what_opens(build: Build, bundle: Bundle) -> None:
    build(tensorrt=TensorRTOptions(batch=2))
    build(precision="fp32", tensorrt=TensorRTOptions(batch=2))
    for precision, dtype in (("fp16", np.float16), ("fp32", np.float32)):
        with closing(open_engine(bundle, "1", device="cuda", precision=precision)) as engine, use_device("cuda"):
            assert engine.name == f"tensorrt 11.4.0.106, cuda:0, {precision}, batch 2"
            logits = to_host(engine(to_device(WINDOWS, "cuda")))
        assert logits.dtype == dtype, "16-bit logits halve the traffic"
        np.testing.assert_allclose(logits, nearest((0, 1, 2))(WINDOWS), rtol=1e-2, atol=1e-2)


def test_options_are_the_builders(build: Build, bundle: Bundle, trt: TensorRT) -> None:
    build(tensorrt=TensorRTOptions(batch=4, workspace_bytes=10**9, compatible=True))
    for config in trt.seen["config"]:
        assert config.flags == {trt.BuilderFlag.VERSION_COMPATIBLE}, "TF32 is off: it keeps ten bits of a float32"
        assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
        assert config.limits == {trt.MemoryPoolType.WORKSPACE: 10**9}
        (profile,) = config.profiles
        assert profile.shapes == {"patches": ((1, 1, 8, 8, 8), (4, 1, 8, 8, 8), (4, 1, 8, 8, 8))}
    (record,) = (bundle.path / "engines").glob("*/build.json")
    assert record.parent.name == "tensorrt-11.4.0.106-compatible-fp16-b4"
    assert json.loads(record.read_text())["compatible"] is True
    assert all(runtime.engine_host_code_allowed for runtime in trt.seen["runtime"])


def test_plain_plans_are_for_this_gpu_with_all_the_memory_there_is(build: Build, trt: TensorRT) -> None:
    build()
    for config in trt.seen["config"]:
        assert (config.flags, config.limits) == (set(), {})
        assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE


# ------------------------------------------------------------------ the timing cache
def test_the_next_build_reads_what_was_timed(build: Build, bundle: Bundle, trt: TensorRT) -> None:
    build()
    build(precision="fp32")
    assert [config.read for config in trt.seen["config"]] == [b"timed\n" * n for n in range(4)]
    assert (bundle.path / "engines" / "timing.cache").read_bytes() == b"timed\n" * 4


def test_a_timing_cache_may_lie_elsewhere(build: Build, bundle: Bundle, tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "all.cache"
    build(tensorrt=TensorRTOptions(timing_cache=shared))
    assert shared.read_bytes() == b"timed\n" * 2
    assert "timing.cache" not in built(bundle)


def test_a_timing_cache_of_another_gpu_is_replaced(build: Build, trt: TensorRT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "timing.cache"
    file.write_bytes(b"another GPU's")
    build(tensorrt=TensorRTOptions(timing_cache=file))
    assert [config.read for config in trt.seen["config"]] == [b"", b"timed\n"]
    assert caplog.text.count("timing.cache is not used: it belongs to another GPU or TensorRT") == 1


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("refuses", "sentence"),
    [
        ({"builder": "no driver"}, "^TensorRT cannot start its builder here: no driver$"),
        ({"build": "no kernel for node conv"}, "^TensorRT built no engine: no kernel for node conv$"),
        ({"deserialize": "version tag differs"}, r"0\.plan: TensorRT does not accept the plan: version tag differs"),
        (
            {"deserialize": "out of memory"},
            r"^the memory of cuda:0 does not hold the plan of member '0': .*out of memory; free some of it$",
        ),
    ],
)
def test_what_tensorrt_refuses_is_one_sentence_and_leaves_no_engine(
    build: Build, bundle: Bundle, trt: TensorRT, refuses: dict[str, str], sentence: str
) -> None:
    trt.refuses = refuses
    with pytest.raises((BuildError, BackendError), match=sentence):
        build()
    assert not set(built(bundle)) - {"timing.cache"}
    assert [path.name for path in (bundle.path / "engines").iterdir() if path.is_dir()] == []


def test_an_engine_that_falls_short_is_kept_only_by_force(build: Build, bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    store_reference(bundle, (0, 5, 2))
    with pytest.raises(BuildError, match=rf"^the {KEY} engine of member '0' is refused: it gives the reference's label to"):
        build()
    assert built(bundle) == ["timing.cache"]
    with pytest.raises(BackendError, match="no TensorRT engine of precision fp16"):
        open_engine(bundle, "0", backend="tensorrt", device="cuda")
    assert build(force=True)["forced"]
    assert json.loads((bundle.engine_path(KEY) / "build.json").read_text())["verified"] is False
    assert "not passed verification" not in caplog.text
    open_engine(bundle, "0", backend="tensorrt", device="cuda").close()
    assert f"{KEY}/0.plan has not passed verification" in caplog.text


def test_a_refused_build_leaves_the_engine_that_was_there(build: Build, bundle: Bundle) -> None:
    build()
    before = (bundle.engine_path(KEY) / "build.json").read_bytes()
    store_reference(bundle, (0, 5, 2))
    with pytest.raises(BuildError, match="is refused"):
        build()
    assert (bundle.engine_path(KEY) / "build.json").read_bytes() == before
    open_engine(bundle, "0", backend="tensorrt", device="cuda").close()


def test_a_precision_that_cannot_be_had_leaves_nothing(build: Build, bundle: Bundle) -> None:
    with pytest.raises(BuildError, match="no convolution between its first and its last one"):
        build(precision="int8")
    assert built(bundle) == []


def test_a_network_has_one_input_and_one_output(trt: TensorRT) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, 4, 4]) for name in ("x", "a", "b")]
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"])]
    graph = helper.make_graph(nodes, "two heads", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    with pytest.raises(BuildError, match="TensorRT found 1 inputs and 2 outputs in the network, expected one of each"):
        build_plan(model, "fp32", TensorRTOptions(batch=1))


# ------------------------------------------------------------------ little memory
def test_a_gpu_too_small_for_the_batch_verifies_with_fewer_windows(build: Build, bundle: Bundle, gpu: Gpu) -> None:
    gpu.size = 4 * (WORKSPACE + 8**3 * 4 * 5)
    report = build()
    assert not report["forced"]
    assert f"{KEY}/1.plan" in built(bundle)
    gpu.size = 8**3 * 8
    with pytest.raises(BackendError, match=r"the memory of cuda:0 does not hold one window \(.*allocating.*\); free some of it"):
        build()
