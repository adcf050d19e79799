"""Bundles as Triton model repositories: what is in them, which versions, and what segrt-build says of them."""

from __future__ import annotations

import filecmp
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import UNET_2D, banded, make_bundle, make_spec, unet_bundle
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from served_bundles import CASCADE, cascade, flat, levels, members, pair, plain, regions
from tritonclient.grpc import model_config_pb2

from segrt import Predictor
from segrt.bundle import Bundle
from segrt.cli import build as build_command
from segrt.engines.openvino import engine_key
from segrt.errors import InputError
from segrt.export.pbtxt import Word, to_text
from segrt.export.triton import write_triton
from segrt.export.triton_config import Export, patch_config, pipeline_config
from segrt.export.triton_native import native_files
from segrt.protocol import ServedModel
from segrt.repository import Deployment, networks_of
from segrt.spec import ModelSpec, SpacingTarget

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "model_repository" / "example"
IMAGE = banded((9, 14, 11), seed=4)
SPACING = (3.0, 1.5, 2.0)


def parse(text: str) -> Any:
    """What a server makes of a configuration."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def config_of(repository: Path, model: str) -> Any:
    return parse((repository / model / "config.pbtxt").read_text(encoding="utf-8"))


def told(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def tensors(described: Any) -> dict[str, tuple[str, list[int]]]:
    return {t.name: (model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in described}


def models_in(repository: Path) -> set[str]:
    return {path.name for path in repository.iterdir()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()}


def labels(bundle: Path, level: str | None = None) -> np.ndarray:
    with Predictor(bundle, level=level, device="cpu") as predictor:
        return predictor((IMAGE, SPACING)).labels


def texts(repository: Path) -> dict[Path, bytes]:
    """All but the bundle and links into it."""
    files = (path for path in repository.rglob("*") if path.is_file() and not path.is_symlink())
    return {file.relative_to(repository): file.read_bytes() for file in files if "bundle" not in file.parts}


BUNDLES: dict[Callable[[Path], Bundle], set[str]] = {
    plain: {"liver_patch"},
    members: {"liver_patch_0", "liver_patch_all"},
    flat: {"liver_patch"},
    regions: {"liver_patch"},
    cascade: {"liver_patch", "liver_previous_patch_0", "liver_previous_patch_1"},
    pair: {"liver_patch", "liver_partner_patch", "liver_partner_previous_patch"},
    levels: {"liver_patch", "liver_patch-L1"},
}
PIPELINES = {"liver", "liver_bls", "liver_stream"}


@pytest.mark.parametrize("make", BUNDLES)
def test_every_kind_of_bundle_is_served_whole(tmp_path: Path, make: Callable[[Path], Bundle]) -> None:
    """Each network has a model, each configuration is read by the server's own parser, and the copy predicts what the bundle does."""
    bundle, repository = make(tmp_path / "liver"), tmp_path / "repository"
    written = write_triton(bundle, repository, device="cpu")
    assert models_in(repository) == PIPELINES | BUNDLES[make] == set(written.models)
    for model in written.models:
        config = config_of(repository, model)
        assert (config.name, config.backend) == (model, "python")
        assert (repository / model / "1" / "model.py").read_text().count("\n") < 10
        deployed = Deployment.from_parameters({k: {"string_value": v} for k, v in told(config).items()})
        assert deployed.bundle_folder(repository, 1) == (repository / "liver" / "1" / "bundle").resolve()
        assert deployed.bundle_sha == deployed.bundle_shas["1"] == bundle.fingerprint
        if model in BUNDLES[make]:
            (network,) = deployed.patch_models
            found = network.bundle_in(Bundle.open(deployed.bundle_folder(repository, 1)))
            assert found.onnx_path(network.member).is_file()
            assert network.model == model
        elif model != "liver":
            assert {network.model for network in deployed.patch_models} == BUNDLES[make]
    asked = (None, "L1") if make is levels else (None,)
    expected = [labels(bundle.path, level) for level in asked]
    assert len({found.tobytes() for found in expected}) == len(asked)
    shutil.rmtree(bundle.path)  # nothing in the repository leans on it
    for level, wanted in zip(asked, expected, strict=True):
        np.testing.assert_array_equal(labels(repository / "liver" / "1" / "bundle", level), wanted)


