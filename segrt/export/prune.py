"""BUILD, for UNet++: every level as a smaller network with engines of its own, and what each costs and loses."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..arrays import require
from ..bundle import Bundle
from ..engines.openvino import cpu_name
from ..errors import BuildError, InputError
from ..files import write_atomic
from ..io import read_volume
from ..level import level_of, levels_of
from ..report.tables import write_rows
from ..spec import UNetPPSpec
from ..volume import Grid, Volume
from .scoring import Score, Validation, score
from .timing import time_models

logger = logging.getLogger(__name__)

MAX_DROP = 0.005
# dimensions -> how many times faster than L4: read off a figure
_PUBLISHED = {2: {"L1": 3.5, "L2": 2.4, "L3": 1.5, "L4": 1.0}, 3: {"L1": 3.9, "L2": 2.5, "L3": 1.4, "L4": 1.0}}


@dataclass(frozen=True)
class Level:
    """What one level costs, and how good it is.

    Attributes
    ----------
    parameters : numbers its network computes with
    gflop : floating-point operations of its convolutions on one window, two for each multiplication and addition, in 10^9
    published : times faster than L4 in the paper's figure
    image_ms : wall time of a whole prediction of one image in memory, all members, that a quarter of the runs stay below
    network_ms : the same of what the network takes
    score : on the validation cases; None without any
    """

    name: str
    parameters: int
    gflop: float
    published: float
    image_ms: float
    network_ms: float
    score: Score | None


@dataclass(frozen=True)
class Pruning:
    """All levels, the whole network's last.

    Attributes
    ----------
    image : shape (z, y, x) of what was timed
    runs : predictions of it by each level
    device, engine : what ran them
    validation : how many cases were scored and where they come from; "none"
    recommended : the smallest level that loses no more than `max_drop` of the whole one's Dice, `Score.dice` and `Score.where_present`;
        None without scores
    """

    levels: tuple[Level, ...]
    image: tuple[int, int, int]
    runs: int
    device: str
    engine: str
    validation: str
    max_drop: float
    recommended: str | None

    def to_json(self) -> str:
        """The text of reports/prune.json."""
        values = {
            "segrt": __version__,
            "cpu": cpu_name(),
            "device": self.device,
            "engine": self.engine,
            "image": self.image,
            "runs": self.runs,
            "validation": self.validation,
            "max_drop": self.max_drop,
            "recommended": self.recommended,
            **{level.name: _plain({**asdict(level), "times_faster": self.times_faster(level)}) for level in self.levels},
        }
        return json.dumps(values, indent=1) + "\n"

    @property
    def title(self) -> str:
        """What was timed, and scored on what."""
        size = " x ".join(map(str, self.image[self.image[0] == 1 :]))
        return f"one image of {size}" + ("" if self.validation == "none" else f"; Dice over {self.validation}")

    @property
    def rows(self) -> list[dict[str, str]]:
        """The table as text, a row per level."""
        return [
            {
                "level": level.name + (" (recommended)" if level.name == self.recommended else ""),
                "parameters": f"{level.parameters:,}",
                "GFLOP": f"{level.gflop:.2f}",
                "ms per image": f"{level.image_ms:.1f}",
                "network ms": f"{level.network_ms:.1f}",
                "times faster": f"{self.times_faster(level):.2f}",
                "in the paper": f"{level.published:.1f}",
                "Dice": "" if level.score is None else f"{level.score.dice:.4f}",
                "IoU": "" if level.score is None else f"{level.score.iou:.4f}",
                "Dice where present": "" if level.score is None else f"{level.score.where_present:.4f}",
            }
            for level in self.levels
        ]

    def times_faster(self, level: Level) -> float:
        """A level's pace against the whole network's."""
        return self.levels[-1].image_ms / level.image_ms


def check_levels(bundle: Bundle, levels: Sequence[str]) -> tuple[str, ...]:
    """Give the levels to build, each once and the smallest first; an InputError names one the model does not have."""
    for name in levels:
        bundle.at_level(name)
    if not levels:
        raise InputError(f"{bundle.path}: name at least one level to prune to, such as --prune L1,L2")
    return tuple(sorted(set(levels)))


def measure_levels(
    bundle: Bundle,
    levels: Sequence[str],
    *,
    options: Mapping[str, Any],
    validation: Validation | None = None,
    sample: str | Path | None = None,
    max_drop: float = MAX_DROP,
) -> Pruning:
    """Time and score levels that were built, and the whole network beside them; reports/prune.json, .csv, .md and .tex say the same.

    Parameters
    ----------
    options : of `Predictor`: what the engines were built for
    validation : cases to score on; without them there is no Dice and no recommendation
    sample : image to time; by default the first validation case, else noise of the size of one window
    max_drop : how much less Dice than the whole network's the recommended level may have

    Raises
    ------
    InputError, BackendError, BuildError
        When a case cannot be read, or a level not be run.
    """
    names = [*(name for name in levels if name != level_of(bundle.spec)), levels_of(bundle.spec)[-1]]
    bundles = [bundle.at_level(name) for name in names]
    volume = _image(bundle, sample, validation)
    timed = time_models(bundles, volume, options)
    scores: list[Score] | list[None] = [None] * len(names)
    if validation is not None:
        logger.info("scoring %s on %s", ", ".join(names), validation.source)
        scores = score(bundles, validation, options)
    found = tuple(Level(name, *_cost(one), *ms, scored) for name, one, ms, scored in zip(names, bundles, timed.ms, scores, strict=True))
    source = "none" if validation is None else validation.source
    how = volume.grid.shape, timed.runs, timed.device, timed.engine
    pruning = Pruning(found, *how, source, max_drop, recommend(found, max_drop))
    write_atomic(bundle.path / "reports" / "prune.json", pruning.to_json())
    write_rows(
        bundle.path / "reports" / "prune",
        pruning.rows,
        caption=f"Levels of {bundle.spec.name}: {pruning.title}; {cpu_name()}, {timed.engine}",
    )
    return pruning


def recommend(levels: Sequence[Level], max_drop: float) -> str | None:
    """Give the name of the first level that is at most `max_drop` of Dice below the last one; None without cases that have a structure.

    Over all cases and over those that have it: where many have nothing, a level may win the former by finding less everywhere.
    """
    scores = [level.score for level in levels if level.score is not None]
    if len(scores) < len(levels) or any(math.isnan(score.where_present) for score in scores):
        return None
    dice, present = scores[-1].dice - max_drop, scores[-1].where_present - max_drop
    good = [score.dice >= dice and score.where_present >= present for score in scores]
    return next(level.name for level, enough in zip(levels, good, strict=True) if enough)


def _cost(bundle: Bundle) -> tuple[int, float, float]:
    """Parameters and GFLOP of what a level computes, and the paper's pace of it."""
    require("torch", extra="export")
    from ..networks import build_empty, count_flops, count_parameters

    network = bundle.spec.network
    if not isinstance(network, UNetPPSpec):
        raise BuildError(f"{bundle.path}: has no levels")
    # heads that the fast mode leaves out are in the whole network's file and in no engine
    used = network.model_copy(update={"deep_supervision": False}) if network.mode == "fast" else network
    published = _PUBLISHED[network.dimensions][f"L{network.level}"]
    return count_parameters(build_empty(used)), count_flops(used, bundle.spec.inference.patch) / 1e9, published


def _image(bundle: Bundle, sample: str | Path | None, validation: Validation | None) -> Volume:
    """What is timed."""
    channels = [channel.name for channel in bundle.spec.channels]
    if sample is not None:
        return read_volume(sample, channels)
    if validation is not None:
        files = validation.cases[0].images
        return read_volume(list(files) if len(files) > 1 else files[0], channels)
    shape = bundle.spec.inference.patch
    noise = np.random.default_rng(0).integers(0, 255, (len(channels), *shape)).astype(np.uint8)
    return Volume(noise, Grid(shape, (1.0, 1.0, 1.0)), "noise")


def _plain(values: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return None if isinstance(values, float) and math.isnan(values) else values
