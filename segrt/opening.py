"""What opens a `Predictor`: which members and devices are meant, and their engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, get_args

from .bundle import Bundle
from .engines import Backend, Engine, Precision, open_alike, resolve_device
from .engines.compose import Mirrored, Spread
from .errors import BackendError, InputError
from .level import levels_of
from .windows import Accumulate

logger = logging.getLogger(__name__)

# engines to use instead of a bundle's own, see `Predictor`
Engines: TypeAlias = Sequence[Engine] | Callable[[Bundle, str], Engine]


@dataclass(frozen=True)
class Options:
    """What the models of a Predictor, a first stage and a partner included, are opened and run with; see `Predictor`."""

    backend: Backend
    precision: Precision | None
    device: str
    step: float | None
    tta: bool
    accumulate: Accumulate
    threads: int

    def __post_init__(self) -> None:
        if self.step is not None and not 0 < self.step <= 1:
            raise InputError(f"step: expected 0 < step <= 1, got {self.step}")
        if self.accumulate not in get_args(Accumulate):
            raise InputError(f"accumulate: expected {' or '.join(get_args(Accumulate))}, got {self.accumulate!r}")
        if self.threads < 0:
            raise InputError(f"threads: expected 0 (all) or more, got {self.threads}")

    def beside(self, device: str) -> dict[str, Any]:
        """Give the arguments of a Predictor whose engines go where others were opened, on `device`."""
        return {**vars(self), "device": device if self.device == "auto" else self.device}


def choose_level(bundle: Bundle, level: str | None, backend: Backend) -> Bundle:
    """Give the bundle pruned to `level`, itself for None, whose ONNX files are there unless PyTorch runs it from the weights.

    Raises
    ------
    InputError
        When the model has no such level, or nobody has made it; the sentence names those that were made.
    """
    chosen = bundle if level is None else bundle.at_level(level)
    if chosen.whole is None or backend == "pytorch" or chosen.is_exported:
        return chosen
    made = [name for name in levels_of(bundle.spec) if bundle.at_level(name).is_exported]
    raise InputError(
        f"{bundle.path} has no level {level}, only {', '.join(made) or 'weights that nothing was built from'}; "
        f"make it with: {chosen.build_command}"
    )


def choose_members(bundle: Bundle, folds: Sequence[str] | None) -> tuple[str, ...]:
    """Give the members that `folds` means, all by default; an InputError names those the bundle does not have."""
    members = bundle.spec.members
    if folds is not None and not folds:
        raise InputError(f"{bundle.path}: no fold was chosen; choose of {', '.join(members)}, or all")
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


def divide_engines(engines: Engines | None, bundle: Bundle, members: Sequence[str]) -> tuple[list[Engine], Engines]:
    """Give those of `engines` that are a model's own, and where those of the models beside it come from."""
    if callable(engines):
        return [engines(bundle, member) for member in members], engines
    given = list(engines or ())
    return (given[: len(members)], given[len(members) :]) if bundle.partner else (given, [])


def open_model(bundle: Bundle, members: Sequence[str], options: Options, given: Sequence[Engine]) -> tuple[list[Engine], tuple[int, ...]]:
    """Open a model's engines, unless they are `given`; with them come the axes whose flips are entries of their batches.

    Raises
    ------
    InputError
        When sums are to be rounded as on a CPU, and the engines are elsewhere.
    """
    opened = list(given) or open_engines(bundle, members, options)
    device = opened[0].device
    if options.accumulate == "float16" and device != "cpu":
        raise InputError(f"accumulate: float16 repeats the rounding of nnU-Net on a CPU; use float32 on {device}, or device cpu")
    axes = bundle.spec.inference.mirror_axes if options.tta else ()
    # an engine of the host makes flips one by one
    return ([Mirrored(engine, axes) for engine in opened], ()) if axes and device == "cpu" else (opened, axes)


def open_engines(bundle: Bundle, members: Sequence[str], options: Options) -> list[Engine]:
    """Open one engine per member, over several devices when there are several; an automatic choice of them falls back to the CPU."""
    # rounding as on a CPU is a reason to take it
    devices = ("cpu",) if options.device == "auto" and options.accumulate == "float16" else name_devices(options.device)
    how: dict[str, Any] = {"backend": options.backend, "precision": options.precision, "threads": options.threads}
    try:
        opened = [open_alike(bundle, member, devices, **how) for member in members]
    except BackendError as err:
        if options.device != "auto" or devices == ("cpu",):
            raise
        logger.warning("the CPU is used, for %s cannot be: %s", ", ".join(devices), err)
        return open_engines(bundle, members, replace(options, device="cpu"))
    return [engines[0] if len(engines) == 1 else Spread(engines) for engines in opened]