def test_the_pipelines_configuration_is_complete(tmp_path: Path) -> None:
    spec = make_spec(values=(0, 1, 300), patch=(4, 8, 6), transpose=(2, 0, 1), target=SpacingTarget(spacing=(2.5, None, 1.5)))
    bundle, repository = make_bundle(tmp_path / "liver", spec), tmp_path / "repository"
    write_triton(bundle, repository, device="cpu", instances=2, precision="fp32")
    config, bls, stream = (config_of(repository, model) for model in ("liver", "liver_bls", "liver_stream"))
    assert config.max_batch_size == 0
    assert config.version_policy.latest.num_versions == 1
    assert tensors(config.input)["IMAGE"] == ("TYPE_FP32", [-1, -1, -1, -1])
    assert tensors(config.input)["DIRECTION"] == ("TYPE_FP64", [3, 3])
    assert all(tensor.optional for tensor in config.input)
    assert tensors(config.output)["LABELS"] == ("TYPE_UINT16", [-1, -1, -1])
    assert [(g.count, g.kind) for g in config.instance_group] == [(2, model_config_pb2.ModelInstanceGroup.KIND_CPU)]
    assert tensors(bls.input) == tensors(stream.input) == tensors(config.input)
    assert tensors(bls.output) == tensors(config.output)
    assert tensors(stream.output) == tensors(config.output) | {"PROGRESS": ("TYPE_INT32", [2])}
    assert [c.model_transaction_policy.decoupled for c in (config, bls, stream)] == [False, False, True]
    assert bls.instance_group[0].count > 2
    for parameters in map(told, (config, bls, stream)):
        client = ServedModel.from_parameters(parameters)
        assert client == ServedModel(spec=bundle.spec, bundle_sha=bundle.fingerprint)
        assert parameters["precision"] == "fp32"
        assert str(tmp_path) not in json.dumps(parameters)
    # an image of one window at the model's own spacing, in the image's order of axes; who has no engine cannot warm up on its own
    (warmup,) = config.model_warmup
    assert list(warmup.inputs["IMAGE_INT16"].dims) == [1, 8, 6, 4]
    assert warmup.inputs["SPACING"].input_data_file == "spacing"
    assert struct.unpack("<3d", (repository / "liver" / "warmup" / "spacing").read_bytes()) == (1.0, 1.5, 2.5)
    assert not bls.model_warmup
    assert not stream.model_warmup


def test_a_second_stage_alone_is_warmed_up_with_labels(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "full", make_spec(previous=CASCADE)), tmp_path / "repository"
    write_triton(bundle, repository, device="cpu")
    config = config_of(repository, "full")
    assert set(config.model_warmup[0].inputs) == {"IMAGE_INT16", "SPACING", "PREVIOUS"}
    assert ServedModel.from_parameters(told(config)).takes_previous


def test_a_patch_models_configuration_is_complete(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "liver", make_spec(patch=(4, 8, 6))), tmp_path / "repository"
    write_triton(bundle, repository, device="cpu")
    config = config_of(repository, "liver_patch")
    assert tensors(config.input) == {"patches": ("TYPE_FP32", [1, 4, 8, 6])}
    assert tensors(config.output) == {"logits": ("TYPE_FP32", [3, 4, 8, 6])}
    assert config.max_batch_size > 1
    assert config.HasField("dynamic_batching")
    assert config.version_policy.latest.num_versions == 2
    (warmup,) = config.model_warmup
    assert list(warmup.inputs["patches"].dims) == [1, 4, 8, 6]
    assert 1 <= warmup.batch_size <= config.max_batch_size


