"""Dice tables, organ by run, as text that a spreadsheet, a README or an article takes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..bundle import write_atomic
from ..errors import InputError

Scores = Mapping[str, Mapping[str, float]]
MEAN = "mean"


def write_tables(stem: str | Path, runs: Scores, *, caption: str = "Dice") -> tuple[Path, ...]:
    """Write `stem`.csv, .md and .tex: a row per organ and one for their mean, a column per run.

    Parameters
    ----------
    stem : path without suffix
    runs : column -> organ -> score; NaN where there is none. Organs keep the order in which they first come

    Returns
    -------
    tuple of Path
        the three files

    Raises
    ------
    InputError
        When there is no run.
    """
    formats = {".csv": to_csv(runs), ".md": to_markdown(runs), ".tex": to_latex(runs, caption=caption)}
    path = Path(stem)
    return tuple(write_atomic(path.with_name(path.name + suffix), text) for suffix, text in formats.items())


def to_csv(runs: Scores) -> str:
    """The table with all digits; an empty field where there is no score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["organ", *runs])
    for organ, scores in _rows(runs):
        writer.writerow([organ, *("" if math.isnan(score) else repr(float(score)) for score in scores)])
    return text.getvalue()


def to_markdown(runs: Scores) -> str:
    """The table for a README; the best score of a row is bold."""
    lines = ["| organ | " + " | ".join(_plain(name) for name in runs) + " |", "|---|" + "---|" * len(runs)]
    for organ, scores in _rows(runs):
        cells = (_cell(score, best=_is_best(score, scores), mark="**{}**") for score in scores)
        lines.append(f"| {_plain(organ)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_latex(runs: Scores, *, caption: str = "Dice") -> str:
    """The table for an article (package booktabs); the best score of a row is bold."""
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escaped(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(runs)}}}",
        r"\toprule",
        "organ & " + " & ".join(_escaped(name) for name in runs) + r" \\",
        r"\midrule",
    ]
    for organ, scores in _rows(runs):
        if organ == MEAN:
            lines.append(r"\midrule")
        cells = (_cell(score, best=_is_best(score, scores), mark=r"\textbf{{{}}}") for score in scores)
        lines.append(f"{_escaped(organ)} & " + " & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def mean_score(scores: Mapping[str, float]) -> float:
    """Mean of the scores that there are; NaN without any."""
    present = [score for score in scores.values() if not math.isnan(score)]
    return sum(present) / len(present) if present else math.nan


def _rows(runs: Scores) -> list[tuple[str, list[float]]]:
    if not runs:
        raise InputError("table: no run given, expected at least one")
    organs = dict.fromkeys(organ for scores in runs.values() for organ in scores)
    rows = [(organ, [scores.get(organ, math.nan) for scores in runs.values()]) for organ in organs]
    return [*rows, (MEAN, [mean_score(scores) for scores in runs.values()])]


def _is_best(score: float, scores: Sequence[float]) -> bool:
    present = [round(other, 4) for other in scores if not math.isnan(other)]
    return len(present) > 1 and min(present) < max(present) == round(score, 4)


def _cell(score: float, *, best: bool, mark: str) -> str:
    if math.isnan(score):
        return "-"
    return mark.format(f"{score:.4f}") if best else f"{score:.4f}"


def _plain(text: str) -> str:
    return text.replace("|", r"\|")


def _escaped(text: str) -> str:
    escapes = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escapes.get(c, c) for c in text)
