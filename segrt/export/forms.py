"""What the functions of torch that our networks call become in an ONNX graph, and the shapes of what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from .trace import Recorder

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def refused(what: str) -> NotImplementedError:
    """What to raise for anything that would not be the same in the graph."""
    return NotImplementedError(f"{what} has no ONNX form here; do it with one of the functions in segrt/export/forms.py, or add it there")


# ------------------------------------------------------------------ what functions become
# Their arguments are those of the functions of torch.nn.functional.
def _conv(
    to: Recorder, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> str:
    strides, pads, dilations = (_each(n, x) for n in (stride, padding, dilation))
    how: dict[str, Any] = {
        "strides": strides,
        "pads": [*pads, *pads],
        "dilations": dilations,
        "group": groups,
        "kernel_shape": weight.shape[2:],
    }
    return to.graph.add("Conv", [to.value(x), *to.weights(weight, bias)], name=to.layer(weight), **how)


def _conv_transposed(
    to: Recorder,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> str:
    strides, pads, more, dilations = (_each(n, x) for n in (stride, padding, output_padding, dilation))
    how: dict[str, Any] = {
        "strides": strides,
        "pads": [*pads, *pads],
        "dilations": dilations,
        "group": groups,
        "kernel_shape": weight.shape[2:],
    }
    return to.graph.add("ConvTranspose", [to.value(x), *to.weights(weight, bias)], name=to.layer(weight), output_padding=more, **how)


def _instance_norm(
    to: Recorder,
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
        raise refused("instance normalisation by running statistics")
    if (weight is None) != (bias is None):
        raise refused("instance normalisation with a weight or a bias alone")
    features = x.shape[1]
    if weight is None:
        scale = [to.graph.constant(np.full(features, n, np.float32), f"{word}_{features}") for n, word in ((1, "ones"), (0, "zeros"))]
    else:
        scale = to.weights(weight, bias)
    name = "" if weight is None else to.layer(weight)
    return to.graph.add("InstanceNormalization", [to.value(x), *scale], name=name, epsilon=float(eps))


def _batch_norm(
    to: Recorder,
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
        raise refused("batch normalisation by the batch")
    conv = to.graph.nodes[-1] if to.graph.nodes else None
    if conv is None or conv.op_type not in _CONVOLUTIONS or to.value(x) != conv.output[0]:
        raise refused("batch normalisation of anything but a convolution")
    mean, variance = (to.parameter(t)[1].astype(np.float64) for t in (running_mean, running_var))
    gain, shift = (n if t is None else to.parameter(t)[1].astype(np.float64) for t, n in ((weight, 1.0), (bias, 0.0)))
    factor = gain / np.sqrt(variance + eps)
    kernel = to.graph.constants[conv.input[1]]
    before = to.graph.constants[conv.input[2]].astype(np.float64) if len(conv.input) == 3 else 0.0
    along = 0 if conv.op_type == "Conv" else 1  # the axis of a kernel's outputs
    factors = factor.reshape([-1 if axis == along else 1 for axis in range(kernel.ndim)])
    # in double precision, a piece at a time
    folded = np.multiply(kernel, factors, out=np.empty_like(kernel), dtype=np.float64, casting="same_kind")
    # named after the node: the same convolution may be used elsewhere, with another normalisation or none
    values = {"weight": folded, "bias": (before - mean) * factor + shift}
    conv.input[1:] = [to.graph.constant(n.astype(np.float32, copy=False), f"{conv.name}.folded.{key}") for key, n in values.items()]
    to.forget(x)
    return str(conv.output[0])


def _prelu(to: Recorder, x: Tensor, weight: Tensor) -> str:
    name, slope = to.parameter(weight)
    slopes = to.graph.constant(slope.reshape(-1, *[1] * (x.ndim - 2)), name)
    return to.graph.add("PRelu", [to.value(x), slopes], name=to.layer(weight))


def _leaky_relu(to: Recorder, x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> str:
    return to.graph.add("LeakyRelu", [to.value(x)], alpha=float(negative_slope))


def _elu(to: Recorder, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> str:
    return to.graph.add("Elu", [to.value(x)], alpha=float(alpha))


def _relu(to: Recorder, x: Tensor, inplace: bool = False) -> str:
    return to.graph.add("Relu", [to.value(x)])


def _dropout(to: Recorder, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> str:
    if training:
        raise refused("dropout at work")
    return to.value(x)


def _average(
    to: Recorder,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> str:
    if any(_each(padding, x)) or ceil_mode or divisor_override is not None:
        raise refused("average pooling with padding, ceil_mode or a divisor")
    return to.graph.add("AveragePool", [to.value(x)], kernel_shape=_each(kernel_size, x), strides=_each(stride or kernel_size, x))


def _largest(
    to: Recorder,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str:
    if any(_each(padding, x)) or set(_each(dilation, x)) != {1} or ceil_mode or return_indices:
        raise refused("maximum pooling with padding, dilation, ceil_mode or indices")
    return to.graph.add("MaxPool", [to.value(x)], kernel_shape=_each(kernel_size, x), strides=_each(stride or kernel_size, x))


def _enlarged(
    to: Recorder,
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> str:
    if size is not None or not align_corners or mode not in ("linear", "bilinear", "trilinear") or recompute_scale_factor or antialias:
        raise refused("enlarging other than linearly, by a factor and corner to corner")
    factors = np.array([1, 1, *_each(scale_factor, x)], np.float32)
    scales = to.graph.constant(factors, "scales_" + "_".join(str(n) for n in factors.tolist()))
    return to.graph.add("Resize", [to.value(x), "", scales], mode="linear", coordinate_transformation_mode="align_corners")


def _beside(to: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> str:
    return to.graph.add("Concat", [to.value(t) for t in tensors], axis=dim)


def _sum(to: Recorder, x: Tensor, y: Tensor) -> str:
    return to.graph.add("Add", [to.value(x), to.value(y)])


def _divided(to: Recorder, x: Tensor, by: float) -> str:
    if not isinstance(by, int | float):
        raise refused("division by anything but a number")
    return to.graph.add("Div", [to.value(x), to.graph.constant(np.array(by, np.float32), f"number_{by!r}")])


def _part(to: Recorder, x: Tensor, index: Any) -> str:
    """x[:, :n]."""
    stop = index[1].stop if isinstance(index, tuple) and len(index) == 2 and isinstance(index[1], slice) else None
    if not isinstance(stop, int) or stop < 1 or index != (slice(None), slice(None, stop)):
        raise refused(f"a tensor's part {index}")
    ends = {"channels_from": 0, "channels_to": stop, "axis_of_channels": 1}
    limits = [to.graph.constant(np.array([n], np.int64), f"{word}_{n}") for word, n in ends.items()]
    return to.graph.add("Slice", [to.value(x), *limits])


def _each(number: Any, x: Tensor) -> list[Any]:
    """One number for each spatial axis."""
    if isinstance(number, str):
        raise refused(f"padding {number!r}")
    return list(number) if isinstance(number, Sequence) else [number] * (x.ndim - 2)


# ------------------------------------------------------------------ the shapes of what they give
def _same(x: Tensor, *rest: Any, **how: Any) -> Sequence[int]:
    return x.shape


def _broadcast(x: Tensor, y: Any) -> Sequence[int]:
    return np.broadcast_shapes(x.shape, y.shape) if isinstance(y, Tensor) else x.shape


def _convolved(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Sequence[int]:
    axes = zip(x.shape[2:], weight.shape[2:], *(_each(n, x) for n in (stride, padding, dilation)), strict=True)
    return [x.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)]


def _spread(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Sequence[int]:
    axes = zip(x.shape[2:], weight.shape[2:], *(_each(n, x) for n in (stride, padding, output_padding, dilation)), strict=True)
    return [x.shape[0], weight.shape[1] * groups, *((n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, more, d in axes)]


def _pooled(x: Tensor, kernel_size: Any, stride: Any = None, *rest: Any, **how: Any) -> Sequence[int]:
    axes = zip(x.shape[2:], _each(kernel_size, x), _each(stride or kernel_size, x), strict=True)
    return [*x.shape[:2], *((n - k) // s + 1 for n, k, s in axes)]


def _larger(x: Tensor, size: Any = None, scale_factor: Any = None, **how: Any) -> Sequence[int]:
    return [*x.shape[:2], *(int(n * factor) for n, factor in zip(x.shape[2:], _each(scale_factor, x), strict=True))]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Sequence[int]:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return shape


def _cut(x: Tensor, index: Any) -> Sequence[int]:
    return [x.shape[0], min(x.shape[1], index[1].stop), *x.shape[2:]]


Form = tuple[Callable[..., str], Callable[..., Sequence[int]]]

FORMS: dict[str, Form] = {
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
