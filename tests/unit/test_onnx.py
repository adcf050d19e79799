"""The exported graph computes what the torch network computes, and its file says where it comes from."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nnunet_factory import arch, plans, write_model

from segrt.bundle import Bundle
from segrt.engines import check_onnx
from segrt.errors import BuildError, InputError
from segrt.export import onnx as export
from segrt.export.importers import import_nnunet
from segrt.export.onnx import export_onnx, load_member, write_reference
from segrt.files import write_atomic
from segrt.spec import OnnxNetwork

FLAT = {"conv_op": "torch.nn.Conv2d", "kernel_sizes": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 1]]}


def bundle_of(folder: Path, **changes: Any) -> Bundle:
    return import_nnunet(write_model(folder, **changes), folder / "bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_of(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with its ONNX file, for tests that only look."""
    made = bundle_of(tmp_path_factory.mktemp("exported"))
    export_onnx(made)
    return made


def patches(bundle: Bundle, n: int, *, scale: int = 1) -> Any:
    shape = [scale * s for s in bundle.spec.inference.patch[3 - bundle.spec.dimensions :]]
    return np.random.default_rng(0).normal(size=(n, bundle.spec.in_channels, *shape)).astype(np.float32)


def run(path: Path, data: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"patches": data})[0]


def in_torch(bundle: Bundle, member: str, data: Any) -> Any:
    with torch.inference_mode():
        return load_member(bundle, member)(torch.from_numpy(data)).numpy()


def flat_plans() -> dict[str, Any]:
    values = arch(**FLAT)
    values["configurations"]["3d_fullres"] |= {"patch_size": [8, 8], "spacing": [1.0, 1.0]}
    return values


def residual_plans() -> dict[str, Any]:
    values = arch(n_blocks_per_stage=[1, 2, 1])
    values["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "ResidualEncoderUNet"
    return values


@pytest.mark.parametrize(
    "values",
    [
        plans(),
        residual_plans(),
        flat_plans(),
        arch(norm_op="torch.nn.BatchNorm3d", nonlin="torch.nn.ReLU"),
        arch(norm_op=None, norm_op_kwargs=None, dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.3}),
        arch(norm_op_kwargs={"affine": False, "eps": 1e-3}),
    ],
    ids=["plain", "residual", "2d", "batch", "none", "not-affine"],
)
def test_logits_equal_torch_for_any_batch(tmp_path: Path, values: dict[str, Any]) -> None:
    made = bundle_of(tmp_path, values=values)
    (path,) = export_onnx(made)
    for n in (1, 3):
        data = patches(made, n)
        assert run(path, data) == pytest.approx(in_torch(made, "0", data), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["S1_hippocampus_3d", "S4_aniso_ct", "S6_png_2d"])
def test_logits_of_real_models_equal_torch(golden: Path, tmp_path: Path, name: str) -> None:
    made = import_nnunet(golden / name / "model", tmp_path / "b")
    for member, path in zip(made.spec.members, export_onnx(made), strict=True):
        data = patches(made, 1)
        assert run(path, data) == pytest.approx(in_torch(made, member, data), abs=2e-4)


def test_the_graph_is_clean(exported: Bundle) -> None:
    model = onnx.load(exported.onnx_path("0"))
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} == {"Conv", "InstanceNormalization", "LeakyRelu", "ConvTranspose", "Concat"}
    assert [i.name for i in model.graph.input] == ["patches"]
    assert [o.name for o in model.graph.output] == ["logits"]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, [d.dim_value for d in dims[1:]]) == ("batch", [1, 4, 8, 8])
    assert [(e.domain, e.version) for e in model.opset_import] == [("", export.OPSET)]


def test_the_file_says_where_it_comes_from_and_not_where_it_was_made(exported: Bundle) -> None:
    path = exported.onnx_path("0")
    values = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert (values["member"], values["head"], values["model"]) == ("0", "logits", "Dataset900_Tiny")
    assert str(Path(export.__file__).parents[2]).encode() not in path.read_bytes()


def test_engines_accept_what_was_exported(exported: Bundle) -> None:
    check_onnx(exported, "0")
    assert json.loads((exported.path / "onnx/build.json").read_text())["opset"] == export.OPSET


def test_members_are_recorded_one_by_one(tmp_path: Path) -> None:
    made = bundle_of(tmp_path, folds=("0", "1"))
    for member in ("1", "0"):
        assert export_onnx(made, members=(member,)) == [made.onnx_path(member)]
    for member in ("0", "1"):
        check_onnx(made, member)
    assert not np.allclose(*(run(made.onnx_path(m), patches(made, 1)) for m in ("0", "1")))


def test_members_are_recorded_at_the_same_time(bundle: Bundle) -> None:
    names = tuple(map(str, range(8)))
    many = Bundle(bundle.path, bundle.spec.model_copy(update={"members": names}))
    for name in names:
        write_atomic(many.onnx_path(name), name)
    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(lambda name: export._record(many, name), names * 4))
    for name in names:
        check_onnx(many, name)


