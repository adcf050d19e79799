"""BUILD: how long models of one kind, such as the levels of a UNet++, take for an image on this machine, which may be busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..predictor import Predictor
from ..volume import Volume

_RUNS, _MOST_RUNS, _SECONDS = 15, 300, 2.0  # of each model, and in all
_QUARTER = 25  # percent


@dataclass(frozen=True)
class Timed:
    """Wall times in ms that a quarter of the runs stay below.

    Attributes
    ----------
    ms : for each model, of a whole prediction and of the network's part of it
    runs : of each
    device, engine : what ran the last model
    """

    ms: tuple[tuple[float, float], ...]
    runs: int
    device: str
    engine: str


def time_models(bundles: Sequence[Bundle], volume: Volume, options: Mapping[str, Any]) -> Timed:
    """Predict one image by each model in turn, so that a busy moment hits all; other work only ever adds, so the faster quarter counts.

    Parameters
    ----------
    options : of `Predictor`

    Raises
    ------
    InputError, BackendError
        When the image does not fit, or an engine cannot be opened.
    """
    with ExitStack() as stack:
        predictors = [stack.enter_context(Predictor(bundle, **options)) for bundle in bundles]
        for predictor in predictors:
            predictor(volume)
        spent = [list[tuple[float, float]]() for _ in predictors]
        start = time.perf_counter()
        while len(spent[0]) < _RUNS or (len(spent[0]) < _MOST_RUNS and time.perf_counter() - start < _SECONDS):
            for predictor, times in zip(predictors, spent, strict=True):
                times.append(_once(predictor, volume))
        ms = tuple((float(image), float(network)) for image, network in (np.percentile(times, _QUARTER, axis=0) for times in spent))
        return Timed(ms, len(spent[0]), predictors[-1].device, predictors[-1].engines[0].name)


def _once(predictor: Callable[[Volume], Any], volume: Volume) -> tuple[float, float]:
    start = time.perf_counter()
    seconds = predictor(volume).seconds
    return 1000 * (time.perf_counter() - start), 1000 * seconds["network"]
