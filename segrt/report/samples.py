"""A contact sheet of prepared samples with their labels: what the network is about to learn from, to be looked at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..arrays import Array
from .overlay import busiest_slice, colour_labels, legend_of
from .sheet import check_shapes, displayed, write_sheet


def write_samples(path: str | Path, samples: Sequence[tuple[str, Array, Array]], names: Mapping[int, str]) -> None:
    """Write a picture with each sample's fullest slice, alone and under its labels.

    Parameters
    ----------
    path : file to write, such as samples.png
    samples : (name, image (C, Z, Y, X), labels (Z, Y, X) with -1 for what is not learned); not modified
    names : label -> name in the legend

    Raises
    ------
    InputError
        When there is no sample, or labels have another shape than their image.
    BackendError
        When matplotlib is not installed.
    """
    cells = []
    for name, image, labels in samples:
        check_shapes("samples", name, image, labels)
        shown = np.maximum(labels, 0)
        z = busiest_slice(shown, 0)
        title = name if len(shown) == 1 else f"{name}, slice {z}"
        cells.append((title, displayed(image[:, z]), colour_labels(shown[z], names)))
    write_sheet(path, cells, legend_of(names), what="samples")
