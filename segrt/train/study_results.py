"""What a study found, as stored in study.json: a record per run, read from the bundles and records it left."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..errors import InputError, SpecError
from ..report.curves import read_rows
from ..spec import Part
from .config import TrainConfig

Status = Literal["waiting", "finished", "failed", "stopped"]


class Pair(Part):
    """A score without and with post-processing; None where there is none."""

    without: float | None
    with_: float | None = Field(alias="with")


class RunRecord(Part):
    """One run of a study.

    Attributes
    ----------
    status, error : how it stands, and the sentence of a failure
    cores : of the machine it ran on
    training, validation : cases of each fold to train on, and all that were validated
    iterations, training_s : per fold; seconds of the iterations alone
    iteration_s : median over all iterations
    flops_per_patch : of one forward pass
    dice : structure -> mean over the validation cases that have it; mean_dice is the mean over the structures
    postprocess : what was tried, a sentence each
    """

    name: str
    config: TrainConfig
    cores: int
    status: Status = "waiting"
    error: str = ""
    training: tuple[int, ...] = ()
    validation: int = 0
    iterations: tuple[int, ...] = ()
    training_s: tuple[float, ...] = ()
    iteration_s: float | None = None
    parameters: int | None = None
    flops_per_patch: int | None = None
    dice: dict[str, Pair] = Field(default_factory=dict)
    mean_dice: Pair | None = None
    postprocess: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """What was trained."""
        return self.config.model

    @property
    def optimizer(self) -> str:
        """And how."""
        return self.config.optimizer


class Study(Part):
    """All runs of a study, finished or not.

    Attributes
    ----------
    dataset, digest : the name, and the SHA-256 of what its files are
    environment : machine and versions
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    dataset: str
    digest: str
    environment: dict[str, object]
    runs: tuple[RunRecord, ...]

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """Runs that have scores."""
        return tuple(run for run in self.runs if run.status == "finished")

    @property
    def best(self) -> RunRecord | None:
        """The finished run with the highest mean Dice with post-processing; of equals the first."""
        return max(self.finished, key=lambda run: _number(run.mean_dice.with_ if run.mean_dice else None, -1.0), default=None)

    @property
    def panels(self) -> dict[str, dict[str, dict[str, float]]]:
        """Without, with -> run -> structure -> Dice."""
        return {
            "without": {run.name: {name: _number(pair.without) for name, pair in run.dice.items()} for run in self.finished},
            "with": {run.name: {name: _number(pair.with_) for name, pair in run.dice.items()} for run in self.finished},
        }

    @property
    def caption(self) -> str:
        """What the table of Dice shows."""
        lengths = " or ".join(dict.fromkeys(run.config.length for run in self.finished))
        cases = " or ".join(dict.fromkeys(str(run.validation) for run in self.finished))
        kind = "training cases of its own" if any("all" in run.config.folds for run in self.finished) else "validation cases"
        return f"Dice (1 is best) on {self.dataset}, mean over {cases} {kind}, after {lengths} of training; best of a row in bold"

    @property
    def rows(self) -> list[dict[str, str]]:
        """A row per finished run: its settings, how far it came, its scores."""
        return [_row(run) for run in self.finished]

    def to_json(self) -> str:
        """The text of study.json."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def load_study(path: Path) -> Study:
    """Read a study.json.

    Raises
    ------
    SpecError
        When it is none of ours.
    """
    try:
        return Study.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as err:
        raise SpecError(f"{path}: no readable study ({' '.join(str(err).split())[:200]}); choose another folder, or --force") from err


def collect(record: RunRecord, bundle: Path, folds: Sequence[Path]) -> RunRecord:
    """Complete the record of a finished run from its bundle's reports and the folders of its folds.

    Raises
    ------
    InputError
        When one of them cannot be read.
    """
    choice = _read(bundle / "reports" / "postprocess.json")
    machine = _read(folds[0] / "environment.json")
    costs = [[float(row["batch_cost"]) for row in read_rows(fold / "training.csv")] for fold in folds]
    return record.model_copy(
        update={
            "validation": choice["cases"],
            "iterations": tuple(len(cost) for cost in costs),
            "training_s": tuple(round(math.fsum(cost), 3) for cost in costs),
            "iteration_s": round(statistics.median(cost for fold in costs for cost in fold), 5),
            "parameters": machine["parameters"],
            "flops_per_patch": machine["flops_per_patch"],
            "dice": {name: Pair.model_validate(pair) for name, pair in choice["dice"].items()},
            "mean_dice": Pair.model_validate(choice["mean_dice"]),
            "postprocess": tuple(choice["tried"]),
        }
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: cannot be read ({err}); delete the run's bundle and run the study again") from err
    return values


def _row(run: RunRecord) -> dict[str, str]:
    config = run.config
    own = {"sgd": f"momentum {config.momentum:g}{', Nesterov' if config.nesterov else ''}"}
    settings = own.get(config.optimizer, "betas " + ", ".join(f"{beta:g}" for beta in config.betas))
    pair = run.mean_dice or Pair.model_validate({"without": None, "with": None})
    return {
        "run": run.name,
        "optimizer": f"{config.optimizer}, {settings}",
        "learning rate": f"{config.lr:g}",
        "weight decay": f"{config.weight_decay:g}",
        "parameters": f"{run.parameters:,}" if run.parameters else "-",
        "iterations": " + ".join(str(count) for count in run.iterations),
        "s per iteration": f"{run.iteration_s:.3f}" if run.iteration_s is not None else "-",
        "training (min)": " + ".join(f"{seconds / 60:.2f}" for seconds in run.training_s),
        "Dice without post-processing": _text(pair.without),
        "with": _text(pair.with_),
    }


def _text(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"


def _number(score: float | None, missing: float = math.nan) -> float:
    return missing if score is None else score
