"""How long a call goes on trying, and the sentence it ends with when it does not."""

from __future__ import annotations

import random
import time

from ..errors import BackendError, InputError, SegrtError
from .connection import Connection
from .wire import Failure

_LONGEST_PAUSE_S = 8.0


class Patience:
    """The time and the repeats one call has left."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._failed = connection, 0
        self._end = None if connection.timeout_s is None else time.monotonic() + connection.timeout_s

    @property
    def left(self) -> float | None:
        """Seconds left; None for all the time it takes."""
        return None if self._end is None else max(self._end - time.monotonic(), 1e-3)

    def pause_after(self, failure: Failure) -> float | None:
        """Seconds to wait before the request is repeated; None when it is not."""
        if failure.reason != "unavailable" or self._failed >= self._connection.retries:
            return None
        # many clients of one server that comes back must not all come at once
        pause = min(self._connection.backoff_s * 2**self._failed, _LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        self._failed += 1
        return pause if self._end is None or time.monotonic() + pause < self._end else None

    def error(self, failure: Failure, where: str, model: str) -> SegrtError:
        """What a failure says to whoever asked."""
        text = " ".join(failure.text.split())
        if failure.reason == "invalid":
            return InputError(text)
        if failure.reason == "unknown":
            return InputError(f"{where} has no model {model!r} ({text}); a model is named as its folder in the model repository")
        out_of_time = self._end is not None and time.monotonic() > self._end
        if failure.reason == "late" or (failure.reason == "unavailable" and out_of_time):
            allowed = self._connection.timeout_s or self._connection.connect_s
            return BackendError(f"{where}: model {model!r} gave no answer within {allowed:g} s ({text}); allow it more time")
        if failure.reason == "unavailable":
            tries = f" after {self._failed} repeats" if self._failed else ""
            return BackendError(f"{where}: no answer{tries} ({text}); check the address, and that the server runs (segrt-serve)")
        if failure.reason == "cancelled":
            return BackendError(f"{where}: the request was cancelled ({text})")
        return BackendError(f"{where}: model {model!r} failed: {text}")