def test_large_answers_leave_less_room_in_a_batch(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "body", make_spec(values=range(60), patch=(128, 160, 160)))
    (network,) = networks_of("body", bundle)
    assert patch_config(Export("body", bundle, {"1": "x"}), network)["max_batch_size"] == 1


@pytest.mark.parametrize(("device", "gpus"), [("cuda", []), ("cuda:1", [1])])
def test_instances_live_on_gpus_where_there_are_some(tmp_path: Path, device: str, gpus: list[int]) -> None:
    bundle = make_bundle(tmp_path / "liver")
    export = Export("liver", bundle, {"1": "x"}, device=device)
    (network,) = export.networks
    patch, whole = parse(to_text(patch_config(export, network))), parse(to_text(pipeline_config(export, "pipeline", "liver")))
    for config in (patch, whole):
        assert [(g.kind, list(g.gpus)) for g in config.instance_group] == [(model_config_pb2.ModelInstanceGroup.KIND_GPU, gpus)]
    assert patch.dynamic_batching.preferred_batch_size[0] > 1
    assert patch.dynamic_batching.max_queue_delay_microseconds > 0


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_native_configurations_are_read_by_the_servers_parser(tmp_path: Path, device: str) -> None:
    bundle = unet_bundle(tmp_path / "liver")
    export = Export("liver", bundle, {"1": bundle.fingerprint}, device=device)
    for network in export.networks:
        files = native_files(export, network)
        configs = {name.removesuffix(".pbtxt"): parse(text) for name, text in files.items() if name.endswith(".pbtxt")}
        assert set(configs) == {"tensorrt_plan", "onnxruntime", "openvino"}
        for config in configs.values():
            assert config.name == network.model
            assert tensors(config.input) == {"patches": ("TYPE_FP32", [1, 8, 8, 8])}
            assert list(config.model_warmup[0].inputs) == ["patches"]
            assert told(config)["bundle_sha"] == bundle.fingerprint
            assert config.HasField("dynamic_batching")
        assert [configs[name].platform for name in configs] == ["tensorrt_plan", "onnxruntime_onnx", ""]
        assert [configs[name].backend for name in configs] == ["tensorrt", "onnxruntime", "openvino"]
        assert [configs[name].default_model_filename for name in configs] == ["model.plan", "model.onnx", "model.onnx"]
        plan = configs["tensorrt_plan"]
        assert tensors(plan.output) == {"logits": ("TYPE_FP16", [3, 8, 8, 8])}
        assert plan.optimization.cuda.graphs
        assert plan.optimization.cuda.graph_spec[0].batch_size == plan.max_batch_size
        kinds = {"cpu": model_config_pb2.ModelInstanceGroup.KIND_CPU, "cuda:1": model_config_pb2.ModelInstanceGroup.KIND_GPU}
        assert plan.instance_group[0].kind == kinds["cuda:1"]
        assert configs["onnxruntime"].instance_group[0].kind == kinds[device]
        assert configs["openvino"].instance_group[0].kind == kinds["cpu"]
        accelerators = configs["onnxruntime"].optimization.execution_accelerators.gpu_execution_accelerator
        assert [a.name for a in accelerators] == ([] if device == "cpu" else ["cuda"])
        assert all(a.parameters["cudnn_conv_algo_search"] == "HEURISTIC" for a in accelerators)
        # -1, 1 and 2 are levels with less than all optimisations
        assert not configs["onnxruntime"].optimization.HasField("graph")


@pytest.mark.parametrize(("patch", "batch"), [((8, 8, 8), 1), ((1, 64, 64), 8)])
def test_openvinos_backend_gets_batches_of_the_one_size_it_is_compiled_for(tmp_path: Path, patch: tuple[int, int, int], batch: int) -> None:
    bundle = make_bundle(tmp_path / "liver", make_spec(patch=patch))
    (network,) = networks_of("liver", bundle)
    config = parse(native_files(Export("liver", bundle, {"1": "x"}), network)["openvino.pbtxt"])
    assert config.max_batch_size == config.model_warmup[0].batch_size == batch
    assert told(config).get("ENABLE_BATCH_PADDING") == ("YES" if batch > 1 else None)


