"""nnU-Net's rule from spacing and patch to strides and kernels, and its estimate of the memory a network takes; used by the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

SMALLEST_EDGE = 4  # voxels along an axis of the lowest resolution


@dataclass(frozen=True)
class Topology:
    """How a U-Net shrinks its patch: `kernels` and `strides` per stage and axis, `patch` padded so that every stride divides it."""

    patch: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def stages(self) -> int:
        """Resolutions, the full one included."""
        return len(self.strides)

    @property
    def divisor(self) -> tuple[int, ...]:
        """What the patch has to be a multiple of along each axis."""
        return tuple(prod(stride[axis] for stride in self.strides) for axis in range(len(self.patch)))


def plan_topology(spacing: Sequence[float], patch: Sequence[float]) -> Topology:
    """Pool each axis as long as its spacing is within a factor 2 of the finest one and 4 voxels are left.

    A kernel is 1 along an axis whose spacing is twice the finest or more and stays 3 once it was 3, so that kernels are about as long in
    mm along every axis.

    Parameters
    ----------
    spacing : mm per axis, two or three of them
    patch : wanted size in voxels per axis; may be a fraction (a median)

    References
    ----------
    Isensee et al. 2021, nnU-Net, doi:10.1038/s41592-020-01008-z; `get_pool_and_conv_props` of nnU-Net 2.8.1.
    """
    mm, size, kernel = list(spacing), list(patch), [1] * len(spacing)
    strides, kernels = [(1,) * len(mm)], []
    while axes := _axes_to_pool(mm, size):
        kernel = [3 if k == 3 or m / min(mm) < 2 else 1 for k, m in zip(kernel, mm, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(len(mm))))
        for axis in axes:
            mm[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
    kernels.append((3,) * len(mm))
    divisors = [prod(stride[axis] for stride in strides) for axis in range(len(mm))]
    padded = tuple(int(ceil(n / d) * d) for n, d in zip(patch, divisors, strict=True))
    return Topology(padded, tuple(kernels), tuple(strides))


def _axes_to_pool(mm: Sequence[float], size: Sequence[float]) -> list[int]:
    """Axes the next stage halves; none when the network is deep enough."""
    large = [axis for axis, n in enumerate(size) if n >= 2 * SMALLEST_EDGE]
    if not large:
        return []
    finest = min(mm[axis] for axis in large)
    axes = [axis for axis in large if mm[axis] / finest < 2]
    # a stage for one axis alone has to be worth it
    return [] if len(axes) == 1 and size[axes[0]] < 3 * SMALLEST_EDGE else axes


def feature_map_elements(
    topology: Topology,
    features: Sequence[int],
    blocks: Sequence[int],
    decoder_convs: Sequence[int],
    *,
    classes: int,
    residual: bool,
) -> int:
    """Count the numbers in all feature maps of one patch, nnU-Net's proxy for the GPU memory of a training step.

    Parameters
    ----------
    features, blocks : per stage; blocks are convolutions of a plain and pairs of convolutions of a residual encoder
    decoder_convs : per decoder stage, the lowest resolution first
    classes : channels of the one head that is counted
    """
    voxels = [prod(topology.patch)]
    for stride in topology.strides[1:]:
        voxels.append(voxels[-1] // prod(stride))  # the patch is a multiple of all strides
    if residual:
        encoder = features[0] * voxels[0] + sum(
            # two convolutions a block; the first block of every lower stage has one in its skip
            (2 * n + (stage > 0)) * f * v
            for stage, (n, f, v) in enumerate(zip(blocks, features, voxels, strict=True))
        )
    else:
        encoder = sum(n * f * v for n, f, v in zip(blocks, features, voxels, strict=True))
    skips = zip(features[-2::-1], voxels[-2::-1], decoder_convs, strict=True)
    decoder = sum((n + 1) * f * v for f, v, n in skips)  # + 1: the transposed convolution
    return encoder + decoder + classes * voxels[0]
