"""Engines of a device, on the simulated one: shared memory without a copy, batches of one size, precisions, what is refused and why."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
import onnxruntime
import pytest
import torch
from factories import UNET_2D, UNET_3D, unet_bundle
from gpu_stand_in import instead_of_cupy
from typed_models import OTHER_FAMILIES

from segrt.arrays import FloatArray, require
from segrt.bundle import Bundle
from segrt.cli.common import run
from segrt.device import Simulated, to_device, to_host
from segrt.engines import _finds_gpu, _open_first, open_engine, pytorch, resolve_device, rtx
from segrt.engines.batches import gpu_batch, in_batches
from segrt.engines.onnxrt import _cuda_provider, check_cuda_provider, runtime_errors
from segrt.engines.pytorch import TorchEngine
from segrt.errors import BackendError, InputError
from segrt.export.engine import build_engine
from segrt.export.onnx import export_onnx
from segrt.export.typed import typed_onnx, write_typed
from segrt.files import sha256
from segrt.networks import build

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("openvino", "onnxruntime", "pytorch")
torch_itself_warns = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
without_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="says what happens on a machine without a GPU")


@pytest.fixture(scope="module", params=[3, 2])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return unet_bundle(tmp_path_factory.mktemp("unet") / "b", request.param)


@pytest.fixture
def copy(tmp_path: Path) -> Bundle:
    return unet_bundle(tmp_path / "b")


def patches_for(bundle: Bundle, count: int) -> FloatArray:
    shape = (count, bundle.spec.in_channels, *bundle.spec.inference.patch)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def simulated(array: FloatArray) -> Any:
    return to_device(array, "simulated")


# devices


def test_devices_are_resolved() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("simulated") == "simulated"
    with pytest.raises(InputError, match="expected cpu, cuda, cuda:N or simulated"):
        resolve_device("gpu")


@without_gpu
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error() -> None:
    assert resolve_device() == "cpu"
    with pytest.raises(BackendError, match="this machine has no GPU"):
        resolve_device("cuda")


def test_cuda_becomes_a_numbered_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    assert resolve_device("cuda") == "cuda:0"
    assert resolve_device("cuda:1") == "cuda:1"
    assert _finds_gpu(["/dev/null"])


def test_auto_looks_for_a_driver_before_it_imports_cupy() -> None:
    code = (
        "import sys; from segrt.engines import _finds_gpu; assert not _finds_gpu(['/none']); assert 'cupy' not in sys.modules;"
        "sys.modules['cupy'] = None; assert not _finds_gpu(['/dev/null'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr


def test_a_driver_file_without_a_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    assert not _finds_gpu(["/dev/null"])


# every backend on a device


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 3, 11, 17])
def test_every_backend_serves_a_device_for_any_batch(bundle: Bundle, backend: Any, count: int) -> None:
    patches = patches_for(bundle, count)
    given = simulated(patches)
    engine = open_engine(bundle, "1", backend=backend, device="simulated")
    logits = engine(given)
    assert engine.device == "simulated"
    assert isinstance(logits, Simulated)
    assert logits.shape == (count, 3, *bundle.spec.inference.patch)
    assert logits.flags.c_contiguous
    # fp32 convolutions in another order of summation
    assert np.abs(to_host(logits) - open_engine(bundle, "1", backend="pytorch")(patches)).max() < 1e-4
    assert (to_host(given) == patches).all()
    engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_patches_give_equal_logits_that_belong_to_the_caller(bundle: Bundle, backend: Any) -> None:
    patches = patches_for(bundle, 19)
    engine = open_engine(bundle, "0", backend=backend, device="simulated")
    together = engine(simulated(patches))
    kept = to_host(together)
    alone = engine(simulated(patches[18:]))
    assert (to_host(alone)[0] == kept[18]).all()
    alone[...] = 7
    assert (to_host(engine(simulated(patches[18:])))[0] == kept[18]).all()
    assert (to_host(together) == kept).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_may_call_an_engine_of_a_device_at_once(bundle: Bundle, backend: Any) -> None:
    engine = open_engine(bundle, "0", backend=backend, device="simulated")
    jobs = [simulated(patches_for(bundle, 12) + i) for i in range(4)]
    expected = [to_host(engine(patches)) for patches in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, jobs))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_host(a), b, rtol=0, atol=1e-5)


def test_the_default_precision_of_the_simulated_device_is_the_cpus(bundle: Bundle) -> None:
    assert open_engine(bundle, "0", backend="pytorch", device="simulated").name == "pytorch, simulated, fp32"
    assert open_engine(bundle, "0", device="simulated").name == "openvino, cpu, fp32, for simulated"


# PyTorch


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [("fp16", np.float16, 0.02), ("bf16", np.float32, 0.15)])
def test_half_precision_of_torch(bundle: Bundle, precision: Any, dtype: Any, tolerance: float) -> None:
    patches = patches_for(bundle, 3)
    reference = open_engine(bundle, "0", backend="pytorch")(patches)
    logits = to_host(open_engine(bundle, "0", backend="pytorch", precision=precision, device="simulated")(simulated(patches)))
    assert logits.dtype == dtype
    # logits are of the order of 1; 11 and 8 bits through some ten layers
    assert 0 < np.abs(logits - reference).max() < tolerance


@torch_itself_warns
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_normalisation_keeps_float32_in_a_network_of_half_precision(dimensions: int, compiled: bool) -> None:
    network = build(UNET_2D if dimensions == 2 else UNET_3D)
    TorchEngine(network, classes=3, dimensions=dimensions, precision="fp16", device="simulated", compiled=compiled)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    own = {id(p) for norm in norms for p in norm.parameters()}
    assert own
    assert {p.dtype for p in network.parameters() if id(p) in own} == {torch.float32}
    assert {p.dtype for p in network.parameters() if id(p) not in own} == {torch.float16}
    last = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    # torch's own normalisation turns them first, at the price of the convolutions
    layout = last if compiled else torch.contiguous_format
    assert all(p.is_contiguous(memory_format=layout) for p in network.parameters() if p.ndim == dimensions + 2)


@torch_itself_warns
def test_torch_compile_is_switched_on_by_the_environment_of_a_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "_compile", False)  # put back at the end
    monkeypatch.setenv("SEGRT_TORCH_COMPILE", "1")
    run(lambda: None)
    assert open_engine(bundle, "0", backend="pytorch", device="simulated").name == "pytorch, simulated, fp32, compiled"
    assert open_engine(bundle, "0", backend="pytorch").name == "pytorch, cpu, fp32", "not where it is the reference"


@pytest.mark.parametrize("name", ["unetpp", "unetpp 2d", "vnet", "vnet elu"])
def test_channels_are_last_where_no_instance_normalisation_turns_them(name: str) -> None:
    spec = OTHER_FAMILIES[name]
    dimensions, network = spec.dimensions, build(spec)
    plain = deepcopy(network)
    engine = TorchEngine(network, classes=3, dimensions=dimensions, batch=2, device="simulated")
    last = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    kernels = [p for p in network.parameters() if p.ndim == dimensions + 2]
    assert kernels
    assert all(p.is_contiguous(memory_format=last) for p in kernels)
    patches = np.random.default_rng(0).normal(size=(3, 1, 16 if dimensions == 3 else 1, 16, 16)).astype(np.float32)
    expected = TorchEngine(plain, classes=3, dimensions=dimensions)(patches)
    logits = engine(simulated(patches))
    assert logits.flags.c_contiguous
    np.testing.assert_allclose(to_host(logits), expected, rtol=0, atol=1e-5)  # sums of another order


class Large(torch.nn.Module):
    """A network of values that 16-bit sums could not hold, and whose normalisation must."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.InstanceNorm3d(1, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_normalisation_of_large_values_in_half_precision() -> None:
    patches = np.random.default_rng(0).normal(3000, 500, (1, 1, 16, 32, 32)).astype(np.float32)
    engine = TorchEngine(Large(), classes=1, dimensions=3, precision="fp16", device="simulated")
    exact = (patches - patches.mean()) / patches.std()
    # values near 3000 are 2 apart in fp16, 1/250 of the spread
    assert np.abs(to_host(engine(simulated(patches))) - exact).max() < 0.02


