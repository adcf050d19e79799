"""What a training leaves behind to look at: CSV and TensorBoard of its numbers, the machine, the size of its network."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import __version__
from ..arrays import require
from ..errors import InputError
from ..files import write_atomic
from ..memory import available_bytes
from ..report.curves import read_rows
from .epoch import EpochMeans

_TRAINING = ("iteration", "loss", "dice", "lr", "batch_cost", "reader_cost")
_EPOCH = ("number", "loss", "dice", "iou", "validation_dice", "validation_iou", "lr")
_PACKAGES = ("torch", "numpy", "numba", "batchgeneratorsv2", "blosc2", "pydantic", "safetensors", "SimpleITK")


class Records:
    """training.csv (a row per iteration), validation.csv (per validation), epochs.csv (per epoch) and tensorboard/ in one folder.

    Parameters
    ----------
    folder : made when missing
    classes : names of the foreground classes, in the network's order
    iteration : where the training goes on from; later rows of an earlier run are dropped

    Raises
    ------
    BackendError
        When TensorBoard is not installed.
    InputError
        When something cannot be written, here and later; rows of an earlier run stay.
    """

    def __init__(self, folder: Path, classes: Sequence[str], *, iteration: int = 0) -> None:
        tensorboard = require("torch.utils.tensorboard", extra="train")
        self._folder, self._classes = folder, tuple(classes)
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._training = _Table(folder / "training.csv", _TRAINING, iteration)
            self._validation = _Table(folder / "validation.csv", ("iteration", "loss", "dice", "average", *classes, "IoU"), iteration)
            self._epochs = _Table(folder / "epochs.csv", ("iteration", *_EPOCH), iteration)
            self._board = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def training(self, iteration: int, values: Mapping[str, float | None]) -> None:
        """Add the numbers of an iteration: loss, dice (None where not taken), lr, batch_cost and reader_cost in s."""
        self._add(self._training, "train", iteration, values)

    def validation(self, iteration: int, values: Mapping[str, float | None], dice: Sequence[float]) -> None:
        """Add a validation: loss, mean dice, its moving average, mean IoU, and the pseudo Dice per class (NaN where there is none)."""
        classes = {name: None if math.isnan(score) else score for name, score in zip(self._classes, dice, strict=True)}
        with self._writing():
            self._validation.add(iteration, {**values, **classes})
            self._show("validation", iteration, values)
            self._show("validation/class", iteration, classes)

    def epoch(self, iteration: int, means: EpochMeans) -> None:
        """Add an epoch that ended with this iteration."""
        values = {name: getattr(means, name) for name in _EPOCH}
        self._add(self._epochs, "epoch", iteration, values)

    def _add(self, table: _Table, group: str, iteration: int, values: Mapping[str, float | None]) -> None:
        with self._writing():
            table.add(iteration, values)
            self._show(group, iteration, values)

    def _show(self, group: str, iteration: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{group}/{name}", value, iteration)

    def flush(self) -> None:
        """Bring what was added to the disk."""
        with self._writing():
            for part in (self._training, self._validation, self._epochs, self._board):
                part.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            reason = err.strerror or err
            raise InputError(
                f"{self._folder}: records cannot be written ({reason}); free some space, the last checkpoint is whole"
            ) from err

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(InputError) if kind is not None else nullcontext(), self._writing(), ExitStack() as stack:
            for part in (self._training, self._validation, self._epochs, self._board):
                stack.callback(part.close)


class _Table:
    """A CSV file that grows by rows; numbers keep all their digits."""

    def __init__(self, path: Path, columns: Sequence[str], iteration: int) -> None:
        rows = [row for row in read_rows(path) if int(row["iteration"]) <= iteration]
        before = io.StringIO()
        earlier = csv.DictWriter(before, columns, restval="", lineterminator="\n")
        earlier.writeheader()
        earlier.writerows(rows)
        write_atomic(path, before.getvalue())
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, restval="", lineterminator="\n")

    def add(self, iteration: int, values: Mapping[str, float | None]) -> None:
        self._writer.writerow({"iteration": iteration} | {k: "" if v is None else repr(float(v)) for k, v in values.items()})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def environment(device: torch.device) -> dict[str, object]:
    """The machine and the versions a training ran on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found: dict[str, object] = {
        "segrt": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "free_memory_gb": round(available_bytes() / 1e9, 1),
        "device": str(device),
        "versions": versions,
    }
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        memory = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        found |= {"gpu": torch.cuda.get_device_name(device), "gpu_memory_gb": memory, "cuda": torch.version.cuda, "cudnn": cudnn}
    return found


def tell_environment(found: Mapping[str, Any]) -> tuple[str, str]:
    """Two lines of what `environment` found: versions, and the machine."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    gpu = f" ({found['gpu']}, {found['gpu_memory_gb']} GB, CUDA {found['cuda']}, cuDNN {found['cudnn']})" if "gpu" in found else ""
    machine = f"{found['processor']}, {found['cores']} cores, {found['free_memory_gb']} GB of memory free"
    return (
        f"segrt {found['segrt']}, Python {found['python']}, {versions}",
        f"device {found['device']}{gpu}; {found['system']}, {machine}",
    )


def count_flops(network: nn.Module, shape: Sequence[int]) -> int:
    """Floating-point operations (2 per multiplication with addition) of one forward pass.

    Parameters
    ----------
    network : on torch's meta device (`segrt.networks.build_empty`), so that nothing is computed
    shape : of the input, (N, C, (Z,) Y, X)
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(tuple(shape), device="meta"))
    return int(counter.get_total_flops())
