"""The same function for every case of a dataset, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from ..arrays import ProgressFn
from ..errors import BackendError

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def run_each(function: Callable[[_In], _Out], items: Sequence[_In], *, workers: int, progress: ProgressFn | None = None) -> list[_Out]:
    """Give `function(item)` for every item, in the order of the items.

    Parameters
    ----------
    function : has to be picklable when `workers` is 2 or more
    workers : processes; 0 or 1 runs in this one

    Raises
    ------
    BackendError
        When a process dies, mostly because memory ran out. What `function` raises is passed on.
    """
    if min(workers, len(items)) < 2:
        return _collect(map(function, items), len(items), progress)
    count = min(workers, len(items))
    context = multiprocessing.get_context("spawn")  # a forked child of a process with running threads can hang
    end, ours = context.Pipe(duplex=False)
    # what leaves the block early closes our end of the pipe first, and so does the end of this process, whatever ends it
    with end, ProcessPoolExecutor(count, mp_context=context, initializer=_end_with, initargs=(end,)) as pool, ours:
        try:
            with signals_later():
                # starts the workers; map would cancel what is left after an error, which the end of a worker then stumbles over
                futures = [pool.submit(function, item) for item in items]
            done = _collect((future.result() for future in futures), len(items), progress)
        except BrokenProcessPool as err:
            raise BackendError(
                f"one of {workers} workers was killed, probably for want of memory; use fewer workers (or, where bootstrapping is "
                "complained about above, begin below `if __name__ == '__main__':` in your script)"
            ) from err
        pool.shutdown()
    return done


@contextmanager
def signals_later() -> Iterator[None]:
    """Signals that ask to stop wait for the end of the block; processes it starts never get them, for those are asked another way."""
    resource_tracker.ensure_running()  # else the first process starts it, and signals come through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(pipe: Connection) -> None:
    """In a worker: end at once when the other end of the pipe is closed; nothing else tells that whoever wants the results is gone."""

    def watch() -> None:
        wait([pipe])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _collect(results: Iterable[_Out], total: int, progress: ProgressFn | None) -> list[_Out]:
    done: list[_Out] = []
    for result in results:
        done.append(result)
        if progress:
            progress(len(done), total)
    return done
