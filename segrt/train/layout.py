"""How a network lies in a CPU's memory while it is trained, and what torch does slowly or wrongly there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

_INSTANCE_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)


def lay_out(network: nn.Module, device: torch.device) -> torch.memory_format:
    """Lay the network out channels last on a CPU, whose convolutions are faster then; the layout its input should have.

    torch's instance normalisation would turn every image to channels first and leave it so, which costs more than the convolutions gain.
    It is the batch normalisation of each sample by itself, and that one keeps the layout.
    """
    if device.type != "cpu":
        return torch.preserve_format
    weights = [parameter for parameter in network.parameters() if parameter.ndim >= 4]
    layout = torch.channels_last_3d if any(weight.ndim == 5 for weight in weights) else torch.channels_last
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=layout)
    for module in network.modules():
        if isinstance(module, _INSTANCE_NORMS) and not module.track_running_stats:
            module.forward = partial(_normalise_samples, module)  # type: ignore[method-assign]
    return layout


def _normalise_samples(norm: nn.InstanceNorm2d | nn.InstanceNorm3d, images: Tensor) -> Tensor:
    if images.ndim == norm._get_no_batch_dim():
        return type(norm).forward(norm, images)
    samples = [functional.batch_norm(sample, None, None, norm.weight, norm.bias, True, 0.0, norm.eps) for sample in torch.split(images, 1)]
    return torch.cat(samples) if len(samples) > 1 else samples[0]


def widen_thin_convolutions(network: nn.Module, device: torch.device) -> None:
    """On a CPU, convolve images that are thinner than the kernel in float32, whatever the precision around it.

    oneDNN leaves parts of the weights' gradient in bfloat16 unwritten there (torch 2.13: a kernel of 3 with 2 slices, of 5 with 2 to 4; it
    takes 16 channels or more). They hold what the memory held, which now and then is infinite and mostly is not.
    """
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.forward = partial(_convolve, module.forward, module.kernel_size)  # type: ignore[method-assign]


def _convolve(forward: Callable[[Tensor], Tensor], kernel: Sequence[int], image: Tensor) -> Tensor:
    thin = any(side < wide for side, wide in zip(image.shape[-len(kernel) :], kernel, strict=True))
    if not thin or not torch.is_autocast_enabled(image.device.type):
        return forward(image)
    with torch.autocast(image.device.type, enabled=False):
        return forward(image.float())
