"""Networks are written down as ONNX graphs that compute what torch computes, or refused; nothing is half understood."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as f

from segrt.export.graph import Graph
from segrt.export.onnx import IR_VERSION, OPSET
from segrt.export.trace import trace


class Module(nn.Module):
    """Layers and what is done with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.layers, x)


def varied(module: nn.Module) -> nn.Module:
    """Every number differs from its start, as after a training."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.2, generator=generator) if name.endswith("var") else tensor.normal_(0, 0.5, generator=generator)
    return module.eval()


def exported(module: nn.Module, channels: int, sides: tuple[int, ...]) -> onnx.ModelProto:
    graph = Graph()
    output = trace(module, graph, "patches", (channels, *sides))
    free = [f"side {axis}" for axis in range(len(sides))]
    inputs = [helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["batch", channels, *free])]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [f"output {axis}" for axis in range(2 + len(sides))])]
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(onnx.GraphProto(), opset_imports=[opset], ir_version=IR_VERSION)
    graph.fill(model.graph, "graph", inputs, outputs)
    return model


def check(module: nn.Module, channels: int, sides: tuple[int, ...]) -> onnx.ModelProto:
    """The graph gives torch's numbers, for another batch and other sides than those it was traced with too."""
    model = exported(varied(module), channels, sides)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, factor in ((1, 1), (3, 2)):
        data = torch.randn(batch, channels, *(factor * n for n in sides), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = module(data).numpy()
        np.testing.assert_allclose(session.run(None, {"patches": data.numpy()})[0], expected, rtol=1e-4, atol=1e-4)
    return model


@settings(max_examples=20)
@given(
    kernel=st.sampled_from([1, 3, (1, 3, 3), (3, 1, 5)]),
    stride=st.sampled_from([1, 2, (1, 2, 2)]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    padding=st.integers(0, 2),
)
def test_convolutions(kernel: Any, stride: Any, dilation: int, groups: int, bias: bool, padding: int) -> None:
    conv = nn.Conv3d(4, 6, kernel, stride, padding, dilation, groups, bias)
    check(Module(lambda layers, x: layers["conv"](x), conv=conv), 4, (9, 10, 11))


@settings(max_examples=20)
@given(
    kernel=st.sampled_from([2, 3, (1, 2)]),
    stride=st.sampled_from([2, (1, 2)]),
    more=st.sampled_from([0, 1]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    padding=st.integers(0, 1),
)
def test_transposed_convolutions(kernel: Any, stride: Any, more: int, dilation: int, groups: int, padding: int) -> None:
    more = more if stride == 2 else 0
    conv = nn.ConvTranspose2d(4, 6, kernel, stride, padding, more, groups, dilation=dilation)
    check(Module(lambda layers, x: layers["conv"](x), conv=conv), 4, (5, 6))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_batch_normalisation_is_folded_into_the_convolution_before_it(kind: Any, bias: bool, affine: bool) -> None:
    layers = {"conv": kind(3, 5, 3, bias=bias), "norm": nn.BatchNorm2d(5, eps=1e-3, affine=affine)}
    model = check(Module(lambda layers, x: layers["norm"](layers["conv"](x)), **layers), 3, (6, 7))
    assert [node.op_type for node in model.graph.node] == [kind.__name__.removesuffix("2d")]


@pytest.mark.parametrize("affine", [True, False])
def test_instance_normalisation(affine: bool) -> None:
    norm = nn.InstanceNorm3d(3, eps=1e-3, affine=affine)
    check(Module(lambda layers, x: layers["norm"](x), norm=norm), 3, (4, 5, 6))


@pytest.mark.parametrize("inplace", [True, False])
def test_activations_in_place_and_not(inplace: bool) -> None:
    layers = {"relu": nn.ReLU(inplace), "leaky": nn.LeakyReLU(0.2, inplace), "elu": nn.ELU(0.7, inplace), "prelu": nn.PReLU(2)}

    def forward(layers: Any, x: Tensor) -> Tensor:
        x = x / 3
        y = layers["elu"](x)
        # an activation in place changes what whoever reads its input later sees
        z = torch.cat([layers["leaky"](y), x, y], 1)
        return layers["prelu"](layers["relu"](z)[:, :2]) + x

    check(Module(forward, **layers), 2, (4, 5))


def test_pooling_enlarging_and_dropout() -> None:
    def forward(layers: Any, x: Tensor) -> Tensor:
        small = layers["drop"](f.max_pool3d(x, (1, 2, 2), (1, 2, 2)) + f.avg_pool3d(x, (1, 2, 2), (1, 2, 2)))
        return f.interpolate(layers["pool"](small), scale_factor=(2, 2, 2), mode="trilinear", align_corners=True)

    check(Module(forward, drop=nn.Dropout3d(0.5), pool=nn.MaxPool3d(2, 2)), 2, (4, 8, 8))


def test_one_channel_is_added_to_all() -> None:
    check(Module(lambda layers, x: layers["conv"](x) + x, conv=nn.Conv2d(1, 4, 3, padding=1)), 1, (5, 6))


def conv(inputs: int = 2, outputs: int = 2, **how: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **how)


def norm() -> nn.Module:
    return nn.BatchNorm2d(2)


def tied() -> dict[str, nn.Module]:
    first, second = conv(), conv()
    second.weight = first.weight
    return {"first": first, "second": second}


def in_place_after_dropout(layers: Any, x: Tensor) -> Tensor:
    y = layers["conv"](x)
    return f.relu(layers["drop"](y), inplace=True) + y


Case = tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module]]

RIGHT: dict[str, Case] = {
    "a shared convolution, normalised in two ways and not at all": (
        lambda layers, x: layers["a"](layers["conv"](x)) + layers["b"](layers["conv"](f.elu(x))) + layers["conv"](f.relu(x)),
        {"conv": conv(), "a": norm(), "b": norm()},
    ),
    "shared weights": (lambda layers, x: layers["first"](layers["second"](x)), tied()),
    "a name that a number makes taken": (
        lambda layers, x: layers["conv_1"](layers["conv"](layers["conv"](x))),
        {"conv": conv(), "conv_1": conv()},
    ),
    "dropout at rest is no other tensor": (in_place_after_dropout, {"conv": conv(), "drop": nn.Dropout2d(0.5)}),
    "whole numbers": (lambda layers, x: layers["elu"](layers["leaky"](x)), {"elu": nn.ELU(alpha=1), "leaky": nn.LeakyReLU(0)}),
    "what torch takes for granted": (
        lambda layers, x: f.avg_pool2d(f.conv2d(x, layers["conv"].weight, stride=1, padding=1), 2) + f.max_pool2d(x, 2),
        {"conv": conv()},
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_uses_that_are_easily_mistaken(case: str) -> None:
    forward, layers = RIGHT[case]
    check(Module(forward, **layers), 2, (8, 8))


def test_numbers_that_differ_late_are_two_numbers() -> None:
    def forward(layers: Any, x: Tensor) -> Tensor:
        for factor in (1.125, 1.1250001):
            x = f.interpolate(x / factor, scale_factor=factor, mode="bilinear", align_corners=True)
        return x

    tensors = exported(Module(forward), 1, (8, 8)).graph.initializer
    assert len({tensor.raw_data for tensor in tensors}) == 4


def test_a_network_that_is_one_layer() -> None:
    check(nn.PReLU(2), 2, (4, 4))


def read_after_folding(layers: Any, x: Tensor) -> Tensor:
    y = layers["conv"](x)
    return layers["norm"](nn.functional.dropout2d(y, training=False)) + y


def in_place_on_a_part(layers: Any, x: Tensor) -> Tensor:
    y = f.relu(x)
    f.elu(y[:, :1], inplace=True)
    return y


def in_place_on_the_whole(layers: Any, x: Tensor) -> Tensor:
    y = f.relu(x)
    part = y[:, :1]
    return f.elu(y, inplace=True) + part


def enlarged(x: Tensor, **how: Any) -> Tensor:
    return f.interpolate(x, **{"scale_factor": 0.5, "mode": "bilinear", "align_corners": True, **how})


PARTS = (0, np.s_[:, 1:], np.s_[:, :-1], np.s_[:, :0], np.s_[:, :], np.s_[:, :2:2], np.s_[:, 1])
CONV, BOTH = {"conv": conv()}, {"conv": conv(), "norm": norm()}

REFUSED: list[tuple[str, Callable[[Any, Tensor], Any], dict[str, nn.Module]]] = [
    ("function tanh", lambda layers, x: torch.tanh(x), {}),
    ("batch normalisation of anything but a convolution", lambda layers, x: layers["norm"](f.relu(x)), BOTH),
    ("batch normalisation of anything but a convolution", lambda layers, x: layers["norm"](x), BOTH),
    ("normalisation was folded into", lambda layers, x: (lambda y: layers["norm"](y) + y)(layers["conv"](x)), BOTH),
    ("normalisation was folded into", read_after_folding, BOTH),
    ("running statistics", lambda layers, x: layers["norm"](x), {"norm": nn.InstanceNorm2d(2, track_running_stats=True)}),
    ("a weight or a bias alone", lambda layers, x: f.instance_norm(x, bias=layers["conv"].bias), CONV),
    ("a weight or a bias alone", lambda layers, x: f.instance_norm(x, weight=layers["conv"].bias), CONV),
    ("in place on a tensor that shares its memory", in_place_on_a_part, {}),
    ("in place on a tensor that shares its memory", in_place_on_the_whole, {}),
    ("enlarging other than", lambda layers, x: enlarged(x, mode="nearest", align_corners=None), {}),
    ("enlarging other than", lambda layers, x: enlarged(x, antialias=True), {}),
    ("average pooling with", lambda layers, x: f.avg_pool2d(x, 3, 2, 1), {}),
    ("average pooling with", lambda layers, x: f.avg_pool2d(x, 3, 2, ceil_mode=True), {}),
    ("average pooling with", lambda layers, x: f.avg_pool2d(x, 2, divisor_override=1), {}),
    ("maximum pooling with", lambda layers, x: f.max_pool2d(x, 3, 2, 1), {}),
    ("maximum pooling with", lambda layers, x: f.max_pool2d(x, 3, 2, ceil_mode=True), {}),
    ("maximum pooling with", lambda layers, x: f.max_pool2d(x, 2, dilation=2), {}),
    ("leaves nothing", lambda layers, x: f.max_pool2d(x, 9), {}),
    ("padding 'same'", lambda layers, x: layers["conv"](x), {"conv": nn.Conv2d(2, 2, 3, padding="same")}),
    ("a weight that is computed", lambda layers, x: f.conv2d(x, torch.relu(x)), {}),
    ("not computed from the input", lambda layers, x: x + layers["conv"].bias, {"conv": conv(2, 8)}),
    ("not computed from the input", lambda layers, x: f.relu(x.data), {}),
    ("int in place of a tensor", lambda layers, x: x + 1, {}),
    ("tuple in place of a tensor", lambda layers, x: (x, x), {}),
    ("division by anything but a number", lambda layers, x: x / x, {}),
    ("with these arguments", lambda layers, x: torch.div(x, 2, rounding_mode="floor"), {}),
    ("with these arguments", lambda layers, x: torch.add(x, x, alpha=2), {}),
    ("with these arguments", lambda layers, x: torch.cat([x, x], axis=1), {}),
    ("with these arguments", lambda layers, x: torch.cat(tensors=[x, x], dim=1), {}),
    *(("a tensor's part", lambda layers, x, part=part: x[part], {}) for part in PARTS),
    ("of type torch.float64", lambda layers, x: layers["conv"](x), {"conv": conv().double()}),
]


@pytest.mark.parametrize(("words", "forward", "layers"), REFUSED)
def test_what_has_no_form_is_refused(words: str, forward: Callable[[Any, Tensor], Any], layers: dict[str, nn.Module]) -> None:
    with pytest.raises(NotImplementedError, match=rf"{words}.* has no ONNX form here; "):
        exported(Module(forward, **layers).eval(), 2, (8, 8))


def test_a_name_stands_for_one_value() -> None:
    graph, ones = Graph(), np.ones(3, np.float32)
    assert graph.constant(ones, "n") == graph.constant(ones.copy(), "n") == "n"
    with pytest.raises(NotImplementedError, match="two values called 'n'"):
        graph.constant(np.zeros(3, np.float32), "n")
    graph.add("Relu", ["n"], name="relu")
    with pytest.raises(NotImplementedError, match="two values called 'relu'"):
        graph.constant(ones, "relu")
    assert graph.add("Relu", ["n"], name="n") == "n_1"
    graph.fill(onnx.GraphProto(), "graph", [], [])
    assert not graph.constants  # a network's weights are not kept beside the file that is made of them


def test_networks_at_training_are_refused() -> None:
    for layers in ({"drop": nn.Dropout(0.5)}, {"conv": nn.Conv2d(2, 2, 1), "norm": nn.BatchNorm2d(2)}):
        with pytest.raises(NotImplementedError, match="no ONNX form"):
            exported(Module(lambda layers, x: nn.Sequential(*layers.values())(x), **layers).train(), 2, (8, 8))


def test_torchs_compiler_is_not_loaded() -> None:
    """It takes longer to load than the export takes."""
    code = (
        "import sys; from factories import UNET_3D; from segrt.export.graph import Graph; from segrt.export.trace import trace;"
        "from segrt.networks import build; trace(build(UNET_3D).eval(), Graph(), 'x', (UNET_3D.in_channels, 8, 8, 8));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
