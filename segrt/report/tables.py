"""Dice tables, organ by run, as text that a spreadsheet, a README or an article takes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from ..files import write_atomic

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
    return _write(stem, formats)


def write_panels(stem: str | Path, name: str, panels: Mapping[str, Scores], *, caption: str) -> tuple[Path, ...]:
    """Write `stem`.csv, .md and .tex: tables of organ by run below each other, one per panel; the best score of a row is bold.

    Parameters
    ----------
    stem : path without suffix
    name : what differs between panels, such as "post-processing"; the CSV has a column of this name
    panels : its values -> column -> organ -> score, as in `write_tables`

    Raises
    ------
    InputError
        When there is no run.
    """
    header = ["organ", *next(iter(panels.values()), {})]
    lines = [[organ, value, *map(_exact, scores)] for value, runs in panels.items() for organ, scores in _rows(runs)]
    formats = {
        ".csv": _csv([header[0], name, *header[1:]], lines),
        ".md": f"{_plain(caption)}\n" + "".join(f"\n{value} {name}:\n\n{to_markdown(runs)}" for value, runs in panels.items()),
        ".tex": _latex(header, {f"{value} {name}": _latex_rows(runs) for value, runs in panels.items()}, caption),
    }
    return _write(stem, formats)


def write_rows(stem: str | Path, rows: Sequence[Mapping[str, str]], *, caption: str) -> tuple[Path, ...]:
    """Write `stem`.csv, .md and .tex: a table of text as it stands, a row per mapping.

    Raises
    ------
    InputError
        When there is no row.
    """
    if not rows:
        raise InputError("table: no row given, expected at least one")
    header, lines = list(rows[0]), [list(row.values()) for row in rows]
    body = [" & ".join(map(_escaped, line)) for line in lines]
    formats = {
        ".csv": _csv(header, lines),
        ".md": f"{_plain(caption)}\n\n" + _markdown(header, [list(map(_plain, line)) for line in lines]),
        ".tex": _latex(header, {"": body}, caption),
    }
    return _write(stem, formats)


def to_csv(runs: Scores) -> str:
    """The table with all digits; an empty field where there is no score."""
    return _csv(["organ", *runs], [[organ, *map(_exact, scores)] for organ, scores in _rows(runs)])


def to_markdown(runs: Scores) -> str:
    """The table for a README; the best score of a row is bold."""
    return _markdown(["organ", *runs], [[_plain(organ), *_cells(scores, "**{}**")] for organ, scores in _rows(runs)])


def to_latex(runs: Scores, *, caption: str = "Dice") -> str:
    """The table for an article (package booktabs); the best score of a row is bold."""
    return _latex(["organ", *runs], {"": _latex_rows(runs)}, caption)


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


def _write(stem: str | Path, formats: Mapping[str, str]) -> tuple[Path, ...]:
    path = Path(stem)
    return tuple(write_atomic(path.with_name(path.name + suffix), text) for suffix, text in formats.items())


def _csv(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *lines])
    return text.getvalue()


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [[_plain(name) for name in header], *lines]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([text[0], "|---|" + "---|" * (len(header) - 1), *text[1:]]) + "\n"


def _latex(header: Sequence[str], panels: Mapping[str, Sequence[str]], caption: str) -> str:
    """`panels` holds rows without their ends, under a title each where there are several."""
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escaped(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(_escaped(name) for name in header) + r" \\",
    ]
    for title, rows in panels.items():
        lines.append(r"\midrule")
        if title:
            lines += [rf"\multicolumn{{{len(header)}}}{{l}}{{\emph{{{_escaped(title)}}}}} \\", r"\midrule"]
        lines += [row if row.startswith("\\") else row + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _latex_rows(runs: Scores) -> list[str]:
    rows = []
    for organ, scores in _rows(runs):
        if organ == MEAN:
            rows.append(r"\midrule")
        rows.append(" & ".join([_escaped(organ), *_cells(scores, r"\textbf{{{}}}")]))
    return rows


def _cells(scores: Sequence[float], mark: str) -> list[str]:
    return [_cell(score, best=_is_best(score, scores), mark=mark) for score in scores]


def _is_best(score: float, scores: Sequence[float]) -> bool:
    present = [round(other, 4) for other in scores if not math.isnan(other)]
    return len(present) > 1 and min(present) < max(present) == round(score, 4)


def _cell(score: float, *, best: bool, mark: str) -> str:
    if math.isnan(score):
        return "-"
    return mark.format(f"{score:.4f}") if best else f"{score:.4f}"


def _exact(score: float) -> str:
    return "" if math.isnan(score) else repr(float(score))


def _plain(text: str) -> str:
    return text.replace("|", r"\|")


def _escaped(text: str) -> str:
    escapes = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escapes.get(c, c) for c in text)
