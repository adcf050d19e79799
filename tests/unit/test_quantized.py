"""INT8 with explicit Q/DQ: what is quantised and how, and how little it moves a trained network's labels."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from factories import UNET_2D, UNET_3D, make_bundle, make_spec, write_case
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from typed_models import (
    OTHER_FAMILIES,
    InstanceNormalization_TRT,
    as_stored,
    element_types,
    held_against,
    node_types,
    random_bundle,
    run,
    windows_of,
)

from segrt.arrays import Array, FloatArray
from segrt.bundle import Bundle
from segrt.errors import BuildError
from segrt.export.calibrate import calibration_windows
from segrt.export.quantized import quantized_onnx
from segrt.export.tensorrt import member_model
from segrt.export.typed import typed_onnx
from segrt.phantom import make_phantom
from segrt.spec import UNetPPSpec

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "bundle"
NETWORKS = {
    "plain": UNET_3D.model_copy(update={"blocks": (2, 2)}),
    "residual": UNET_3D.model_copy(update={"family": "residual_unet", "blocks": (1, 2)}),
    "2d": UNET_2D,
    **OTHER_FAMILIES,
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, bytes]:
    """A random network's bundle and its quantised file."""
    bundle = random_bundle(tmp_path_factory.mktemp("quantized") / "bundle", NETWORKS[request.param])
    return bundle, quantized_onnx(bundle.onnx_path("0"), windows_of(bundle))


def heads(bundle: Bundle) -> int:
    """How many convolutions write logits: of a UNet++ whose answer is the mean of several, all of these."""
    network = bundle.spec.network
    return len(network.heads) if isinstance(network, UNetPPSpec) else 1


def is_end(graph: Any, node: Any) -> bool:
    """Whether a convolution reads the image or writes logits: the answer, or those of a head whose mean with others is the answer."""
    return node.input[0] == graph.input[0].name or node.output[0] == graph.output[0].name or node.output[0].startswith("heads.")


def test_inner_convolutions_read_int8_and_nothing_else_does(made: tuple[Bundle, bytes]) -> None:
    graph = onnx.load_model_from_string(made[1]).graph
    maker = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        read = [maker[name].op_type if name in maker else "" for name in node.input]
        if node.op_type == "Conv" and not is_end(graph, node):
            assert read[:2] == ["DequantizeLinear", "DequantizeLinear"]
            assert read[2:] in ([], [""]), "a bias stays in float"
        elif node.op_type != "DequantizeLinear":
            assert "DequantizeLinear" not in read, node.op_type


