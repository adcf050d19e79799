"""How a network lies in a CPU's memory: layers give what they give elsewhere, and gradients do not depend on what lay there before."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from segrt.train.layout import lay_out, widen_thin_convolutions

CPU = torch.device("cpu")

# the weights' gradient of a convolution under bfloat16, and that of the same numbers in float64
SCRIPT = """
import sys
import torch
from torch import nn
from segrt.train.layout import lay_out, widen_thin_convolutions

kernel, *shape = map(int, sys.argv[1:])
torch.manual_seed(0)
layer = nn.Conv3d(16, 16, kernel, padding=kernel // 2)
lay_out(layer, torch.device("cpu"))
widen_thin_convolutions(layer, torch.device("cpu"))
image, back = torch.randn(2, 16, *shape), torch.randn(2, 16, *shape)
with torch.autocast("cpu", torch.bfloat16):
    out = layer(image)
out.backward(back.to(out.dtype))
truth = nn.grad.conv3d_weight(image.double(), layer.weight.shape, back.double(), padding=kernel // 2)
print(out.dtype, float((layer.weight.grad - truth).abs().max() / truth.abs().max()))
"""


@pytest.mark.parametrize(("kernel", "shape"), [(3, (2, 4, 4)), (5, (3, 4, 3)), (5, (4, 4, 4)), (5, (6, 6, 6))])
def test_bfloat16_gradients_are_right_where_images_are_thinner_than_the_kernel(kernel: int, shape: tuple[int, int, int]) -> None:
    """glibc fills what it hands out with large numbers here, which oneDNN takes for sums where it writes none itself."""
    numbers = map(str, (kernel, *shape))
    environment = {**os.environ, "MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, *numbers], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    dtype, error = answer.stdout.split()
    assert dtype == ("torch.float32" if min(shape) < kernel else "torch.bfloat16")
    assert float(error) < 0.02  # of numbers rounded to 8 bits


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("shape", "layer"), [((4, 5, 6), nn.InstanceNorm3d), ((7, 9), nn.InstanceNorm2d)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])  # bfloat16 has 8 bits
def test_instance_normalisation_keeps_the_layout_and_its_numbers(
    samples: int, shape: tuple[int, ...], layer: type[nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    network, truth = layer(5, affine=True), layer(5, affine=True).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    truth.load_state_dict(network.state_dict())
    convolution = nn.Conv3d(1, 1, 3) if len(shape) == 3 else nn.Conv2d(1, 1, 3)
    layout = lay_out(nn.ModuleList([convolution, network]), CPU)
    image = (50 + 10 * torch.randn(samples, 5, *shape)).to(dtype).contiguous(memory_format=layout).requires_grad_()
    back = torch.randn(samples, 5, *shape)

    out = network(image)
    out.backward(back.to(out.dtype))
    assert out.is_contiguous(memory_format=layout)
    same = image.detach().double().requires_grad_()
    expected = truth(same)
    expected.backward(back.double())
    assert torch.allclose(out.double(), expected, rtol=tolerance, atol=tolerance)
    for found, right in zip([image, *network.parameters()], [same, *truth.parameters()], strict=True):
        assert found.grad is not None
        assert right.grad is not None
        assert torch.allclose(found.grad.double(), right.grad, rtol=tolerance, atol=tolerance * float(right.grad.abs().max()))


def laid_out(*layers: nn.Module) -> nn.Sequential:
    network = nn.Sequential(*layers)
    lay_out(network, CPU)
    widen_thin_convolutions(network, CPU)
    return network


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_copy_computes_with_its_own_weights(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    network = laid_out(nn.Conv3d(1, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True))
    copied, image = copy.deepcopy(network), torch.randn(2, 1, 2, 4, 4)  # thinner than the kernel
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        before = network(image)
        for parameter in copied[1].parameters():
            parameter.fill_(2)
        assert torch.equal(network(image), before)
        changed = copied(image)
        copied[0].weight.zero_()
        copied[0].bias.zero_()
        assert not torch.equal(changed, before)
        assert torch.equal(copied(image), torch.full_like(before, 2))


def test_layers_take_one_image_without_a_batch() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True))
    network = laid_out(*copy.deepcopy(plain))
    image = torch.randn(1, 2, 4, 4)
    assert torch.allclose(network(image), plain(image), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert network[0](image).dtype == torch.float32  # thin, with and without a batch
