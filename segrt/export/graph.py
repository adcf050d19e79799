"""An ONNX graph in the making."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..arrays import Array


class Graph:
    """Nodes and constants, in the order in which they were added; values are known by their names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self._names: Counter[str] = Counter()

    def add(self, op: str, inputs: Sequence[str], *, name: str = "", output: str = "", **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        name = self._free(name or op.lower())
        output = output or name
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, value: Array, name: str) -> str:
        """A constant; the same name always stands for the same value."""
        self.constants[name] = np.asarray(value, order="C")
        return name

    def rename(self, old: str, new: str) -> str:
        """Another name for a value, wherever it is written and read."""
        for node in self.nodes:
            for values in (node.input, node.output):
                values[:] = [new if value == old else value for value in values]
        return new

    def proto(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> onnx.GraphProto:
        """The graph with its constants, those in use."""
        read = {value for node in self.nodes for value in node.input}
        tensors = [numpy_helper.from_array(value, key) for key, value in self.constants.items() if key in read]
        return helper.make_graph(self.nodes, name, inputs, outputs, tensors)

    def _free(self, name: str) -> str:
        """The name, or with a number when nodes have it already."""
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name] - 1}"
