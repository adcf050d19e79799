"""Predictors of one served bundle: engines are opened once, whatever the requests ask for."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ..bundle import Bundle
from ..engines import Engine
from ..predictor import Predictor
from ..protocol import RequestOptions

logger = logging.getLogger(__name__)

Opener = Callable[[Bundle, str], Engine]
# a client may ask for a new window step every time
_KEPT = 16


class Predictors:
    """Predictors over shared engines, one for each combination of options that was asked for lately.

    Parameters
    ----------
    bundle : what they serve
    opener : opens the engine of a bundle's member; asked once for each, also for levels, a first stage and a partner
    device, threads : as `Predictor` takes them
    """

    def __init__(self, bundle: Bundle, opener: Opener, *, device: str = "cpu", threads: int = 0) -> None:
        self.bundle, self._opener = bundle, opener
        self._how: dict[str, Any] = {"device": device, "threads": threads}
        self._engines: dict[tuple[str, str | None, str], Engine] = {}
        self._made: OrderedDict[tuple[Any, ...], Predictor] = OrderedDict()

    def choose(self, options: RequestOptions) -> Predictor:
        """Give the Predictor that does what a request asks for.

        Raises
        ------
        InputError
            When the bundle has no such level.
        BackendError
            When an engine cannot be opened.
        """
        key = (options.tta, options.step, options.level, options.postprocess)
        if key not in self._made:
            tta, step, level, cleaned = key
            self._made[key] = Predictor(
                self.bundle, tta=tta, step=step, level=level, postprocess=cleaned, engines=self._engine, **self._how
            )
        self._made.move_to_end(key)
        if len(self._made) > _KEPT:
            self._made.popitem(last=False)
        return self._made[key]

    def close(self) -> None:
        """Release the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._made.clear()

    def _engine(self, bundle: Bundle, member: str) -> Engine:
        key = (str(bundle.path), bundle.level, member)
        if key not in self._engines:
            self._engines[key] = self._opener(bundle, member)
        return self._engines[key]
