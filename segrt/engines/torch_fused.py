"""What lies between the convolutions of a channels-last U-Net of PyTorch on a GPU, by kernels of our own."""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import require

SOURCE = Path(__file__).parents[1] / "kernels" / "_cuda" / "src" / "between_convolutions.cu"
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_THREADS = 256
_BLOCK = (_THREADS,)
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
        windows, channels = x.shape[:2]
        voxels = prod(x.shape[2:])
        parts = _parts(voxels, channels // lanes(x.dtype), _BLOCKS // windows)
        # torch's memory, which its own allocator orders along the stream everything here runs in
        sums = torch.empty((windows, parts, 2, channels), dtype=torch.float32, device=x.device)
        table = torch.empty((windows, 2, channels), dtype=torch.float32, device=x.device)
        space, depth = np.int64(voxels), np.int32(channels)
        kernels = _kernels(KINDS[x.dtype], x.device.index)
        grid = parts, windows
        kernels["moments"](grid, _BLOCK, (x.data_ptr(), sums.data_ptr(), space, depth))
        fold = (x.data_ptr(), sums.data_ptr(), _address(self.weight), table.data_ptr(), space, depth)
        kernels["fold"]((-(-channels // 32), windows), _BLOCK, (*fold, np.int32(parts), np.float32(self.eps)))
        apply = (x.data_ptr(), table.data_ptr(), _address(self.bias), space, depth, np.float32(self.slope))
        kernels["apply"](grid, _BLOCK, apply)
        return x


class JoinBiased(nn.Module):
    """Channels of what comes from below, plus its transposed convolution's bias, then the skip's; each is read and written once."""

    def __init__(self, bias: Any) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """(N, C, ...) and (N, D, ...) -> (N, C + D, ...), channels last."""
        layout = _CHANNELS_LAST[below.ndim]
        below, skip = below.contiguous(memory_format=layout), skip.contiguous(memory_format=layout)
        channels, others = below.shape[1], skip.shape[1]
        shape = (len(below), channels + others, *below.shape[2:])
        joined = torch.empty(shape, dtype=below.dtype, device=below.device, memory_format=layout)
        voxels = len(below) * prod(below.shape[2:])
        grid = (_parts(voxels, (channels + others) // lanes(below.dtype), _BLOCKS), 1)
        sizes = np.int64(voxels), np.int32(channels), np.int32(others)
        arguments = (below.data_ptr(), _address(self.bias), skip.data_ptr(), joined.data_ptr(), *sizes)
        _kernels(KINDS[below.dtype], below.device.index)["join"](grid, _BLOCK, arguments)
        return joined


def separate(logits: Tensor, out: Tensor) -> None:
    """Write channels-last logits (N, K, ...) to a contiguous `out`, float16 for float16 and float32 for other types; each read once."""
    logits = logits.contiguous(memory_format=_CHANNELS_LAST[logits.ndim])
    windows, channels = logits.shape[:2]
    voxels = prod(logits.shape[2:])
    grid = (max(1, min(_BLOCKS // windows, -(-voxels // _THREADS))), windows)
    arguments = (logits.data_ptr(), out.data_ptr(), np.int64(voxels), np.int32(channels))
    _kernels(KINDS[logits.dtype], logits.device.index)["separate"](grid, _BLOCK, arguments)


def _parts(voxels: int, columns: int, most: int) -> int:
    """Blocks that share the voxels: enough to fill a GPU, each with some eight voxels a thread."""
    rows = _THREADS // columns
    return max(1, min(most, -(-voxels // (8 * rows))))


def _address(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()


def lanes(dtype: torch.dtype) -> int:
    """Channels a thread takes at once: 16 bytes."""
    return 4 if dtype == torch.float32 else 8


def fuse(network: nn.Module, dtype: torch.dtype) -> bool:
    """Replace what lies between convolutions, in place; False, and nothing is changed, when something there is none of ours.

    Blocks are modules with `conv`, `norm` and `activation`, as those of `segrt.networks`; every number of channels has to be a multiple of
    `lanes`. A bias before a normalisation is taken away by it and left out.
    """
    blocks: list[Any] = [m for m in network.modules() if isinstance(getattr(m, "norm", None), nn.InstanceNorm2d | nn.InstanceNorm3d)]
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if not blocks or len(blocks) != len(norms) or not all(_is_fusible(block, dtype) for block in blocks):
        return False
    for block in blocks:
        active = block.activation
        slope = float(active.negative_slope) if isinstance(active, nn.LeakyReLU) else 0.0 if isinstance(active, nn.ReLU) else 1.0
        block.norm, block.activation, block.conv.bias = InstanceNormLeaky(block.norm, slope), nn.Identity(), None
    joins: Any = getattr(network, "join", ())
    for level, up in enumerate(getattr(network, "up", ())):
        # the skip is as wide as what comes from below
        if up.out_channels % lanes(dtype) == 0 and 2 * up.out_channels // lanes(dtype) <= _THREADS:
            joins[level], up.bias = JoinBiased(None if up.bias is None else nn.Parameter(up.bias.float(), requires_grad=False)), None
    return True


def _is_fusible(block: Any, dtype: torch.dtype) -> bool:
    plain = isinstance(getattr(block, "activation", None), nn.LeakyReLU | nn.ReLU | nn.Identity)
    count, step = block.norm.num_features, lanes(dtype)
    return plain and not block.norm.track_running_stats and count % step == 0 and count // step <= _THREADS


@cache
def _kernels(kind: int, device: int) -> dict[str, Any]:  # `device`: a module belongs to the GPU it was loaded on
    module = require("cupy", extra="cuda").RawModule(code=SOURCE.read_text(), options=(f"-DKIND={kind}", "--std=c++17"))
    return {name: module.get_function(name) for name in ("moments", "fold", "apply", "join", "separate")}
