"""Several processes that train one network together (`torchrun`); alone, every function here does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from ..networks import freeze_unread

# the others wait while the first one prepares and validates
_PATIENCE = timedelta(days=30)


@contextmanager
def group(number: int, size: int, *, gpu: int | None) -> Iterator[None]:
    """Belong to the group of processes that `torchrun` started, of which this is `number` of `size`, on that GPU, inside the block."""
    if gpu is not None:
        torch.cuda.set_device(gpu)  # where the group's own messages go
    distributed.init_process_group("gloo" if gpu is None else "nccl", rank=number, world_size=size, timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number; 0 for the one that keeps the records."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients averaged over all processes; itself in a single one."""
    if not distributed.is_initialized():
        return network
    freeze_unread(network)  # the group would wait for their gradients
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return nn.parallel.DistributedDataParallel(network, [device] if device.type == "cuda" else None)


def synchronised(model: nn.Module, *, last: bool) -> Any:
    """A block whose gradients travel between processes only with the last batch of a step."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) and not last else nullcontext()


def agree(loss: float, stop: bool, seconds: float, device: torch.device) -> tuple[float, bool, float]:
    """The mean loss of all processes, whether any of them was asked to stop, and the mean of the seconds they count."""
    if not distributed.is_initialized():
        return loss, stop, seconds
    values = torch.tensor([loss, float(stop), seconds], dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return float(values[0]) / processes(), bool(values[1]), float(values[2]) / processes()


def add_up(*tensors: torch.Tensor) -> None:
    """Sum each tensor over all processes, in place."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def wait_for_all() -> None:
    """Return when every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def has_gpu() -> bool:
    """Whether torch can compute on a GPU here."""
    return torch.cuda.is_available()
