"""nnU-Net's U-Net with a plain or a residual encoder, in 2-D and 3-D.

Tensor names: `stem`, `encoder.<stage>.<block>`, `up.<level>`, `decoder.<level>.<block>`, `heads.<level>`; encoder stages count from full
resolution down, decoder levels from the coarsest up, so the last head is the one at full resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..spec import UNetSpec

# dimensions -> layer; torch types their sizes for one number of dimensions at a time.
_CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_DROPOUT: dict[int, Callable[..., nn.Module]] = {2: nn.Dropout2d, 3: nn.Dropout3d}
_NORM: dict[tuple[str, int], Callable[..., nn.Module]] = {
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
}

# Far beyond any real network; they keep a damaged description from asking for more than torch can count or build.
_MAX_SIZE = 2**16
_MAX_BLOCKS = 1000


class UNet(nn.Module):
    """Encoder, decoder with skips, one 1x1 head per decoder level.

    `strides` is what the network shrinks each axis by at its coarsest: every side of the input is a multiple of it. `deep_supervision` may
    be changed at any time: when true, `forward` returns the logits of every level, finest first.
    """

    def __init__(self, spec: UNetSpec, *, deep_supervision: bool = False) -> None:
        super().__init__()
        _check(spec)
        self.deep_supervision = deep_supervision
        self.strides = tuple(prod(axis) for axis in zip(*spec.strides, strict=True))
        residual = spec.family == "residual_unet"
        width = spec.in_channels
        if residual:
            self.stem = ConvBlock(spec, width, spec.features[0], kernel=spec.kernels[0])
            width = spec.features[0]
        stages = []
        for s, features in enumerate(spec.features):
            block = ResidualBlock if residual else ConvBlock
            stages.append(_stack(block, spec, spec.blocks[s], (width, features), kernel=spec.kernels[s], stride=spec.strides[s]))
            width = features
        self.encoder = nn.ModuleList(stages)
        self.up, self.join, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, s in enumerate(reversed(range(len(spec.features) - 1))):
            below, features, stride = spec.features[s + 1], spec.features[s], spec.strides[s + 1]
            self.up.append(_TRANSPOSED[spec.dimensions](below, features, stride, stride, bias=spec.conv_bias))
            self.join.append(Join())
            self.decoder.append(_stack(ConvBlock, spec, spec.decoder_convs[level], (2 * features, features), kernel=spec.kernels[s]))
            self.heads.append(_CONV[spec.dimensions](features, spec.out_channels, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, C, (Z,) Y, X) -> logits (N, K, (Z,) Y, X), or a tuple of them, finest first, under deep supervision."""
        if hasattr(self, "stem"):
            x = self.stem(x)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        logits = []
        for up, join, decoder, head in zip(self.up, self.join, self.decoder, self.heads, strict=True):
            # Popping lets each skip's memory go as soon as it is used.
            x = decoder(join(up(x), skips.pop()))
            if self.deep_supervision:
                logits.append(head(x))
        return tuple(logits[::-1]) if self.deep_supervision else self.heads[-1](x)


class Join(nn.Module):
    """Channels of what comes from below, then those of the skip."""

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """(N, C, ...) and (N, D, ...) -> (N, C + D, ...)."""
        return torch.cat((below, skip), 1)


class ConvBlock(nn.Module):
    """Convolution, dropout, normalisation, activation; those the spec does without are left out."""

    def __init__(
        self,
        spec: UNetSpec,
        inputs: int,
        outputs: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        active: bool = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.conv = _CONV[spec.dimensions](
            inputs,
            outputs,
            tuple(kernel),
            tuple(stride or (1,) * spec.dimensions),
            padding=tuple((k - 1) // 2 for k in kernel),
            bias=spec.conv_bias if bias is None else bias,
        )
        # The second convolution of a residual block and its projection have neither dropout nor activation.
        self.dropout = _DROPOUT[spec.dimensions](spec.dropout) if spec.dropout and active else nn.Identity()
        self.norm = _norm(spec, outputs)
        self.activation = _activation(spec) if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, ...) -> (N, outputs, ...), smaller by the stride."""
        y: Tensor = self.activation(self.norm(self.dropout(self.conv(x))))
        return y


class ResidualBlock(nn.Module):
    """Two convolutions added to a shortcut: average pooling where the block strides, a 1x1 projection where the width changes."""

    def __init__(self, spec: UNetSpec, inputs: int, outputs: int, *, kernel: Sequence[int], stride: Sequence[int] | None = None) -> None:
        super().__init__()
        ones = (1,) * spec.dimensions
        stride = tuple(stride or ones)
        self.conv1 = ConvBlock(spec, inputs, outputs, kernel=kernel, stride=stride)
        self.conv2 = ConvBlock(spec, outputs, outputs, kernel=kernel, active=False)
        self.pool = _POOL[spec.dimensions](stride, stride) if stride != ones else nn.Identity()
        widens = inputs != outputs
        self.projection = ConvBlock(spec, inputs, outputs, kernel=ones, active=False, bias=False) if widens else nn.Identity()
        self.activation = _activation(spec)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, ...) -> (N, outputs, ...), smaller by the stride."""
        y: Tensor = self.activation(self.conv2(self.conv1(x)) + self.projection(self.pool(x)))
        return y


def _stack(
    block: type[ConvBlock] | type[ResidualBlock],
    spec: UNetSpec,
    count: int,
    widths: tuple[int, int],
    *,
    kernel: Sequence[int],
    stride: Sequence[int] | None = None,
) -> nn.Sequential:
    """`count` blocks from widths[0] to widths[1]; the first one strides and changes the width."""
    inputs, outputs = widths
    first = block(spec, inputs, outputs, kernel=kernel, stride=stride)
    return nn.Sequential(first, *(block(spec, outputs, outputs, kernel=kernel) for _ in range(count - 1)))


def _norm(spec: UNetSpec, features: int) -> nn.Module:
    if spec.norm == "none":
        return nn.Identity()
    return _NORM[spec.norm, spec.dimensions](features, eps=spec.norm_eps, affine=spec.norm_affine)


def _activation(spec: UNetSpec) -> nn.Module:
    return nn.ReLU(inplace=True) if spec.nonlinearity == "relu" else nn.LeakyReLU(spec.negative_slope, inplace=True)


def _check(spec: UNetSpec) -> None:
    """Refuse what would give logits of another size than the input, or no layers at all."""
    if len(spec.features) < 2:
        raise SpecError(f"network.features: expected two stages or more, got {len(spec.features)}")
    if any(s != 1 for s in spec.strides[0]):
        raise SpecError(f"network.strides: the first stage works at full resolution and cannot stride, got {spec.strides[0]}")
    sizes = (*spec.features, *(n for row in (*spec.kernels, *spec.strides) for n in row))
    if min(sizes) < 1 or max(sizes) > _MAX_SIZE:
        raise SpecError(f"network.features, network.kernels, network.strides: expected numbers from 1 to {_MAX_SIZE}")
    depths = (*spec.blocks, *spec.decoder_convs)
    if min(depths) < 1 or max(depths) > _MAX_BLOCKS:
        raise SpecError(f"network.blocks, network.decoder_convs: expected 1 to {_MAX_BLOCKS} blocks in every stage")
    if any(k % 2 == 0 for kernel in spec.kernels for k in kernel):
        raise SpecError(f"network.kernels: expected odd sizes, got {spec.kernels}")
