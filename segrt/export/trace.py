"""A network of this package becomes an ONNX graph: its forward pass runs once without numbers, and each function of torch becomes a node.

torch.onnx.export does the same for any program in seconds to minutes, this for the dozen functions of our networks in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..arrays import FloatArray
from .graph import Graph

_CONVOLUTIONS = ("Conv", "ConvTranspose")
# What networks ask a tensor about itself, which is no part of the graph.
_QUESTIONS = {"__get__", "size", "dim"}


def trace(network: nn.Module, graph: Graph, patches: str, shape: Sequence[int]) -> str:
    """Add a network's nodes to a graph.

    Parameters
    ----------
    network : in evaluation mode, with one output; its batch normalisations are folded into the convolutions before them
    patches : name of the input, (N, C, (Z,) Y, X)
    shape : (C, (Z,) Y, X) of it; nodes do not depend on its spatial part, nor on N

    Returns
    -------
    str : name of the output

    Raises
    ------
    NotImplementedError
        For a function of torch that has no form here.
    """
    state = network.state_dict()
    shells = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    image = torch.empty(2, *shape, device="meta")
    recorder = _Recorder(graph, {id(shell): name for name, shell in shells.items()}, state)
    recorder.tell(image, patches)
    with torch.no_grad(), recorder:
        output = torch.func.functional_call(network, shells, (image,))
    return recorder.value(output)


class _Recorder(TorchFunctionMode):
    """Sees every function of torch that is called, and adds a node for each; nothing is computed."""

    def __init__(self, graph: Graph, parameters: dict[int, str], state: dict[str, Tensor]) -> None:
        super().__init__()
        self.graph, self._parameters, self._state = graph, parameters, state
        self._values: dict[int, str] = {}
        self._alive: list[Tensor] = []  # a tensor that is gone may leave its id to another

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        if name in _QUESTIONS:
            return function(*args, **kwargs)
        if name not in _FORMS:
            raise NotImplementedError(f"{name}: this function of torch has no ONNX form in {__name__}")
        form, shape = _FORMS[name]
        value = form(self, *args, **kwargs)
        # torch itself would tell the shape too, but loads its compiler and a computer algebra system for it, for seconds
        image = next(x for x in (args[0] if name == "cat" else args) if isinstance(x, Tensor))
        result = image if kwargs.get("inplace") else image.new_empty(*shape(*args, **kwargs))
        self.tell(result, value)
        return result

    def tell(self, tensor: Tensor, value: str) -> None:
        self._values[id(tensor)] = value
        self._alive.append(tensor)

    def value(self, tensor: Tensor) -> str:
        """Name of a tensor's value."""
        return self._values[id(tensor)]

    def forget(self, tensor: Tensor) -> None:
        """A tensor that the graph no longer holds: whoever reads it from here on fails."""
        del self._values[id(tensor)]

    def parameter(self, tensor: Tensor) -> tuple[str, FloatArray]:
        """Name and numbers of one of the network's tensors."""
        name = self._parameters[id(tensor)]
        return name, self._state[name].detach().cpu().numpy()

    def weights(self, *tensors: Tensor | None) -> list[str]:
        """Constants for the network's tensors, those there are."""
        return [self.graph.constant(value, name) for name, value in (self.parameter(t) for t in tensors if t is not None)]

    def layer(self, tensor: Tensor) -> str:
        """Name of the layer whose parameter this is."""
        return self._parameters[id(tensor)].removesuffix(".weight")


# ------------------------------------------------------------------ what functions become
# Their arguments are those of the functions of torch.nn.functional.
def _conv(to: _Recorder, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> str:
    how = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups, "kernel_shape": weight.shape[2:]}
    return to.graph.add("Conv", [to.value(x), *to.weights(weight, bias)], name=to.layer(weight), **how)


def _conv_transposed(
    to: _Recorder, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> str:
    how = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups, "kernel_shape": weight.shape[2:]}
    name = to.layer(weight)
    return to.graph.add("ConvTranspose", [to.value(x), *to.weights(weight, bias)], name=name, output_padding=output_padding, **how)