def test_scales_are_what_tensorrt_wants(made: tuple[Bundle, bytes]) -> None:
    """Symmetric around zero; weights by output channel, activations by tensor."""
    graph = onnx.load_model_from_string(made[1]).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = tensors[node.input[1]], tensors[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
        if node.input[0] in tensors:
            (axis,) = [a.i for a in node.attribute if a.name == "axis"]
            assert axis == 0
            assert scale.shape == (len(tensors[node.input[0]]),)
        else:
            assert scale.shape == ()


def test_weights_are_stored_in_8_bits(made: tuple[Bundle, bytes]) -> None:
    model = onnx.load_model_from_string(made[1])
    assert TensorProto.INT8 in {t.data_type for t in model.graph.initializer}
    assert {p.key for p in model.metadata_props} >= {"precision", "member"}
    assert not any(p.key.startswith("onnx.") for p in model.metadata_props)
    assert [i.name for i in model.graph.input] == ["patches"]


def test_what_stays_in_float_becomes_float16(made: tuple[Bundle, bytes]) -> None:
    bundle, content = made
    model = onnx.load_model_from_string(typed_onnx(content, "fp16"))
    for operator, kinds in node_types(model):
        if operator != "Cast":
            full = operator in ("InstanceNormalization", "Div")  # the mean of several heads
            assert kinds == ({TensorProto.FLOAT} if full else {TensorProto.FLOAT16}), operator
    kinds = element_types(model)
    assert {kinds[n.output[0]] for n in model.graph.node if n.op_type == "QuantizeLinear"} == {TensorProto.INT8}
    patches = windows_of(bundle)
    expected = run(content, patches)
    assert run(typed_onnx(content, "fp16"), patches) == pytest.approx(expected, abs=0.15 * spread(expected))


def spread(logits: FloatArray) -> float:
    """How far logits lie apart: some 1 after instance normalisation, as much as the image's values elsewhere."""
    return max(1.0, float(logits.std()))


def test_tensorrt_8_gets_its_own_norms_between_quantised_convolutions(made: tuple[Bundle, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parser makes of InstanceNormalization is a layout that no fast convolution reads."""
    bundle, content = made
    eight = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0))
    monkeypatch.setitem(sys.modules, "tensorrt", eight)
    flat = bundle.spec.dimensions == 2
    model = onnx.load_model_from_string(member_model(bundle, "0", "int8", windows_of(bundle)[:, :, None] if flat else windows_of(bundle)))
    before, after = (Counter(node.op_type for node in m.graph.node) for m in (onnx.load_model_from_string(content), model))
    norm = "GroupNormalization" if flat else "InstanceNormalization_TRT"
    assert (after["InstanceNormalization"], after[norm]) == (0, before["InstanceNormalization"])
    maker = {name: node.op_type for node in model.graph.node for name in node.output}
    inner = [node for node in model.graph.node if node.op_type == "Conv" and not is_end(model.graph, node)]
    assert len(inner) == before["Conv"] - 1 - heads(bundle)
    assert all(maker[name] == "DequantizeLinear" for node in inner for name in node.input[:2])
    patches = windows_of(bundle)[:1]
    model.opset_import[0].version = 20  # the evaluator knows no older quantisation, and these operators did not change in between
    with np.errstate(over="ignore"):  # the evaluator's ELU computes both of its sides
        (logits,) = ReferenceEvaluator(model, new_ops=[InstanceNormalization_TRT]).run(None, {"patches": patches})
    # a value that lies between two steps of 8 bits may take the other one
    expected = run(content, patches)
    assert logits == pytest.approx(expected, abs=0.05 * spread(expected))


def phantom_windows(bundle: Bundle, folder: Path, seed: int) -> FloatArray:
    folder.mkdir()
    image, _, grid = make_phantom(np.random.default_rng(seed), spacing=(6.0, 3.0, 3.0))
    write_case(folder / "a_0000.nii.gz", image, grid.spacing)
    return calibration_windows(bundle, folder)


def test_a_trained_network_keeps_its_labels(tmp_path: Path) -> None:
    """Calibrated on one image, held against float32 on another."""
    demo = Bundle.open(DEMO)
    content = quantized_onnx(demo.onnx_path("0"), phantom_windows(demo, tmp_path / "a", 31))
    windows = phantom_windows(demo, tmp_path / "b", 32)[:3]
    for model in (content, as_stored(typed_onnx(content, "fp16"), TensorProto.FLOAT16)):
        report = held_against(demo, model, windows)
        assert report["label_agreement"] >= 0.995
        assert report["mean_dice"] > 0.97


def edited(path: Path, name: str, change: Any) -> Path:
    """Change a weight of an ONNX file in place."""
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    values: Array = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    path.write_bytes(model.SerializeToString())
    return path


def test_channels_that_died_in_training_become_zero(tmp_path: Path) -> None:
    """Their scale would be zero in float16, which TensorRT refuses."""
    bundle = random_bundle(tmp_path / "b", NETWORKS["plain"])

    def kill(values: Array) -> None:
        values[1] *= 1e-12

    path = edited(bundle.onnx_path("0"), "encoder.0.1.conv.weight", kill)
    graph = onnx.load_model_from_string(typed_onnx(quantized_onnx(path, windows_of(bundle)), "fp16")).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    (node,) = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("encoder.0.1.conv.weight")]
    weights, scale = tensors[node.input[0]], tensors[node.input[1]]
    assert not weights[1].any()
    assert weights[0].any()
    assert (scale > 0).all()


def test_a_network_of_one_layer_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", make_spec())
    with pytest.raises(BuildError, match="no convolution between its first and its last one"):
        quantized_onnx(bundle.onnx_path("0"), np.zeros((1, 1, 8, 8, 8), np.float32))


def test_windows_that_do_not_fit_are_a_sentence(tmp_path: Path) -> None:
    bundle = random_bundle(tmp_path / "b", UNET_3D)
    for shape in ((1, 2, 8, 16, 16), (1, 1, 8, 16, 8), (0, 1, 8, 16, 16)):
        with pytest.raises(BuildError, match=r"0\.onnx: expected windows \(n, 1, 8, 16, 16\), got"):
            quantized_onnx(bundle.onnx_path("0"), np.zeros(shape, np.float32))


def test_nothing_is_printed_or_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    bundle = random_bundle(tmp_path / "b", UNET_3D)
    quantized_onnx(bundle.onnx_path("0"), windows_of(bundle))
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if not record.name.startswith("torch")] == []
