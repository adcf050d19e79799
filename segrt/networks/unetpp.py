"""UNet++ and the plain U-Net beside it, in 2-D and 3-D, whole or pruned to the nodes that a level needs.

Tensor names: `nodes.<i>_<j>`, with transposed convolutions `up.<i>_<j>` (what enlarges node (i + 1, j - 1) for node (i, j)), and
`heads.<level>`. A pruned network has the names, and the shapes, of the whole one's tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..errors import InputError
from ..spec import UNetPPSpec

_CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_NORM: dict[int, Callable[..., nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


class UNetPP(nn.Module):
    """Nodes (i, j), each a block of two convolutions at scale i, and heads on the finest scale.

    `strides` is what the network shrinks each axis by at its coarsest. `deep_supervision` may be changed at any time where the spec has
    several heads: when true, `forward` returns the logits of every head, all at full resolution, the last level's first.

    References
    ----------
    Zhou, Siddiquee, Tajbakhsh, Liang 2018, doi:10.1007/978-3-030-00889-5_1, and 2020, doi:10.1109/TMI.2019.2959609. Difference: in
    accurate mode the mean is that of the heads' logits, as segrt averages folds and flips, not of their sigmoids.
    """

    def __init__(self, spec: UNetPPSpec, *, deep_supervision: bool = False) -> None:
        super().__init__()
        self.spec, self.deep_supervision = spec, deep_supervision
        self.strides = (2**spec.level,) * spec.dimensions
        self.pool = _POOL[spec.dimensions](2, 2)
        self.nodes, self.up = nn.ModuleDict(), nn.ModuleDict()
        for i, j in spec.nodes:
            self.nodes[f"{i}_{j}"] = Block(spec, spec.width(i, j), spec.features[i])
            if j and spec.up == "transposed":
                self.up[f"{i}_{j}"] = _TRANSPOSED[spec.dimensions](spec.features[i + 1], spec.features[i], 2, 2)
        self.heads = nn.ModuleDict({str(n): _CONV[spec.dimensions](spec.features[0], spec.out_channels, 1) for n in spec.heads})

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, C, (Z,) Y, X) -> logits (N, K, (Z,) Y, X), or those of every head under deep supervision, the last level's first.

        Raises
        ------
        InputError
            When the sides are no multiples of the network's strides.
        """
        if refusal := self.spec.refusal((1, *x.shape[2:])[-3:]):
            raise InputError(f"the input of this {self.spec.family}: {refusal}")
        made: dict[tuple[int, int], Tensor] = {}
        for i, j in self.spec.nodes:
            made[i, j] = self.nodes[f"{i}_{j}"](self._input(made, i, j) if i or j else x)
        if self.deep_supervision:
            return tuple(self._head(made, level) for level in reversed(self.spec.heads))
        if self.spec.mode == "fast" or len(self.spec.heads) == 1:
            return self._head(made, self.spec.level)
        total = self._head(made, 1)
        for level in self.spec.heads[1:]:
            total = total + self._head(made, level)
        return total / len(self.spec.heads)

    def _head(self, made: dict[tuple[int, int], Tensor], level: int) -> Tensor:
        logits: Tensor = self.heads[str(level)](made[0, level])
        return logits

    def _input(self, made: dict[tuple[int, int], Tensor], i: int, j: int) -> Tensor:
        """What node (i, j) reads: the node above it, smaller; or those left of it and the one below, enlarged."""
        if j == 0:
            smaller: Tensor = self.pool(made[i - 1, 0])
            return smaller
        beside = [made[i, k] for k in self.spec.beside(j)]
        return torch.cat([*beside, self._enlarged(made[i + 1, j - 1], f"{i}_{j}")], 1)

    def _enlarged(self, below: Tensor, name: str) -> Tensor:
        if self.spec.up == "transposed":
            learned: Tensor = self.up[name](below)
            return learned
        # corners stay corners, as in the published implementation
        return interpolate(below, scale_factor=2, mode=_LINEAR[self.spec.dimensions], align_corners=True)


class Block(nn.Module):
    """Two 3x3 convolutions, each followed by the spec's normalisation, ReLU and dropout."""

    def __init__(self, spec: UNetPPSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _CONV[spec.dimensions](inputs, outputs, 3, padding=1)
        self.norm1 = _norm(spec, outputs)
        self.conv2 = _CONV[spec.dimensions](outputs, outputs, 3, padding=1)
        self.norm2 = _norm(spec, outputs)
        self.activation = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, ...) -> (N, outputs, ...)."""
        x = self.dropout(self.activation(self.norm1(self.conv1(x))))
        y: Tensor = self.dropout(self.activation(self.norm2(self.conv2(x))))
        return y


def _norm(spec: UNetPPSpec, features: int) -> nn.Module:
    return _NORM[spec.dimensions](features) if spec.norm == "batch" else nn.Identity()
