"""The weights a training starts from."""

from __future__ import annotations

import torch
from torch import nn

from .nnunet import ResidualBlock, UNet

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def initialize(network: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Draw a network's weights anew, in place.

    nnU-Net's: He's normal distribution for a negative slope of .01, whatever the activation; biases zero; the last normalisation of each
    residual block zero, so that the block starts as its shortcut. V-Net's, as Paddle initialises it: He's normal distribution for
    convolutions, Glorot's uniform one for transposed convolutions, biases zero, slopes .25. UNet++ has the same in 3-D, and in 2-D He's for
    transposed convolutions too.

    Parameters
    ----------
    generator : where the random numbers come from; torch's global one by default

    References
    ----------
    He, Zhang, Ren, Sun 2015, doi:10.1109/ICCV.2015.123; Glorot, Bengio 2010, proceedings.mlr.press/v9/glorot10a.
    """
    slope = 0.01 if isinstance(network, UNet) else 0.0
    for module in network.modules():
        if isinstance(module, _CONVOLUTIONS):
            if isinstance(module, nn.ConvTranspose3d) and not isinstance(network, UNet):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            else:
                nn.init.kaiming_normal_(module.weight, a=slope, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (*_NORMS, nn.PReLU)):
            module.reset_parameters()
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            for parameter in module.conv2.norm.parameters():
                nn.init.zeros_(parameter)
