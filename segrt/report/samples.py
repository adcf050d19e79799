"""A contact sheet of prepared samples with their labels: what the network is about to learn from, to be looked at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..arrays import Array, require
from ..errors import InputError
from .overlay import busiest_slice, colour_labels, draw_legend

_COLUMNS = 4


def write_samples(path: str | Path, samples: Sequence[tuple[str, Array, Array]], names: Mapping[int, str]) -> None:
    """Write a picture with each sample's fullest slice, alone and under its labels.

    Parameters
    ----------
    path : file to write, such as samples.png
    samples : (name, image (Z, Y, X), labels (Z, Y, X) with -1 for what is not learned); not modified
    names : label -> name in the legend

    Raises
    ------
    InputError
        When there is no sample, or labels have another shape than their image.
    BackendError
        When matplotlib is not installed.
    """
    if not samples:
        raise InputError("samples: none given, expected at least one")
    columns = min(_COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(3.2 * columns + 2, 6.6 * rows), facecolor="black")
    cells = figure.subplots(2 * rows, columns, squeeze=False)
    for cell in cells.ravel():
        cell.set_axis_off()
    for number, (name, image, labels) in enumerate(samples):
        if labels.shape != image.shape:
            raise InputError(f"samples: labels of {name!r} have shape {labels.shape}, its image {image.shape}")
        row, column = divmod(number, columns)
        shown = np.maximum(labels, 0)
        z = busiest_slice(shown, 0)
        low, high = np.percentile(image[z], (1, 99))
        for cell in cells[2 * row : 2 * row + 2, column]:
            cell.imshow(image[z], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        cells[2 * row + 1, column].imshow(colour_labels(shown[z], names), interpolation="nearest")
        cells[2 * row, column].set_title(f"{name}, slice {z}", color="white", fontsize=9)
    draw_legend(figure, names)
    figure.tight_layout(rect=(0, 0, 1 - 2 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=80)
