"""TensorRT: which plan of a bundle fits a machine, what is refused, that the names we call exist; and, where there is a GPU, its logits."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from factories import make_bundle, make_spec, unet_bundle

from segrt.bundle import Bundle
from segrt.device import compute_on, open_stream, to_device, to_host, use_device
from segrt.engines import open_engine
from segrt.engines.batches import at_most
from segrt.engines.compiled import check_window
from segrt.engines.trt import TensorRTEngine, _Lane, this_machine
from segrt.engines.trt_plan import Machine, engine_key, find_plan, make_record, mismatch
from segrt.errors import BackendError
from segrt.export.engine import build_engine
from segrt.export.tensorrt import TensorRTOptions
from segrt.files import sha256

H200 = Machine(gpu="NVIDIA H200", capability="9.0", driver="13.0", tensorrt="11.4.0.106")
A100 = replace(H200, gpu="NVIDIA A100-SXM4-80GB", capability="8.0")
needs_no_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "liver", make_spec(members=("0", "1")))


def add_plan(bundle: Bundle, machine: Machine = H200, precision: str = "fp16", batch: int = 8, **options: Any) -> Path:
    """Put a plan (of no use) with its record into a bundle, as a build does."""
    compatible, verified = options.get("compatible", False), options.get("verified", True)
    folder = bundle.engine_path(engine_key(machine, precision, batch, compatible=compatible))
    folder.mkdir(parents=True)
    members = {}
    for member in bundle.spec.members:
        (folder / f"{member}.plan").write_bytes(f"plan of {member}, batch {batch}".encode())
        members[member] = {"onnx_sha256": sha256(bundle.onnx_path(member)), "sha256": sha256(folder / f"{member}.plan")}
    record = make_record(machine, precision, batch, members, compatible=compatible, verified=verified)
    (folder / "build.json").write_text(json.dumps(record))
    return folder


# ------------------------------------------------------------------ the plan that fits
def test_a_key_names_all_that_a_plan_is_bound_to() -> None:
    assert engine_key(H200, "fp16", 8) == "tensorrt-11.4.0.106-nvidia-h200-sm90-fp16-b8"
    assert engine_key(A100, "fp16", 8) == "tensorrt-11.4.0.106-nvidia-a100-sxm4-80gb-sm80-fp16-b8"
    assert engine_key(H200, "int8", 4, compatible=True) == "tensorrt-11.4.0.106-compatible-int8-b4"


def test_the_plan_built_here_is_found(bundle: Bundle) -> None:
    folder = add_plan(bundle)
    add_plan(bundle, A100)
    add_plan(bundle, precision="fp32")
    file, record = find_plan(bundle, "1", "fp16", H200)
    assert file == folder / "1.plan"
    assert (record["batch"], record["verified"], record["compatible"]) == (8, True, False)


def test_the_largest_batch_for_this_gpu_comes_first(bundle: Bundle) -> None:
    for batch in (4, 16, 8):
        add_plan(bundle, batch=batch)
    add_plan(bundle, batch=32, compatible=True)
    assert find_plan(bundle, "0", "fp16", H200)[1]["batch"] == 16
    assert find_plan(bundle, "0", "fp16", A100)[1]["batch"] == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "NVIDIA A100", "capability": "8.0"}, "was built for GPU NVIDIA H200, and this machine has GPU NVIDIA A100"),
        ({"driver": "12.8"}, "was built for a driver of CUDA 13.0, and this machine has a driver of CUDA 12.8"),
        ({"tensorrt": "11.5.0.1"}, "was built for TensorRT 11.4.0.106, and this machine has TensorRT 11.5.0.1"),
    ],
)
def test_another_machine_is_refused_with_what_differs(bundle: Bundle, changes: dict[str, str], words: str) -> None:
    folder = add_plan(bundle)
    with pytest.raises(BackendError) as caught:
        find_plan(bundle, "0", "fp16", replace(H200, **changes))
    sentence = str(caught.value)
    assert f"{folder.name} {words}" in sentence
    assert f"segrt-build {bundle.path} --backend tensorrt --device cuda --fp16" in sentence
    assert "\n" not in sentence


def test_a_bundle_without_plans_says_how_to_make_one(bundle: Bundle) -> None:
    add_plan(bundle, precision="fp32")
    with pytest.raises(BackendError, match=r"has no TensorRT engine of precision bf16 for this machine, which has NVIDIA H200 .* --bf16$"):
        find_plan(bundle, "0", "bf16", H200)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (H200, ""),
        (A100, ""),
        (replace(H200, tensorrt="11.5.1.2", driver="13.2"), ""),
        (
            replace(H200, tensorrt="11.3.0.9"),
            "TensorRT 11.4.0.106 and later ones of the same major version, and this machine has TensorRT 11.3",
        ),
        (replace(H200, tensorrt="12.0.0.1"), "this machine has TensorRT 12.0.0.1"),
        (replace(H200, gpu="Tesla T4", capability="7.5"), "compute capability 8.0 and later, and Tesla T4 has 7.5"),
    ],
)
def test_a_compatible_plan_runs_from_ampere_on_and_on_later_versions(machine: Machine, words: str) -> None:
    reason = mismatch(make_record(A100, "fp16", 8, {}, compatible=True, verified=True), machine)
    assert words in reason
    assert bool(words) == bool(reason)


# ------------------------------------------------------------------ files that are not the ones that were built
def test_a_changed_plan_is_refused(bundle: Bundle) -> None:
    folder = add_plan(bundle)
    (folder / "0.plan").write_bytes(b"another")
    with pytest.raises(BackendError, match=r"0\.plan is not the engine that was built \(its SHA-256 differs"):
        find_plan(bundle, "0", "fp16", H200)
    (folder / "0.plan").unlink()
    with pytest.raises(BackendError, match=r"0\.plan is not the engine that was built"):
        find_plan(bundle, "0", "fp16", H200)


def test_a_plan_of_another_onnx_file_is_refused(bundle: Bundle) -> None:
    add_plan(bundle)
    bundle.onnx_path("0").write_bytes(b"another")
    with pytest.raises(BackendError, match="was compiled from another ONNX file"):
        find_plan(bundle, "0", "fp16", H200)


@pytest.mark.parametrize("damage", ["not json", "[]", '{"precision": "fp16"}'])
def test_a_damaged_record_is_no_record(bundle: Bundle, damage: str) -> None:
    (add_plan(bundle) / "build.json").write_text(damage)
    with pytest.raises(BackendError, match="no TensorRT engine of precision fp16"):
        find_plan(bundle, "0", "fp16", H200)


def test_a_record_that_fits_and_lacks_its_members_is_refused(bundle: Bundle) -> None:
    folder = add_plan(bundle)
    record = json.loads((folder / "build.json").read_text())
    for members in ([], {"0": "plan"}, {"0": {"sha256": 5}}):
        (folder / "build.json").write_text(json.dumps(record | {"members": members, "batch": "many"}))
        with pytest.raises(BackendError, match="another ONNX file"):
            find_plan(bundle, "0", "fp16", H200)


def test_a_plan_kept_by_force_is_marked(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    add_plan(bundle, verified=False)
    find_plan(bundle, "0", "fp16", H200)
    assert "has not passed verification" in caplog.text


def test_windows_are_those_of_the_model(bundle: Bundle, tmp_path: Path) -> None:
    record = {"key": "tensorrt-11.4-sm90-fp16-b4", "precision": "fp16"}
    check_window(bundle, tmp_path / "0.plan", (1, 8, 8, 8), record)
    with pytest.raises(BackendError, match=r"0\.plan was compiled for windows of 1 x 8 x 8 x 9 .* describes 1 x 8 x 8 x 8") as refused:
        check_window(bundle, tmp_path / "0.plan", (1, 8, 8, 9), record)
    assert str(refused.value).endswith(f"rebuild it with: segrt-build {bundle.path} --backend tensorrt --device cuda --fp16")
    flat = make_bundle(tmp_path / "flat", make_spec(patch=(1, 16, 8)))
    check_window(flat, tmp_path / "0.plan", (1, 16, 8), record)


# ------------------------------------------------------------------ no GPU
@needs_no_gpu
def test_without_a_gpu_nothing_is_opened_or_built(bundle: Bundle) -> None:
    add_plan(bundle)
    before = sorted(bundle.path.rglob("*"))
    for device in ("cuda", "cuda:1"):
        with pytest.raises(BackendError, match=f"{device} is asked for and this machine has no GPU"):
            open_engine(bundle, "0", backend="tensorrt", device=device)
        with pytest.raises(BackendError, match=f"{device} is asked for and this machine has no GPU"):
            build_engine(bundle, backend="tensorrt", device=device, precision="fp16")
    with pytest.raises(BackendError, match="cuda is asked for"):
        build_engine(bundle, backend="tensorrt", precision="fp16")
    assert sorted(bundle.path.rglob("*")) == before


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_tensorrt_needs_a_gpu(bundle: Bundle, device: str) -> None:
    with pytest.raises(BackendError, match=f"NVIDIA GPU, not on device {device}"):
        open_engine(bundle, "0", backend="tensorrt", device=device)
    with pytest.raises(BackendError, match=f"TensorRT runs on an NVIDIA GPU, not on device {device}"):
        this_machine(device)


def test_what_lies_in_the_gpus_memory_already_is_not_counted_again() -> None:
    """Neither the plan nor a lane that an earlier call made; what a lane of another batch size gives back counts for the new one."""
    engine = TensorRTEngine.__new__(TensorRTEngine)  # opening one needs a GPU
    engine._engine = SimpleNamespace(device_memory_size_v2=1000)
    engine._input, engine._output = "patches", "logits"
    engine._types = {"patches": np.dtype(np.float32), "logits": np.dtype(np.float16)}
    engine.window, engine._logits_shape, engine._lanes = (1, 2, 5, 5), (3, 2, 5, 5), {}
    assert [engine.call_bytes(n, 10**9) for n in (1, 4)] == [1000 + 500, 1000 + 4 * 500]
    patches, logits = np.empty((4, 1, 2, 5, 5), np.float32), np.empty((4, 3, 2, 5, 5), np.float16)
    engine._lanes[4] = _Lane(None, patches, logits, np.empty(900, np.uint8), None)
    assert [engine.call_bytes(n, 10**9) for n in (4, 1, 8)] == [0, 0, 1000 + 8 * 500 - 2900]


# ------------------------------------------------------------------ names that only a GPU would run
def test_cupy_has_what_the_engine_calls() -> None:
    cuda = pytest.importorskip("cupy").cuda
    from cupy.cuda.graph import Graph

    for owner, names in {
        cuda.Stream: ("begin_capture", "end_capture", "wait_event", "synchronize", "__enter__"),
        cuda.Event: ("record",),
        Graph: ("launch",),
        cuda.runtime: ("getDeviceProperties", "driverGetVersion", "CUDARuntimeError"),
        cuda: ("get_current_stream",),
    }.items():
        assert [name for name in names if not hasattr(owner, name)] == []


# ------------------------------------------------------------------ on a GPU
@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if not Path("/dev/nvidia0").exists():
        pytest.skip("needs an NVIDIA GPU")
    pytest.importorskip("tensorrt", reason="needs TensorRT", exc_type=ImportError)
    made = unet_bundle(tmp_path_factory.mktemp("gpu") / "unet")
    for precision in ("fp32", "fp16", "int8"):
        # a random network's classes are nearly tied
        build_engine(made, backend="tensorrt", device="cuda", precision=precision, force=True, tensorrt=TensorRTOptions(batch=4))
    return made


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("fp16", 5e-3), ("int8", 0.2)])
def test_a_gpu_gives_the_logits_of_the_cpu(built: Bundle, precision: Any, error: float) -> None:
    patches = np.random.default_rng(0).normal(size=(11, 1, 8, 8, 8)).astype(np.float32)
    with closing(open_engine(built, "0", backend="onnxruntime", precision="fp32")) as reference:
        expected = reference(patches)
    with closing(open_engine(built, "0", backend="tensorrt", device="cuda", precision=precision)) as engine, use_device(engine.device):
        assert (engine.batch, engine.device) == (4, "cuda:0")
        device_patches = to_device(patches, engine.device)
        found = to_host(engine(device_patches)).astype(np.float32)
        assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < error
        # the first batch ran plainly, all later ones as a CUDA graph
        for count in (11, 1, 4, 5):
            assert np.array_equal(to_host(engine(device_patches[:count])).astype(np.float32), found[:count])


@pytest.mark.gpu
def test_a_plan_serves_smaller_batches_to_the_same_logits(built: Bundle) -> None:
    with closing(open_engine(built, "0", backend="tensorrt", device="cuda", precision="fp16")) as engine, use_device(engine.device):
        patches = to_device(np.random.default_rng(0).normal(size=(5, 1, 8, 8, 8)).astype(np.float32), engine.device)
        expected = to_host(engine(patches))
        for windows in (1, 2, None):
            with at_most(engine, windows):
                assert np.array_equal(to_host(engine(patches)), expected)
                assert engine.call_bytes(engine.batch, 0) == 0


@pytest.mark.gpu
def test_threads_take_turns(built: Bundle) -> None:
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=(6, 1, 8, 8, 8)).astype(np.float32) for _ in range(4)]
    with closing(open_engine(built, "0", backend="tensorrt", device="cuda", precision="fp16")) as engine:

        def run(patches: Any) -> Any:
            stream = open_stream(engine.device)
            with compute_on(engine.device, stream):
                return to_host(engine(to_device(patches, engine.device)))

        expected = [run(patches) for patches in inputs]
        with ThreadPoolExecutor(4) as pool:
            for found, wanted in zip(pool.map(run, inputs * 5), expected * 5, strict=True):
                assert np.array_equal(found, wanted)
