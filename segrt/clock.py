"""Where the time of one image goes: `Predictor` asks this clock stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .device import wait_for

_T = TypeVar("_T")


class Clock:
    """Wall seconds per named stage; time inside another stage counts for the inner one alone."""

    def __init__(self, stream: Any) -> None:
        self.seconds: dict[str, float] = {}
        self._stream, self._inner = stream, 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what the block takes as `stage`."""
        start, self._inner = time.perf_counter(), 0.0
        yield
        wait_for(self._stream)
        self.seconds[stage] = time.perf_counter() - start - self._inner

    def each(self, stage: str, items: Iterable[_T]) -> Iterator[_T]:
        """Yield the items, and count what making them takes as `stage`."""
        self.seconds[stage] = 0.0
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            item = next(iterator, None)
            wait_for(self._stream)
            self._inner += time.perf_counter() - start
            self.seconds[stage] = self._inner
            if item is None:
                return
            yield item
            wait_for(self._stream)  # what was done with it is the outer stage's