def test_nothing_global_is_left_changed(bundle: Bundle) -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    seen = []

    class Looks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cudnn = torch.backends.cudnn
            seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.is_inference_mode_enabled()))
            return x

    TorchEngine(Looks(), classes=1, dimensions=3, device="simulated")(simulated(patches_for(bundle, 1)))
    assert seen == [(False, True, False, True)]
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == before
    assert not torch.is_inference_mode_enabled()


def test_engines_that_run_at_once_keep_their_settings() -> None:
    """cuDNN's settings are the process's: an engine that is done must not take them from one that still runs."""
    cudnn = torch.backends.cudnn
    before, seen = cudnn.deterministic, []
    inside, one_is_done = threading.Barrier(2), threading.Event()

    class Waits(torch.nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first = first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside.wait(10)
            if not self.first:
                assert one_is_done.wait(10)
            seen.append((cudnn.deterministic, cudnn.allow_tf32))
            return x

    def run(first: bool) -> None:
        TorchEngine(Waits(first), classes=1, dimensions=3, device="simulated")(simulated(np.zeros((1, 1, 2, 2, 2), np.float32)))
        one_is_done.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (True, False)))
    assert seen == [(True, False)] * 2
    assert cudnn.deterministic == before


@pytest.mark.slow
@torch_itself_warns
def test_a_compiled_network_gives_the_same_logits(copy: Bundle) -> None:
    torch.compiler.reset()
    patches = patches_for(copy, 2)
    engine = TorchEngine(build(UNET_3D), classes=3, dimensions=3, device="simulated", compiled=True)
    plain = TorchEngine(engine._network, classes=3, dimensions=3, device="simulated")
    assert engine.name == "pytorch, simulated, fp32, compiled"
    np.testing.assert_allclose(to_host(engine(simulated(patches))), to_host(plain(simulated(patches))), rtol=0, atol=1e-4)
    assert engine.name.endswith("compiled")


