"""Training images in .npy files: arrays that say neither a spacing nor which intensities they hold; TRAIN, where a dataset is opened."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..io import read_volume
from ..volume import Volume
from .cases import Dataset
from .config import WINDOWS, TrainConfig

logger = logging.getLogger(__name__)

_AS_THEY_ARE = (0.0, 255.0)  # 0 means 0 and 255 means 255


def read_npy(path: Path, window: tuple[float, float] | None) -> Volume:
    """Read an array without geometry, (Z, Y, X) or (C, Z, Y, X), its spacing taken as 1 mm; `window` are the intensities of 0 and 255.

    Raises
    ------
    InputError
        When the file is no such array of numbers.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        raise InputError(f"{path.name} cannot be read as an array of numbers ({err})") from err
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path.name} is an archive of arrays, expected one array (.npy)")
    try:
        volume = read_volume((array, (1.0, 1.0, 1.0)))
    except InputError as err:
        raise InputError(f"{path.name}: {err}") from err
    data = volume.data
    if window is not None:
        data = data.astype(np.float32) * np.float32((window[1] - window[0]) / 255) + np.float32(window[0])
    return Volume(data, volume.grid, path.name)


def parse_npy_window(text: str) -> tuple[float, float]:
    """Give the intensities of 0 and 255 that a text means: "article", "abdomen", two numbers, or "none" for intensities as they are.

    Raises
    ------
    InputError
        When it means nothing of these.
    """
    if text == "none":
        return _AS_THEY_ARE
    if text in WINDOWS:
        return WINDOWS[text]
    try:
        lower, upper = (float(part) for part in text.split(","))
        if not lower < upper:
            raise ValueError
    except ValueError as err:
        raise InputError(
            f"npy_window: expected {', '.join(WINDOWS)}, none, or a number and a higher one such as -1200,600, got {text!r}"
        ) from err
    return lower, upper


def check_intensities(dataset: Dataset, config: TrainConfig) -> None:
    """Make sure that arrays whose intensities nobody tells meet no normalisation of intensities that mean the same everywhere.

    Such arrays mostly hold 0..255 of a window already. Taken for HU, a second window would squeeze them, and the trained model would see
    nothing alike in a scanner's images.

    Raises
    ------
    InputError
        When a channel would be clipped and scaled by numbers of its own, and `Dataset.npy_window` is None.
    """
    if not dataset.arrays or dataset.npy_window is not None:
        return
    hounsfield = tuple(name for name in dataset.channels if name.casefold() == "ct")
    if config.model != "nnunet" and config.window != "auto":
        hounsfield = () if config.window in ("zscore", "none") else dataset.channels
    if hounsfield:
        raise InputError(
            f"npy_window: the arrays of dataset {dataset.name} do not say which intensities they hold, and channel {hounsfield[0]} gets a "
            "window of them; say which ones 0 and 255 stand for (--npy-window -1200,600), or none when arrays hold intensities as they are"
        )
    logger.warning(
        "dataset %s: .npy files say no spacing (taken as 1 mm) and not which intensities they hold; npy_window tells it", dataset.name
    )
