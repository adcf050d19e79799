"""Levels of a UNet++: what they are called, and the model that is left at one; asked by `bundle`."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError
from .spec import ModelSpec, UNetPPSpec


def levels_of(spec: ModelSpec) -> tuple[str, ...]:
    """Give the levels a model can be pruned to, "L1" first and its own last; none of what is no UNet++."""
    network = spec.network
    return tuple(f"L{n}" for n in network.heads) if isinstance(network, UNetPPSpec) and network.family == "unetpp" else ()


def level_of(spec: ModelSpec) -> str | None:
    """The level a model has; None of what is no UNet++."""
    return levels_of(spec)[-1] if levels_of(spec) else None


def prune_spec(path: Path, spec: ModelSpec, level: str) -> ModelSpec:
    """Give the model of the bundle at `path` at a level; itself at its own.

    Raises
    ------
    InputError
        When it is no UNet++, or one without a head at that level.
    """
    network, names = spec.network, levels_of(spec)
    if not isinstance(network, UNetPPSpec) or not names:
        raise InputError(f"{path}: level {level!r} is asked for, and only a UNet++ has levels; this model's network is {network.family!r}")
    if level not in names:
        hint = "" if network.deep_supervision else "; it was trained without deep supervision, so that only its last level has a head"
        raise InputError(f"{path}: level: expected {' or '.join(names)}, got {level!r}{hint}")
    pruned = network.pruned(int(level[1:]))
    return spec if pruned is network else spec.model_copy(update={"network": pruned})
