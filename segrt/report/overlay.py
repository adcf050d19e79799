"""A picture of label maps laid over the image they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, Spacing3, require
from ..errors import InputError
from .text import plain_text

# Each organ keeps its colour in every picture; neighbours in the body differ clearly.
# fmt: off
COLOURS = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6",
    "#bcf60c", "#fabebe", "#008080", "#e6beff", "#9a6324", "#fffac8", "#aaffc3", "#808000",
)
# fmt: on
_PLANES = {"axial": 0, "coronal": 1}


@plain_text()
def write_overlay(
    path: str | Path,
    image: Array,
    maps: Mapping[str, Array],
    names: Mapping[int, str],
    *,
    spacing: Spacing3,
    window: tuple[float, float] = (-160.0, 240.0),
    title: str = "",
) -> None:
    """Write a picture: an axial and a coronal slice, the image alone and under each label map, and a legend.

    Parameters
    ----------
    path : file to write, such as overlay.png
    image : (Z, Y, X), z to the head and y to the back; not modified
    maps : title -> (Z, Y, X) labels; the slices shown are those where the first one has most labels
    names : label value -> name in the legend; other values are not drawn
    spacing : (z, y, x) in mm
    window : intensities shown as black and white

    Raises
    ------
    InputError
        When there is no label map, or one has another shape than the image.
    BackendError
        When matplotlib is not installed.
    """
    if not maps:
        raise InputError("overlay: no label map given, expected at least one")
    for name, labels in maps.items():
        if labels.shape != image.shape:
            raise InputError(f"overlay: {name!r} has shape {labels.shape}, the image {image.shape}")
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(4 * (1 + len(maps)) + 2, 8.4), facecolor="black")
    cells = figure.subplots(len(_PLANES), 1 + len(maps), squeeze=False)
    first = next(iter(maps.values()))
    for row, (plane, axis) in zip(cells, _PLANES.items(), strict=True):
        position = busiest_slice(first, axis)
        aspect = spacing[0] / spacing[2] if axis else spacing[1] / spacing[2]
        for cell, name in zip(row, ["image", *maps], strict=True):
            cell.imshow(_slice(image, axis, position), cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect)
            if name in maps:
                cell.imshow(colour_labels(_slice(maps[name], axis, position), names), aspect=aspect, interpolation="nearest")
            cell.set_title(f"{name}, {plane} {position}", color="white", fontsize=11)
            cell.set_axis_off()
    draw_legend(figure, legend_of(names))
    figure.suptitle(title, color="white")
    figure.tight_layout(rect=(0, 0, 1 - 2 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=90)


def busiest_slice(labels: Array, axis: int) -> int:
    """Slice along `axis` that shows most different labels, and of those the one with most of them."""
    planes = np.moveaxis(labels, axis, 0)
    step = max(1, len(planes) // 100)
    return max(range(0, len(planes), step), key=lambda i: (len(np.unique(planes[i])), np.count_nonzero(planes[i])))


def _slice(array: Array, axis: int, position: int) -> Array:
    """One slice with the head or the front of the body up."""
    plane: Array = np.take(array, position, axis)
    return plane[::-1] if axis else plane


def colour_labels(labels: Array, names: Mapping[int, str]) -> Array:
    """(Y, X, 4) uint8: half-transparent colour on the named labels, nothing elsewhere."""
    table = np.zeros((int(max((labels.max(initial=0), *names))) + 1, 4), np.uint8)
    for number, value in enumerate(names):
        hexadecimal = COLOURS[number % len(COLOURS)].removeprefix("#")
        table[value] = (*bytes.fromhex(hexadecimal), 130)
    coloured: Array = table[labels]
    return coloured


def legend_of(names: Mapping[int, str]) -> dict[str, str]:
    """The text and colour of each label, as `draw_legend` takes them; colours begin again after the last, so there the legend ends."""
    legend = {f"{value} {name}": colour for (value, name), colour in zip(names.items(), COLOURS, strict=False)}
    return legend | ({f"and {len(names) - len(COLOURS)} more": "black"} if len(names) > len(COLOURS) else {})


def draw_legend(figure: Any, legend: Mapping[str, str]) -> None:
    """Name colours at the right edge of the figure."""
    patch = require("matplotlib.patches", extra="report").Patch
    handles = [patch(color=colour, label=text) for text, colour in legend.items()]
    figure.legend(handles=handles, loc="center right", fontsize=10, frameon=False, labelcolor="white")
