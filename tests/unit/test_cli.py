"""segrt-predict: what each flag does, exit codes, and errors as one sentence. segrt-build has its own file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from factories import banded, make_bundle, make_spec, unet_bundle, write_case

from segrt import Predictor
from segrt.cli import build as build_command
from segrt.cli import common
from segrt.cli import predict as predict_command
from segrt.cli.common import comma_list, gigabytes
from segrt.export.engine import build_engine
from segrt.io import read_labels
from segrt.kernels._cuda import native
from segrt.spec import KeepLargest, PreviousStage, SpacingTarget

IMAGES = {name: banded((9, 10, 11), seed=seed) for seed, name in enumerate(("a", "b", "c"))}


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run segrt-predict in a folder with images/, and a bundle in segrt_model/."""
    monkeypatch.chdir(tmp_path)
    for name, image in IMAGES.items():
        write_case(Path("images") / f"{name}_0000.nii.gz", image)
    make_bundle(Path("segrt_model"), make_spec(members=("0", "1"), mirror_axes=(2,), postprocess=(KeepLargest(values=(1, 2)),)))

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["segrt-predict", *arguments])
        with pytest.raises(SystemExit) as left:
            predict_command.main()
        captured = capsys.readouterr()
        return Answer(int(left.value.code or 0), captured.out, captured.err)

    return command


def record() -> dict[str, Any]:
    return json.loads(Path("out/predictions.json").read_text())


def settings(run: Run, *flags: str) -> dict[str, Any]:
    """The settings predictions.json records for these flags."""
    answer = run("images/a_0000.nii.gz", "out", "--overwrite", *flags)
    assert answer.code == 0, answer.err
    return record()["settings"]


def refusal(run: Run, *arguments: str) -> str:
    """The one sentence of a run that cannot start."""
    answer = run(*arguments)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert answer.out == ""
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert answer.err.endswith(f"{line}\n")
    return line


def test_the_short_form_runs_as_written(run: Run) -> None:
    answer = run("images", "out")
    assert answer.code == 0
    for name in IMAGES:
        assert read_labels(Path("out") / f"{name}.nii.gz")[0].any()
    assert re.search(r"memory: at most \d+\.\d\d GB \(case ", answer.err)
    assert answer.out.splitlines()[-1] == "3 done; details in out/predictions.json"
    assert "label 1" in answer.out
    assert record()["settings"]["members"] == ["0", "1"]
    again = run("images", "out")
    assert again.code == 0
    assert again.out.splitlines()[-1].startswith("3 skipped")


def test_the_gpus_path_can_be_simulated(run: Run) -> None:
    assert run("images", "out").code == 0
    assert run("images", "simulated", "--device", "simulated").code == 0
    for name in IMAGES:
        expected, found = (read_labels(Path(folder) / f"{name}.nii.gz")[0] for folder in ("out", "simulated"))
        assert np.array_equal(expected, found)
    assert "simulated" in json.loads(Path("simulated/predictions.json").read_text())["settings"]["engines"][0]


def test_cases_are_shared_by_devices(run: Run) -> None:
    """Two devices of which one is simulated: each case lies on one of them."""
    assert run("images", "out", "--device", "cpu,simulated", "--across", "cases").code == 0
    assert {case["status"] for case in record()["cases"]} == {"done"}


def test_one_failing_case_of_three_gives_code_3(run: Run) -> None:
    path = Path("images/b_0000.nii.gz")
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    answer = run("images", "out")
    assert answer.code == 3
    assert answer.out.splitlines()[-1].startswith("2 done, 1 failed")
    assert "b failed: b_0000.nii.gz" in answer.err
    assert "Traceback" not in answer.err + answer.out
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.nii.gz", "c.nii.gz", "predictions.json"]
    path.write_bytes(whole)
    answer = run("images", "out")
    assert answer.code == 0
    assert answer.out.splitlines()[-1].startswith("1 done, 2 skipped")
    assert {c["name"]: c["status"] for c in record()["cases"]} == dict.fromkeys("abc", "done")


