"""INT8 for TensorRT: an ONNX file with explicit QuantizeLinear and DequantizeLinear pairs before its convolutions.

TensorRT wants quantisation symmetric around zero, weights per output channel and activations per tensor. Normalisation, transposed
convolutions, and the convolutions that read the image and write the logits stay in float: these cost little time and most of the accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .. import __version__
from ..arrays import FloatArray, require
from ..errors import BuildError


def quantized_onnx(source: Path, windows: FloatArray) -> bytes:
    """Quantise a float32 ONNX model after training.

    Parameters
    ----------
    source : the model
    windows : (N, C, (Z,) Y, X) whose smallest and largest values set the ranges of the activations

    Returns
    -------
    bytes : the model with the same inputs and outputs, weights stored in 8 bits

    Raises
    ------
    BuildError
        When it has no convolution that may be quantised, or the windows do not fit.
    """
    quantization = require("onnxruntime.quantization", extra="ort")
    model = _named(source)
    window = tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)[1:]
    if windows.shape[1:] != window or not len(windows):
        raise BuildError(f"{source}: expected windows (n, {', '.join(map(str, window))}), got {windows.shape}")
    chosen = _inner_convolutions(model.graph)
    if not chosen:
        raise BuildError(f"{source}: has no convolution between its first and its last one that could be quantised; use another precision")
    with TemporaryDirectory(prefix="segrt-") as temporary:
        prepared, target = Path(temporary, "prepared.onnx"), Path(temporary, "quantised.onnx")
        prepared.write_bytes(model.SerializeToString())
        try:
            quantization.quantize_static(
                prepared,
                target,
                _reader(quantization, model.graph.input[0].name, windows),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_quantize=chosen,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options=_OPTIONS,
            )
        except (ValueError, RuntimeError) as err:
            raise BuildError(f"{source} could not be quantised: {err}") from err
        return _finished(target.read_bytes())


# the smallest number above zero in float16
_LEAST_SCALE = np.float32(2**-24)
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,  # TensorRT adds the bias in float
    "OpTypesToExcludeOutputQuantization": ["Conv"],
}


def _named(source: Path) -> Any:
    """The model with a name for every node and a type for every value, and marked as prepared, without which a warning is logged."""
    onnx = require("onnx", extra="export")
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node{number}"
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    return model


def _finished(content: bytes) -> bytes:
    """Correct what the quantiser leaves and drop its marks."""
    onnx = require("onnx", extra="export")
    model = onnx.load_model_from_string(content)
    _give_float_back(model.graph)
    _drop_vanishing_weights(onnx.numpy_helper, model.graph)
    known = {prop.key: prop.value for prop in model.metadata_props if not prop.key.startswith("onnx.")}
    onnx.helper.set_model_props(model, known | {"precision": "int8"})
    model.producer_name, model.producer_version = "segrt", __version__
    finished: bytes = model.SerializeToString(deterministic=True)
    return finished


def _give_float_back(graph: Any) -> None:
    """Let all but convolutions read the values that were not rounded: the quantiser has every reader of a tensor read the rounded one."""
    maker = {name: node for node in graph.node for name in node.output}
    exact = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in maker:
            exact[node.output[0]] = maker[node.input[0]].input[0]
    for node in graph.node:
        if node.op_type != "Conv":
            node.input[:] = [exact.get(name, name) for name in node.input]


def _drop_vanishing_weights(numpy_helper: Any, graph: Any) -> None:
    """Set weights below 8e-6 to zero where they are all a channel has: their scale would become zero in float16."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = numpy_helper.to_array(tensors[node.input[1]])
        vanishing = scale < _LEAST_SCALE
        if not vanishing.any():
            continue
        if node.input[0] in tensors:
            values = numpy_helper.to_array(tensors[node.input[0]]).copy()
            values[vanishing] = 0
            tensors[node.input[0]].CopyFrom(numpy_helper.from_array(values, node.input[0]))
        tensors[node.input[1]].CopyFrom(numpy_helper.from_array(np.maximum(scale, _LEAST_SCALE), node.input[1]))


def _inner_convolutions(graph: Any) -> list[str]:
    """Names of the convolutions that neither read the image nor write logits, which are the answer or have their mean taken for it."""
    maker = {name: node for node in graph.node for name in node.output}
    image, last, before = graph.input[0].name, set(), [value.name for value in graph.output]
    while before:
        node = maker.pop(before.pop(), None)
        if node is None:
            continue
        if node.op_type in ("Conv", "ConvTranspose"):
            last.add(node.name)
        else:
            before += node.input
    return [node.name for node in graph.node if node.op_type == "Conv" and node.input[0] != image and node.name not in last]


def _reader(quantization: Any, name: str, windows: FloatArray) -> Any:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, FloatArray]] = ({name: window[None]} for window in windows)

        def get_next(self) -> dict[str, FloatArray] | None:
            return next(self._feeds, None)

    return Reader()
