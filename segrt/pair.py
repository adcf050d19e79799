"""Pairs: which two models can be averaged, and whether a partner is the one a pair was made with; asked by `bundle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import SpecError
from .spec import ModelSpec, Partner


def check_pair(path: Path, spec: ModelSpec, partner: ModelSpec) -> None:
    """Raise a SpecError unless two models can be averaged: the same channels in, the same labels out."""
    names = [tuple(channel.name for channel in model.channels) for model in (spec, partner)]
    if partner.partner is not None:
        raise SpecError(f"{path}: the partner of a pair is a single model, not a pair itself")
    for what, mine, other in (("channels", *names), ("head", spec.head, partner.head), ("labels", spec.labels, partner.labels)):
        if mine != other:
            raise SpecError(f"{path}: a pair needs two models of the same {what}, got {mine!r} and {other!r}")


def check_identity(path: Path, members: Sequence[str], *, named: Partner, found: Partner) -> None:
    """Raise a SpecError unless the partner found at `path` is the one that was named; weights that were taken away are not missed."""
    changed = ["model.json"] if found.spec_sha256 != named.spec_sha256 else []
    for member, expected, now in zip(members, named.weights_sha256, found.weights_sha256, strict=False):
        if now and now != expected:
            changed.append(f"weights/{member}.safetensors")
    if changed:
        raise SpecError(f"{path}: {', '.join(changed)} is not what this pair was made with; copy the whole bundle again")
