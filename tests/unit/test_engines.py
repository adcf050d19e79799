"""Engines: every backend gives the torch network's logits, and a file that is not the built one is refused."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from factories import CountingEngine, make_bundle, make_spec, nearest, unet_bundle

from segrt.arrays import FloatArray
from segrt.bundle import Bundle
from segrt.engines import check_onnx, open_engine, read_build
from segrt.engines.compose import Mirrored
from segrt.engines.function import FunctionEngine
from segrt.engines.openvino import batch_size, cpu_name, engine_key
from segrt.errors import BackendError
from segrt.export.build import build_model
from segrt.export.engine import build_engine
from segrt.spec import ShapeTarget

BACKENDS = ("openvino", "onnxruntime", "pytorch")


@pytest.fixture(scope="module", params=[3, 2])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return unet_bundle(tmp_path_factory.mktemp("unet") / "b", request.param)


@pytest.fixture
def copy(tmp_path: Path) -> Bundle:
    return unet_bundle(tmp_path / "b")


def patches_for(bundle: Bundle, count: int) -> FloatArray:
    shape = (count, bundle.spec.in_channels, *bundle.spec.inference.patch)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 3, 11])
def test_every_backend_agrees_with_torch_for_any_batch(bundle: Bundle, backend: Any, count: int) -> None:
    patches = patches_for(bundle, count)
    before = patches.copy()
    reference = open_engine(bundle, "1", backend="pytorch")
    engine = open_engine(bundle, "1", backend=backend)
    logits = engine(patches)
    assert logits.shape == (count, 3, *bundle.spec.inference.patch)
    assert logits.dtype == np.float32
    assert logits.flags.c_contiguous
    # fp32 convolutions in another order of summation
    assert np.abs(logits - reference(patches)).max() < 1e-4
    assert (patches == before).all()
    engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_patches_give_equal_logits_that_belong_to_the_caller(bundle: Bundle, backend: Any) -> None:
    patches = patches_for(bundle, 5)
    engine = open_engine(bundle, "0", backend=backend)
    together = engine(patches)
    kept = together.copy()
    alone = engine(patches[4:5])
    alone += 1000
    assert (engine(patches[4:5])[0] == kept[4]).all()
    assert (together == kept).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_may_call_an_engine_at_once(bundle: Bundle, backend: Any) -> None:
    engine = open_engine(bundle, "0", backend=backend)
    jobs = [patches_for(bundle, 12) + i for i in range(4)]
    expected = [engine(patches) for patches in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, jobs))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_members_differ(bundle: Bundle) -> None:
    patches = patches_for(bundle, 1)
    assert np.abs(open_engine(bundle, "0")(patches) - open_engine(bundle, "1")(patches)).max() > 1e-3


def test_threads_can_be_limited(bundle: Bundle) -> None:
    patches = patches_for(bundle, 1)
    for backend in ("openvino", "onnxruntime"):
        logits = open_engine(bundle, "0", backend=backend, threads=1)(patches)
        assert np.abs(logits - open_engine(bundle, "0")(patches)).max() < 1e-4


def test_auto_takes_openvino_where_there_is_an_onnx_file(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    assert open_engine(copy, "0").name.startswith("openvino")
    shutil.rmtree(copy.path / "onnx")
    with caplog.at_level(logging.WARNING):
        assert open_engine(copy, "0").name.startswith("pytorch")
    assert "0.onnx is missing: member 0 runs on PyTorch, which is slower" in caplog.text


def test_the_compiled_engine_is_used_and_its_memory_known(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = open_engine(copy, "0")
    assert caplog.text == ""
    assert engine.held_bytes > 0


def test_without_a_compiled_engine_it_compiles_and_says_so(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(copy.path / "engines")
    patches = patches_for(copy, 1)
    with caplog.at_level(logging.WARNING):
        logits = open_engine(copy, "0")(patches)
    assert "no compiled engine for this machine" in caplog.text
    assert np.abs(logits - open_engine(copy, "0", backend="pytorch")(patches)).max() < 1e-4


def test_an_engine_of_another_cpu_is_compiled_again(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    path = copy.engine_path(engine_key("fp32")) / "build.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cpu": "another"}))
    with caplog.at_level(logging.WARNING):
        open_engine(copy, "0")
    assert "compiling now" in caplog.text


@pytest.mark.parametrize("verified", [False, None, "yes"])
def test_an_engine_without_a_passed_verification_is_marked(copy: Bundle, caplog: pytest.LogCaptureFixture, verified: Any) -> None:
    path = copy.engine_path(engine_key("fp32")) / "build.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verified": verified}))
    with caplog.at_level(logging.WARNING):
        open_engine(copy, "0")
    assert "has not passed verification" in caplog.text


def test_a_changed_blob_is_refused(copy: Bundle) -> None:
    blob = copy.engine_path(engine_key("fp32")) / "0.blob"
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1  # a fixed byte may be the one that is there: the engine is scrambled anew with every build
    blob.write_bytes(content)
    with pytest.raises(BackendError, match=r"0\.blob is not the engine that was built.*segrt-build \S+ --fp32$"):
        open_engine(copy, "0")
    build_model(copy.path, device="cpu", precisions=["fp32"])  # which does so, and keeps none that falls short
    open_engine(copy, "0").close()


def test_a_blob_of_another_onnx_file_is_refused(copy: Bundle) -> None:
    path = copy.engine_path(engine_key("fp32")) / "build.json"
    build = json.loads(path.read_text())
    build["members"]["0"]["onnx_sha256"] = build["members"]["1"]["onnx_sha256"]
    path.write_text(json.dumps(build))
    with pytest.raises(BackendError, match="compiled from another ONNX file"):
        open_engine(copy, "0")


def test_a_changed_onnx_file_is_refused(copy: Bundle) -> None:
    shutil.copy(copy.onnx_path("1"), copy.onnx_path("0"))
    for backend in ("auto", "openvino", "onnxruntime"):
        with pytest.raises(BackendError, match=r"0\.onnx is not the file that was exported"):
            open_engine(copy, "0", backend=backend)
    assert check_onnx(copy, "1")


def test_missing_files_are_named(copy: Bundle) -> None:
    copy.weights_path("0").unlink()
    with pytest.raises(BackendError, match=r"0\.safetensors is missing"):
        open_engine(copy, "0", backend="pytorch")
    copy.onnx_path("0").unlink()
    with pytest.raises(BackendError, match=r"0\.onnx is missing; make it with: segrt-build"):
        open_engine(copy, "0", backend="openvino")


def test_a_network_that_is_only_onnx_has_no_torch_form(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="has no PyTorch form; use backend openvino"):
        open_engine(make_bundle(tmp_path / "b"), "0", backend="pytorch")


@pytest.mark.parametrize(
    ("backend", "precision", "sentence"),
    [
        ("caffe", "fp32", "unknown backend 'caffe'; expected auto, openvino"),
        ("tensorrt", "fp16", "backend tensorrt runs on an NVIDIA GPU, not on device cpu"),
        ("tensorrt-rtx", None, "backend tensorrt-rtx runs on an NVIDIA GPU, not on device cpu"),
        ("openvino", "fp8", "expected one of fp32, bf16, fp16, int8"),
        ("openvino", "int8", "has no verified int8 engine for this machine; make one with: segrt-build"),
        ("onnxruntime", "bf16", "serves fp32 only, not bf16; use backend openvino"),
        ("pytorch", "fp16", "serves fp32 and bf16, not fp16"),
    ],
)
def test_what_a_backend_cannot_do(copy: Bundle, backend: Any, precision: Any, sentence: str) -> None:
    with pytest.raises(BackendError, match=sentence):
        open_engine(copy, "0", backend=backend, precision=precision)


def test_bf16_is_close_or_refused(copy: Bundle) -> None:
    patches = patches_for(copy, 1)
    reference = open_engine(copy, "0", backend="pytorch")(patches)
    assert np.abs(open_engine(copy, "0", backend="pytorch", precision="bf16")(patches) - reference).max() < 0.1
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match="no verified bf16 engine"):
            open_engine(copy, "0", precision="bf16")
        build_engine(copy, precision="bf16", force=True)
        assert np.abs(open_engine(copy, "0", precision="bf16")(patches) - reference).max() < 0.1
    else:
        with pytest.raises(BackendError, match="no bf16 arithmetic"):
            open_engine(copy, "0", precision="bf16")


def test_the_key_and_the_machine_are_named() -> None:
    assert engine_key("fp32") == f"openvino-{openvino.__version__.split('-')[0]}-cpu-fp32"
    assert cpu_name()


@pytest.mark.parametrize(
    ("patch", "batch"), [((64, 64, 64), 1), ((1, 64, 64), 8), ((1, 128, 128), 4), ((1, 256, 256), 1), ((1, 2048, 2048), 1)]
)
def test_2d_models_run_in_batches(tmp_path: Path, patch: Any, batch: int) -> None:
    assert batch_size(Bundle(tmp_path, make_spec(patch=patch))) == batch
    # one window is all of such an image: a batch would be filled with nothing
    assert batch_size(Bundle(tmp_path, make_spec(patch=patch, target=ShapeTarget(shape=patch)))) == 1


@pytest.mark.parametrize("text", [None, "{", "[]", '"x"'])
def test_a_damaged_build_record_is_no_record(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "build.json"
    if text is not None:
        path.write_text(text)
    assert read_build(path) == {}


def test_a_function_must_give_logits() -> None:
    for function in (lambda p: p[0], lambda p: p[:, :, :-1], lambda p: np.concatenate([p, p])):
        with pytest.raises(BackendError, match=r"expected logits \(N, K, Z, Y, X\)"):
            FunctionEngine(function)(np.zeros((1, 1, 2, 2, 2), np.float32))


def test_a_function_may_give_back_its_input() -> None:
    patches = np.zeros((1, 1, 2, 2, 2), np.float32)
    engine = FunctionEngine(lambda p: p)
    assert not np.shares_memory(engine(patches), patches)
    assert engine.close() is None


def lopsided(patches: FloatArray) -> FloatArray:
    """A network that knows left from right: position matters."""
    ramp = np.arange(patches[0, 0].size, dtype=np.float32).reshape(patches.shape[2:])
    return np.tanh(patches * ramp) + ramp / 7


def mirrored_slowly(patches: FloatArray, flips: list[tuple[int, ...]]) -> FloatArray:
    total = np.zeros_like(patches)
    for flip in flips:
        axes = tuple(a + 2 for a in flip)
        total = total + np.flip(lopsided(np.flip(patches, axes)), axes)
    return total / np.float32(len(flips))


# the order of NNUNET.md 1.10
ALL_FLIPS = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2), (2,), (2, 0)])
def test_mirroring_averages_in_nnunets_order(axes: tuple[int, ...]) -> None:
    patches = np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5)).astype(np.float32)
    flips = [f for f in ALL_FLIPS if set(f) <= set(axes)]
    engine = Mirrored(FunctionEngine(lopsided), axes)
    assert (engine(patches) == mirrored_slowly(patches, flips)).all()
    assert engine.name == f"function, {len(flips)} mirrored passes"


def test_mirroring_passes_on_what_the_engine_says() -> None:
    inner = CountingEngine(nearest((0, 1)), batch=4)
    inner.held_bytes = 9
    engine = Mirrored(inner, (0, 1))
    assert (engine.batch, engine.held_bytes) == (4, 9)
    engine(np.zeros((2, 1, 2, 2, 2), np.float32))
    assert inner.calls == [2, 2, 2, 2]
    engine.close()
    assert inner.closed == 1


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_signal_after_engines_were_closed_reaches_python(tmp_path: Path, order: str) -> None:
    """OpenVINO gives the thread a signal stack, and its end puts an older one back that may be gone: Ctrl-C then killed the process."""
    bundle = make_bundle(tmp_path / "model")
    code = f"""
import os, signal, sys
from segrt.bundle import Bundle
from segrt.engines import open_engine
received = []
signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
bundle = Bundle.open(sys.argv[1])
for _ in range(3):
    engines = [open_engine(bundle, "0") for _ in range(2)]
    for _ in range(2):
        engines.pop({0 if order == "first" else -1}).close()
    os.kill(os.getpid(), signal.SIGUSR1)
assert received == [signal.SIGUSR1] * 3, received
"""
    done = subprocess.run([sys.executable, "-c", code, str(bundle.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
