"""Every benchmark that needs no rival environment runs at toy size; its figures are no test."""

from __future__ import annotations

import ctypes
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["kernels", "files", "engine", "export", "gpu", "precision", "loader", "train_runs", "lgg", "study", "frames", "serve"]
)
def test_benchmark_runs_at_toy_size(script: str) -> None:
    before = {p: p.read_bytes() for p in (ROOT / "benchmarks" / "results").glob("*.json")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--toy"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.read_bytes() for p in (ROOT / "benchmarks" / "results").glob("*.json")} == before, "a toy run leaves results alone"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_stages_of_a_gpu_run_leave_those_of_earlier_runs_as_they_are(gpu: Any) -> None:
    first, second = ({"commit": commit, "versions": {"torch": torch}} for commit, torch in (("a", "2.11"), ("b", "2.13")))
    machine = {"identity": {"name": "NVIDIA H200"}, "copy": {"bytes_per_s": 4e12}, "matrix": {"flop_per_s": {"fp16": 7e14}}}
    stages = {"machine": machine, "kernels": {"argmax": {"median_ms": 1.0, "bytes_per_s": 2e12}}}
    written = gpu.merged({}, stages, {"machine": first, "kernels": first})
    in_cuda_c = {**second, "cuda_c": True}
    again = gpu.merged(
        json.loads(json.dumps(written)), {"kernels": {"argmax": {"median_ms": 0.5, "bytes_per_s": 4e12}}}, {"kernels": in_cuda_c}
    )
    assert again["machine"] == machine
    assert again["kernels"]["argmax"]["median_ms"] == 0.5
    assert again["made"] == {"machine": first, "kernels": in_cuda_c}
    assert again["commit"] == "b"
    assert any("100 %" in line for line in again["summary"]), "of the copy that was measured before"
    # files of before had one commit for all
    old = {**written, **first}
    del old["made"]
    assert gpu.merged(old, {"case": {}}, {"case": second})["made"] == {"machine": first, "kernels": first, "case": second}


def test_kernels_are_measured_both_as_thread_bodies_and_in_cuda_c_whatever_is_asked_for(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("0", "1"):
        monkeypatch.setenv("SEGRT_CUDA_C", asked)
        found = {stage: gpu.uses_cuda_c(stage) for stage in gpu.STAGES}
        assert not found["kernels"]
        assert not found["sanitizer"]
        assert found["kernels_cuda_c"]
        assert found["sanitizer_cuda_c"]
        assert found["case"] == (asked == "1")


def test_what_is_measured_in_cuda_c_is_what_cuda_c_is_written_for(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be launched: calls are made as on one and thrown away, whatever comes out."""
    kernels, setting = importlib.import_module("_gpu_kernels"), importlib.import_module("_gpu_setting")
    monkeypatch.setattr(kernels.native, "available", lambda array: True)
    monkeypatch.setattr(kernels.native, "run", lambda call: call is not None)
    for name in kernels.CUDA_C:
        with kernels.counted_launches() as launches:
            kernels.KERNELS[name](setting.Arrays("simulated"), setting.CHECKS[1])[0]()
        assert launches, name


def test_plans_are_built_before_anything_needs_them(gpu: Any) -> None:
    stages = list(gpu.STAGES)
    assert stages.index("plans") < min(stages.index(stage) for stage in ("case", "engines", "repeats"))


@pytest.mark.parametrize("script", ["make_tensorrt86"])
def test_what_needs_more_than_a_cpu_says_how_it_is_used(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python benchmarks/{script}.py" in done.stdout


def test_every_form_that_is_tried_is_one_of_a_kernels(gpu: Any) -> None:
    variants = importlib.import_module("_gpu_variants")
    for tuning, names, options, settings in variants.FORMS.values():
        assert set(names) <= set(importlib.import_module("_gpu_kernels").CUDA_C)
        assert set(options) <= tuning.keys()
        assert {len(values) for values in settings} == {len(options)}
        assert tuple(tuning[option] for option in options) in settings, "the form in use is among them"


def test_a_library_stands_in_for_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("needs gcc and nm")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    make = importlib.import_module("make_tensorrt86")
    library = tmp_path / "libcudnn.so.8"
    make.stand_in(library, ["cudnnCreate", "cudnnGetErrorString", "cudnnBatchNormalizationForwardInference"])
    there = ctypes.CDLL(str(library))
    there.cudnnGetErrorString.restype = ctypes.c_char_p
    assert (there.cudnnCreate(), there.cudnnGetErrorString(1), there.cudnnBatchNormalizationForwardInference()) == (0, b"no cuDNN", 1)
    # a plugin library that asks for these, as the linker records it
    source = tmp_path / "plugin.c"
    source.write_text("int cudnnCreate(void); int plugin(void) { return cudnnCreate(); }")
    plugin = tmp_path / "libplugin.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(plugin), str(library)], check=True)
    assert make.missing(plugin) == {"libcudnn.so.8": ["cudnnCreate"]}