def test_an_image_larger_than_memory_is_announced(run: Run) -> None:
    write_case(Path("images/big_0000.nii.gz"), IMAGES["a"], (9e3, 9e3, 9e3))
    make_bundle(Path("one_mm"), make_spec(target=SpacingTarget(spacing=(1.0, 1.0, 1.0))))
    answer = run("images", "out", "--model", "one_mm")
    assert "(case big), more than the" in answer.err
    assert "big_0000.nii.gz would be resampled to" in answer.err
    assert answer.code == 3


def test_names_and_errors_with_brackets_are_printed_as_they_are(run: Run) -> None:
    write_case(Path("images/[bold]x[1]_0000.nii.gz"), IMAGES["a"])
    Path("images/[red]y_0000.nii.gz").write_bytes(b"no [/] image")
    answer = run("images", "out[/b]")
    assert answer.code == 3
    assert "[bold]x[1]" in answer.out
    assert "[red]y failed: [red]y_0000.nii.gz" in answer.err
    assert answer.err.count("failed") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("images", "out", "--model", "nothing"), "nothing: no such bundle"),
        (("images", "out", "-m", "images"), "no model.json in it"),
        (("nothing", "out"), "nothing cannot be read as a folder of images"),
        (("segrt_model/onnx", "out"), "found no image"),
        (("images", "out", "--step", "0"), "expected 0 < step <= 1, got 0"),
        (("images", "out", "--folds", "0,7"), "no fold 7; the bundle has 0, 1"),
        (("images", "out", "--backend", "tensorrt"), "tensorrt runs on an NVIDIA GPU, not on device cpu"),
        (("images", "out", "--backend", "caffe"), "--backend: expected auto or openvino or onnxruntime or pytorch or tensorrt or"),
        (("images", "out", "--precision", "fp8"), "--precision: expected fp32 or bf16 or fp16 or int8, got 'fp8'"),
        (("images", "out", "--accumulate", "double"), "--accumulate: expected float32 or float16, got 'double'"),
        (("images", "out", "--device", "tpu"), "device: expected cpu, cuda, cuda:N or simulated, got 'tpu'"),
        (("images", "out", "--device", "cuda:99"), "cuda:99 is asked for and this machine has"),
        (("images", "out", "--device", "cuda:98,cuda:99", "--across", "windows"), "cuda:98 is asked for and this machine has"),
        (("images", "out", "--device", "cuda:98,cuda:99"), "cuda:98 is asked for and this machine has"),
        (("images", "out", "--across", "voxels"), "--across: expected cases or windows, got 'voxels'"),
        (("images", "out", "--device", "cpu,simulated", "--across", "windows"), "several can only be GPUs"),
        (("images", "out", "--format", ".jpg"), "format: expected one of"),
        (("images", "out", "--previous", "nothing"), "nothing: no such folder; --previous expects"),
        (("images", "out", "--previous", "images"), "not the second stage of a cascade"),
        (("images", "images/a_0000.nii.gz"), "cannot be made"),
        (("images", "segrt_model/../images"), "images is the folder of the images, whose next run would take the labels for images"),
        (("images", "images/a_0000.nii.gz", "--benchmark"), "cannot be made"),
        (("images", "out", "--backend", "pytorch"), "has no PyTorch form"),
    ],
)
def test_what_cannot_start_is_one_sentence_and_code_2(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refusal(run, *arguments)
    assert not Path("out").exists() or list(Path("out").iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("images",), ("images", "out", "--threads", "-1"), ("images", "out", "--colour")])
def test_wrong_usage_is_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.code == 2
    assert "Usage:" in answer.err


def test_folds(run: Run) -> None:
    assert settings(run, "--folds", "1")["members"] == ["1"]
    assert settings(run, "-f", "0, 1")["members"] == ["0", "1"]
    assert settings(run, "-f", "all")["members"] == ["0", "1"]


def test_step(run: Run) -> None:
    assert settings(run)["step"] == 0.5
    assert settings(run, "--step", "1")["step"] == 1.0
    assert record()["cases"][0]["windows"] == 8


def test_tta(run: Run) -> None:
    assert "2 mirrored passes" in settings(run, "--tta")["engines"][0]
    assert "mirrored" not in settings(run, "--no-tta")["engines"][0]


