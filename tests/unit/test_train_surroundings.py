"""What surrounds the loop: convolutions whose gradients do not depend on what lay in the memory before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# the weights' gradient of a convolution under bfloat16, and that of the same numbers in float64
SCRIPT = """
import sys
import torch
from torch import nn
from segrt.train.surroundings import lay_out, widen_thin_convolutions

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
