"""Which TensorRT plan of a bundle may run on this machine: keys, records and refusals, none of which needs TensorRT or a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError
from . import read_build
from .compiled import check_compiled

# a plan for several GPUs runs from this compute capability on
_COMPATIBLE_FROM = (8, 0)


@dataclass(frozen=True)
class Machine:
    """What a plan is bound to.

    Attributes
    ----------
    gpu : the GPU's name, such as "NVIDIA H200"
    capability : its compute capability, "9.0"
    driver : the CUDA version the driver offers, "13.0"
    tensorrt : version of TensorRT, "11.4.0.106"
    """

    gpu: str
    capability: str
    driver: str
    tensorrt: str

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.capability}), a driver of CUDA {self.driver}, TensorRT {self.tensorrt}"


def engine_key(machine: Machine, precision: str, batch: int, *, compatible: bool = False) -> str:
    """Folder name under engines/: TensorRT's version, the GPU, precision and batch; a compatible plan names no GPU."""
    if compatible:
        return f"tensorrt-{machine.tensorrt}-compatible-{precision}-b{batch}"
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    return f"tensorrt-{machine.tensorrt}-{gpu}-sm{machine.capability.replace('.', '')}-{precision}-b{batch}"


def make_record(
    machine: Machine, precision: str, batch: int, members: Mapping[str, Mapping[str, Any]], *, compatible: bool, verified: bool
) -> dict[str, Any]:
    """Give what build.json says of the plans in its folder."""
    key = engine_key(machine, precision, batch, compatible=compatible)
    values: dict[str, Any] = {"key": key, "precision": precision, "batch": batch, "compatible": compatible, **asdict(machine)}
    return {**values, "verified": verified, "members": dict(members)}


def find_plan(bundle: Bundle, member: str, precision: str, machine: Machine) -> tuple[Path, dict[str, Any]]:
    """Find the plan built for this machine: (file, the record in its build.json).

    Of several, one for this GPU alone comes before a compatible one, and the larger batch first.

    Raises
    ------
    BackendError
        When there is none for this machine (the sentence says what those that are there were built for), or its file is not the one that
        was built.
    """
    records = {path.parent: read_build(path) for path in sorted((bundle.path / "engines").glob("tensorrt-*/build.json"))}
    records = {folder: record for folder, record in records.items() if _is_meant(record, precision, bundle.level)}
    refused = {folder: mismatch(record, machine) for folder, record in records.items()}
    fitting = [folder for folder, reason in refused.items() if not reason]
    if not fitting:
        raise BackendError(
            f"{bundle.path} has no TensorRT engine of precision {precision} for this machine, which has {machine}"
            + "".join(f"; {folder.name} {reason}" for folder, reason in refused.items())
            + f"; make one with: {bundle.build_command} --backend tensorrt --device cuda --{precision}"
        )
    folder = max(fitting, key=lambda f: (records[f].get("compatible") is not True, _numbers(str(records[f].get("batch")))))
    file = folder / f"{member}.plan"
    check_compiled(bundle, member, file, records[folder])
    return file, records[folder]


def _is_meant(record: Mapping[str, Any], precision: str, level: str | None) -> bool:
    return record.get("precision") == precision and record.get("level") == level


def mismatch(record: Mapping[str, Any], machine: Machine) -> str:
    """Why a recorded plan cannot run on this machine, as the end of a sentence; "" when it can."""
    if record.get("compatible") is True:
        return _compatible_mismatch(record, machine)
    now = asdict(machine)
    for field, what in _BOUND_TO.items():
        built = record.get(field)
        if built != now[field]:
            return f"was built for {what} {built}, and this machine has {what} {now[field]}"
    return ""


_BOUND_TO = {"gpu": "GPU", "capability": "compute capability", "driver": "a driver of CUDA", "tensorrt": "TensorRT"}


def _compatible_mismatch(record: Mapping[str, Any], machine: Machine) -> str:
    """Made for GPUs from Ampere on, and for this and later TensorRT of the same major version."""
    built, now = _numbers(str(record.get("tensorrt"))), _numbers(machine.tensorrt)
    if built[:1] != now[:1] or built > now:
        which = f"TensorRT {record.get('tensorrt')} and later ones of the same major version"
        return f"was built for {which}, and this machine has TensorRT {machine.tensorrt}"
    if _numbers(machine.capability) < _COMPATIBLE_FROM:
        return f"was built for GPUs of compute capability 8.0 and later, and {machine.gpu} has {machine.capability}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