def _instance_norm(
    to: _Recorder,
    x: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> str:
    if not use_input_stats:
        raise NotImplementedError("instance normalisation by running statistics has no ONNX form")
    features = x.shape[1]
    if weight is None:
        scale = [to.graph.constant(np.full(features, n, np.float32), f"{word}_{features}") for n, word in ((1, "ones"), (0, "zeros"))]
    else:
        scale = to.weights(weight, bias)
    name = "" if weight is None else to.layer(weight)
    return to.graph.add("InstanceNormalization", [to.value(x), *scale], name=name, epsilon=eps)


def _batch_norm(
    to: _Recorder,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> str:
    if training:
        raise NotImplementedError("batch normalisation by the batch has no ONNX form here")
    conv = to.graph.nodes[-1]
    if conv.op_type not in _CONVOLUTIONS or to.value(x) != conv.output[0]:
        raise NotImplementedError("batch normalisation of anything but a convolution has no ONNX form here")
    mean, variance = (to.parameter(t)[1].astype(np.float64) for t in (running_mean, running_var))
    gain, shift = (n if t is None else to.parameter(t)[1].astype(np.float64) for t, n in ((weight, 1.0), (bias, 0.0)))
    factor = gain / np.sqrt(variance + eps)
    name = conv.input[1]
    kernel = to.graph.constants[name]
    before = to.graph.constants[conv.input[2]].astype(np.float64) if len(conv.input) == 3 else 0.0
    along = 0 if conv.op_type == "Conv" else 1  # the axis of a kernel's outputs
    factors = factor.reshape([-1 if axis == along else 1 for axis in range(kernel.ndim)])
    # in double precision, a piece at a time
    folded = np.multiply(kernel, factors, out=np.empty_like(kernel), dtype=np.float64, casting="same_kind")
    values = {name: folded, f"{name.removesuffix('.weight')}.bias": (before - mean) * factor + shift}
    conv.input[1:] = [to.graph.constant(value.astype(np.float32, copy=False), key) for key, value in values.items()]
    to.forget(x)
    return str(conv.output[0])


def _prelu(to: _Recorder, x: Tensor, weight: Tensor) -> str:
    name, slope = to.parameter(weight)
    slopes = to.graph.constant(slope.reshape(-1, *[1] * (x.ndim - 2)), name)
    return to.graph.add("PRelu", [to.value(x), slopes], name=to.layer(weight))


def _leaky_relu(to: _Recorder, x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> str:
    return to.graph.add("LeakyRelu", [to.value(x)], alpha=negative_slope)


def _elu(to: _Recorder, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> str:
    return to.graph.add("Elu", [to.value(x)], alpha=alpha)


def _relu(to: _Recorder, x: Tensor, inplace: bool = False) -> str:
    return to.graph.add("Relu", [to.value(x)])


def _dropout(to: _Recorder, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> str:
    if training:
        raise NotImplementedError("dropout at work has no ONNX form here")
    return to.value(x)


def _average(to: _Recorder, x: Tensor, kernel: Any, stride: Any, padding: Any = 0, *rest: Any) -> str:
    if padding:
        raise NotImplementedError("average pooling with padding has no ONNX form here")
    return to.graph.add("AveragePool", [to.value(x)], kernel_shape=_each(kernel, x), strides=_each(stride, x))


def _largest(to: _Recorder, x: Tensor, kernel: Any, stride: Any, padding: Any = 0, *rest: Any, **how: Any) -> str:
    if padding:
        raise NotImplementedError("maximum pooling with padding has no ONNX form here")
    return to.graph.add("MaxPool", [to.value(x)], kernel_shape=_each(kernel, x), strides=_each(stride, x))


def _enlarged(
    to: _Recorder, x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "", align_corners: Any = None, **how: Any
) -> str:
    if size is not None or not align_corners or mode not in ("linear", "bilinear", "trilinear"):
        raise NotImplementedError("enlarging other than linearly, by a factor and corner to corner has no ONNX form here")
    factors = np.array([1, 1, *_each(scale_factor, x)], np.float32)
    scales = to.graph.constant(factors, "scales_" + "_".join(f"{n:g}" for n in factors))
    return to.graph.add("Resize", [to.value(x), "", scales], mode="linear", coordinate_transformation_mode="align_corners")


def _beside(to: _Recorder, tensors: Sequence[Tensor], dim: int = 0) -> str:
    return to.graph.add("Concat", [to.value(t) for t in tensors], axis=dim)


def _sum(to: _Recorder, x: Tensor, y: Tensor) -> str:
    return to.graph.add("Add", [to.value(x), to.value(y)])


def _divided(to: _Recorder, x: Tensor, by: float) -> str:
    return to.graph.add("Div", [to.value(x), to.graph.constant(np.array(by, np.float32), f"number_{by:g}")])


def _part(to: _Recorder, x: Tensor, index: Any) -> str:
    """x[:, :n]."""
    if not (isinstance(index, tuple) and len(index) == 2 and index == (slice(None), slice(None, index[1].stop))):
        raise NotImplementedError(f"a tensor's part {index} has no ONNX form here")
    ends = {"channels_from": 0, "channels_to": index[1].stop, "axis_of_channels": 1}
    limits = [to.graph.constant(np.array([n], np.int64), f"{word}_{n}") for word, n in ends.items()]
    return to.graph.add("Slice", [to.value(x), *limits])


def _each(number: Any, x: Tensor) -> list[Any]:
    """One number for each spatial axis."""
    return list(number) if isinstance(number, Sequence) else [number] * (x.ndim - 2)


# ------------------------------------------------------------------ the shapes of what they give
def _same(x: Tensor, *rest: Any, **how: Any) -> Sequence[int]:
    return x.shape


def _broadcast(x: Tensor, y: Any, *rest: Any) -> Sequence[int]:
    return [max(sides) for sides in zip(x.shape, y.shape, strict=True)] if isinstance(y, Tensor) else x.shape


def _convolved(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Sequence[int]:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [x.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)]


def _spread(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> Sequence[int]:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation, strict=True)
    return [x.shape[0], weight.shape[1] * groups, *((n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, more, d in axes)]


def _pooled(x: Tensor, kernel: Any, stride: Any, *rest: Any, **how: Any) -> Sequence[int]:
    return [*x.shape[:2], *((n - k) // s + 1 for n, k, s in zip(x.shape[2:], _each(kernel, x), _each(stride, x), strict=True))]


def _larger(x: Tensor, size: Any = None, scale_factor: Any = None, **how: Any) -> Sequence[int]:
    return [*x.shape[:2], *(int(n * factor) for n, factor in zip(x.shape[2:], _each(scale_factor, x), strict=True))]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Sequence[int]:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return shape


def _cut(x: Tensor, index: Any) -> Sequence[int]:
    return [x.shape[0], min(x.shape[1], index[1].stop), *x.shape[2:]]


Form = tuple[Callable[..., str], Callable[..., Sequence[int]]]

_FORMS: dict[str, Form] = {
    **dict.fromkeys(("conv2d", "conv3d"), (_conv, _convolved)),
    **dict.fromkeys(("conv_transpose2d", "conv_transpose3d"), (_conv_transposed, _spread)),
    **dict.fromkeys(("dropout", "dropout2d", "dropout3d"), (_dropout, _same)),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d"), (_average, _pooled)),
    **dict.fromkeys(("max_pool2d", "max_pool3d", "_max_pool2d", "_max_pool3d"), (_largest, _pooled)),
    **dict.fromkeys(("add", "__add__"), (_sum, _broadcast)),
    **dict.fromkeys(("div", "__truediv__", "true_divide"), (_divided, _broadcast)),
    "instance_norm": (_instance_norm, _same),
    "batch_norm": (_batch_norm, _same),
    "prelu": (_prelu, _same),
    "leaky_relu": (_leaky_relu, _same),
    "elu": (_elu, _same),
    "relu": (_relu, _same),
    "interpolate": (_enlarged, _larger),
    "cat": (_beside, _joined),
    "__getitem__": (_part, _cut),
}
