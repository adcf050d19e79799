"""What an exported model's head makes of logits, without the network before it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnxruntime
from onnx import GraphProto, TensorProto, helper

from segrt.export.graph import Graph
from segrt.export.head import append_labels, append_probabilities
from segrt.export.onnx import IR_VERSION, OPSET
from segrt.spec import ModelSpec


def headed(logits: Any, spec: ModelSpec, kind: Literal["softmax", "argmax"]) -> Any:
    """Logits (N, K, ...) -> probabilities (N, K, ...) or label values (N, ...)."""
    graph, data = Graph(), np.asarray(logits, np.float32)
    made, channels = TensorProto.FLOAT, [data.shape[1]]
    if kind == "softmax":
        append_probabilities(graph, "logits", spec.head, output="made")
    else:
        made, channels = append_labels(graph, "logits", spec, output="made"), []
    inputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, data.shape)]
    outputs = [helper.make_tensor_value_info("made", made, [data.shape[0], *channels, *data.shape[2:]])]
    model = helper.make_model(GraphProto(), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    graph.fill(model.graph, "head", inputs, outputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"logits": data})[0]
