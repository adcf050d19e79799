"""A strongly typed ONNX file, as TensorRT 10 and 11 want it: the precision lies in the graph and every change of type is a Cast.

Convolutions, activations, concatenations and enlargements read and write 16 bits. Normalisation reads float32, has float32 parameters,
computes its statistics in float32 and is rounded afterwards: in float16 the sum over a window's voxels overflows, and the masks come out
black.
Operators nobody has looked at stay in float32, so a normalisation spelt out as means, differences and products does too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..arrays import Array, require
from ..bundle import Bundle
from ..engines import read_build
from ..errors import BuildError
from ..files import held, sha256, write_atomic

Half = Literal["fp16", "bf16"]

# the first ones whose convolutions know bfloat16, and whose quantisation knows scales in float16
_BF16_OPSET = 22
_HALF_SCALE_OPSET = 19
_LARGEST = {"fp16": "65504", "bf16": "3.39e38"}

# reads and writes 16 bits; sums are kept in float32 by the hardware
_HALF = {
    *("Conv", "ConvTranspose", "LeakyRelu", "Relu", "PRelu", "Elu", "Concat", "AveragePool", "MaxPool", "GlobalAveragePool", "Resize"),
    *("QuantizeLinear", "DequantizeLinear"),
}
# TensorRT has kernels for these in float16 and none in bfloat16
_NOT_BF16 = {"ConvTranspose", "Resize"}
# how many inputs are values; those after them are float32 by definition, such as the factors an image is enlarged by
_VALUES = {"Resize": 1}
# float32 inside, rounded to 16 bits on the way out
_NORMS = {"InstanceNormalization", "BatchNormalization", "GroupNormalization", "LayerNormalization"}
# 16 bits when all they read already is
_FOLLOWERS = {"Add", "Identity", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Shape"}


def typed_onnx(source: Path | bytes, precision: Half, *, inputs: Half | None = None, outputs: Half | None = None) -> bytes:
    """Make a float32 ONNX model a strongly typed one of 16 bits.

    Parameters
    ----------
    source : file or content of a float32 model without control flow
    precision : type of weights and activations
    inputs, outputs : None keeps the graph's inputs (outputs) in float32 behind a Cast; `precision` hands over 16 bits

    Returns
    -------
    bytes : the model, with the source's names of inputs and outputs and its opset (22 at least for bf16, 19 for int8); its metadata
        says `precision`

    Raises
    ------
    BuildError
        When the model is no float32 one, has control flow or operators that ONNX does not know, or a weight does not fit into 16 bits;
        the sentence names the weight.
    """
    content, where = (source, "the ONNX model") if isinstance(source, bytes) else (source.read_bytes(), str(source))
    return _retyped(content, where, precision, inputs, outputs)


def write_typed(bundle: Bundle, member: str) -> Path:
    """Write onnx/<member>-fp16.onnx, which ONNX Runtime runs on a GPU; onnx/build.json says its hash and that of the file it is made of.

    Raises
    ------
    BuildError
        When the member's ONNX file cannot be had in float16.
    """
    source = bundle.onnx_path(member)
    content = source.read_bytes()  # once: another process may export new weights meanwhile
    path = write_atomic(bundle.onnx_path(f"{member}-fp16"), _retyped(content, str(source), "fp16", None, "fp16"))
    record = source.with_name("build.json")
    with held(record.parent):
        values = read_build(record)
        values["sha256"] = {**values.get("sha256", {}), path.stem: sha256(path)}
        values["fp16_of"] = {**values.get("fp16_of", {}), source.stem: hashlib.sha256(content).hexdigest()}
        write_atomic(record, json.dumps(values, indent=1) + "\n")
    return path


def _retyped(content: bytes, where: str, precision: Half, inputs: Half | None, outputs: Half | None) -> bytes:
    onnx = require("onnx", extra="export")
    model = onnx.load_model_from_string(content)
    if model.functions or any(a.type in (a.GRAPH, a.GRAPHS) for node in model.graph.node for a in node.attribute):
        raise BuildError(f"{where}: has control flow or functions of its own, which TensorRT's types cannot be set for; use precision fp32")
    try:
        model = _lifted(onnx, model, precision)
        _Typing(onnx, model, precision, where).run({"input": inputs, "output": outputs})
        known = {prop.key: prop.value for prop in model.metadata_props}
        onnx.helper.set_model_props(model, {"precision": precision, **known, "inputs": inputs or "fp32", "outputs": outputs or "fp32"})
        onnx.checker.check_model(model, full_check=True)
    except BuildError:
        raise
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as err:
        reason = str(err).splitlines()[0]
        raise BuildError(
            f"{where}: cannot be had in {precision}: {reason}; use precision fp32, or export it with standard operators"
        ) from err
    typed: bytes = model.SerializeToString(deterministic=True)
    return typed


def _lifted(onnx: Any, model: Any, precision: Half) -> Any:
    """The model in an opset that has what its types need."""
    quantised = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    least = _BF16_OPSET if precision == "bf16" else _HALF_SCALE_OPSET if quantised else 0
    if max((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=least) >= least:
        return model
    model = onnx.version_converter.convert_version(model, least)
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", least)]))
    return model


class _Typing:
    """One pass over the nodes in their order; `kinds` holds the type every value has so far."""

    def __init__(self, onnx: Any, model: Any, precision: Half, where: str) -> None:
        self.onnx, self.model, self.graph, self.where = onnx, model, model.graph, where
        self.full = onnx.TensorProto.FLOAT
        self.half = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
        self.suffix = precision
        _hoist_constants(onnx, model)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.kinds = _element_types(onnx, model, where)
        self.images = {value.name for value in self.graph.input}
        self.nodes: list[Any] = []
        self.kept: dict[str, Any] = {}
        self.casts: dict[tuple[str, int], str] = {}

    def run(self, wanted: dict[str, Half | None]) -> None:
        """Rewrite the graph in place."""
        outputs = {value.name: value for value in self.graph.output}
        for values, kind in ((self.graph.input, wanted["input"]), (self.graph.output, wanted["output"])):
            for value in values:
                if kind and self.kinds[value.name] == self.full:
                    value.type.tensor_type.elem_type = self.half
        self.kinds |= {value.name: value.type.tensor_type.elem_type for value in self.graph.input}
        for node in list(self.graph.node):
            self._node(node, outputs)
        for parts, new in ((self.graph.node, self.nodes), (self.graph.initializer, self.kept.values())):
            del parts[:]
            parts.extend(new)
        del self.graph.value_info[:]

    def _node(self, node: Any, outputs: dict[str, Any]) -> None:
        kind = self._compute(node)
        values = node.input[: _VALUES.get(node.op_type)]
        typed = [self._as(name, kind) if self._is_float(name) else self._keep(name) for name in values]
        node.input[:] = typed + [self._keep(name) for name in node.input[len(values) :]]
        written = self.half if node.op_type in _NORMS | _HALF else kind
        tail = []
        for i, name in enumerate(node.output):
            if not name or self.kinds[name] != self.full:
                continue
            target = outputs[name].type.tensor_type.elem_type if name in outputs else written
            self.kinds[name] = target
            if target != kind:
                node.output[i] = f"{name}.raw"
                tail.append(self.onnx.helper.make_node("Cast", [f"{name}.raw"], [name], name=f"{name}.cast", to=target))
        self.nodes += [node, *tail]

    def _compute(self, node: Any) -> int:
        """The type a node computes in."""
        if node.op_type in _HALF and not (self.suffix == "bf16" and node.op_type in _NOT_BF16):
            return int(self.half)
        read = {self._at_hand(name) for name in node.input if self._is_float(name) and name not in self.constants}
        return int(self.half if node.op_type in _FOLLOWERS and read == {self.half} else self.full)

    def _at_hand(self, name: str) -> int:
        """The type a value can be had in: that of an image which a convolution reads in 16 bits is both."""
        return int(self.half if name in self.images and (name, self.half) in self.casts else self.kinds[name])

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.kinds[name] in (self.full, self.half)

    def _as(self, name: str, kind: int) -> str:
        """Name under which a value is at hand in a type: a constant is stored so, anything else is cast once."""
        if name in self.constants:
            return self._constant(name, kind)
        if self.kinds[name] == kind:
            return name
        if (name, kind) not in self.casts:
            self.casts[name, kind] = f"{name}.{self.suffix if kind == self.half else 'fp32'}"
            self.nodes.append(self.onnx.helper.make_node("Cast", [name], [self.casts[name, kind]], name=f"{name}.cast{kind}", to=kind))
        return self.casts[name, kind]

    def _constant(self, name: str, kind: int) -> str:
        if kind == self.full:
            return self._keep(name)
        typed = f"{name}.{self.suffix}"
        if typed not in self.kept:
            values = self.onnx.numpy_helper.to_array(self.constants[name])
            kept = self.onnx.numpy_helper.from_array(_rounded(values, self.suffix, f"{self.where}: weight {name!r}"), typed)
            self.kept[typed] = kept
        return typed

    def _keep(self, name: str) -> str:
        if name in self.constants:
            self.kept[name] = self.constants[name]
        return name


def _hoist_constants(onnx: Any, model: Any) -> None:
    """Turn Constant nodes into initializers: a weight is then one thing."""
    left = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            left.append(node)
    del model.graph.node[:]
    model.graph.node.extend(left)


def _element_types(onnx: Any, model: Any, where: str) -> dict[str, int]:
    """Value name -> element type, for every value of the graph."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    kinds = {t.name: t.data_type for t in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        kinds[value.name] = value.type.tensor_type.elem_type
    # operators ONNX does not know have no inferred type: the parser that is to run them will say so
    kinds |= {name: onnx.TensorProto.FLOAT for node in model.graph.node for name in node.output if name and name not in kinds}
    if {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16} & set(kinds.values()):
        raise BuildError(f"{where}: holds 16-bit values already; a float32 model is needed to choose types from")
    return kinds


def _rounded(values: Array, precision: str, what: str) -> Array:
    """Round to 16 bits; numbers that leave the range, and scales that would vanish, are an error."""
    if precision == "bf16":
        kind: Any = require("ml_dtypes", extra="export").bfloat16
    else:
        kind = np.float16
    with np.errstate(over="ignore"):
        rounded: Array = values.astype(kind)
    bad = ~np.isfinite(rounded.astype(np.float32))
    if bad.any():
        worst = float(values[bad].flat[0])
        raise BuildError(f"{what} holds {worst:.6g}, beyond the range of {precision} ({_LARGEST[precision]}); use another precision")
    return rounded
