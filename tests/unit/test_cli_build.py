"""segrt-build: each flag, exit codes, and errors as one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino
import pytest
from factories import unet_bundle, write_case
from gpu_stand_in import instead_of_cupy
from trt_stand_in import TensorRT

from segrt.bundle import Bundle
from segrt.cli import build as build_command
from segrt.engines.openvino import engine_key


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run segrt-build in a folder whose segrt_model/ is a random U-Net of one fold, exported and not compiled."""
    monkeypatch.chdir(tmp_path)
    bundle = unet_bundle(Path("segrt_model"))
    bundle.update_spec(bundle.spec.model_copy(update={"members": ("0",)}))
    shutil.rmtree("segrt_model/engines")
    shutil.rmtree("segrt_model/reports")

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["segrt-build", *arguments])
        with pytest.raises(SystemExit) as left:
            build_command.main()
        captured = capsys.readouterr()
        return Answer(int(left.value.code or 0), captured.out, captured.err)

    return command


def report(key: str) -> dict:
    return json.loads(Path(f"segrt_model/reports/verify-{key}.json").read_text())


def refusal(answer: Answer) -> str:
    assert answer.code == 2
    assert "Traceback" not in answer.err
    return answer.err.splitlines()[-1]


def test_the_short_form_builds_the_default_bundle(run: Run) -> None:
    answer = run()
    assert answer.code == 0, answer.err
    assert "verified" in answer.out
    assert Path("segrt_model/engines", engine_key("fp32"), "0.blob").is_file()
    check = report(engine_key("fp32"))["members"]["0"]
    assert check["passed"]
    assert check["relative_error"] < 1e-4


def test_precisions_add_engines(run: Run) -> None:
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    flags = ["--fp32", "--fp16", *(["--bf16"] if "BF16" in able else [])]
    # a random network's classes are nearly tied, so half precision may turn a label
    answer = run(*flags, "--force")
    assert answer.code == 0, answer.err
    assert len(list(Path("segrt_model/engines").iterdir())) == len(flags)


def test_int8_is_calibrated_on_a_folder(run: Run) -> None:
    Path("images").mkdir()
    write_case(Path("images/a_0000.nii.gz"), np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32))
    answer = run("--int8", "--calibration", "images", "--force")
    assert answer.code == 0
    assert "mean Dice" in answer.out
    assert (Path("segrt_model/engines") / engine_key("int8") / "0.blob").is_file()
    assert "nowhere" in refusal(run("--int8", "--calibration", "nowhere"))


def test_a_sample_image_and_verbose(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    write_case(Path("ct.nii.gz"), np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32))
    with caplog.at_level("INFO"):
        assert run("segrt_model", "--backend", "pytorch", "--sample", "ct.nii.gz", "--verbose").code == 0
        assert run("segrt_model", "--backend", "onnxruntime", "-v").code == 0
    assert report("pytorch-cpu-fp32")["sample"] == "ct.nii.gz"
    assert report("onnxruntime-cpu-fp32")["sample"] == "phantom"
    assert "runs on onnxruntime" in caplog.text


def test_other_onnx_files_lie_beside_the_engines_own(run: Run) -> None:
    before = Path("segrt_model/onnx/0.onnx").read_bytes()
    assert run("--backend", "onnxruntime", "--dynamic", "--head", "argmax").code == 0
    assert Path("segrt_model/onnx/0-argmax-dynamic.onnx").is_file()
    assert Path("segrt_model/onnx/0.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing",), "nothing"),
        (("segrt_model", "--output", "elsewhere"), "built in place; leave out --output"),
        (("segrt_model", "-o", "elsewhere"), "built in place; leave out --output"),
        (("--backend", "cuda"), "--backend: expected auto or"),
        (("--device", "gpu"), "device: expected cpu, cuda, cuda:N or simulated, got 'gpu'"),
        (("--head", "sigmoid"), "--head: expected logits or softmax or argmax"),
        (("--backend", "onnxruntime", "--fp16"), "serves fp32 only, not fp16"),
        (("--sample", "nothing.nii.gz"), "nothing.nii.gz"),
        (("nnunet_results", "--compatible"), "are TensorRT's"),  # before anything is imported
    ],
)
def test_what_cannot_be_built_is_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refusal(run(*arguments))


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
@pytest.mark.parametrize("precision", ["--fp32", "--fp16", "--bf16", "--int8"])
def test_tensorrt_without_a_gpu_is_one_sentence(run: Run, precision: str) -> None:
    options = ("--batch", "8", "--workspace-gb", "4", "--compatible")
    before = sorted(Path("segrt_model").rglob("*"))
    for device in ((), ("--device", "cuda")):
        assert "cuda is asked for and this machine has no GPU" in refusal(run("--backend", "tensorrt", *device, precision, *options))
    assert "runs on an NVIDIA GPU, not on device cpu" in refusal(run("--backend", "tensorrt", "--device", "cpu", precision))
    assert sorted(Path("segrt_model").rglob("*")) == before