@torch_itself_warns
def test_where_torch_cannot_compile_the_network_runs_as_it_is(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor import config

    torch.compiler.reset()
    patches = patches_for(copy, 2)
    engine = TorchEngine(build(UNET_3D), classes=3, dimensions=3, device="simulated", compiled=True)
    plain = TorchEngine(engine._network, classes=3, dimensions=3, device="simulated")
    # the configuration's own patch: pytest's leaves its entries deleted for every later test
    missing = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}
    with config.patch(missing), caplog.at_level(logging.WARNING):
        logits = engine(simulated(patches))
    assert "torch.compile does not work here" in caplog.text
    assert (to_host(logits) == to_host(plain(simulated(patches)))).all()
    assert engine.name == "pytorch, simulated, fp32"


class Hungry(torch.nn.Module):
    """A network that needs more memory than there is for more than `most` windows."""

    def __init__(self, most: int, message: str) -> None:
        super().__init__()
        self.most, self.message = most, message

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(self.message)
        return x


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate", "Unable to find a valid cuDNN algorithm to run convolution"])
def test_out_of_memory_halves_the_batch(bundle: Bundle, message: str) -> None:
    engine = TorchEngine(Hungry(2, message), classes=1, dimensions=3, batch=8, device="simulated")
    patches = patches_for(bundle, 8)
    for expected in (4, 2):
        with pytest.raises(MemoryError):
            engine(simulated(patches[: engine.batch]))
        assert engine.batch == expected
    assert (to_host(engine(simulated(patches))) == patches).all()


def test_another_error_of_torch_is_not_one_of_memory() -> None:
    engine = TorchEngine(build(UNET_3D), classes=3, dimensions=3, batch=4, device="simulated")
    with pytest.raises(RuntimeError, match="channels"):
        engine(simulated(np.zeros((1, 2, 8, 8, 8), np.float32)))
    assert engine.batch == 4


# ONNX Runtime


