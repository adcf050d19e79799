"""Strongly typed ONNX: every node's types, what is refused, and how little the 16 bits move the labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from factories import UNET_2D, UNET_3D
from onnx import TensorProto, helper, numpy_helper
from typed_models import OTHER_FAMILIES, as_stored, held_against, node_types, random_bundle, run, windows_of

from segrt.arrays import Array
from segrt.bundle import Bundle
from segrt.engines.onnxrt import model_file
from segrt.errors import BuildError
from segrt.export.importers import import_nnunet
from segrt.export.onnx import export_onnx
from segrt.export.typed import typed_onnx, write_typed
from segrt.files import write_atomic

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "bundle"
IN_HALF = {"Conv", "ConvTranspose", "LeakyRelu", "Relu", "PRelu", "Elu", "Concat", "Add", "AveragePool", "MaxPool", "Resize"}
# TensorRT has no bfloat16 for these
NOT_BF16 = {"ConvTranspose", "Resize"}
NETWORKS = {
    "plain": UNET_3D,
    "residual": UNET_3D.model_copy(update={"family": "residual_unet", "blocks": (1, 2)}),
    "2d": UNET_2D,
    "relu": UNET_3D.model_copy(update={"nonlinearity": "relu"}),
    "batch": UNET_3D.model_copy(update={"norm": "batch"}),
    "none": UNET_3D.model_copy(update={"norm": "none"}),
    **OTHER_FAMILIES,
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("typed") / "bundle", NETWORKS[request.param])


# ------------------------------------------------------------------ types
def test_every_node_has_one_type(bundle: Bundle) -> None:
    typed = onnx.load_model_from_string(typed_onnx(bundle.onnx_path("0"), "fp16"))
    operators = node_types(typed)
    for operator, kinds in operators:
        if operator != "Cast":
            assert kinds == ({HALF} if operator in IN_HALF else {FLOAT}), operator
    if IN_HALF.issuperset(operator for operator, _ in operators if operator != "Cast"):
        assert [operator for operator, _ in operators].count("Cast") == 2, "the image's and the logits'"
    before = [node.op_type for node in onnx.load(bundle.onnx_path("0")).graph.node]
    assert [operator for operator, _ in operators if operator != "Cast"] == before


def test_normalisation_lies_between_casts(bundle: Bundle) -> None:
    graph = onnx.load_model_from_string(typed_onnx(bundle.onnx_path("0"), "fp16")).graph
    maker = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "InstanceNormalization":
            continue
        assert maker[node.input[0]].op_type == "Cast"
        assert [weights[name] for name in node.input[1:]] == [FLOAT, FLOAT]
        assert {n.op_type for n in graph.node if node.output[0] in n.input} == {"Cast"}


# operator -> where its definition that ONNX Runtime's CUDA provider knows, in float32 and float16, begins; it takes a node for which it has
# no kernel of just that definition to the CPU (its docs/OperatorKernels.md; newer releases add definitions)
CUDA_KERNELS = {"Add": 14, "AveragePool": 11, "Cast": 13, "Concat": 13, "Conv": 11, "ConvTranspose": 11, "Div": 14, "Elu": 6} | {
    "InstanceNormalization": 6,
    "LeakyRelu": 16,
    "MaxPool": 12,
    "PRelu": 16,
    "Relu": 14,
    "Resize": 13,
    "Slice": 13,
}


def test_onnx_runtime_leaves_no_node_to_the_cpu(bundle: Bundle) -> None:
    for content in (bundle.onnx_path("0").read_bytes(), typed_onnx(bundle.onnx_path("0"), "fp16")):
        model = onnx.load_model_from_string(content)
        (opset,) = model.opset_import
        needed = {node.op_type: onnx.defs.get_schema(node.op_type, opset.version).since_version for node in model.graph.node}
        assert needed.items() <= CUDA_KERNELS.items()


def test_the_source_is_kept_but_for_its_types(bundle: Bundle) -> None:
    source = onnx.load(bundle.onnx_path("0"))
    typed = onnx.load_model_from_string(typed_onnx(bundle.onnx_path("0"), "fp16"))
    assert [(e.domain, e.version) for e in typed.opset_import] == [(e.domain, e.version) for e in source.opset_import]
    assert typed.graph.input == source.graph.input
    assert typed.graph.output == source.graph.output
    values = {prop.key: prop.value for prop in typed.metadata_props}
    assert (values["precision"], values["inputs"], values["outputs"], values["member"]) == ("fp16", "fp32", "fp32", "0")
    assert sum(len(t.raw_data) for t in typed.graph.initializer) < 0.7 * sum(len(t.raw_data) for t in source.graph.initializer)


def test_inputs_and_outputs_may_be_16_bits(bundle: Bundle) -> None:
    content = typed_onnx(bundle.onnx_path("0"), "fp16", inputs="fp16", outputs="fp16")
    graph = onnx.load_model_from_string(content).graph
    assert [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)] == [HALF, HALF]
    patches = windows_of(bundle).astype(np.float16)
    logits = run(content, patches)
    assert logits.dtype == np.float16
    assert np.array_equal(logits, run(typed_onnx(bundle.onnx_path("0"), "fp16"), patches.astype(np.float32)).astype(np.float16))


def test_bfloat16_leaves_in_float32_what_tensorrt_has_no_kernels_for(bundle: Bundle) -> None:
    typed = onnx.load_model_from_string(typed_onnx(bundle.onnx_path("0"), "bf16"))
    assert (typed.opset_import[0].version, typed.ir_version) == (22, 10)
    for operator, kinds in node_types(typed):
        if operator != "Cast":
            assert kinds == ({BF16} if operator in IN_HALF - NOT_BF16 else {FLOAT}), operator


# ------------------------------------------------------------------ other graphs
def model_of(
    nodes: list[Any],
    tensors: dict[str, Array],
    shape: tuple[int, ...] = (1, 2, 4, 4),
    *,
    opset: int = 20,
    ir_version: int = 10,
    **more: Any,
) -> bytes:
    values = [helper.make_tensor_value_info(name, FLOAT, shape) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "by hand", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", opset)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **more).SerializeToString()
    return content


KERNEL = np.random.default_rng(0).normal(size=(2, 2, 1, 1)).astype(np.float32)


def test_a_norm_by_parts_stays_in_float32() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("ReduceMean", ["a", "axes"], ["mean"]),
        helper.make_node("Sub", ["a", "mean"], ["b"]),
        helper.make_node("Mul", ["b", "b"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["variance"]),
        helper.make_node("Add", ["variance", "eps"], ["c"]),
        helper.make_node("Sqrt", ["c"], ["deviation"]),
        helper.make_node("Div", ["b", "deviation"], ["d"]),
        helper.make_node("LeakyRelu", ["d"], ["e"]),
        helper.make_node("Conv", ["e", "w"], ["y"]),
    ]
    source = model_of(nodes, {"w": KERNEL, "axes": np.array([2, 3]), "eps": np.float32(1e-5)})
    content = typed_onnx(source, "fp16")
    kinds = [(operator, found) for operator, found in node_types(onnx.load_model_from_string(content)) if operator != "Cast"]
    assert kinds == [(n.op_type, {HALF} if n.op_type in IN_HALF - {"Add"} else {FLOAT}) for n in nodes]
    patches = np.random.default_rng(1).normal(size=(1, 2, 4, 4)).astype(np.float32)
    assert run(content, patches) == pytest.approx(run(source, patches), abs=0.01)


def test_unknown_operators_stay_in_float32_and_integers_are_left_alone() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=1),
        helper.make_node("Reshape", ["b", "shape"], ["y"]),
    ]
    kinds = node_types(onnx.load_model_from_string(typed_onnx(model_of(nodes, {"w": KERNEL}), "fp16")))
    assert [k for k in kinds if k[0] != "Cast"] == [("Conv", {HALF}), ("Shape", {HALF}), ("Softmax", {FLOAT}), ("Reshape", {FLOAT})]


def test_a_constant_read_in_both_types_is_stored_in_both() -> None:
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(KERNEL))
    nodes = [constant, helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Conv", ["a", "w"], ["b"])]
    nodes += [helper.make_node("ReduceMax", ["w"], ["top"], keepdims=0), helper.make_node("Mul", ["b", "top"], ["y"])]
    graph = onnx.load_model_from_string(typed_onnx(model_of(nodes, {}), "fp16")).graph
    assert {t.name: t.data_type for t in graph.initializer} == {"w.fp16": HALF, "w": FLOAT}


def test_an_output_that_is_read_again_is_cast_once() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["unused"])]
    content = typed_onnx(model_of(nodes, {"w": KERNEL}), "fp16")
    assert run(content, np.ones((1, 2, 4, 4), np.float32)).dtype == np.float32


@pytest.mark.parametrize("weights_alone", [False, True])
def test_scales_in_float16_need_a_younger_quantisation(weights_alone: bool) -> None:
    values = {"w": (KERNEL * 10).astype(np.int8), "s": np.float32(0.125), "z": np.int8(0)}
    image = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"])]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("Conv", ["x" if weights_alone else "d", "v"], ["y"]),
    ]
    source = model_of(nodes if weights_alone else image + nodes, values, opset=17, ir_version=8)
    content = typed_onnx(source, "fp16")
    typed = onnx.load_model_from_string(content)
    assert (typed.opset_import[0].version, typed.ir_version) == (19, 9)
    patches = np.random.default_rng(1).integers(-9, 9, (1, 2, 4, 4)).astype(np.float32) / 8
    assert run(content, patches) == pytest.approx(run(source, patches), rel=1e-3)


def test_a_typed_file_vouches_for_the_weights_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another process exports others before it is on record."""
    made = random_bundle(tmp_path / "b", UNET_3D)
    write_typed(made, "0")
    assert model_file(made, "0", "fp16")[1] == "fp16"

    def meanwhile(path: Path, content: str | bytes) -> Path:
        if path.stem == "0-fp16":
            source = onnx.load(made.onnx_path("0"))
            source.graph.initializer[0].raw_data = bytes(len(source.graph.initializer[0].raw_data))
            write_atomic(made.onnx_path("0"), source.SerializeToString())
        return write_atomic(path, content)

    with monkeypatch.context() as changed:
        changed.setattr("segrt.export.typed.write_atomic", meanwhile)
        write_typed(made, "0")
    assert model_file(made, "0", "fp16")[1] == "fp32"
    write_typed(made, "0")
    assert model_file(made, "0", "fp16")[1] == "fp16"


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("precision", "value", "words"), [("fp16", 7e4, "holds 70000, beyond the range of fp16"), ("bf16", np.nan, "holds nan")]
)
def test_a_weight_that_does_not_fit_is_named(precision: Any, value: float, words: str) -> None:
    kernel = KERNEL.copy()
    kernel[1, 1] = value
    with pytest.raises(BuildError, match=f"weight 'w' {words}"):
        typed_onnx(model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": kernel}), precision)


def test_what_float16_cannot_hold_bfloat16_can() -> None:
    source = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": KERNEL * np.float32(1e6)})
    assert run(as_stored(typed_onnx(source, "bf16"), BF16), np.ones((1, 2, 4, 4), np.float32)).max() > 65504


def branch(name: str) -> Any:
    value = helper.make_tensor_value_info(name, FLOAT, (1, 2, 4, 4))
    return helper.make_graph([helper.make_node("Identity", ["x"], [name])], name, [], [value])


def with_if() -> bytes:
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch("then"), else_branch=branch("else"))
    return model_of([node], {"flag": np.array(True)})


