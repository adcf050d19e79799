"""What the TensorRT engine asks of CuPy and TensorRT, in which order, and what it does when they fail; see `gpu_stand_in`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import make_bundle, make_spec
from gpu_stand_in import Gpu, instead_of_cupy, running_ahead
from trt_stand_in import WORKSPACE, TensorRT, make_plan

from segrt.arrays import FloatArray
from segrt.bundle import Bundle
from segrt.device import compute_on, open_stream, to_device, to_host
from segrt.engines import open_engine
from segrt.engines.batches import at_most
from segrt.engines.trt import TensorRTEngine, this_machine
from segrt.engines.trt_plan import engine_key, make_record
from segrt.errors import BackendError
from segrt.files import sha256

WINDOW_BYTES = (1 + 3) * 8**3 * 4  # patches and logits of one window


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return instead_of_cupy(monkeypatch)


@pytest.fixture
def trt(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    trt = TensorRT(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b", make_spec())


@pytest.fixture
def engine(trt: TensorRT, bundle: Bundle) -> Iterator[TensorRTEngine]:
    with closing(open_plan_of(bundle)) as engine:
        yield engine


def open_plan_of(bundle: Bundle, batch: int = 4) -> TensorRTEngine:
    return TensorRTEngine(make_plan(bundle.onnx_path("0").read_bytes(), batch), device="cuda", precision="fp32")


def patches_of(count: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(1, 1, (count, 1, 8, 8, 8)).astype(np.float32)


def logits_of(patches: FloatArray) -> FloatArray:
    centres = np.arange(3, dtype=np.float32)[None, :, None, None, None]
    return 2 * centres * patches - centres**2


def answer(engine: TensorRTEngine, patches: FloatArray) -> Any:
    """Logits of patches that the caller's stream has yet to write when the engine is called."""
    stream = open_stream("cuda")
    with compute_on("cuda", stream):
        uploaded = to_device(patches, "cuda")
        late = sys.modules["cupy"].empty(patches.shape, np.float32)
        late[...] = uploaded
        return to_host(engine(late))


# ------------------------------------------------------------------ order
@pytest.mark.parametrize("ahead", ["nobody", "engine", "everybody"])
def test_logits_are_right_whichever_stream_is_ahead(engine: TensorRTEngine, gpu: Gpu, ahead: str) -> None:
    assert (engine.batch, engine.device, engine.window) == (4, "cuda:0", (1, 8, 8, 8))
    streams = {"nobody": (), "engine": (engine._stream,), "everybody": tuple(gpu.streams.values())}[ahead]
    with running_ahead(*streams):
        for count in (11, 1, 4, 9):
            patches = patches_of(count, count)
            np.testing.assert_allclose(answer(engine, patches), logits_of(patches), rtol=1e-5, atol=1e-5)


def test_logits_of_a_caller_that_does_not_wait_are_not_written_over(engine: TensorRTEngine) -> None:
    stream = open_stream("cuda")
    with compute_on("cuda", stream):
        given = [patches_of(4, seed) for seed in range(3)]
        found = [engine(to_device(patches, "cuda")) for patches in given]
        for patches, logits in zip(given, found, strict=True):
            np.testing.assert_allclose(to_host(logits), logits_of(patches), rtol=1e-5, atol=1e-5)


