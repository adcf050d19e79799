"""ONNX as TensorRT 8.6 reads it best: old operators, and normalisation as something it has a fast kernel for.

Its parser makes InstanceNormalization a plugin that, on linear tensors, is a batch normalisation of cuDNN 8 in a layout no fast 3-D
convolution uses. Two other ways exist: in 16 bits the same plugin has a kernel of its own for channels-last volumes with the activation in
it, float32 sums inside, when it is asked for by name; and group normalisation of one channel a group is a layer that needs no plugin and no
cuDNN at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import require

# group normalisation appeared with it; the parser of TensorRT 8.6 knows most of opset 17 and this one operator of 18
_OPSET = 17
_GROUP_OPSET = 18
_PLUGIN = "InstanceNormalization_TRT"


def fused_norms(content: bytes) -> bytes:
    """Replace InstanceNormalization, and the LeakyRelu or Relu that alone reads it, by TensorRT's plugin for both.

    Parameters
    ----------
    content : float32 ONNX model of a 3-D network with constant scales and biases; its convolutions may be quantised

    Returns
    -------
    bytes : the model in opset 17; norms whose scale or bias is computed stay as they are
    """
    onnx, model = _converted(content, _OPSET)
    constants, readers = _constants(onnx, model), _readers(model)
    outputs = {value.name for value in model.graph.output}
    nodes, taken = [], set()
    for node in model.graph.node:
        if id(node) in taken:
            continue
        if node.op_type != "InstanceNormalization" or not {*node.input[1:]} <= constants.keys():
            nodes.append(node)
            continue
        followers = [] if node.output[0] in outputs else readers.get(node.output[0], [])
        activation = followers[0] if len(followers) == 1 and followers[0].op_type in ("LeakyRelu", "Relu") else None
        if activation is not None:
            taken.add(id(activation))
        scales, bias = (constants[name].ravel().tolist() for name in node.input[1:])
        nodes.append(
            onnx.helper.make_node(
                _PLUGIN,
                [node.input[0]],
                [(node if activation is None else activation).output[0]],
                name=f"{node.name or node.output[0]}_fused",
                epsilon=_attribute(node, "epsilon", 1e-5),
                scales=scales,
                bias=bias,
                relu=int(activation is not None),
                alpha=_slope(activation),
                plugin_version="1",
            )
        )
    return _rebuilt(model, nodes)


def group_norms(content: bytes) -> bytes:
    """Replace InstanceNormalization by GroupNormalization of one channel a group, TensorRT's own layer; opset 18."""
    onnx, model = _converted(content, _GROUP_OPSET)
    constants = _constants(onnx, model)
    for node in model.graph.node:
        if node.op_type == "InstanceNormalization" and node.input[1] in constants:
            node.op_type = "GroupNormalization"
            node.attribute.append(onnx.helper.make_attribute("num_groups", int(constants[node.input[1]].size)))
    return bytes(model.SerializeToString())


def _converted(content: bytes, opset: int) -> tuple[Any, Any]:
    onnx = require("onnx", extra="export")
    return onnx, onnx.version_converter.convert_version(onnx.load_model_from_string(content), opset)


def _constants(onnx: Any, model: Any) -> dict[str, np.ndarray[Any, Any]]:
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def _readers(model: Any) -> dict[str, list[Any]]:
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _attribute(node: Any, name: str, default: float) -> float:
    return next((float(a.f) for a in node.attribute if a.name == name), default)


def _slope(activation: Any) -> float:
    """Slope below zero."""
    return _attribute(activation, "alpha", 0.01) if activation is not None and activation.op_type == "LeakyRelu" else 0.0


def _rebuilt(model: Any, nodes: list[Any]) -> bytes:
    read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    # a Constant that nothing reads any more would be a layer without use
    nodes = [node for node in nodes if node.op_type != "Constant" or node.output[0] in read]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, kept)):
        values = [type(v).FromString(v.SerializeToString()) for v in values]
        del field[:]
        field.extend(values)
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())
