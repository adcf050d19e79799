"""What follows a network where something other than logits is wanted: probabilities or labels."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ..spec import Head, ModelSpec
from .graph import Graph

_TYPES = {"uint8": TensorProto.UINT8, "uint16": TensorProto.INT32}  # few kernels know uint16


def append_probabilities(graph: Graph, logits: str, head: Head, *, output: str = "probabilities") -> str:
    """(N, K, (Z,) Y, X) of the model's softmax or sigmoid."""
    if head.activation == "sigmoid":
        return graph.add("Sigmoid", [logits], output=output)
    return graph.add("Softmax", [logits], output=output, axis=1)


def append_labels(graph: Graph, logits: str, spec: ModelSpec, *, output: str = "labels") -> int:
    """Label values (N, (Z,) Y, X); returns their ONNX type, uint8 or, above 255, int32."""
    head, kind = spec.head, _TYPES[spec.label_dtype]
    values = np.array(head.values, np.uint8 if kind == TensorProto.UINT8 else np.int32)
    if head.activation == "sigmoid":
        _paint(graph, append_probabilities(graph, logits, head, output=""), head, values, output)
        return kind
    winner = graph.add("ArgMax", [logits], axis=1, keepdims=0)
    if head.values == tuple(range(len(values))):
        graph.add("Cast", [winner], output=output, to=kind)
    else:
        graph.add("Gather", [graph.constant(values, "values"), winner], output=output, axis=0)
    return kind


def _paint(graph: Graph, probabilities: str, head: Head, values: np.ndarray, output: str) -> None:
    """Each channel above the threshold paints its value, later channels over earlier ones."""
    threshold = graph.constant(np.array(head.threshold, np.float32), "threshold")
    painted = graph.constant(np.zeros((), values.dtype), "background")
    for k, value in enumerate(values):
        channel = graph.add("Gather", [probabilities, graph.constant(np.array(k, np.int64), f"channel_{k}")], axis=1)
        above = graph.add("Greater", [channel, threshold])
        one = graph.constant(np.array(value), f"value_{k}")
        painted = graph.add("Where", [above, one, painted], output=output if k == len(values) - 1 else "")
