"""Curves of one or several trainings in one picture: loss, Dice, learning rate, and where the time goes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, require
from ..errors import InputError
from .text import legend_text, plain_text

Rows = list[dict[str, str]]
_POINTS = 400  # of a curve; a longer training is averaged down to them
_SMOOTH = 80  # where many curves share a panel, whose noise would hide them


def read_rows(path: Path) -> Rows:
    """Rows of a training's CSV, column -> text ("" where no number was taken); none when there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # a run that was killed may have left half a row
    return [row for row in rows if None not in row and None not in row.values() and row.get("iteration", "").isdigit()]


@plain_text()
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
        _draw(dice, rows, "dice", f"{name}, training", alpha=0.5)
        if checks:
            _draw(loss, checks, "loss", f"{name}, validation", style="--")
            _draw(dice, checks, "dice", f"{name}, validation")
            if len(runs) == 1:
                _draw(dice, checks, "average", "moving average", style="--")
                for label in _parts(checks):
                    _draw(dice, checks, label, label, alpha=0.6)
        _draw(lr, rows, "lr", name)
        _draw(cost, rows, "batch_cost", f"{name}, batch")
        _draw(cost, rows, "reader_cost", f"{name}, reader", style="--")
    titles = {"loss": loss, "Dice of batches": dice, "learning rate": lr, "seconds per iteration": cost}
    for title, panel in titles.items():
        panel.set_title(title)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
        if panel.has_data():
            panel.legend(fontsize=8)
    _spare_outliers(loss)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


@plain_text()
def write_comparison(path: str | Path, runs: Mapping[tuple[str, str], Sequence[Path]]) -> None:
    """Write a picture of a study: loss and validation Dice of all runs, over iterations on the left and over training time on the right.

    The losses of each model have a row of their own, for models may differ in what they minimise. Time is the sum of the iterations'.

    Parameters
    ----------
    path : file to write
    runs : (model, optimizer) -> folders with training.csv and validation.csv, one per fold

    Raises
    ------
    InputError
        When there is no run.
    BackendError
        When matplotlib is not installed.
    """
    if not runs:
        raise InputError("curves: no run given, expected at least one")
    models, optimizers = (list(dict.fromkeys(names)) for names in zip(*runs, strict=True))
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(13, 3.6 * (len(models) + 1)), layout="constrained")
    panels = figure.subplots(len(models) + 1, 2, sharex="col", sharey="row", squeeze=False)
    for (model, optimizer), folders in runs.items():
        look = {"color": f"C{optimizers.index(optimizer)}", "linestyle": ("-", "--", ":", "-.")[models.index(model) % 4]}
        for number, folder in enumerate(folders):
            label = legend_text(f"{model}, {optimizer}") if number == 0 else None
            rows, checks = read_rows(folder / "training.csv"), read_rows(folder / "validation.csv")
            minutes = np.cumsum([0.0, *(float(row["batch_cost"]) for row in rows)]) / 60
            for column, scale in enumerate((np.arange(len(minutes)), minutes)):
                _trace(panels[models.index(model), column], rows, "loss", scale, look | {"label": label}, points=_SMOOTH)
                _trace(panels[-1, column], checks, "dice", scale, look | {"label": label, "marker": "."}, points=_POINTS)
    for row, title in zip(
        panels, [*(f"training loss of {model}" for model in models), "validation Dice (pseudo, on patches)"], strict=True
    ):
        row[0].set_ylabel(title)
        for panel in row:
            panel.grid(alpha=0.3)
            if panel.has_data():
                panel.legend(fontsize=8)
    for panel, unit in zip(panels[-1], ("iteration", "training time (min)"), strict=True):
        panel.set_xlabel(unit)
    figure.savefig(path, dpi=100)


def _parts(checks: Rows) -> list[str]:
    """Columns of the single classes, but for one that is the mean itself."""
    return [name for name in list(checks[0])[4:] if any(row[name] != row["dice"] for row in checks)]


def _spare_outliers(panel: Any) -> None:
    """Let a few values far from all others, as a network has before it has learnt, not flatten the curves."""
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in panel.get_lines()])
    low, high = np.nanpercentile(values, (1, 99))
    margin = 0.2 * (high - low)
    if margin > 0 and (values.min() < low - margin or values.max() > high + margin):
        panel.set_ylim(low - margin, high + margin)


def _trace(panel: Any, rows: Rows, column: str, scale: Array, look: Mapping[str, Any], *, points: int) -> None:
    """A curve over `scale`[iteration]."""
    values = [(scale[int(row["iteration"])], float(row[column])) for row in rows if row.get(column) and int(row["iteration"]) < len(scale)]
    if values:
        x, y = _thin(values, points)
        panel.plot(x, y, linewidth=1.2, **look)


def _draw(panel: Any, rows: Rows, column: str, label: str, *, style: str = "-", alpha: float = 1.0) -> None:
    points = [(int(row["iteration"]), float(row[column])) for row in rows if row.get(column)]
    if points:
        x, y = _thin(points)
        panel.plot(x, y, style, label=legend_text(label), alpha=alpha, linewidth=1.2, marker="." if len(x) == 1 else None)


def _thin(points: Sequence[tuple[float, float]], most: int = _POINTS) -> tuple[Array, Array]:
    """At most that many means of neighbours."""
    parts = np.array_split(np.asarray(points, np.float64), min(len(points), most))
    x, y = zip(*(part.mean(0) for part in parts), strict=True)
    return np.asarray(x), np.asarray(y)
