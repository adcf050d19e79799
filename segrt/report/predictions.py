"""Predictions on one page: what was found, missed and wrong beside a truth, or what was found where there is none (extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..arrays import Array
from ..io import read_labels, read_volume
from ..metrics import Overlap
from .overlay import busiest_slice, colour_labels, legend_of
from .sheet import check_shapes, displayed, write_sheet

TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = "#3cb44b", "#e6194b", "#4363d8"
MOST = 16  # cases a page shows
OVERVIEW = "overview.png"
_MEANING = {"found (TP)": TRUE_POSITIVE, "wrong (FP)": FALSE_POSITIVE, "missed (FN)": FALSE_NEGATIVE}
_OPACITY = 130


def write_errors(path: str | Path, cases: Sequence[tuple[str, Array, Array, Array]]) -> None:
    """Write a page of predictions against their truth: each case's fullest slice, alone and with what is found, wrong and missed.

    A pixel with another label than the truth's is wrong. Dice and IoU in the titles are of the slice, all labels together.

    Parameters
    ----------
    path : file to write, such as predictions.png
    cases : (name, image (C, Z, Y, X), truth (Z, Y, X), prediction (Z, Y, X)); not modified

    Raises
    ------
    InputError
        When there is no case, or shapes differ.
    BackendError
        When matplotlib is not installed.
    """
    cells = []
    for name, image, truth, found in cases:
        check_shapes("predictions", name, image, truth, found)
        z = busiest_slice(truth if truth.any() else found, 0)
        overlap = overlap_of(truth[z], found[z])
        scores = "nothing there" if np.isnan(overlap.dice) else f"Dice {overlap.dice:.2f}, IoU {overlap.iou:.2f}"
        cells.append((f"{name}\n{scores}", displayed(image[:, z]), colour_errors(truth[z], found[z])))
    write_sheet(path, cells, _MEANING, what="predictions")


def write_overview(path: str | Path, cases: Sequence[tuple[str, Array, Array]], names: Mapping[int, str], *, title: str = "") -> None:
    """Write a page of predictions whose truth nobody knows: each case's fullest slice, alone and under its labels.

    Parameters
    ----------
    path : file to write, such as overview.png
    cases : (name, image (C, Z, Y, X), labels (Z, Y, X)); not modified
    names : label value -> name in the legend; other values are not drawn
    title : of the page

    Raises
    ------
    InputError
        When there is no case, or shapes differ.
    BackendError
        When matplotlib is not installed.
    """
    cells = []
    for name, image, labels in cases:
        check_shapes("predictions", name, image, labels)
        z = busiest_slice(labels, 0)
        cells.append((name, displayed(image[:, z]), colour_labels(labels[z], names)))
    write_sheet(path, cells, legend_of(names), what="predictions", title=title)


def overview_of_files(path: str | Path, cases: Sequence[tuple[str, Sequence[Path], Path]], names: Mapping[int, str]) -> None:
    """Write the picture of `write_overview` from files: (name, image files, label file) of each case; of many, some spread evenly.

    Raises
    ------
    InputError, BackendError
        See `write_overview`; or when a file cannot be read.
    """
    shown = [cases[i] for i in spread(len(cases))]
    read = [(name, read_volume(list(files)).data, read_labels(labels)[0]) for name, files, labels in shown]
    write_overview(path, read, names, title=f"{len(shown)} of {len(cases)} cases" if len(shown) < len(cases) else "")


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


def spread(count: int, most: int = MOST) -> list[int]:
    """At most `most` of `count` positions, evenly, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
