"""ONNX models of 16 and 8 bits in tests: their nodes' types, and what a GPU would compute, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from factories import make_spec
from onnx import TensorProto, helper, numpy_helper
from onnx.reference.op_run import OpRun

from segrt.arrays import Array, FloatArray
from segrt.bundle import Bundle
from segrt.export.onnx import export_onnx
from segrt.export.verify import compare, sample_windows
from segrt.networks import build
from segrt.spec import UNetPPSpec, UNetSpec, VNetSpec

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
# V-Net and UNet++ with few channels: what is between their convolutions is what they have and no U-Net has
VNET = VNetSpec(in_channels=1, out_channels=3, width=1 / 8, dropout=0)
UNETPP_3D = UNetPPSpec(
    family="unetpp", dimensions=3, in_channels=1, out_channels=3, features=(4, 4, 4, 4, 4), level=2, deep_supervision=True
)
OTHER_FAMILIES: dict[str, VNetSpec | UNetPPSpec] = {
    "vnet": VNET,
    "vnet elu": VNET.model_copy(update={"elu": True}),
    "unetpp": UNETPP_3D,
    "unetpp 2d": UNETPP_3D.model_copy(update={"dimensions": 2}),
    "unetpp 2d transposed": UNETPP_3D.model_copy(update={"dimensions": 2, "deep_supervision": False, "norm": "none", "up": "transposed"}),
}


class InstanceNormalization_TRT(OpRun):  # noqa: N801 - the plugin's name
    """The plugin as its documentation defines it: instance normalisation, then a leaky ReLU where `relu` is set."""

    def _run(
        self, x: Any, epsilon: Any = 0, scales: Any = (), bias: Any = (), relu: Any = 0, alpha: Any = 0, plugin_version: Any = ""
    ) -> Any:
        assert plugin_version == "1"
        axes, shape = (2, 3, 4), (1, -1, 1, 1, 1)
        y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
        y = y * np.reshape(scales, shape) + np.reshape(bias, shape)
        return ((np.where(y < 0, alpha * y, y) if relu else y).astype(x.dtype),)


def random_bundle(folder: Path, network: UNetSpec | VNetSpec | UNetPPSpec) -> Bundle:
    deep = 16 if isinstance(network, VNetSpec) else 8
    spec = make_spec(patch=(deep, 16, 16) if network.dimensions == 3 else (1, 32, 32), network=network)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bundle = Bundle.create(folder, spec, weights={"0": build(network).state_dict()})
    export_onnx(bundle)
    return bundle


def element_types(model: Any) -> dict[str, int]:
    """Value -> element type, by ONNX's own inference."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return known | {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}


def node_types(model: Any) -> list[tuple[str, set[int]]]:
    """(operator, the floating types among its inputs and outputs) of every node; the factors of a Resize are float32 by definition."""
    kinds = element_types(model)
    values = [(n.op_type, (*n.input[: 1 if n.op_type == "Resize" else None], *n.output)) for n in model.graph.node]
    return [(operator, {kinds[name] for name in names if name and kinds[name] in _FLOATS}) for operator, names in values]


def as_stored(content: bytes, half: int) -> bytes:
    """A float32 model that rounds wherever the typed one stores 16 bits: what a GPU computes, with sums in float32.

    ONNX Runtime computes 16-bit nodes of a CPU in float32 and leaves roundings between them out.
    """
    model = onnx.load_model_from_string(content)
    kinds, graph, nodes = element_types(model), model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        if node.op_type == "Cast":
            node = helper.make_node("Identity", node.input, node.output)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if kinds[name] == half:
                node.output[i] = f"{name}/full"
                nodes.append(helper.make_node("Cast", [f"{name}/full"], [f"{name}/half"], to=half))
                nodes.append(helper.make_node("Cast", [f"{name}/half"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    stored: bytes = model.SerializeToString()
    return stored


def run(content: bytes | Path, patches: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = content if isinstance(content, bytes) else str(content)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: patch[None]})[0] for patch in patches])


def windows_of(bundle: Bundle, image: Path | None = None) -> FloatArray:
    windows = sample_windows(bundle.spec, image)
    return windows if bundle.spec.dimensions == 3 else windows[:, :, 0]


def held_against(bundle: Bundle, content: bytes, patches: FloatArray) -> dict[str, Any]:
    """How a model's logits compare with those of the bundle's float32 file."""
    pair = [run(model, patches).astype(np.float32) for model in (bundle.onnx_path("0"), content)]
    if bundle.spec.dimensions == 2:
        pair = [logits[:, :, None] for logits in pair]
    return compare(*pair, bundle.spec)
