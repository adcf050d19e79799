"""Instance normalisation and leaky ReLU in one step for channels-last networks of PyTorch on a GPU."""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import require

SOURCE = Path(__file__).parents[1] / "kernels" / "_cuda" / "src" / "instance_norm.cu"
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_THREADS = 256
_BLOCKS = 1056  # eight for each multiprocessor of a large GPU
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class InstanceNormLeaky(nn.Module):
    """Normalise (N, C, (Z,) Y, X) over space, in place, and multiply negative results by `slope` (1: leave them).

    The same as torch's instance_norm and leaky_relu in float32, rounded once. Three launches: activations are read twice and written once.
    """

    def __init__(self, norm: Any, slope: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.slope = norm.weight, norm.bias, float(norm.eps), slope

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` itself when its channels are last, else a channels-last copy."""
        x = x.contiguous(memory_format=_CHANNELS_LAST[x.ndim])
        cupy = require("cupy", extra="cuda")
        windows, channels = x.shape[:2]
        voxels = prod(x.shape[2:])
        columns = channels // lanes(x.dtype)
        rows = _THREADS // columns
        parts = max(1, min(_BLOCKS // windows, -(-voxels // (8 * rows))))
        # torch's memory, which its own allocator orders along the stream everything here runs in
        sums = torch.empty((windows, parts, 2, channels), dtype=torch.float32, device=x.device)
        table = torch.empty((windows, 2, channels), dtype=torch.float32, device=x.device)
        space, depth = np.int64(voxels), np.int32(channels)
        kernels = _kernels(KINDS[x.dtype], cupy.cuda.Device().id)
        grid, block = (parts, windows), (_THREADS,)
        kernels["moments"](grid, block, (x.data_ptr(), sums.data_ptr(), space, depth))
        scale = (0 if p is None else p.data_ptr() for p in (self.weight, self.bias))
        fold = (x.data_ptr(), sums.data_ptr(), *scale, table.data_ptr(), space, depth, np.int32(parts), np.float32(self.eps))
        kernels["fold"]((-(-channels // 32), windows), block, fold)
        kernels["apply"](grid, block, (x.data_ptr(), table.data_ptr(), space, depth, np.float32(self.slope)))
        return x


def lanes(dtype: torch.dtype) -> int:
    """Channels a thread takes at once: 16 bytes."""
    return 4 if dtype == torch.float32 else 8


def fuse_norms(network: nn.Module, dtype: torch.dtype) -> bool:
    """Replace every normalisation and the activation after it, in place; False, and nothing is changed, when one cannot be.

    Blocks are modules with `norm` and `activation`, as those of `segrt.networks`; every number of channels has to be a multiple of `lanes`
    and at most 2048.
    """
    blocks: list[Any] = [m for m in network.modules() if isinstance(getattr(m, "norm", None), nn.InstanceNorm2d | nn.InstanceNorm3d)]
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if not blocks or len(blocks) != len(norms) or not all(_is_fusible(block, dtype) for block in blocks):
        return False
    for block in blocks:
        active = block.activation
        slope = float(active.negative_slope) if isinstance(active, nn.LeakyReLU) else 0.0 if isinstance(active, nn.ReLU) else 1.0
        block.norm, block.activation = InstanceNormLeaky(block.norm, slope), nn.Identity()
    return True


def _is_fusible(block: Any, dtype: torch.dtype) -> bool:
    plain = isinstance(getattr(block, "activation", None), nn.LeakyReLU | nn.ReLU | nn.Identity)
    count, step = block.norm.num_features, lanes(dtype)
    return plain and not block.norm.track_running_stats and count % step == 0 and count // step <= _THREADS


@cache
def _kernels(kind: int, device: int) -> dict[str, Any]:  # `device`: a module belongs to the GPU it was loaded on
    module = require("cupy", extra="cuda").RawModule(code=SOURCE.read_text(), options=(f"-DKIND={kind}", "--std=c++17"))
    return {name: module.get_function(name) for name in ("moments", "fold", "apply")}
