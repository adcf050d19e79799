"""A plan's configuration with what a `TrainConfig` overrides; TRAIN, between the plan and the preparation."""

from __future__ import annotations

from math import prod
from typing import Any

from ..errors import SpecError
from ..spec import ModelSpec, UNetSpec, VNetSpec, parse_spec
from .augment import Augment
from .config import TrainConfig
from .configuration import Configuration, Plan
from .losses import SupervisedLoss, build_loss

_LOW = ("3d_lowres", "3d_cascade_fullres")


def choose_configuration(plan: Plan, config: TrainConfig, name: str | None = None) -> Configuration:
    """Give the configuration to train: the plan's with another batch, patch or width where the config has them.

    Raises
    ------
    SpecError
        When the plan has no such configuration, its network cannot train on that patch, or its labels or dimensions do not go with the
        loss, the class weights or the augmentation.
    """
    name = name or config.configuration
    if name not in plan.configurations:
        why = "; nnU-Net plans a low resolution only for images of more than four patches, so choose another (--config)"
        there = ", ".join(plan.configurations)
        raise SpecError(f"configuration: expected one the plan has ({there}), got {name!r}{why if name in _LOW else ''}")
    planned = plan.configurations[name]
    changes: dict[str, Any] = {"spec": _spec(planned.spec, config)}
    if config.batch_size:
        changes["batch_size"] = config.batch_size
    if not config.deep_supervision:
        changes["deep_supervision"] = False
    if config.batch_dice is not None:
        changes["batch_dice"] = config.batch_dice
    if planned.flips is not None and not config.mirroring:
        changes["flips"] = ()
    chosen = planned.model_copy(update=changes)
    _check_coarsest(chosen)
    # what cannot be made of it is said before cases are prepared
    choose_loss(chosen, config)
    Augment(chosen.spec, config.augment, grey=config.grey, grey_channel=config.grey_channel)
    return chosen


def choose_loss(configuration: Configuration, config: TrainConfig, *, distributed: bool = False) -> SupervisedLoss:
    """Give the loss a configuration is trained with; see `build_loss` for what it raises."""
    return build_loss(
        configuration.spec,
        kind=config.loss,
        batch_dice=configuration.batch_dice,
        deep_supervision=configuration.deep_supervision,
        distributed=distributed,
        coefficients=config.coefficients,
        class_weights=config.class_weights,
        dice_activation=config.dice_activation,
    )


def _spec(spec: ModelSpec, config: TrainConfig) -> ModelSpec:
    values = spec.model_dump(by_alias=True)
    if config.patch and config.model == "nnunet":
        values["inference"]["patch"] = _patch(spec, config.patch)
    if config.augmentation == "none" or not config.mirroring:
        # a network that never saw a mirrored image is not averaged over them
        values["inference"]["mirror_axes"] = ()
    if config.width != 1 and isinstance(spec.network, UNetSpec):
        values["network"]["features"] = tuple(max(1, round(n * config.width)) for n in spec.network.features)
    return parse_spec(values, where="training")


def _patch(spec: ModelSpec, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    network = spec.network
    if not isinstance(network, UNetSpec):
        return patch
    if network.dimensions == 2 and patch[0] != 1:
        raise SpecError(f"patch: a 2-D configuration sees single slices, so z is 1, got {patch}")
    sides = patch[3 - network.dimensions :]
    for axis, side in enumerate(sides):
        factor = 1
        for stride in network.strides:
            factor *= stride[axis]
        if side % factor:
            name = "zyx"[axis + 3 - network.dimensions]
            raise SpecError(
                f"patch: the planned network halves axis {name} to 1/{factor}, so its side is a multiple of {factor}, got {side}"
            )
    return patch


def _check_coarsest(configuration: Configuration) -> None:
    """Raise a SpecError where a normalisation would get one number per feature: a U-Net's takes each patch alone, a V-Net's the batch."""
    network, numbers = configuration.spec.network, 1
    sides: tuple[int, ...] = configuration.spec.inference.patch
    if isinstance(network, UNetSpec):
        sides = sides[3 - network.dimensions :]
        for stride in network.strides:
            sides = tuple(-(-side // step) for side, step in zip(sides, stride, strict=True))
    elif isinstance(network, VNetSpec):
        numbers = configuration.batch_size
        for kernel, stride in zip(network.kernels, network.strides, strict=True):
            sides = tuple((side - wide) // step + 1 for side, wide, step in zip(sides, kernel, stride, strict=True))
    if numbers * prod(sides) == 1:
        raise SpecError(
            f"patch: {configuration.spec.inference.patch} leaves one voxel at the coarsest level of the network, where normalising needs "
            "more; choose a larger patch" + (" or batch" if isinstance(network, VNetSpec) else "")
        )
