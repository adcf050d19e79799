"""A page of cases: each one's picture, below it the same under an overlay, and a legend at the side (extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..arrays import Array, require
from ..errors import InputError
from .overlay import draw_legend
from .text import plain_text

_COLUMNS = 4


@plain_text()
def write_sheet(
    path: str | Path, cells: Sequence[tuple[str, Array, Array]], legend: Mapping[str, str], *, what: str, title: str = ""
) -> None:
    """Write a page, four cases in a row.

    Parameters
    ----------
    path : file to write
    cells : (name, picture (Y, X, 3) uint8, overlay (Y, X, 4) uint8) of each case
    legend : text -> colour, such as "#3cb44b"
    what : what the cases are, for the error
    title : of the page

    Raises
    ------
    InputError
        When there is no case.
    BackendError
        When matplotlib is not installed.
    """
    if not cells:
        raise InputError(f"{what}: none given, expected at least one")
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(3.2 * columns + 2, 6.8 * rows), facecolor="black")
    places = figure.subplots(2 * rows, columns, squeeze=False)
    for place in places.ravel():
        place.set_axis_off()
    for number, (name, picture, overlay) in enumerate(cells):
        row, column = divmod(number, columns)
        for place in places[2 * row : 2 * row + 2, column]:
            place.imshow(picture)
        places[2 * row + 1, column].imshow(overlay, interpolation="nearest")
        places[2 * row, column].set_title(name, color="white", fontsize=9)
    if title:
        figure.suptitle(title, color="white")
    draw_legend(figure, legend)
    figure.tight_layout(rect=(0, 0, 1 - 2 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=75)


def displayed(image: Array) -> Array:
    """(C, Y, X) -> (Y, X, 3) uint8: colours as they are, one grey channel (the first) else, from the 1st to the 99th percentile of all."""
    shown = image if len(image) == 3 else np.repeat(image[:1], 3, 0)
    low, high = np.percentile(shown, (1, 99))
    scaled = (shown.astype(np.float32) - low) / max(float(high - low), 1e-6)
    page: Array = np.moveaxis((scaled.clip(0, 1) * 255).astype(np.uint8), 0, -1)
    return page


def check_shapes(what: str, name: str, image: Array, *maps: Array) -> None:
    """Raise an InputError unless label maps (Z, Y, X) have the shape of their image (C, Z, Y, X)."""
    for labels in maps:
        if labels.shape != image.shape[1:]:
            raise InputError(f"{what}: labels of {name!r} have shape {labels.shape}, its image {image.shape[1:]}")