def test_native_backends_find_the_networks_file(tmp_path: Path) -> None:
    bundle, repository = cascade(tmp_path / "liver"), tmp_path / "repository"
    write_triton(bundle, repository, device="cpu")
    shutil.move(repository, tmp_path / "moved")  # the links lead nowhere outside
    for model, file in (("liver_previous_patch_1", "low/onnx/1.onnx"), ("liver_patch", "liver/onnx/0.onnx")):
        link = tmp_path / "moved" / model / "1" / "model.onnx"
        assert link.resolve().is_relative_to(tmp_path / "moved")
        assert filecmp.cmp(link, tmp_path / file, shallow=False)
        assert {path.name for path in link.parent.iterdir()} == {"model.py", "model.onnx"}


def test_native_configurations_follow_the_plan_that_was_built(tmp_path: Path) -> None:
    bundle = unet_bundle(tmp_path / "liver")
    for batch, precision in ((2, "fp32"), (4, "fp32"), (16, "fp16")):
        folder = bundle.engine_path(f"tensorrt-11.4-h200-sm90-{precision}-b{batch}")
        folder.mkdir()
        (folder / "0.plan").write_bytes(b"plan")
        (folder / "build.json").write_text(json.dumps({"precision": precision, "batch": batch, "level": None}))
    repository = tmp_path / "repository"
    write_triton(bundle, repository, device="cpu", precision="fp32")
    config = parse((repository / "liver_patch_0" / "configs" / "tensorrt_plan.pbtxt").read_text(encoding="utf-8"))
    assert config.max_batch_size == 4
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert tensors(config.output)["logits"][0] == "TYPE_FP32"
    plan = repository / "liver_patch_0" / "1" / "model.plan"
    assert plan.resolve().parent.name == "tensorrt-11.4-h200-sm90-fp32-b4"
    # the other precision's plan lies in the same version
    assert not write_triton(bundle, repository, device="cpu", precision="fp16").new
    assert plan.resolve().parent.name == "tensorrt-11.4-h200-sm90-fp16-b16"


def test_slices_reach_native_backends_without_their_axis(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "picture", make_spec(patch=(1, 16, 8), network=UNET_2D))
    (network,) = networks_of("picture", bundle)
    for name, text in native_files(Export("picture", bundle, {"1": "x"}), network).items():
        if name.endswith(".pbtxt"):
            (patches,), (logits,) = parse(text).input, parse(text).output
            assert (list(patches.dims), list(patches.reshape.shape)) == ([1, 1, 16, 8], [1, 16, 8])
            assert (list(logits.dims), list(logits.reshape.shape)) == ([3, 1, 16, 8], [3, 16, 8])


def test_a_foreign_networks_own_names_are_used_and_said(tmp_path: Path) -> None:
    import onnx

    bundle = make_bundle(tmp_path / "liver")
    model = onnx.load(bundle.onnx_path("0"))
    model.graph.input[0].name = model.graph.node[0].input[0] = "x.1"
    onnx.save(model, bundle.onnx_path("0"))
    (network,) = networks_of("liver", bundle)
    files = native_files(Export("liver", bundle, {"1": "x"}), network)
    assert [tensor.name for tensor in parse(files["onnxruntime.pbtxt"]).input] == ["x.1"]
    assert "calls its tensors x.1 and logits" in files["README.md"]