@pytest.mark.parametrize("size", ["-1", "inf", "nan"])
def test_a_workspace_is_a_number_of_gigabytes(run: Run, size: str) -> None:
    answer = run("--backend", "tensorrt", "--workspace-gb", size)
    assert answer.code == 2
    assert "Invalid value for '--workspace-gb'" in answer.err


def test_options_of_tensorrt_are_for_tensorrt(run: Run) -> None:
    sentence = refusal(run("--backend", "openvino", "--batch", "4", "--workspace-gb", "1.5", "--compatible"))
    assert "batch, workspace, compatibility and timing cache are TensorRT's, and this engine is built by openvino" in sentence
    assert "are TensorRT's" in refusal(run("--backend", "onnxruntime", "--timing-cache", "timing.cache"))
    assert not Path("segrt_model/engines").exists()


def test_options_reach_tensorrt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = TensorRT(instead_of_cupy(monkeypatch))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    options = ("--batch", "4", "--workspace-gb", "1.5", "--compatible", "--timing-cache", "shared/timing.cache")
    # a random network's classes are nearly tied, so half precision may turn a label
    answer = run("--backend", "tensorrt", *options, "--force")
    assert answer.code == 0, answer.err
    (config,) = trt.seen["config"]
    assert config.limits == {trt.MemoryPoolType.WORKSPACE: 1_500_000_000}
    assert config.flags == {trt.BuilderFlag.VERSION_COMPATIBLE}
    assert Path("shared/timing.cache").read_bytes() == b"timed\n"
    assert [path.name for path in Path("segrt_model/engines").iterdir()] == ["tensorrt-11.4.0.106-compatible-fp16-b4"]
    assert "tensorrt 11.4.0.106, cuda:0, fp16, batch 4" in json.dumps(report("tensorrt-11.4.0.106-compatible-fp16-b4"))


def test_a_timing_cache_is_a_file(run: Run) -> None:
    answer = run("--backend", "tensorrt", "--timing-cache", ".")
    assert answer.code == 2
    assert "Invalid value for '--timing-cache'" in answer.err


def test_a_folder_that_cannot_be_written_is_one_sentence(run: Run) -> None:
    Path("segrt_model/engines").write_text("a file where a folder belongs")
    assert "segrt_model/engines cannot be read or written (File exists); check its permissions" in refusal(run())


def test_an_engine_that_falls_short_is_refused_and_kept_only_by_force(run: Run) -> None:
    """The weights are exchanged after export, so torch and the compiled network are two networks."""
    shutil.copy("segrt_model/weights/1.safetensors", "segrt_model/weights/0.safetensors")
    line = refusal(run())
    assert "is refused: it gives the reference's label to" in line
    assert not Path("segrt_model/engines", engine_key("fp32")).exists()


def test_force_exports_again(run: Run) -> None:
    shutil.copy("segrt_model/weights/1.safetensors", "segrt_model/weights/0.safetensors")
    before = Path("segrt_model/onnx/0.onnx").read_bytes()
    answer = run("--backend", "onnxruntime", "--force")
    assert answer.code == 0, answer.err
    assert Path("segrt_model/onnx/0.onnx").read_bytes() != before


def test_an_onnx_file_that_was_changed_is_made_again_from_the_weights(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy("segrt_model/onnx/1.onnx", "segrt_model/onnx/0.onnx")
    assert run("--backend", "onnxruntime").code == 0
    assert "are made again" in caplog.text


def test_a_trained_model_is_imported_by_configuration_and_folds(run: Run, golden: Path) -> None:
    source = str(golden / "S6_png_2d" / "model")
    flags = ("--backend", "onnxruntime", "--folds", "0")
    answer = run(source, "-o", "picture", "--configuration", "2d", *flags)
    assert answer.code == 0, answer.err
    assert Bundle.open("picture").spec.members == ("0",)
    assert "a bundle is already there" in refusal(run(source, "-o", "picture", "-c", "2d", "-f", "all"))
    assert "3d_fullres" in refusal(run(source, "-o", "other", "-c", "3d_fullres"))
