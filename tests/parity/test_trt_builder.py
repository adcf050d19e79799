"""TensorRT's own parser and builder accept what we hand them, on a machine without a GPU.

The Python bindings of TensorRT 11.4 come from one wheel, parser and builder of TensorRT-RTX 1.7.1 from another, and a shim of some lines
of C (trt_shim.c) connects them. Two products' binary interfaces are mixed here, so this is a check and nothing to build on: a crash in it
says nothing about our code, and the engines cannot be run (opening one asks for a driver). Kernels are not timed either, so the seconds
say nothing about a build on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from factories import UNET_2D, UNET_3D, make_spec
from onnx import TensorProto, helper, numpy_helper
from typed_models import OTHER_FAMILIES, random_bundle

from segrt.bundle import Bundle
from segrt.export.onnx import export_onnx
from segrt.networks import build
from segrt.spec import UNetSpec

TESTS = Path(__file__).resolve().parents[1]
RTX_VERSION = 10701
NETWORKS = {
    "plain": UNET_3D.model_copy(update={"blocks": (2, 2)}),
    "residual": UNET_3D.model_copy(update={"family": "residual_unet", "blocks": (1, 2)}),
    "2d": UNET_2D.model_copy(update={"blocks": (2, 2)}),
    **OTHER_FAMILIES,
}
# what nnU-Net plans for abdominal CT of 16 classes
LARGE = UNetSpec(
    family="plain_unet",
    dimensions=3,
    in_channels=1,
    out_channels=16,
    features=(32, 64, 128, 256, 320, 320),
    kernels=((1, 3, 3), *((3, 3, 3),) * 5),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    blocks=(2,) * 6,
    decoder_convs=(2,) * 5,
)
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run jobs (see trt_jobs.py) under the shim."""
    found = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if found is None or importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs the wheels of extra trtcheck: tensorrt-cu13-bindings and onnxruntime-ep-nv-tensorrt-rtx-cu13")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    assert found.origin is not None
    folder, libraries = tmp_path_factory.mktemp("shim"), Path(found.origin).parent
    paths = {name: next(libraries.glob(f"{file}.so.*")) for name, file in _RTX_FILES.items()}
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        defines = [f'-D{key}="{path}"' for key, path in paths.items()]
        target = f"lib{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", *defines, f"-DVERSION={RTX_VERSION}", f"-Wl,-soname,{target}", "-o", str(folder / target)]
        subprocess.run([*command, str(TESTS / "trt_shim.c"), "-ldl"], check=True)

    def run(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
        file = folder / "jobs.json"
        file.write_text(json.dumps(jobs))
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(TESTS.parent)}
        command = [sys.executable, str(TESTS / "trt_jobs.py"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


_RTX_FILES = {"INFER": "libtensorrt_rtx", "PARSER": "libtensorrt_onnxparser_rtx"}


def jobs_of(bundle: Bundle, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """One job per precision."""
    windows = folder / "windows.npy"
    np.save(windows, np.random.default_rng(0).normal(size=(1, 1, *bundle.spec.inference.patch)).astype(np.float32))
    jobs: list[dict[str, Any]] = [{"bundle": str(bundle.path), "precision": p, **options} for p in ("fp32", "fp16", "bf16", "int8")]
    jobs[-1]["windows"] = str(windows)
    return jobs


@pytest.fixture(scope="module")
def answers(builder: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of every network one answer for each precision, all from one process."""
    jobs = []
    for network in NETWORKS.values():
        folder = tmp_path_factory.mktemp("network")
        jobs += jobs_of(random_bundle(folder / "bundle", network), folder)
    found = iter(builder(*jobs))
    return {name: [next(found) for _ in range(4)] for name in NETWORKS}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_precision_is_parsed_and_built(answers: dict[str, list[dict[str, Any]]], name: str) -> None:
    for answer, half in zip(answers[name], ("FLOAT", "HALF", "BF16", "HALF"), strict=True):
        assert "error" not in answer
        assert answer["bytes"] > 1000
        expected = {"ACTIVATION": half, "PARAMETRIC_RELU": half, "RESIZE": "FLOAT" if half == "BF16" else half}
        for layer, kinds in answer["layers"]:
            assert layer not in expected or kinds == [expected[layer]], layer


def kinds_of(answer: dict[str, Any], *layers: str) -> list[list[str]]:
    found = [kinds for layer, kinds in answer["layers"] if layer in layers]
    assert found, f"no {' or '.join(layers)} among {answer['layers']}"
    return found


def test_tensorrt_sees_the_types_we_mean(answers: dict[str, list[dict[str, Any]]]) -> None:
    fp32, fp16, bf16, int8 = answers["plain"]
    for answer, half in ((fp32, "FLOAT"), (fp16, "HALF"), (bf16, "BF16"), (int8, "HALF")):
        for layers in (("CONVOLUTION",), ("ACTIVATION",), ("CONCATENATION",)):
            assert all(kinds == [half] for kinds in kinds_of(answer, *layers)), layers
        assert all(kinds == ["FLOAT"] for kinds in kinds_of(answer, "NORMALIZATION"))
    assert kinds_of(fp16, "DECONVOLUTION") == [["HALF"]]
    assert kinds_of(bf16, "DECONVOLUTION") == [["FLOAT"]]
    assert {tuple(kinds) for kinds in kinds_of(int8, "QUANTIZE", "DEQUANTIZE")} == {("HALF", "INT8")}


def test_options_reach_the_builder(builder: Run, tmp_path: Path) -> None:
    bundle = random_bundle(tmp_path / "bundle", UNET_3D)
    job, cache = {"bundle": str(bundle.path), "precision": "fp16"}, tmp_path / "engines" / "timing.cache"
    first, second, damaged, one = builder(
        {**job, "cache": str(cache), "workspace": 2**28},
        {**job, "cache": str(cache)},
        {**job, "cache": str(write_noise(tmp_path / "noise.cache"))},
        {**job, "batch": 1},
    )
    assert cache.is_file()
    for answer in (first, second, damaged, one):
        assert "error" not in answer
    # a plan for other versions carries a small runtime, which only TensorRT's own packages have
    (compatible,) = builder({**job, "compatible": True})
    assert "lean" in compatible["error"]


def test_a_configuration_holds_what_was_asked_for(builder: Run) -> None:
    """All but the level of compatibility, which TensorRT-RTX has its own way to set and leaves as it was."""
    plain, asked = builder({"configured": {}}, {"configured": {"workspace_bytes": 2**28, "compatible": True}})
    assert plain["flags"] == []
    assert asked == {"flags": ["VERSION_COMPATIBLE"], "workspace": 2**28}


def write_noise(path: Path) -> Path:
    path.write_bytes(bytes(range(256)))
    return path


def test_a_plan_cannot_be_opened_without_a_driver_and_the_sentence_says_why(builder: Run, tmp_path: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a driver")
    bundle = random_bundle(tmp_path / "bundle", UNET_3D)
    (answer,) = builder({"bundle": str(bundle.path), "precision": "fp16", "open": True})
    assert answer["error"].startswith("BackendError: TensorRT ")
    assert "driver" in answer["error"]


def test_what_only_a_gpu_can_run_has_its_names(builder: Run) -> None:
    names = {
        "ICudaEngine": "create_execution_context device_memory_size_v2 num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype "
        "get_tensor_shape get_tensor_profile_shape",
        "IExecutionContext": "set_input_shape set_tensor_address set_device_memory update_device_memory_size_for_shapes execute_async_v3",
        "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
        "ExecutionContextAllocationStrategy": "USER_MANAGED",
        "TensorIOMode": "INPUT",
        "IBuilderConfig": "hardware_compatibility_level",
        "HardwareCompatibilityLevel": "AMPERE_PLUS",
    }
    (answer,) = builder({"names": [f"{owner}.{name}" for owner, listed in names.items() for name in listed.split()]})
    assert answer["missing"] == []


# ------------------------------------------------------------------ refusals
def write_model(path: Path, nodes: list[Any], tensors: dict[str, Any], outputs: tuple[str, ...] = ("y",)) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2, 4, 4]) for name in ("x", *outputs)]
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "by hand", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_what_the_parser_or_builder_refuses_is_in_the_sentence(builder: Run, tmp_path: Path) -> None:
    half = {"h": np.ones((1, 2, 4, 4), np.float16)}
    mixed = write_model(tmp_path / "mixed.onnx", [helper.make_node("Add", ["x", "h"], ["y"], name="sum")], half)
    unknown = write_model(tmp_path / "unknown.onnx", [helper.make_node("Frobnicate", ["x"], ["y"], name="strange")], {})
    noise = write_noise(tmp_path / "noise.onnx")
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
    two = write_model(tmp_path / "two.onnx", nodes, {}, outputs=("y", "z"))
    answers = builder(*({"onnx": str(path), "precision": "fp16"} for path in (mixed, unknown, noise, two)))
    for answer in answers:
        assert answer["error"].startswith("BuildError: TensorRT ")
    assert "sum" in answers[0]["error"]
    assert "Half" in answers[0]["error"]
    assert "Float" in answers[0]["error"]
    assert "node strange (Frobnicate)" in answers[1]["error"]
    assert "found 1 inputs and 2 outputs" in answers[3]["error"]


# ------------------------------------------------------------------ full size
@pytest.mark.slow
def test_the_31_million_parameter_network(builder: Run, tmp_path: Path) -> None:
    """INT8 of smaller windows, for its calibration runs the network here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(LARGE)
    assert sum(p.numel() for p in network.parameters()) > 30e6
    jobs = []
    for patch, chosen in (((64, 160, 160), slice(3)), ((32, 64, 64), slice(3, 4))):
        folder = tmp_path / str(patch[0])
        spec = make_spec(values=range(16), patch=patch, network=LARGE)
        bundle = Bundle.create(folder / "bundle", spec, weights={"0": network.state_dict()})
        export_onnx(bundle)
        jobs += jobs_of(bundle, folder)[chosen]
    fp32, fp16, bf16, int8 = builder(*jobs)
    for answer in (fp32, fp16, bf16, int8):
        assert "error" not in answer
    assert fp16["bytes"] < 0.6 * fp32["bytes"]
    assert bf16["bytes"] < 0.6 * fp32["bytes"]
    assert int8["bytes"] < 0.7 * fp16["bytes"]