def test_networks_are_linked_and_what_prediction_never_reads_is_left_out(tmp_path: Path) -> None:
    bundle, repository = unet_bundle(tmp_path / "liver"), tmp_path / "repository"
    (bundle.path / "engines" / "timing.cache").write_bytes(b"of the builder")
    write_triton(bundle, repository, device="cpu")
    served = repository / "liver" / "1" / "bundle"
    there = {str(path.relative_to(served)) for path in served.rglob("*") if path.is_file()}
    blobs = {f"engines/{engine_key('fp32')}/{name}" for name in ("0.blob", "1.blob", "build.json")}
    assert there == {"model.json", "onnx/0.onnx", "onnx/1.onnx", "onnx/build.json"} | blobs
    assert (served / "onnx" / "0.onnx").samefile(bundle.onnx_path("0"))
    # an editor may write into this one
    assert not (served / "model.json").samefile(bundle.path / "model.json")
    write_triton(bundle, tmp_path / "torch", device="cpu", backend="pytorch")
    assert (tmp_path / "torch" / "liver" / "1" / "bundle" / "weights" / "0.safetensors").is_file()


def test_the_same_bundle_again_writes_nothing(tmp_path: Path) -> None:
    bundle, repository = cascade(tmp_path / "liver"), tmp_path / "repository"
    assert write_triton(bundle, repository, device="cpu").new
    before = snapshot(repository)
    again = write_triton(Bundle.open(bundle.path), repository, device="cpu")
    assert (again.version, again.new) == (1, False)
    # a copy without links is the same bundle too
    shutil.copytree(bundle.path, tmp_path / "elsewhere")
    assert not write_triton(Bundle.open(tmp_path / "elsewhere"), repository, name="liver", device="cpu").new
    assert snapshot(repository) == before


def test_a_changed_bundle_becomes_the_next_version_beside_the_one_before(tmp_path: Path) -> None:
    bundle, repository = members(tmp_path / "liver"), tmp_path / "repository"
    write_triton(bundle, repository, device="cpu")
    first = snapshot(repository / "liver" / "1")
    shutil.rmtree(bundle.path)
    changed = make_bundle(bundle.path, make_spec(patch=(8, 16, 8)), centres=(0, 1.5, 1.9))
    written = write_triton(changed, repository, device="cpu")
    assert (written.version, written.new) == (2, True)
    assert written.unused == ("liver_patch_0", "liver_patch_all")  # a server may still be running them
    assert snapshot(repository / "liver" / "1") == first
    for model in written.models:
        assert (repository / model / "2" / "model.py").is_file()
        shas = json.loads(told(config_of(repository, model))["bundle_shas"])
        assert (list(shas), shas["2"]) == (["1", "2"], changed.fingerprint)
        assert shas["1"] == Bundle.open(repository / "liver" / "1" / "bundle").fingerprint != shas["2"]
    assert not write_triton(changed, repository, device="cpu").new