def test_what_a_program_made_torchs_default_changes_nothing(exported: Bundle, tmp_path: Path) -> None:
    content, windows = exported.onnx_path("0").read_bytes(), patches(exported, 1)
    made = Bundle(shutil.copytree(exported.path, tmp_path / "b"), exported.spec)
    with np.load(write_reference(made, windows)) as stored:
        logits = stored["logits_0"]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            export_onnx(made)
            write_reference(made, windows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.onnx_path("0").read_bytes() == content
    with np.load(made.reference_path) as stored:
        assert np.array_equal(stored["logits_0"], logits)


def test_a_model_without_a_name(exported: Bundle, tmp_path: Path) -> None:
    made = Bundle(shutil.copytree(exported.path, tmp_path / "b"), exported.spec.model_copy(update={"name": ""}))
    assert onnx.load(export_onnx(made)[0]).graph.name == "model"


def test_exporting_prints_nothing(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(bundle)
    assert capfd.readouterr() == ("", "")


def test_a_free_spatial_shape(tmp_path: Path) -> None:
    made = bundle_of(tmp_path, values=residual_plans())
    (path,) = export_onnx(made, dynamic=True)
    assert path.name == "0-dynamic.onnx"
    data = patches(made, 1, scale=2)
    assert run(path, data) == pytest.approx(in_torch(made, "0", data), abs=1e-4)
    assert not made.onnx_path("0").exists()


def test_probabilities_and_labels(bundle: Bundle) -> None:
    data = patches(bundle, 2)
    logits = in_torch(bundle, "0", data)
    (softmax,), (argmax,) = export_onnx(bundle, head="softmax"), export_onnx(bundle, head="argmax")
    assert (softmax.name, argmax.name) == ("0-softmax.onnx", "0-argmax.onnx")
    probabilities, labels = run(softmax, data), run(argmax, data)
    assert probabilities.sum(1) == pytest.approx(np.ones((2, 4, 8, 8)), abs=1e-5)
    assert labels.dtype == np.uint8
    assert (labels == logits.argmax(1)).mean() > 0.999


def test_regions_are_painted(tmp_path: Path) -> None:
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2},
        "regions_class_order": [1, 2],
        "file_ending": ".nii.gz",
    }
    made = bundle_of(tmp_path, dataset=dataset)
    data = patches(made, 1)
    above = in_torch(made, "0", data) > 0
    expected = np.where(above[:, 1], 2, np.where(above[:, 0], 1, 0))
    assert (run(export_onnx(made, head="argmax")[0], data) == expected).mean() > 0.999


# ------------------------------------------------------------------ what cannot be exported
def test_wrong_arguments(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="head: expected one of logits, softmax, argmax, got 'tanh'"):
        export_onnx(bundle, head="tanh")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no member '7'; it has 0"):
        export_onnx(bundle, members=("7",))


def test_missing_and_damaged_weights(bundle: Bundle) -> None:
    bundle.weights_path("0").write_bytes(b"damage")
    with pytest.raises(BuildError, match="not readable as safetensors"):
        export_onnx(bundle)
    bundle.weights_path("0").unlink()
    with pytest.raises(BuildError, match=r"0\.safetensors is missing"):
        export_onnx(bundle)


def test_a_bundle_of_onnx_only(bundle: Bundle) -> None:
    network = OnnxNetwork(in_channels=1, out_channels=3)
    foreign = Bundle(bundle.path, bundle.spec.model_copy(update={"network": network}))
    with pytest.raises(BuildError, match="only compiled or ONNX networks"):
        export_onnx(foreign)


def test_networks_beyond_one_file(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_MAX_BYTES", 100)
    with pytest.raises(BuildError, match="one ONNX file holds 2 GiB at most"):
        export_onnx(bundle)


def test_networks_no_graph_stands_for(bundle: Bundle) -> None:
    inference = bundle.spec.inference.model_copy(update={"patch": (4, 9, 8)})
    wrong = Bundle(bundle.path, bundle.spec.model_copy(update={"inference": inference}))
    with pytest.raises(BuildError, match=r"member '0' cannot be written as ONNX: .*; check network in model\.json"):
        export_onnx(wrong)


# ------------------------------------------------------------------ the stored reference
@pytest.mark.parametrize("values", [plans(), flat_plans()], ids=["3d", "2d"])
def test_the_reference_holds_exact_inputs_and_thinned_logits(tmp_path: Path, values: dict[str, Any]) -> None:
    made = bundle_of(tmp_path, values=values, folds=("0", "1"))
    shape = (2, made.spec.in_channels, *made.spec.inference.patch)
    path = write_reference(made, np.random.default_rng(1).normal(size=shape).astype(np.float32), max_values=100)
    with np.load(path) as stored:
        assert stored["inputs"].dtype == np.float16
        data = stored["inputs"].astype(np.float32)
        step = tuple(slice(None, None, int(s)) for s in stored["stride"])
        squeezed = data[:, :, 0] if made.spec.dimensions == 2 else data
        for member in ("0", "1"):
            logits = in_torch(made, member, squeezed)
            full = logits[:, :, None] if made.spec.dimensions == 2 else logits
            kept = stored[f"logits_{member}"]
            assert kept == pytest.approx(full[(slice(None), slice(None), *step)], abs=1e-5)
            assert math.prod(kept.shape) <= 100


@pytest.mark.parametrize(
    ("shape", "value", "words"),
    [
        ((1, 2, 4, 8, 8), 0, r"expected \(n, 1, 4, 8, 8\)"),
        ((1, 4, 8, 8), 0, "expected"),
        ((1, 1, 4, 8, 8), np.nan, "NaN"),
        ((1, 1, 4, 8, 8), 1e6, "65504"),
    ],
)
def test_windows_that_do_not_fit(bundle: Bundle, shape: tuple[int, ...], value: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_reference(bundle, np.full(shape, value, np.float32))
