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
    return helper.make_model(graph.proto("graph", inputs, outputs), opset_imports=[opset], ir_version=IR_VERSION)


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


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module]]] = {
    "tanh": (lambda layers, x: torch.tanh(x), {}),
    "batch normalisation of anything but a convolution": (lambda layers, x: layers["norm"](f.relu(x)), {"norm": nn.BatchNorm2d(2)}),
    "enlarging other than": (lambda layers, x: f.interpolate(x, scale_factor=2, mode="nearest"), {}),
    "average pooling with padding": (lambda layers, x: f.avg_pool2d(x, 3, 2, 1), {}),
    "maximum pooling with padding": (lambda layers, x: f.max_pool2d(x, 3, 2, 1), {}),
    "part": (lambda layers, x: x[:, 1:], {}),
    "running statistics": (lambda layers, x: layers["norm"](x), {"norm": nn.InstanceNorm2d(2, track_running_stats=True)}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_form_is_refused(words: str) -> None:
    forward, layers = REFUSED[words]
    with pytest.raises(NotImplementedError, match=words):
        exported(Module(forward, **layers).eval(), 2, (8, 8))


def test_what_a_folded_convolution_gave_before_cannot_be_read() -> None:
    def forward(layers: Any, x: Tensor) -> Tensor:
        y = layers["conv"](x)
        return layers["norm"](y) + y

    with pytest.raises(KeyError):
        exported(Module(forward, conv=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2)).eval(), 2, (8, 8))


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
