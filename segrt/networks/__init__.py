"""Networks built from a `NetworkSpec`; needs torch (extra `export`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import BuildError, SpecError
from ..spec import NetworkSpec, OnnxNetwork, UNetPPSpec, VNetSpec
from .initialize import initialize
from .nnunet import UNet
from .unetpp import UNetPP
from .vnet import VNet

__all__ = [
    "Network",
    "UNet",
    "UNetPP",
    "VNet",
    "build",
    "build_empty",
    "count_flops",
    "count_parameters",
    "freeze_unread",
    "initialize",
    "load_weights",
    "supervision_scales",
]

Network = UNet | VNet | UNetPP


def build(spec: NetworkSpec, *, deep_supervision: bool = False) -> Network:
    """Build the network of `spec` with fresh weights.

    Both forms have the same tensors, heads of the coarser levels included: weights of one fit the other, and nnU-Net's fit both.

    Parameters
    ----------
    spec : the network in numbers
    deep_supervision : return a tuple of logits, the network's own at full resolution first, instead of these alone; see
        `supervision_scales`

    Returns
    -------
    Network : (N, C, (Z,) Y, X) float32 -> logits (N, K, (Z,) Y, X); in evaluation mode, under deep supervision in training mode. Its
        attribute `deep_supervision` may be changed at any time

    Raises
    ------
    SpecError
        For a network that only exists as ONNX, numbers no network can have, or deep supervision of a V-Net or UNet++ without heads for it.
    """
    if isinstance(spec, OnnxNetwork):
        raise SpecError(f"network.family: {spec.family!r} has no layers to build; only plain_unet, residual_unet, vnet, unetpp and unet do")
    if isinstance(spec, VNetSpec):
        if deep_supervision and not spec.deep_supervision:
            raise SpecError("network.deep_supervision: this V-Net has no heads at its coarser levels; plan it with deep_supervision=True")
        return VNet(spec, deep_supervision=deep_supervision).train(deep_supervision)
    if isinstance(spec, UNetPPSpec):
        if deep_supervision and not spec.deep_supervision:
            raise SpecError("network.deep_supervision: this network has one head only; plan a UNet++ with deep_supervision=True")
        return UNetPP(spec, deep_supervision=deep_supervision).train(deep_supervision)
    return UNet(spec, deep_supervision=deep_supervision).train(deep_supervision)


def build_empty(spec: NetworkSpec) -> Network:
    """Build the network without memory for its weights: for their names, shapes and count."""
    with torch.device("meta"):
        return build(spec)


def supervision_scales(spec: NetworkSpec) -> tuple[tuple[float, ...], ...]:
    """Give the size of every output under deep supervision, in the order they come, as shares of the input's size on each axis.

    nnU-Net's levels shrink by their strides; those of a V-Net are enlarged to full size, and a UNet++ makes all of them there. One output,
    of full size, where there is no deep supervision.
    """
    if isinstance(spec, UNetPPSpec):
        return ((1.0, 1.0, 1.0),) * len(spec.heads)
    if isinstance(spec, OnnxNetwork | VNetSpec):
        count = 4 if isinstance(spec, VNetSpec) and spec.deep_supervision else 1
        return ((1.0, 1.0, 1.0),) * count
    scales = [(1.0,) * spec.dimensions]
    for stride in spec.strides[1:-1]:
        scales.append(tuple(share / s for share, s in zip(scales[-1], stride, strict=True)))
    return tuple(scales)


def freeze_unread(network: nn.Module) -> None:
    """Let heads that `forward` does not read learn nothing, in place; their tensors stay, so that weights of both forms fit each other."""
    unread: list[nn.Module] = []
    if isinstance(network, Network) and not network.deep_supervision:
        match network:
            case UNet():
                unread = list(network.heads)[:-1]
            case VNet():
                unread = list(network.heads) if network.spec.deep_supervision else []
            case UNetPP():
                unread = [head for level, head in network.heads.items() if network.spec.mode == "fast" and level != str(network.spec.level)]
    for head in unread:
        head.requires_grad_(False)


def count_parameters(network: nn.Module) -> int:
    """Numbers a network learns, those of all heads included; shared tensors count once."""
    return sum(p.numel() for p in network.parameters())


def count_flops(spec: NetworkSpec, shape: Sequence[int]) -> int:
    """Count the floating-point operations of convolutions on one patch of `shape` (z, y, x), two for each multiplication and addition."""
    network = build_empty(spec)
    patch = torch.empty(1, spec.in_channels, *shape[3 - len(network.strides) :], device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(patch)
    return int(counter.get_total_flops())


def load_weights(
    network: nn.Module, weights: Mapping[str, torch.Tensor], *, where: str = "weights", whole: NetworkSpec | None = None
) -> None:
    """Copy `weights` into `network` by name.

    Parameters
    ----------
    whole : the network all of whose tensors `weights` holds, when `network` is a part of it; itself by default

    Raises
    ------
    BuildError
        When a tensor is missing, too many, or has another shape; the sentence names `where` and the first such tensor.
    """
    check_weights(network if whole is None else build_empty(whole), weights, where=where)
    network.load_state_dict({name: weights[name] for name in network.state_dict()})


def check_weights(network: nn.Module, weights: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Raise BuildError unless `weights` holds exactly the network's tensors; see `load_weights`."""
    expected = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise BuildError(f"{where}: tensor {name} is missing; the weights belong to another network than the plans describe")
        if tuple(weights[name].shape) != shape:
            raise BuildError(f"{where}: tensor {name} has shape {tuple(weights[name].shape)}, the plans ask for {shape}")
    for name in weights:
        if name not in expected:
            raise BuildError(f"{where}: tensor {name} has no place in the network the plans describe; it was trained with another one")
