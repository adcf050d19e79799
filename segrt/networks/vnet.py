"""V-Net as MedicalSeg and MedicalZooPytorch build it: residual levels of 5x5x5 convolutions in 3-D.

Tensor names: `stem`, `down.<level>`, `up.<level>` (levels of `down` from the finest, of `up` from the coarsest), `out`, and under deep
supervision `heads.<level>` of the three coarser levels of the decoder, coarsest first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..errors import InputError
from ..spec import Triple, VNetSpec

# 5x5x5 convolutions per level on the way down and up, and the levels whose features are dropped at random
_DOWN = ((1, False), (2, False), (3, True), (2, True))
_UP = ((2, True), (2, True), (1, False), (1, False))


class VNet(nn.Module):
    """Five levels, each adding what it read to what its convolutions made of it.

    `strides` is what the network shrinks each axis by at its coarsest. `deep_supervision` may be changed at any time where the spec has
    heads for it: when true, `forward` returns four logits of full resolution, the network's own first, then those of the heads, coarsest
    first.

    References
    ----------
    Milletari, Navab, Ahmadi 2016, doi:10.1109/3DV.2016.79. Differences from the paper, as in the two implementations named above: batch
    normalisation, dropout at the coarsest levels, 1-2-3-2 and 2-2-1-1 convolutions per level.
    """

    def __init__(self, spec: VNetSpec, *, deep_supervision: bool = False) -> None:
        super().__init__()
        self.spec, self.deep_supervision = spec, deep_supervision
        self.strides = tuple(a * b * c * d for a, b, c, d in zip(*spec.strides, strict=True))
        f, steps = spec.features, tuple(zip(spec.kernels, spec.strides, strict=True))
        self.stem = Stem(spec, f[0])
        self.down = nn.ModuleList(Down(spec, f[i], count, step=steps[i], drops=drops) for i, (count, drops) in enumerate(_DOWN))
        # what a step up writes is wide enough for its skip beside as much; the coarsest one so reads no more than it writes
        self.up = nn.ModuleList()
        for level, (count, drops) in zip((3, 2, 1, 0), _UP, strict=True):
            self.up.append(Up(spec, f[min(level + 2, 4)], 2 * f[level], count, step=steps[level], drops=drops))
        self.out = Out(spec, f[1])
        if spec.deep_supervision:
            self.heads = nn.ModuleList(nn.Conv3d(n, spec.out_channels, 3, padding=1) for n in (f[4], f[3], f[2]))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, C, Z, Y, X) -> logits (N, K, Z, Y, X), or four of them under deep supervision.

        Raises
        ------
        InputError
            When the network cannot give logits of the input's shape.
        """
        shape = x.shape[2:]
        if refusal := self.spec.refusal(tuple(shape)):
            raise InputError(f"the input of this V-Net: {refusal}")
        x = self.stem(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        coarser = []
        for level, up in enumerate(self.up):
            x = up(x, skips.pop())
            if self.deep_supervision and level < 3:
                coarser.append(interpolate(self.heads[level](x), size=shape, mode="trilinear"))
        logits: Tensor = self.out(x)
        return (logits, *coarser) if self.deep_supervision else logits


class Stem(nn.Module):
    """The first convolution, to which the image itself is added: each of its channels to every C-th feature."""

    def __init__(self, spec: VNetSpec, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(spec.in_channels, features, 5, padding=2)
        self.norm = nn.BatchNorm3d(features)
        self.activation = _activation(spec, features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, Z, Y, X) -> (N, features, Z, Y, X)."""
        y: Tensor = self.norm(self.conv(x))
        channels, features = x.shape[1], y.shape[1]
        # one channel broadcasts; where C does not divide the features the last round of channels is cut off
        image = x if channels == 1 else torch.cat([x] * -(-features // channels), 1)[:, :features]
        activated: Tensor = self.activation(y + image)
        return activated


class Down(nn.Module):
    """A strided convolution to twice the features, then `count` convolutions around which it is added."""

    def __init__(self, spec: VNetSpec, inputs: int, count: int, *, step: tuple[Triple, Triple], drops: bool) -> None:
        super().__init__()
        outputs = 2 * inputs
        kernel, stride = step
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride)
        self.norm = nn.BatchNorm3d(outputs)
        self.activation = _activation(spec, outputs)
        self.dropout = _dropout(spec, drops)
        self.convs = nn.Sequential(*(ConvBlock(spec, outputs) for _ in range(count)))
        self.activation_out = _activation(spec, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, Z, Y, X) -> (N, 2 * inputs, Z / s, Y / s, X / s)."""
        x = self.activation(self.norm(self.conv(x)))
        y: Tensor = self.activation_out(self.convs(self.dropout(x)) + x)
        return y


class Up(nn.Module):
    """A transposed convolution to half the features, the skip beside it, then `count` convolutions around which both are added."""

    def __init__(self, spec: VNetSpec, inputs: int, outputs: int, count: int, *, step: tuple[Triple, Triple], drops: bool) -> None:
        super().__init__()
        half = outputs // 2
        kernel, stride = step
        self.dropout, self.dropout_skip = _dropout(spec, drops), _dropout(spec, drops)
        self.conv = nn.ConvTranspose3d(inputs, half, kernel, stride)
        self.norm = nn.BatchNorm3d(half)
        self.activation = _activation(spec, half)
        self.convs = nn.Sequential(*(ConvBlock(spec, outputs) for _ in range(count)))
        self.activation_out = _activation(spec, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, inputs, z, y, x) and (N, outputs / 2, Z, Y, X) -> (N, outputs, Z, Y, X)."""
        x = self.activation(self.norm(self.conv(self.dropout(x))))
        x = torch.cat((x, self.dropout_skip(skip)), 1)
        y: Tensor = self.activation_out(self.convs(x) + x)
        return y


class Out(nn.Module):
    """From features to logits."""

    def __init__(self, spec: VNetSpec, inputs: int) -> None:
        super().__init__()
        classes = spec.out_channels
        self.conv = nn.Conv3d(inputs, classes, 5, padding=2)
        self.norm = nn.BatchNorm3d(classes)
        self.activation = _activation(spec, classes)
        self.head = nn.Conv3d(classes, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, Z, Y, X) -> logits (N, K, Z, Y, X)."""
        y: Tensor = self.head(self.activation(self.norm(self.conv(x))))
        return y


class ConvBlock(nn.Module):
    """5x5x5 convolution, batch normalisation, activation."""

    def __init__(self, spec: VNetSpec, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(features, features, 5, padding=2)
        self.norm = nn.BatchNorm3d(features)
        self.activation = _activation(spec, features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, Z, Y, X) -> the same."""
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y


def _activation(spec: VNetSpec, features: int) -> nn.Module:
    return nn.ELU(inplace=True) if spec.elu else nn.PReLU(features)


def _dropout(spec: VNetSpec, drops: bool) -> nn.Module:
    return nn.Dropout3d(spec.dropout) if drops and spec.dropout else nn.Identity()
