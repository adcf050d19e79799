"""The same function for every case of a dataset, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
    context = multiprocessing.get_context("spawn")  # a forked child of a process with running threads can hang
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        try:
            return _collect(pool.map(function, items), len(items), progress)
        except BrokenProcessPool as err:
            raise BackendError(f"one of {workers} workers was killed, probably for want of memory; use fewer workers") from err
        finally:
            pool.shutdown(cancel_futures=True)  # what is left after an error need not run


def _collect(results: Iterable[_Out], total: int, progress: ProgressFn | None) -> list[_Out]:
    done: list[_Out] = []
    for result in results:
        done.append(result)
        if progress:
            progress(len(done), total)
    return done
