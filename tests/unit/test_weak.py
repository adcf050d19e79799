"""What TensorRT 8.6 is given: the same function, with normalisation as its plugin or as its own layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from typed_models import InstanceNormalization_TRT

from segrt.export.weak import fused_norms, group_norms

SHAPE = (2, 3, 4, 5, 6)
rng = np.random.default_rng(0)
CONSTANTS = {
    "w": rng.normal(size=(3, 3, 1, 1, 1)).astype(np.float32),
    "scale": rng.normal(size=3).astype(np.float32),
    "bias": rng.normal(size=3).astype(np.float32),
}


def model(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), opset: int = 20) -> bytes:
    """A model that reads x and the constants w, scale and bias."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("x", *outputs)]
    constants = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9).SerializeToString()


def norm(source: str, out: str, scale: str = "scale") -> onnx.NodeProto:
    return helper.make_node("InstanceNormalization", [source, scale, "bias"], [out], name=f"norm_{out}", epsilon=1e-3)


def node(kind: str, sources: str, out: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, sources.split(), [out], **attributes)


def run(content: bytes) -> list[np.ndarray]:
    x = np.random.default_rng(1).normal(3, 2, SHAPE).astype(np.float32)
    return list(ReferenceEvaluator(onnx.load_model_from_string(content), new_ops=[InstanceNormalization_TRT]).run(None, {"x": x}))


def kinds(content: bytes) -> list[str]:
    return [n.op_type for n in onnx.load_model_from_string(content).graph.node]


CASES = {
    "block": (model(node("Conv", "x w", "c"), norm("c", "n"), node("LeakyRelu", "n", "y", alpha=0.2)), ["Conv", "TRT"]),
    "relu": (model(norm("x", "n"), node("Relu", "n", "y")), ["TRT"]),
    "other activation": (model(norm("x", "n"), node("Sigmoid", "n", "y")), ["TRT", "Sigmoid"]),
    "norm is read twice": (model(norm("x", "n"), node("LeakyRelu", "n", "a"), node("Add", "a n", "y")), ["TRT", "LeakyRelu", "Add"]),
    "norm is an output": (model(norm("x", "y"), node("Relu", "y", "z"), outputs=("y", "z")), ["TRT", "Relu"]),
    "computed scale": (
        model(node("Abs", "scale", "s"), norm("x", "n", "s"), node("Relu", "n", "y")),
        ["Abs", "InstanceNormalization", "Relu"],
    ),
    "residual": (
        model(node("Conv", "x w", "c"), norm("c", "n"), node("Add", "n x", "a"), node("LeakyRelu", "a", "y")),
        ["Conv", "TRT", "Add", "LeakyRelu"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_plugin_and_activation_compute_what_the_model_did(name: str) -> None:
    content, expected = CASES[name]
    fused = fused_norms(content)
    assert kinds(fused) == ["InstanceNormalization_TRT" if kind == "TRT" else kind for kind in expected]
    for a, b in zip(run(content), run(fused), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_group_normalisation_computes_what_the_model_did(name: str) -> None:
    content = CASES[name][0]
    assert ("GroupNormalization" in kinds(group_norms(content))) == (name != "computed scale")
    for a, b in zip(run(content), run(group_norms(content)), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6)


def test_operators_are_those_that_the_parser_knows() -> None:
    for convert, opset in ((fused_norms, 17), (group_norms, 18)):
        assert [e.version for e in onnx.load_model_from_string(convert(CASES["block"][0])).opset_import] == [opset]


def test_constants_that_nothing_reads_any_more_are_gone() -> None:
    left = {t.name for t in onnx.load_model_from_string(fused_norms(CASES["block"][0])).graph.initializer}
    assert left == {"w"}
