"""Whether anybody still waits for an answer, and what a failure is called on the wire."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import Literal

from ..errors import InputError, SegrtError, SpecError
from ..protocol import ErrorCode

Outcome = Literal["done", "refused", "cancelled", "late", "failed"]
_ASK_S = 0.02
DONE: Outcome = "done"


class Abandoned(Exception):  # noqa: N818 - no error of segrt's: it ends a request inside the server and is never seen outside
    """Nobody waits for this answer any more."""

    def __init__(self, outcome: Outcome, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


class Attention:
    """One request's claim to be worked on.

    Parameters
    ----------
    is_cancelled : asks the server whether the client has given up
    timeout_s : seconds after which we do; never by default
    waited_s : seconds of them that have passed, such as in the queue
    clock : seconds
    """

    def __init__(
        self,
        is_cancelled: Callable[[], bool],
        timeout_s: float | None = None,
        *,
        waited_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_cancelled, self._timeout_s, self._clock = is_cancelled, timeout_s, clock
        self._start, self._asked = clock() - waited_s, -inf

    def check(self) -> None:
        """Raise `Abandoned` when the work is for nobody."""
        now = self._clock()
        # a question to the server's process; windows of a small network are faster than its answer
        if now - self._asked >= _ASK_S:
            self._asked = now
            if self._is_cancelled():
                raise Abandoned("cancelled", "the request was cancelled; its windows were stopped")
        if self._timeout_s is not None and now - self._start > self._timeout_s:
            raise Abandoned("late", f"gave up after {self._timeout_s:g} s, the time this request was given; allow more or ask for less")


def outcome_of(error: BaseException) -> tuple[Outcome, ErrorCode, str]:
    """Say of an error what became of the request, the server's name for it, and the sentence for the client.

    What the client can mend is INVALID_ARG. What another try may mend is UNAVAILABLE: a network's process that was lost, memory that others
    hold. Anything else is INTERNAL, with no more than a sentence; the log has the rest.
    """
    if isinstance(error, Abandoned):
        return error.outcome, "CANCELLED" if error.outcome == "cancelled" else "UNAVAILABLE", str(error)
    if isinstance(error, InputError | SpecError):
        return "refused", "INVALID_ARG", str(error)
    if isinstance(error, SegrtError):
        return "failed", "UNAVAILABLE", str(error)
    if isinstance(error, MemoryError):
        reason = " ".join(str(error).split()) or "allocation failed"
        return "failed", "UNAVAILABLE", f"the server has not enough memory for this image now ({reason}); try again, or send a smaller one"
    return "failed", "INTERNAL", f"the server failed on this image ({type(error).__name__}); its log says more"