def with_function() -> bytes:
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("own", "Twice", ["p"], ["q"], [helper.make_node("Add", ["p", "p"], ["q"])], opsets)
    return model_of([helper.make_node("Twice", ["x"], ["y"], domain="own")], {}, functions=[function])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (with_if, "has control flow or functions"),
        (with_function, "has control flow or functions"),
        (lambda: model_of([helper.make_node("Frob", ["x"], ["y"])], {}), "cannot be had in fp16: No Op registered for Frob"),
        (lambda: typed_onnx(model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": KERNEL}), "fp16"), "holds 16-bit values already"),
    ],
)
def test_graphs_whose_types_cannot_be_chosen(source: Callable[[], bytes], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        typed_onnx(source(), "fp16")


# ------------------------------------------------------------------ numbers
@pytest.mark.parametrize(("precision", "half", "error"), [("fp16", HALF, 3e-3), ("bf16", BF16, 3e-2)])
def test_random_networks_keep_their_logits(bundle: Bundle, precision: Any, half: int, error: float) -> None:
    """Each of some ten layers rounds to 11 (8) bits."""
    stored = as_stored(typed_onnx(bundle.onnx_path("0"), precision), half)
    assert 0 < held_against(bundle, stored, windows_of(bundle))["relative_error"] < error


@pytest.mark.parametrize(("precision", "half", "agreement"), [("fp16", HALF, 0.999), ("bf16", BF16, 0.995)])
def test_a_trained_network_keeps_its_labels(precision: Any, half: int, agreement: float) -> None:
    demo = Bundle.open(DEMO)
    stored = as_stored(typed_onnx(demo.onnx_path("0"), precision), half)
    report = held_against(demo, stored, windows_of(demo))
    assert report["label_agreement"] >= agreement
    assert report["mean_dice"] > 0.98


def test_onnx_runtime_runs_the_typed_file_itself() -> None:
    demo = Bundle.open(DEMO)
    report = held_against(demo, typed_onnx(demo.onnx_path("0"), "fp16", outputs="fp16"), windows_of(demo))
    assert report["label_agreement"] >= 0.999
    assert report["relative_error"] < 1e-3


GOLDEN = [
    ("S1_hippocampus_3d", "3d_fullres"),
    ("S2_organs_ct", "3d_fullres"),
    ("S3_cascade_ct", "3d_lowres"),
    ("S3_cascade_ct", "3d_cascade_fullres"),
    ("S4_aniso_ct", "3d_fullres"),
    ("S5_slices_2d", "2d"),
    ("S6_png_2d", "2d"),
    ("S7_regions_mr", "3d_fullres"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "configuration"), GOLDEN)
def test_networks_of_nnunet_keep_their_labels(golden: Path, tmp_path: Path, folder: str, configuration: str) -> None:
    source = next(p for p in (golden / folder / "model").iterdir() if p.name.endswith(f"__{configuration}"))
    bundle = import_nnunet(source, tmp_path / "bundle")
    export_onnx(bundle, members=bundle.spec.members[:1])
    stored = as_stored(typed_onnx(bundle.onnx_path(bundle.spec.members[0]), "fp16"), HALF)
    report = held_against(bundle, stored, windows_of(bundle))
    assert report["label_agreement"] >= 0.999
    assert report["relative_error"] < 5e-3
