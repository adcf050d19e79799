"""What opens a `Predictor`: which members and devices are meant, and their engines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .bundle import Bundle
from .engines import Backend, Engine, Precision, open_engine, resolve_device
from .engines.compose import Spread
from .errors import BackendError, InputError

logger = logging.getLogger(__name__)


def choose_members(bundle: Bundle, folds: Sequence[str] | None) -> tuple[str, ...]:
    """Give the members that `folds` means, all by default; an InputError names those the bundle does not have."""
    members = bundle.spec.members
    if folds is not None and tuple(folds) == ("all",) and "all" not in members:
        return members  # nnU-Net's own "all" is a member that was trained on every case
    # a fold may be given as a number or twice; it counts once
    folds = None if folds is None else tuple(dict.fromkeys(str(fold) for fold in folds))
    unknown = [fold for fold in folds or () if fold not in members]
    if unknown:
        raise InputError(f"{bundle.path}: no fold {', '.join(unknown)}; the bundle has {', '.join(members)}")
    return folds or members


def name_devices(device: str) -> tuple[str, ...]:
    """Give the devices that a name or a comma list of names means; an InputError when several are not all GPUs."""
    names = tuple(dict.fromkeys(resolve_device(name.strip()) for name in device.split(",")))
    if len(names) > 1 and not all(name.startswith("cuda:") for name in names):
        raise InputError(f"device: several can only be GPUs, such as cuda:0,cuda:1, got {device!r}")
    return names


def open_engines(
    bundle: Bundle,
    members: Sequence[str],
    devices: Sequence[str],
    automatic: bool,
    backend: Backend,
    precision: Precision | None,
    threads: int,
) -> list[Engine]:
    """Open one engine per member, over several devices when there are several; an `automatic` choice of them falls back to the CPU."""
    how: dict[str, Any] = {"backend": backend, "precision": precision, "threads": threads}
    try:
        opened = [[open_engine(bundle, member, device=device, **how) for device in devices] for member in members]
    except BackendError as err:
        if not automatic or tuple(devices) == ("cpu",):
            raise
        logger.warning("the CPU is used, for %s cannot be: %s", ", ".join(devices), err)
        return open_engines(bundle, members, ("cpu",), False, backend, precision, threads)
    return [engines[0] if len(engines) == 1 else Spread(engines) for engines in opened]