def test_onnxruntime_takes_the_typed_file_for_fp16(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    write_typed(bundle, "0")
    patches = patches_for(bundle, 3)
    with caplog.at_level(logging.WARNING):
        engine = open_engine(bundle, "0", backend="onnxruntime", precision="fp16", device="simulated")
    logits = to_host(engine(simulated(patches)))
    assert (engine.name, caplog.text) == ("onnxruntime, simulated, fp16", "")
    assert logits.dtype == np.float16
    assert 0 < np.abs(logits - open_engine(bundle, "0", backend="pytorch")(patches)).max() < 0.02


def test_onnxruntime_without_the_typed_file_computes_in_fp32_and_says_so(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = open_engine(copy, "0", backend="onnxruntime", precision="fp16", device="simulated")
    assert engine.name == "onnxruntime, simulated, fp32"
    assert "ONNX Runtime computes in fp32: " in caplog.text
    assert "0-fp16.onnx is missing or old; make it with: segrt-build" in caplog.text


def test_a_build_for_fp16_writes_the_typed_file_and_verifies_it(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    report = build_engine(copy, backend="onnxruntime", device="simulated", precision="fp16", force=True)
    for member, check in report["members"].items():
        assert check["engine"] == "onnxruntime, simulated, fp16"
        assert 1e-5 < check["relative_error"] < 0.02
        assert copy.onnx_path(f"{member}-fp16").is_file()
    assert "missing" not in caplog.text


def test_openvino_keeps_its_precision_where_there_is_a_gpu(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    report = build_engine(copy, backend="openvino", device="cuda")
    assert report["key"].endswith("cpu-fp32")


def test_the_typed_file_of_an_earlier_export_is_not_used(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    write_typed(copy, "0")
    shutil.copyfile(copy.weights_path("1"), copy.weights_path("0"))
    export_onnx(copy, members=["0"])
    assert open_engine(copy, "0", backend="onnxruntime", precision="fp16", device="simulated").name.endswith("fp32")
    assert "0-fp16.onnx is missing or old" in caplog.text


def test_a_changed_typed_file_is_refused(copy: Bundle) -> None:
    path = write_typed(copy, "0")
    path.write_bytes(typed_onnx(copy.onnx_path("1"), "fp16"))
    with pytest.raises(BackendError, match=r"0-fp16\.onnx is not the file that was exported"):
        open_engine(copy, "0", backend="onnxruntime", precision="fp16", device="simulated")


def test_a_network_that_reads_half_precision_is_refused(copy: Bundle) -> None:
    path = write_typed(copy, "0")
    path.write_bytes(typed_onnx(copy.onnx_path("0"), "fp16", inputs="fp16"))
    record = path.parent / "build.json"
    record.write_text(record.read_text().replace(json.loads(record.read_text())["sha256"]["0-fp16"], sha256(path)))
    with pytest.raises(BackendError, match="expected float32 patches"):
        open_engine(copy, "0", backend="onnxruntime", precision="fp16", device="simulated")


def test_the_errors_of_onnxruntime_are_ours() -> None:
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", extra="ort")
    with pytest.raises(MemoryError, match="Failed to allocate"), runtime_errors("x"):
        raise state.RuntimeException("Non-zero status code\nFailed to allocate memory for requested buffer of size 9")
    with pytest.raises(BackendError, match="engine x: ONNX Runtime failed: shapes differ"), runtime_errors("engine x"):
        raise state.InvalidArgument("shapes\n differ")


def test_cudas_algorithms_are_not_chosen_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was the fastest in one run may not be in the next, and equal patches would get other bytes."""
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    options = onnxruntime.SessionOptions()
    library, stream = SimpleNamespace(preload_dlls=lambda: None), SimpleNamespace(ptr=7)
    name, settings = _cuda_provider(library, options, "cuda:1", stream)
    assert options.use_deterministic_compute
    assert settings["cudnn_conv_algo_search"] == "HEURISTIC"
    assert (name, settings["device_id"], settings["user_compute_stream"]) == ("CUDAExecutionProvider", "1", "7")


def test_patches_of_another_size_are_an_error_in_a_sentence(copy: Bundle) -> None:
    engine = open_engine(copy, "0", backend="onnxruntime", device="simulated")
    with pytest.raises(BackendError, match="onnxruntime, simulated, fp32: ONNX Runtime failed"):
        engine(simulated(np.zeros((1, 1, 8, 8, 9), np.float32)))


# batches


def test_the_last_part_is_filled_up_and_each_part_is_whole() -> None:
    parts = []

    def run(part: Any, out: Any) -> None:
        parts.append(to_host(part))
        out[...] = part

    patches = np.arange(1, 6, dtype=np.float32)[:, None, None, None, None] * np.ones((5, 1, 2, 2, 2), np.float32)
    logits = in_batches(simulated(patches)[::1], 3, 1, np.float32, run)
    assert (to_host(logits) == patches).all()
    assert [part[:, 0, 0, 0, 0].tolist() for part in parts] == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize(("patch", "batch"), [((64, 160, 160), 4), ((128, 128, 128), 4), ((1, 512, 512), 16), ((512, 512, 512), 1)])
def test_large_windows_come_in_small_batches(patch: Any, batch: int) -> None:
    assert gpu_batch(patch) == batch


# what is refused on a GPU


@without_gpu
def test_what_every_backend_lacks_is_listed(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    write_typed(copy, "0")
    with pytest.raises(BackendError) as error:
        open_engine(copy, "0", device="cuda:0")
    text = str(error.value)
    assert text.startswith("no engine of member '0' runs on cuda:0: tensorrt: ")
    assert "; onnxruntime: onnxruntime" in text
    assert "has no CUDA provider" in text
    assert "; pytorch: torch" in text
    assert "cannot compute on cuda:0" in text


def test_auto_passes_over_a_backend_that_lacks_the_precision(copy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    """float32 in ONNX Runtime is many times slower on a GPU than float16 in PyTorch."""
    (engine,) = _open_first(copy, "0", "fp16", 0, ["simulated"])
    assert engine.name == "pytorch, simulated, fp16"
    assert re.search(r"runs on pytorch, simulated, fp16, not on onnxruntime: .*0-fp16\.onnx is missing or old; make it with", caplog.text)
    write_typed(copy, "0")
    (engine,) = _open_first(copy, "0", "fp16", 0, ["simulated"])
    assert engine.name == "onnxruntime, simulated, fp16"


def test_auto_takes_one_backend_for_all_devices(copy: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Windows dealt to two backends would make the labels depend on who got which."""
    opened = []

    class OnlyOnce(onnxruntime.InferenceSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            opened.append(self)
            if len(opened) == 2:
                raise RuntimeError("not on this one")
            super().__init__(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnlyOnce)
    engines = _open_first(copy, "0", "fp32", 0, ["simulated", "cpu"])
    assert len(opened) == 2
    assert [engine.name for engine in engines] == ["pytorch, simulated, fp32", "pytorch, cpu, fp32"]
    assert "not on this one" in caplog.text


@without_gpu
def test_a_damaged_bundle_is_no_reason_for_another_backend(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    copy.onnx_path("0").write_bytes(copy.onnx_path("1").read_bytes())
    with pytest.raises(BackendError, match=r"^.*0\.onnx is not the file that was exported"):
        open_engine(copy, "0", device="cuda:0")


@without_gpu
def test_an_engine_of_the_cpu_may_be_asked_for_on_a_gpu(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    assert open_engine(copy, "0", backend="openvino", device="cuda:0").name == "openvino, cpu, fp32, for cuda:0"


def test_an_onnxruntime_for_the_cpu_is_refused() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(BackendError, match=r"has no CUDA provider \(only .*CPUExecutionProvider\); pip uninstall onnxruntime"):
        check_cuda_provider(onnxruntime)


class FallsBack(onnxruntime.InferenceSession):
    """A session as ONNX Runtime makes it when CUDA's provider was asked for and its library does not load: on the CPU, without a word."""

    def __init__(self, path: str, options: Any, *, providers: Any, enable_fallback: int) -> None:
        assert [name for name, _ in providers] == ["CUDAExecutionProvider"], "and nothing to fall back to"
        assert enable_fallback == 0
        plain = onnxruntime.SessionOptions()
        plain.log_severity_level = options.log_severity_level
        super().__init__(path, plain, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cuda_provider_that_does_not_load_is_refused(copy: Bundle, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """Left alone the network would run on the CPU, many times slower."""
    write_typed(copy, "0")
    instead_of_cupy(monkeypatch)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallsBack)
    words = r"^ONNX Runtime's CUDA provider did not load \(CPUExecutionProvider did\); check CUDA 13 and cuDNN 9$"
    with pytest.raises(BackendError, match=words):
        open_engine(copy, "0", backend="onnxruntime", precision=precision, device="cuda")


@pytest.mark.parametrize(
    ("backend", "precision", "sentence"),
    [
        ("tensorrt", "fp16", "runs on an NVIDIA GPU, not on device simulated"),
        ("onnxruntime", "int8", "ONNX Runtime serves fp32 and fp16, not int8"),
        ("pytorch", "int8", "PyTorch on a GPU serves fp32, fp16 and bf16, not int8"),
    ],
)
def test_what_a_backend_cannot_do_on_a_device(copy: Bundle, backend: Any, precision: Any, sentence: str) -> None:
    with pytest.raises(BackendError, match=sentence):
        open_engine(copy, "0", backend=backend, precision=precision, device="simulated")


# TensorRT-RTX


@without_gpu
def test_the_rtx_plugin_says_what_it_lacks() -> None:
    """Without the wheel, its name; with it but without a driver, what does not load."""
    with pytest.raises(BackendError, match=r"pip install onnxruntime-ep-nv-tensorrt-rtx-cu13|does not load: .*NVIDIA driver for CUDA 13"):
        rtx.register(onnxruntime)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's package, whose provider is called "rtx"."""
    monkeypatch.setitem(sys.modules, rtx._PLUGIN, SimpleNamespace(get_ep_name=lambda: "rtx", get_library_path=lambda: "/librtx.so"))


class Runtime:
    """ONNX Runtime as far as plugins go: `known` providers, and what it says when one is loaded."""

    __version__ = "1.32.0"

    def __init__(self, known: tuple[str, ...] = (), says: str = "") -> None:
        self.known, self.says, self.loaded = list(known), says, []

    def get_ep_devices(self) -> list[Any]:
        return [rtx_device(name) for name in self.known]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.loaded.append((name, path))
        if self.says:
            raise require("onnxruntime.capi.onnxruntime_pybind11_state", extra="ort").Fail(self.says)
        self.known.append(name)


def test_the_rtx_plugin_is_loaded_once(plugin: None) -> None:
    runtime = Runtime(known=("CPUExecutionProvider",))
    assert [rtx.register(runtime) for _ in range(3)] == ["rtx"] * 3
    assert runtime.loaded == [("rtx", "/librtx.so")]


def test_a_plugin_that_is_registered_and_found_no_gpu_is_no_error(plugin: None) -> None:
    """The list of devices does not show it, and loading it again fails; that it serves no GPU is said when one is asked for."""
    assert rtx.register(Runtime(says="[ONNXRuntimeError] : 1 : FAIL : library rtx is already registered")) == "rtx"


def test_a_plugin_that_does_not_load_is_a_sentence(plugin: None) -> None:
    with pytest.raises(BackendError, match=r"^onnxruntime-ep-nv-tensorrt-rtx-cu13 does not load: libcuda\.so\.1: .* an NVIDIA driver"):
        rtx.register(Runtime(says="libcuda.so.1:\n cannot open shared object file"))


def test_an_onnxruntime_without_plugins_is_a_sentence(plugin: None) -> None:
    with pytest.raises(BackendError, match=r"^onnxruntime 1\.20\.1 cannot load plugins; install 1\.24 or newer$"):
        rtx.register(SimpleNamespace(__version__="1.20.1"))


def rtx_device(name: str, **told: str) -> Any:
    return SimpleNamespace(ep_name=name, ep_metadata=told, ep_options={})


def test_the_rtx_plugin_serves_the_gpu_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 3)
    cpu, first, second = rtx_device("cpu"), rtx_device("rtx"), rtx_device("rtx")
    assert rtx.pick_device([cpu, first, second], "rtx", "cuda:1") is second
    told = [rtx_device("rtx", device_id="2"), rtx_device("rtx", device_id="0")]
    assert rtx.pick_device(told, "rtx", "cuda:0") is told[1]
    with pytest.raises(BackendError, match="TensorRT-RTX does not serve cuda:1: it serves 2 here"):
        rtx.pick_device(told, "rtx", "cuda:1")
    with pytest.raises(BackendError, match=r"it serves none here \(GeForce and RTX cards"):
        rtx.pick_device([cpu], "rtx", "cuda:0")
