"""An ONNX graph in the making."""

from __future__ import annotations

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
        self._taken: set[str] = set()

    def add(self, op: str, inputs: Sequence[str], *, name: str = "", output: str = "", **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        name = self._free(name or op.lower())
        output = output or name
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, value: Array, name: str) -> str:
        """A constant; the same name always stands for the same value.

        Raises
        ------
        NotImplementedError
            When a node, or a constant of another value, has that name already.
        """
        value = np.asarray(value, order="C")
        known = self.constants.setdefault(name, value)
        same = known is value or (known.dtype == value.dtype and np.array_equal(known, value, equal_nan=True))
        if name in self._taken or not same:
            raise NotImplementedError(f"two values called {name!r} have no place in one graph; give a layer or parameter another name")
        return name

    def rename(self, old: str, new: str) -> str:
        """Another name for a value, wherever it is written and read."""
        for node in self.nodes:
            for values in (node.input, node.output):
                values[:] = [new if value == old else value for value in values]
        return new

    def fill(self, proto: onnx.GraphProto, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Write the graph into an empty message, with its constants, those in use; they are given up one by one, for they are large."""
        read = {value for node in self.nodes for value in node.input}
        proto.name = name
        for field, values in ((proto.node, self.nodes), (proto.input, inputs), (proto.output, outputs)):
            field.extend(values)
        for key in tuple(self.constants):
            value = self.constants.pop(key)
            if key in read:
                proto.initializer.add().CopyFrom(numpy_helper.from_array(value, key))

    def _free(self, name: str) -> str:
        """The name, or with a number when a node or a constant has it already."""
        free, count = name, 0
        while free in self._taken or free in self.constants:
            count += 1
            free = f"{name}_{count}"
        self._taken.add(free)
        return free