def test_versions_that_stay_loaded_together_share_a_configuration_that_fits_both(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for patch, version in (((8, 8, 8), 1), ((8, 16, 8), 2), ((8, 16, 8), 3)):
        shutil.rmtree(tmp_path / "liver", ignore_errors=True)
        bundle = make_bundle(tmp_path / "liver", make_spec(patch=patch, name=f"version {version}"))
        assert write_triton(bundle, repository, device="cpu").version == version
        dims = tensors(config_of(repository, "liver_patch").input)["patches"][1]
        assert dims == ([1, 8, -1, 8] if version == 2 else [1, *patch])


def test_what_an_interrupted_export_left_out_is_written_by_the_next(tmp_path: Path) -> None:
    bundle, repository = plain(tmp_path / "liver"), tmp_path / "repository"
    write_triton(bundle, repository, device="cpu")
    whole = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    shutil.rmtree(repository / "liver_bls" / "1")
    (repository / "liver_patch" / "config.pbtxt").unlink()
    (repository / "liver_stream" / ".1.12345678.part").mkdir()
    assert write_triton(bundle, repository, device="cpu").version == 1
    assert {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()} == whole


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """No file may grow beyond the limit, which programs see as on a full disk: a write fails."""
    unet_bundle(tmp_path / "liver")
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (700,) * 2); from segrt.cli.build import main; main()"
    command = [sys.executable, "-B", "-c", program, "liver", "--triton", "repository", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot be read or written (File too large)" in done.stderr.splitlines()[-1]
    assert not [path for path in (tmp_path / "repository").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../liver", "a/b", "", ".x", "x" * 65, "liver\n"])
def test_a_name_cannot_leave_the_repository(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="model name"):
        write_triton(plain(tmp_path / "liver"), tmp_path / "repository", name=name, device="cpu")
    assert not (tmp_path / "repository").exists()


def test_a_folder_whose_name_is_no_models_needs_another(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "liver v1.2")
    with pytest.raises(InputError, match=r"model name 'liver v1\.2'.*--triton-name"):
        write_triton(bundle, tmp_path / "repository", device="cpu")
    assert "liver" in write_triton(bundle, tmp_path / "repository", name="liver", device="cpu").models


def test_what_others_made_is_not_touched(tmp_path: Path) -> None:
    bundle, repository = plain(tmp_path / "liver"), tmp_path / "repository"
    foreign = repository / "liver_bls" / "config.pbtxt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text('name: "liver_bls"\n')
    with pytest.raises(InputError, match=r"liver_bls/config\.pbtxt is not of the models that serve 'liver'"):
        write_triton(bundle, repository, device="cpu")
    foreign.rename(foreign.with_name("notes.txt"))
    with pytest.raises(InputError, match="holds files that segrt-build did not write"):
        write_triton(bundle, repository, device="cpu")
    assert models_in(repository) == {"liver_bls"}


def test_a_link_out_of_the_repository_is_refused(tmp_path: Path) -> None:
    bundle, repository, elsewhere = plain(tmp_path / "liver"), tmp_path / "repository", tmp_path / "elsewhere"
    elsewhere.mkdir()
    repository.mkdir()
    (repository / "liver_patch").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(InputError, match="liver_patch is no folder of the repository's own"):
        write_triton(bundle, repository, device="cpu")
    assert not any(elsewhere.iterdir())


def test_two_bundles_share_a_repository_unless_their_models_names_meet(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_triton(cascade(tmp_path / "liver"), repository, device="cpu")
    write_triton(plain(tmp_path / "spleen"), repository, device="cpu")
    before = snapshot(repository)
    with pytest.raises(InputError, match="choose another name with --triton-name"):
        write_triton(members(tmp_path / "liver_previous"), repository, device="cpu", name="liver_previous")
    clash = make_bundle(tmp_path / "clash", make_spec(members=("0", "1")))
    with pytest.raises(InputError, match="liver_previous_patch_0"):
        write_triton(clash, repository, name="liver_previous", device="cpu")
    assert snapshot(repository) == before


def test_a_repository_inside_the_bundle_is_refused(tmp_path: Path) -> None:
    bundle = plain(tmp_path / "liver")
    with pytest.raises(InputError, match="lies in the bundle"):
        write_triton(bundle, bundle.path / "repository", device="cpu")


def test_the_servers_side_refuses_a_bundle_folder_outside_the_repository(tmp_path: Path) -> None:
    for folder in ("../liver", "/etc", "liver/{version}/../../../x"):
        deployed = Deployment(role="patch", name="liver", bundle=folder, bundle_sha="x", bundle_shas={})
        with pytest.raises(InputError, match="inside the model repository"):
            deployed.bundle_folder(tmp_path, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bundle_shas": "{"}, "parameter bundle_shas: expected JSON"),
        ({"max_voxel": "3"}, "parameter max_voxel"),
        ({"max_voxels": "many"}, "parameter max_voxels"),
        ({"role": "cook"}, "parameter role"),
        ({"patch_models": '[{"model": "m", "member": "0", "stage": "../x"}]'}, "patch_models.0.stage"),
    ],
)
def test_a_configuration_that_was_changed_by_hand_is_refused_by_name(change: dict[str, str], sentence: str) -> None:
    good = Deployment(role="pipeline", name="liver", bundle="liver/{version}/bundle", bundle_sha="x", bundle_shas={"1": "x"}, max_voxels=9)
    parameters = good.to_parameters() | {"FORCE_CPU_ONLY_INPUT_TENSORS": "no", "spec": "{}"}
    assert Deployment.from_parameters(parameters) == good
    with pytest.raises(InputError, match=sentence):
        Deployment.from_parameters(parameters | change)


@given(st.text(), st.integers(-(2**31), 2**31 - 1), st.booleans())
def test_any_text_survives_the_text_format(text: str, number: int, flag: bool) -> None:
    message = {
        "name": text,
        "max_batch_size": number,
        "instance_group": [{"gpus": [1, 2], "kind": Word("KIND_GPU"), "passive": flag}, {}],
        "ensemble_scheduling": {},
    }
    config = parse(to_text(message))
    assert (config.name, config.max_batch_size, config.instance_group[0].passive) == (text, number, flag)
    assert (list(config.instance_group[0].gpus), len(config.instance_group)) == ([1, 2], 2)
    assert config.HasField("ensemble_scheduling")


def test_the_example_is_what_is_written_today(tmp_path: Path) -> None:
    write_triton(Bundle.open(ROOT / "examples" / "demo" / "bundle"), tmp_path, name="phantom", device="cpu")
    written, stored = (texts(folder) for folder in (tmp_path, EXAMPLE))
    assert stored == written, "write it again as model_repository/README.md says"
    assert sum(map(len, stored.values())) < 50_000


# ------------------------------------------------------------------ segrt-build --triton
@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run segrt-build in a folder whose liver/ is a random U-Net of one fold, exported and not compiled."""
    monkeypatch.chdir(tmp_path)
    bundle = unet_bundle(Path("liver"))
    bundle.update_spec(ModelSpec.model_validate(bundle.spec.model_copy(update={"members": ("0",)}).model_dump()))
    shutil.rmtree("liver/engines")
    shutil.rmtree("liver/reports")

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["segrt-build", *arguments])
        with pytest.raises(SystemExit) as left:
            build_command.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return command


def test_segrt_build_builds_what_is_not_built_and_nothing_twice(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("liver/", "--triton", "repository", "--device", "cpu")
    assert code == 0, err
    assert "verified" in out
    assert "repository: version 1 written; models liver, liver_bls, liver_stream, liver_patch" in out
    engine = Path("repository/liver/1/bundle/engines", engine_key("fp32"), "0.blob")
    assert engine.samefile(Path("liver/engines", engine_key("fp32"), "0.blob"))
    before = snapshot(Path())
    code, out, _ = run("liver/", "--triton", "repository", "--device", "cpu")
    assert code == 0
    assert "version 1 is there already" in out
    assert snapshot(Path()) == before
    # another precision is another engine: it is built, and served from the next version on
    code, out, _ = run("liver/", "--triton", "repository", "--device", "cpu", "--fp16", "--force")
    assert "version 2 written" in out
    assert told(config_of(Path("repository"), "liver"))["precision"] == "fp16"


def test_segrt_build_names_the_models_and_their_instances(run: Callable[..., tuple[int, str, str]]) -> None:
    flags = ("--backend", "onnxruntime", "--triton", "repository", "--triton-name", "organ-1", "--instances", "3")
    code, _, err = run("liver", *flags)
    assert code == 0, err
    config = config_of(Path("repository"), "organ-1")
    assert config.instance_group[0].count == 3
    assert told(config)["backend"] == "onnxruntime"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--triton-name", "x"), "name its folder with --triton"),
        (("--instances", "2"), "name its folder with --triton"),
        (("--triton", "repository", "--triton-name", "../x"), "model name '../x'"),
        (("--triton", "liver/repository"), "lies in the bundle"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_is_built(
    run: Callable[..., tuple[int, str, str]], flags: tuple[str, ...], sentence: str
) -> None:
    code, _, err = run("liver", *flags)
    assert code == 2
    assert sentence in err.splitlines()[-1]
    assert not Path("liver/engines").exists()
    assert not Path("repository").exists()