def test_postprocess(run: Run) -> None:
    assert len(settings(run, "--postprocess")["postprocess"]) == 1
    kept = read_labels("out/a.nii.gz")[0]
    assert settings(run, "--no-postprocess")["postprocess"] == []
    labels = read_labels("out/a.nii.gz")[0]
    assert (labels == IMAGES["a"]).all()
    assert (kept > 0).sum() < (labels > 0).sum()


def test_backend_precision_and_device(run: Run) -> None:
    assert "no verified fp16 engine for this machine" in refusal(run, "images", "out", "--precision", "fp16")
    build_engine(unet_bundle(Path("unet")), precision="fp16", force=True)
    flags = ("--model", "unet", "--precision", "fp16", "--device", "cpu", "--no-tta")
    assert "openvino, cpu, fp16" in settings(run, *flags)["engines"][0]
    assert "onnxruntime, cpu, fp32" in settings(run, "--backend", "onnxruntime")["engines"][0]


def test_accumulate(run: Run) -> None:
    assert settings(run)["accumulate"] == "float32"
    assert settings(run, "--accumulate", "float16")["accumulate"] == "float16"


def test_threads(run: Run) -> None:
    assert settings(run, "--threads", "1")["threads"] == 1


def test_save_probabilities(run: Run) -> None:
    settings(run, "--save-probabilities", "--no-postprocess")
    with np.load("out/a.npz") as stored:
        assert (stored["probabilities"].argmax(0) == read_labels("out/a.nii.gz")[0]).all()


def test_format(run: Run) -> None:
    settings(run, "--format", ".nrrd")
    assert read_labels("out/a.nrrd")[0].any()
    settings(run, "--format", "mha")
    assert read_labels("out/a.mha")[0].any()


def test_overwrite(run: Run) -> None:
    write_case(Path("out/a.nii.gz"), np.zeros((2, 2, 2), np.uint8))
    run("images/a_0000.nii.gz", "out")
    assert read_labels("out/a.nii.gz")[0].shape == (2, 2, 2)
    run("images/a_0000.nii.gz", "out", "--overwrite")
    assert read_labels("out/a.nii.gz")[0].shape == (9, 10, 11)


def test_previous(run: Run) -> None:
    make_bundle(Path("cascade"), make_spec(previous=PreviousStage(values=(1, 2))), previous=None)
    assert "no first stage; pass its labels (--previous DIR)" in " ".join(run("images/a_0000.nii.gz", "out", "-m", "cascade").err.split())
    for name, image in IMAGES.items():
        write_case(Path("low") / f"{name}.nii.gz", image.astype(np.uint8))
    answer = run("images", "out", "--model", "cascade", "--previous", "low")
    assert answer.code == 0, answer.err
    assert (read_labels("out/a.nii.gz")[0] == IMAGES["a"]).all()
    answer = run("images/a_0000.nii.gz", "timed", "--model", "cascade", "--previous", "low", "--benchmark")
    assert answer.code == 0, answer.err


def test_a_cascade_runs_its_own_first_stage(run: Run) -> None:
    low = make_bundle(Path("low"), make_spec(name="low"))
    make_bundle(Path("cascade"), make_spec(previous=PreviousStage(values=(1, 2))), previous=low)
    answer = run("images/a_0000.nii.gz", "out", "--model", "cascade")
    assert answer.code == 0, answer.err
    assert re.search(r"memory: at most \d", answer.err)
    assert (read_labels("out/a.nii.gz")[0] == IMAGES["a"]).all()


def test_benchmark(run: Run) -> None:
    answer = run("images", "out", "--benchmark", "--folds", "0")
    assert answer.code == 0
    printed = json.loads(answer.out)
    assert printed == json.loads(Path("out/benchmark.json").read_text())
    assert printed["warm_ups"] == 5
    assert printed["case"] == "a"
    assert set(printed["modes"]) == {"tta", "no_tta"}
    for mode in printed["modes"].values():
        assert mode["windows"] == 8
        assert mode["windows_per_second"] > 0
        assert {"read", "preprocess", "network", "restore", "postprocess"} <= set(mode["seconds"])
        assert mode["total"] >= mode["seconds"]["network"]
    assert printed["peak_bytes"] > 10**7
    assert set(json.loads(run("images", "out", "--benchmark", "--no-tta").out)["modes"]) == {"no_tta"}


