"""TRAIN, endless batches for the loop: workers draw, cut and augment ahead of it; batch n is the same whoever makes it, and when."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import BackendError, InputError, SegrtError
from ..networks import supervision_scales
from .augment import Augment, Augmentation, initial_patch
from .cache import Prepared
from .configuration import Configuration
from .parallel import signals_later
from .sampler import Sampling, draw, wants_foreground

Stream = Literal["training", "validation"]
_STREAMS: dict[Stream, int] = {"training": 0, "validation": 1}
_AHEAD = 2  # batches each worker makes before they are asked for


class Batch(NamedTuple):
    """`data` (B, C, [z,] y, x) float32, `targets` one per supervision scale (see `make_targets`), `names` of the cases."""

    data: Tensor
    targets: tuple[Tensor, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """Elements `first` to `last` of a common batch of `batch` elements: what one of several processes trains on."""

    batch: int
    first: int
    last: int

    def weight(self, processes: int) -> float:
        """What makes the mean over all processes one over all elements: a mean of an uneven share counts as much as it has elements."""
        return (self.last - self.first) * processes / self.batch


def share(batch: int, rank: int = 0, processes: int = 1) -> Share:
    """Divide a batch among processes as nnU-Net does: the first ones get one element more where it does not divide evenly.

    Raises
    ------
    InputError
        When there are more processes than elements.
    """
    if batch < processes:
        raise InputError(f"a batch of {batch} cannot be divided among {processes} processes; start fewer or take a larger batch")
    each, left = divmod(batch, processes)
    first = rank * each + min(rank, left)
    return Share(batch, first, first + each + (rank < left))


class Batches:
    """Batches of a fold's cases, the same sequence every time it is opened.

    Element j of batch n is drawn from a generator of its own, seeded by (seed, stream, n, j): no two elements share a state, in whichever
    worker or process they are made, and to go on after n batches only n has to be remembered.

    Parameters
    ----------
    prepared : the fold's cases, see `Prepared.select`
    configuration : its spec says what a patch and a target are, its `batch_size` how many make a batch of all processes together
    augmentation, grey, grey_channel : see `Augment`; "none" and 0 for validation
    stream : "training" and "validation" draw differently from one seed
    workers : processes; 0 makes each batch when it is asked for
    rank, processes : which part of each batch is ours
    pin : put batches into pinned memory, for a GPU

    Raises
    ------
    InputError
        When there is no case, or more processes than elements.
    """

    def __init__(
        self,
        prepared: Prepared,
        configuration: Configuration,
        *,
        augmentation: Augmentation = "nnunet",
        grey: float = 0.0,
        grey_channel: str | None = None,
        oversampling: float = 0.33,
        probabilistic: bool = False,
        seed: int = 12345,
        stream: Stream = "training",
        workers: int = 2,
        rank: int = 0,
        processes: int = 1,
        pin: bool = False,
    ) -> None:
        if not prepared.cases:
            raise InputError(f"{prepared.folder}: there is no case to draw {stream} batches from")
        spec = configuration.spec
        scales = supervision_scales(spec.network) if configuration.deep_supervision else ((1.0, 1.0, 1.0),)
        sampling = Sampling(spec.inference.patch, initial_patch(spec, augmentation), oversampling, probabilistic)
        part = share(configuration.batch_size, rank, processes)
        augment = Augment(spec, augmentation, scales, flips=configuration.flips, grey=grey, grey_channel=grey_channel)
        self._source = _Source(prepared, sampling, augment, part, (seed, _STREAMS[stream]), ignore=spec.ignore is not None)
        self._workers, self._pin = workers, pin

    def __call__(self, first: int = 0) -> BatchStream:
        """Start the workers and give the batches from number `first` on."""
        return BatchStream(self._source, first, self._workers, pin=self._pin)

    def __iter__(self) -> BatchStream:
        return self()


class BatchStream(Iterator[Batch]):
    """Batches in order; `close` ends the workers."""

    def __init__(self, source: _Source, first: int, workers: int, *, pin: bool) -> None:
        loader = DataLoader(
            source,
            batch_size=None,
            collate_fn=_as_made,
            sampler=itertools.count(first),
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            pin_memory=pin,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if workers else None,
            generator=torch.Generator(),  # its own, or the weights of a network made later would depend on us
        )
        with signals_later() if workers else nullcontext():
            self._batches: Iterator[Batch | SegrtError] | None = iter(loader)

    def __next__(self) -> Batch:
        """Give the next batch.

        Raises
        ------
        SegrtError
            What a worker could not do (the sentence names the case), or that one was killed.
        """
        if self._batches is None:
            raise StopIteration
        try:
            made = next(self._batches)
        except (RuntimeError, ConnectionError, EOFError) as err:  # the latter two when it died while its batch was fetched
            self.close()
            if isinstance(err, RuntimeError) and "DataLoader worker" not in str(err):
                raise
            raise BackendError("a process that makes batches was killed, most likely for want of memory; use fewer workers") from err
        if isinstance(made, SegrtError):
            self.close()
            raise made
        return made

    def close(self) -> None:
        """End the workers and give their memory back."""
        self._batches = None  # its finaliser waits for them


class _Source(Dataset[Batch]):
    """Batch number -> batch: what a worker runs."""

    def __init__(
        self, prepared: Prepared, sampling: Sampling, augment: Augment, part: Share, seed: tuple[int, int], *, ignore: bool
    ) -> None:
        self._prepared, self._sampling, self._augment, self._part, self._seed, self._ignore = (
            prepared,
            sampling,
            augment,
            part,
            seed,
            ignore,
        )

    def __getitem__(self, number: int) -> Batch | SegrtError:  # type: ignore[override]
        try:
            elements = [self._element(number, position) for position in range(self._part.first, self._part.last)]
        except SegrtError as err:
            return err  # raised again where the sentence is not buried in a worker's traceback
        images, targets, names = zip(*elements, strict=True)
        return Batch(torch.stack(images), tuple(torch.stack(scale) for scale in zip(*targets, strict=True)), names)

    def _element(self, number: int, position: int) -> tuple[Tensor, tuple[Tensor, ...], str]:
        rng = np.random.default_rng((*self._seed, number, position))
        case = self._prepared.cases[rng.integers(len(self._prepared.cases))]
        try:
            foreground = wants_foreground(position, self._part.batch, self._sampling, rng)
            sample = draw(self._prepared.folder, case, self._sampling, foreground=foreground, ignore=self._ignore, rng=rng)
            return *self._augment(sample, rng), case.name
        except SegrtError:
            raise
        except (OSError, RuntimeError, ValueError) as err:
            raise InputError(
                f"case {case.name}: no patch can be made of it ({err}); delete {self._prepared.folder / case.name} and prepare again"
            ) from err
        except BaseException as err:
            err.add_note(f"while making batch {number}, case {case.name}")
            raise


def _as_made(made: Any) -> Any:
    """Batches are put together by their source."""
    return made


def _context() -> Any:
    """Processes that are not copies of this one: a copy of one that runs threads, or holds a GPU, may hang.

    Where there is a fork server, it imports torch once for all workers of this process; it ends with it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "batchgeneratorsv2.transforms.spatial.spatial"])
    return context


def _start_worker(_number: int) -> None:
    # Ctrl-C is the loop's to answer, and so is what ends a whole group of processes: it saves first. The second time means us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL) and None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # blocked since the fork server was started
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A training that is killed cannot end its workers, and the fork server, whose children they are, stays while they do."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    wait([parent.sentinel])
    os._exit(1)
