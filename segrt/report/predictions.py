"""Predictions on one page: what was found, missed and wrong beside a truth, or what was found where there is none (extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, require
from ..errors import InputError
from ..io import read_labels, read_volume
from ..metrics import Overlap
from .overlay import COLOURS, busiest_slice, colour_labels, draw_legend

TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = "#3cb44b", "#e6194b", "#4363d8"
MOST = 16  # cases a page shows
OVERVIEW = "overview.png"
_MEANING = {"found (TP)": TRUE_POSITIVE, "wrong (FP)": FALSE_POSITIVE, "missed (FN)": FALSE_NEGATIVE}
_OPACITY = 130
_COLUMNS = 4


def write_errors(path: str | Path, cases: Sequence[tuple[str, Array, Array, Array]]) -> None:
    """Write a picture of predictions beside their truth: of each case its fullest slice, with true and false positives and false negatives.

    Parameters
    ----------
    path : file to write, such as predictions.png
    cases : (name, image (C, Z, Y, X), truth (Z, Y, X), prediction (Z, Y, X)); not modified. A pixel of another label than the truth's is
        wrong; Dice and IoU in the titles are of this slice, all labels together

    Raises
    ------
    InputError
        When there is no case, or shapes differ.
    BackendError
        When matplotlib is not installed.
    """
    pages = []
    for name, image, truth, found in cases:
        _check(name, image, truth, found)
        z = busiest_slice(truth if truth.any() else found, 0)
        true, guess = truth[z], found[z]
        overlap = overlap_of(true, guess)
        scores = "nothing there" if np.isnan(overlap.dice) else f"Dice {overlap.dice:.2f}, IoU {overlap.iou:.2f}"
        pages.append((f"{name}\n{scores}", displayed(image[:, z]), colour_errors(true, guess)))
    figure = _sheet(pages)
    patch = require("matplotlib.patches", extra="report").Patch
    handles = [patch(color=colour, label=meaning) for meaning, colour in _MEANING.items()]
    figure.legend(handles=handles, loc="center right", fontsize=10, frameon=False, labelcolor="white")
    _save(figure, path)


def write_overview(path: str | Path, cases: Sequence[tuple[str, Array, Array]], names: Mapping[int, str]) -> None:
    """Write a picture of predictions: of each case its fullest slice, alone and under its labels.

    Parameters
    ----------
    path : file to write, such as overview.png
    cases : (name, image (C, Z, Y, X), labels (Z, Y, X)); not modified
    names : label value -> name in the legend; other values are not drawn

    Raises
    ------
    InputError
        When there is no case, or shapes differ.
    BackendError
        When matplotlib is not installed.
    """
    pages = []
    for name, image, labels in cases:
        _check(name, image, labels)
        z = busiest_slice(labels, 0)
        pages.append((name, displayed(image[:, z]), colour_labels(labels[z], names)))
    figure = _sheet(pages)
    draw_legend(figure, dict(list(names.items())[: len(COLOURS)]))
    _save(figure, path)


def overview_of_files(path: str | Path, cases: Sequence[tuple[str, Sequence[Path], Path]], names: Mapping[int, str]) -> None:
    """Write the picture of `write_overview` from files: (name, image files, label file) of each case; of many, some spread evenly.

    Raises
    ------
    InputError, BackendError
        See `write_overview`; or when a file cannot be read.
    """
    shown = [cases[i] for i in spread(len(cases))]
    write_overview(path, [(name, read_volume(list(files)).data, read_labels(labels)[0]) for name, files, labels in shown], names)


def overlap_of(truth: Array, found: Array) -> Overlap:
    """Voxels of foreground that are right, wrong and missed, all labels together."""
    right = int(np.count_nonzero((found == truth) & (truth != 0)))
    predicted, there = int(np.count_nonzero(found)), int(np.count_nonzero(truth))
    return Overlap(right, predicted - right, there - right, truth.size - predicted - there + right)


def colour_errors(truth: Array, found: Array) -> Array:
    """(Y, X, 4) uint8: half-transparent green where a label is right, red where it is wrong, blue where there should be one."""
    coloured = np.zeros((*truth.shape, 4), np.uint8)
    for where, colour in (
        ((truth != 0) & (found == 0), FALSE_NEGATIVE),
        ((found != 0) & (found != truth), FALSE_POSITIVE),
        ((found != 0) & (found == truth), TRUE_POSITIVE),
    ):
        coloured[where] = (*bytes.fromhex(colour.removeprefix("#")), _OPACITY)
    return coloured


def displayed(image: Array) -> Array:
    """(Y, X, 3) uint8: colours as they are, one grey channel (the first) else, from the 1st to the 99th percentile of all."""
    shown = image if len(image) == 3 else np.repeat(image[:1], 3, 0)
    low, high = np.percentile(shown, (1, 99))
    scaled = (shown.astype(np.float32) - low) / max(float(high - low), 1e-6)
    page: Array = np.moveaxis((scaled.clip(0, 1) * 255).astype(np.uint8), 0, -1)
    return page


def spread(count: int, most: int = MOST) -> list[int]:
    """At most `most` of `count` positions, evenly, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _check(name: str, image: Array, *maps: Array) -> None:
    for labels in maps:
        if labels.shape != image.shape[1:]:
            raise InputError(f"predictions: labels of {name!r} have shape {labels.shape}, its image {image.shape[1:]}")


def _sheet(pages: Sequence[tuple[str, Array, Array]]) -> Any:
    """Title, picture and overlay of each case: the picture alone above the one with the overlay."""
    if not pages:
        raise InputError("predictions: none given, expected at least one")
    columns = min(_COLUMNS, len(pages))
    rows = -(-len(pages) // columns)
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(3.2 * columns + 2, 6.8 * rows), facecolor="black")
    cells = figure.subplots(2 * rows, columns, squeeze=False)
    for cell in cells.ravel():
        cell.set_axis_off()
    for number, (title, picture, overlay) in enumerate(pages):
        row, column = divmod(number, columns)
        for cell in cells[2 * row : 2 * row + 2, column]:
            cell.imshow(picture)
        cells[2 * row + 1, column].imshow(overlay, interpolation="nearest")
        cells[2 * row, column].set_title(title, color="white", fontsize=9)
    return figure


def _save(figure: Any, path: str | Path) -> None:
    figure.tight_layout(rect=(0, 0, 1 - 2 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=70)