def test_verbose(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert run("images/a_0000.nii.gz", "out", "--verbose").code == 0
        assert run("images/a_0000.nii.gz", "out", "-v").code == 0
    assert "runs on openvino, cpu, fp32" in caplog.text


@pytest.mark.parametrize("command", ["predict", "build", "serve"])
def test_help_needs_nothing_heavy(command: str) -> None:
    code = (
        "import sys\n"
        f"from segrt.cli.{command} import main\n"
        "sys.argv = ['segrt', '--help']\n"
        "try:\n    main()\nexcept SystemExit as left:\n    print('code', left.code)\n"
        "heavy = ('torch', 'openvino', 'numba', 'SimpleITK', 'numpy', 'pydantic', 'scipy', 'onnx')\n"
        "print('loaded', [m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "code 0" in done.stdout
    assert "Exit codes: 0" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_a_real_process_prints_no_traceback(tmp_path: Path) -> None:
    code = "from segrt.cli.predict import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "x", "y", "-m", "z"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: z: no such bundle; expected a folder made by segrt-build or segrt-train\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("module", "files"),
    [
        (predict_command, ("test_cli.py", "test_prune.py", "test_remote.py", "../e2e/test_pictures.py")),
        (build_command, ("test_cli_build.py", "test_prune.py", "test_triton_repository.py")),
    ],
)
def test_every_flag_has_a_test(module: Any, files: tuple[str, ...]) -> None:
    tests = "".join((Path(__file__).parent / file).read_text() for file in files)
    options = [o for p in typer.main.get_command(module.app).params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")]
    assert len(options) > 10
    assert [o for o in options if f'"{o}"' not in tests and o != "--help"] == []


def test_a_terminal_that_cannot_show_a_name_is_no_failure(tmp_path: Path) -> None:
    make_bundle(tmp_path / "model")
    write_case(tmp_path / "images" / "leber_größe_0000.nii.gz", IMAGES["a"])
    command = [sys.executable, "-c", "from segrt.cli.predict import main; main()", "images", "out", "-m", "model"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert r"leber_gr\xf6\xdfe" in done.stdout
    assert (tmp_path / "out" / "leber_größe.nii.gz").is_file()


@pytest.mark.parametrize(("limit", "code", "left"), [(200, 2, []), (3000, 3, ["b.nii.gz", "predictions.json"])])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path, limit: int, code: int, left: list[str]) -> None:
    """No file may grow beyond the limit, which programs see as on a full disk: a write fails."""
    # kernels are compiled and stored before the limit holds for their files too
    Predictor(make_bundle(tmp_path / "model"))((IMAGES["b"], (1.0, 1.0, 1.0)))
    large = np.random.default_rng(0).integers(0, 3, (30, 30, 30)).astype(np.int16)
    for name, image in {"a": large, "b": IMAGES["b"]}.items():
        write_case(tmp_path / "images" / f"{name}_0000.nii.gz", image)
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2); from segrt.cli.predict import main; main()"
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, "images", "out", "-m", "model"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code == 2:
        assert done.stderr.splitlines()[-1].startswith("error: out/predictions.json cannot be written (File too large)")
    else:
        assert "a failed: out/a.nii.gz cannot be written: file too large" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == left


def test_lists_and_sizes() -> None:
    assert comma_list(None) is None
    assert comma_list("0, 1,,2 ") == ("0", "1", "2")
    assert gigabytes(1_234_000_000) == "1.23 GB"


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), (None, False)])
def test_kernels_on_trial_are_used_when_the_environment_asks_for_them(
    value: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEGRT_CUDA_C", raising=False)
    if value is not None:
        monkeypatch.setenv("SEGRT_CUDA_C", value)
    monkeypatch.setattr(native, "_asked_for", False)  # put back at the end
    found: list[bool] = []
    common.run(lambda: found.append(native.available(np.zeros(1))))
    assert found == [wanted]
