"""A network of this package becomes an ONNX graph: its forward pass runs once without numbers, and each function of torch becomes a node.

torch.onnx.export does the same for any program in seconds to minutes, this for the dozen functions of our networks in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..arrays import FloatArray
from .forms import FORMS, refused
from .graph import Graph

# What networks ask a tensor about itself, which is no part of the graph.
_QUESTIONS = {"__get__", "size", "dim"}


def trace(network: nn.Module, graph: Graph, patches: str, shape: Sequence[int]) -> str:
    """Add a network's nodes to a graph.

    Parameters
    ----------
    network : in evaluation mode, with one output; its batch normalisations are folded into the convolutions before them
    patches : name of the input, (N, C, (Z,) Y, X)
    shape : (C, (Z,) Y, X) of it; nodes do not depend on its spatial part, nor on N. A forward pass that asks for them and does one thing or
        another is recorded as it goes for this shape and N = 2.

    Returns
    -------
    str : name of the output

    Raises
    ------
    NotImplementedError
        For what has no form here: a function of torch, a use of one, or a tensor that is neither computed from the input nor a weight.
    """
    state = network.state_dict(keep_vars=True)
    once: dict[int, Tensor] = {}  # layers that share a tensor share its shell
    shells = {name: once.setdefault(id(tensor), torch.empty_like(tensor, device="meta")) for name, tensor in state.items()}
    image = torch.empty(2, *shape, device="meta")
    recorder = Recorder(graph, {id(shell): name for name, shell in shells.items()}, state)
    recorder.tell(image, patches)
    with torch.no_grad(), recorder:
        output = torch.func.functional_call(network, shells, (image,))
    return recorder.value(output)


class Recorder(TorchFunctionMode):
    """Sees every function of torch that is called, and adds a node for each; nothing is computed."""

    def __init__(self, graph: Graph, parameters: dict[int, str], state: dict[str, Tensor]) -> None:
        super().__init__()
        self.graph, self._parameters, self._state = graph, parameters, state
        self._values: dict[int, str] = {}
        self._alive: list[Tensor] = []  # a tensor that is gone may leave its id to another
        self._overlapping: set[int] = set()  # parts, and what they are parts of: memory with two names

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        if name in _QUESTIONS:
            return function(*args, **kwargs)
        if name not in FORMS:
            raise refused(f"torch's function {name}")
        form, shape = FORMS[name]
        try:
            value = form(self, *args, **kwargs)
            # torch itself would tell the shape too, but loads its compiler and a computer algebra system for it, for seconds
            image = next(x for x in (args[0] if name == "cat" else args) if isinstance(x, Tensor))
            sides = shape(*args, **kwargs)
        except (TypeError, ValueError, IndexError) as err:
            raise refused(f"{name} with these arguments ({err})") from err
        if min(sides) < 1:
            raise refused(f"{name} of {tuple(image.shape)}, which leaves nothing,")
        if kwargs.get("inplace") and id(image) in self._overlapping:
            raise refused(f"{name} in place on a tensor that shares its memory with another")
        result = image if kwargs.get("inplace") or value == self._values.get(id(image)) else image.new_empty(*sides)
        if name == "__getitem__":
            self._overlapping |= {id(image), id(result)}
        self.tell(result, value)
        return result

    def tell(self, tensor: Tensor, value: str) -> None:
        """Name a tensor's value."""
        self._values[id(tensor)] = value
        self._alive.append(tensor)

    def value(self, tensor: object) -> str:
        """Name of a tensor's value."""
        if not isinstance(tensor, Tensor):
            raise refused(f"{type(tensor).__name__} in place of a tensor")
        if id(tensor) not in self._values:
            raise refused("a tensor that is not computed from the input, or that batch normalisation was folded into,")
        return self._values[id(tensor)]

    def forget(self, tensor: Tensor) -> None:
        """A tensor that the graph no longer holds: whoever reads it from here on is refused."""
        del self._values[id(tensor)]

    def parameter(self, tensor: Tensor) -> tuple[str, FloatArray]:
        """Name and numbers of one of the network's tensors."""
        if id(tensor) not in self._parameters:
            raise refused("a weight that is computed, or that the network's state does not hold,")
        name = self._parameters[id(tensor)]
        numbers = self._state[name].detach()
        if numbers.dtype != torch.float32:
            raise refused(f"{name} of type {numbers.dtype}, not float32,")
        return name, numbers.cpu().numpy()

    def weights(self, *tensors: Tensor | None) -> list[str]:
        """Constants for the network's tensors, those there are."""
        return [self.graph.constant(value, name) for name, value in (self.parameter(t) for t in tensors if t is not None)]

    def layer(self, tensor: Tensor) -> str:
        """Name of the layer whose parameter this is."""
        return self._parameters[id(tensor)].removesuffix(".weight")
