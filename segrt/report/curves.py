"""Curves of one or several trainings in one picture: loss, Dice, learning rate, and where the time goes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, require
from ..errors import InputError

Rows = list[dict[str, str]]
_POINTS = 400  # of a curve; a longer training is averaged down to them


def read_rows(path: Path) -> Rows:
    """Rows of a training's CSV, column -> text ("" where no number was taken); none when there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # a run that was killed may have left half a row
    return [row for row in rows if None not in row and None not in row.values() and row.get("iteration", "").isdigit()]


def write_curves(path: str | Path, runs: Mapping[str, str | Path]) -> None:
    """Write a picture with four panels.

    Parameters
    ----------
    path : file to write, such as curves.png
    runs : name in the legend -> folder with training.csv and validation.csv; a single run also shows the Dice of each class

    Raises
    ------
    InputError
        When there is no run, or a folder holds no training.csv with a row in it.
    BackendError
        When matplotlib is not installed.
    """
    if not runs:
        raise InputError("curves: no run given, expected at least one")
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(13, 8))
    loss, dice, lr, cost = figure.subplots(2, 2).ravel()
    for name, folder in runs.items():
        rows, checks = read_rows(Path(folder) / "training.csv"), read_rows(Path(folder) / "validation.csv")
        if not rows:
            raise InputError(f"{folder}: no training.csv with a row in it; train first")
        _draw(loss, rows, "loss", name)
        if checks:
            _draw(loss, checks, "loss", f"{name}, validation", style="--")
            _draw(dice, checks, "dice", f"{name}, mean")
            if len(runs) == 1:
                _draw(dice, checks, "average", "moving average", style="--")
                for label in list(checks[0])[4:]:
                    _draw(dice, checks, label, label, alpha=0.6)
        else:
            _draw(dice, rows, "dice", f"{name}, training")
        _draw(lr, rows, "lr", name)
        _draw(cost, rows, "batch_cost", f"{name}, batch")
        _draw(cost, rows, "reader_cost", f"{name}, reader", style="--")
    titles = {"loss": loss, "Dice (pseudo, on patches)": dice, "learning rate": lr, "seconds per iteration": cost}
    for title, panel in titles.items():
        panel.set_title(title)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
        if panel.has_data():
            panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _draw(panel: Any, rows: Rows, column: str, label: str, *, style: str = "-", alpha: float = 1.0) -> None:
    points = [(int(row["iteration"]), float(row[column])) for row in rows if row.get(column)]
    if points:
        x, y = _thin(points)
        panel.plot(x, y, style, label=label, alpha=alpha, linewidth=1.2, marker="." if len(x) == 1 else None)


def _thin(points: Sequence[tuple[int, float]]) -> tuple[Array, Array]:
    """At most `_POINTS` means of neighbours."""
    parts = np.array_split(np.asarray(points, np.float64), min(len(points), _POINTS))
    x, y = zip(*(part.mean(0) for part in parts), strict=True)
    return np.asarray(x), np.asarray(y)