def test_threads_take_turns_at_the_lane(engine: TensorRTEngine) -> None:
    given = [patches_of(5, seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for patches, found in zip(given, pool.map(lambda patches: answer(engine, patches), given), strict=True):
            np.testing.assert_allclose(found, logits_of(patches), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ the CUDA graph
def test_from_the_second_batch_on_a_graph_is_launched(engine: TensorRTEngine, trt: TensorRT, gpu: Gpu) -> None:
    answer(engine, patches_of(4))
    (context,), (graph,) = trt.seen["context"], gpu.graphs
    assert (context.calls, graph.launches) == (2, 0), "a plain run, and one to record"
    answer(engine, patches_of(12))
    assert (context.calls, graph.launches) == (2, 3)


@pytest.mark.parametrize("call", ["begin_capture", "end_capture", "execute in a capture"])
def test_where_no_graph_can_be_captured_the_network_runs_without(
    engine: TensorRTEngine, trt: TensorRT, gpu: Gpu, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    caplog.set_level("INFO")
    gpu.failures.add(call)
    trt.refuses = {call: "this layer waits for the host"}
    patches = patches_of(12)
    np.testing.assert_allclose(answer(engine, patches), logits_of(patches), rtol=1e-5, atol=1e-5)
    assert caplog.text.count("the network runs without a CUDA graph, which could not be captured") == 1, "and it is not tried again"
    assert ("waits for the host" if call.startswith("execute") else f"{call} failed") in caplog.text
    assert gpu.graphs == [] or not gpu.graphs[0].launches
    assert engine.batch == 4


# ------------------------------------------------------------------ memory
def test_a_lane_makes_room_for_one_of_another_size(engine: TensorRTEngine, trt: TensorRT, gpu: Gpu) -> None:
    patches = patches_of(4)
    for windows in (4, 1, 2):
        with at_most(engine, windows):
            assert engine.call_bytes(windows, 0) > 0 or windows < 4, "what the larger lane holds is more than enough"
            np.testing.assert_allclose(answer(engine, patches), logits_of(patches), rtol=1e-5, atol=1e-5)
            assert engine.call_bytes(windows, 0) == 0
        assert gpu.used == windows * (WINDOW_BYTES + WORKSPACE), "the lane of this batch size and no other"
        context = trt.seen["context"][-1]
        assert context.lent[1] == windows * WORKSPACE, "what TensorRT asks for these shapes"
    assert len(trt.seen["context"]) == 3


def test_out_of_memory_drops_the_lane_and_halves_the_batch(engine: TensorRTEngine, gpu: Gpu) -> None:
    patches = patches_of(4)
    with compute_on("cuda", open_stream("cuda")):
        there = to_device(patches, "cuda")
        # room for the logits and a lane of two windows
        gpu.size = gpu.used + 4 * 3 * 8**3 * 4 + 2 * (WINDOW_BYTES + WORKSPACE) + 100
        before = gpu.used
        with pytest.raises(MemoryError, match="allocating"):
            engine(there)
        assert (engine.batch, gpu.used, gpu.given_back) == (2, before, 1)
        np.testing.assert_allclose(to_host(engine(there)), logits_of(patches), rtol=1e-5, atol=1e-5)


def test_memory_that_tensorrt_lacks_is_a_memory_error_too(engine: TensorRTEngine, trt: TensorRT, gpu: Gpu) -> None:
    answer(engine, patches_of(1))
    engine.batch = 3
    for call, batch in (("context", 1), ("shape", 1)):
        trt.refuses = {call: "[resizingAllocator.cpp] Cuda Runtime (out of memory)"}
        with pytest.raises(MemoryError, match=r"cannot prepare a batch of .*out of memory"):
            answer(engine, patches_of(1))
        assert (engine.batch, gpu.used) == (batch, 0)
    trt.refuses = {"execute": "Cuda Runtime (out of memory)"}
    with pytest.raises(MemoryError, match="could not run the network"):
        answer(engine, patches_of(1))
    trt.refuses = {}
    np.testing.assert_allclose(answer(engine, patches_of(2)), logits_of(patches_of(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("context", r"^tensorrt 11\.4\.0\.106, cuda:0, fp32, batch 4 cannot prepare a batch of 4: an odd reason$"),
        ("shape", "cannot prepare a batch of 4: an odd reason"),
        ("execute", "^TensorRT could not run the network: an odd reason$"),
    ],
)
def test_other_failures_are_sentences_and_the_next_call_starts_anew(
    engine: TensorRTEngine, trt: TensorRT, gpu: Gpu, call: str, sentence: str
) -> None:
    trt.refuses = {call: "an odd reason"}
    with pytest.raises(BackendError, match=sentence):
        answer(engine, patches_of(1))
    assert (engine.batch, gpu.used) == (4, 0)
    trt.refuses = {}
    np.testing.assert_allclose(answer(engine, patches_of(1)), logits_of(patches_of(1)), rtol=1e-5, atol=1e-5)


def test_closing_gives_the_memory_back(trt: TensorRT, gpu: Gpu, bundle: Bundle) -> None:
    engine = open_plan_of(bundle)
    answer(engine, patches_of(4))
    assert gpu.used > 0
    engine.close()
    assert gpu.used == 0


# ------------------------------------------------------------------ opening
def add_plan(bundle: Bundle, compatible: bool) -> Path:
    machine = this_machine("cuda")
    folder = bundle.engine_path(engine_key(machine, "fp16", 4, compatible=compatible))
    folder.mkdir(parents=True)
    plan = folder / "0.plan"
    plan.write_bytes(make_plan(bundle.onnx_path("0").read_bytes(), 4))
    members = {"0": {"onnx_sha256": sha256(bundle.onnx_path("0")), "sha256": sha256(plan)}}
    (folder / "build.json").write_text(json.dumps(make_record(machine, "fp16", 4, members, compatible=compatible, verified=True)))
    return plan


@pytest.mark.parametrize("compatible", [False, True])
def test_code_in_a_plan_runs_only_where_its_record_says_compatible(trt: TensorRT, tmp_path: Path, compatible: bool) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec())
    add_plan(bundle, compatible)
    with closing(open_engine(bundle, "0", backend="tensorrt", device="cuda")) as engine:
        assert engine.name == "tensorrt 11.4.0.106, cuda:0, fp16, batch 4"
    assert [runtime.engine_host_code_allowed for runtime in trt.seen["runtime"]] == [compatible]


@pytest.mark.parametrize(
    ("call", "reason", "sentence"),
    [
        ("deserialize", "version tag differs", r"0\.plan: TensorRT does not accept the plan: version tag differs"),
        ("deserialize", "out of memory", r"the memory of cuda does not hold member '0' on tensorrt: .*out of memory"),
        ("runtime", "no driver", r"0\.plan: TensorRT cannot start here: no driver"),
    ],
)
def test_a_plan_that_does_not_open_is_one_sentence(trt: TensorRT, tmp_path: Path, call: str, reason: str, sentence: str) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec())
    add_plan(bundle, False)
    trt.refuses = {call: reason}
    with pytest.raises(BackendError, match=sentence):
        open_engine(bundle, "0", backend="tensorrt", device="cuda")


def test_a_plan_for_other_windows_is_refused(trt: TensorRT, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec())
    add_plan(bundle, False)
    bundle.update_spec(make_spec(patch=(8, 8, 16)))
    with pytest.raises(BackendError, match=r"0\.plan was compiled for windows of 1 x 8 x 8 x 8 .* describes 1 x 8 x 8 x 16"):
        open_engine(Bundle.open(bundle.path), "0", backend="tensorrt", device="cuda")


# ------------------------------------------------------------------ the machine
def test_the_machine_is_described_as_keys_and_records_need_it(trt: TensorRT) -> None:
    assert str(this_machine("cuda")) == "NVIDIA H200 (compute capability 9.0), a driver of CUDA 13.2, TensorRT 11.4.0.106"


def test_what_this_machine_lacks_is_named(trt: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="cuda:1 is asked for and this machine has one GPU, cuda:0"):
        this_machine("cuda:1")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"tensorrt is needed here .* pip install 'segrt\[trt\]'"):
        this_machine("cuda")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r"cupy is needed here .* pip install 'segrt\[cuda\]'"):
        this_machine("cuda")
