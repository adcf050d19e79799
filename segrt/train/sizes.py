"""TRAIN, what preparing cases will take on disk and in memory, from headers alone; asked before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from ..arrays import Shape3, Spacing3
from ..io.peek import peek
from ..preprocess import working_grid
from ..spec import ModelSpec
from .cache import Storage
from .cases import TrainingCase
from .locations import MOST

DType = Literal["float32", "float16"]

_SHRINKS_TO = 0.8  # of its size: what LZ4 leaves of intensities and their labels; measured .44 (MR as it is) to 1.07 (resampled noise)
_POINT_BYTES = 6
_NO_SPACING = (1.0, 1.0, 1.0)  # what an array without one is taken to have
_SLACK_BYTES = 256 * 2**20  # a worker's own Python and compiled kernels


def cache_bytes(cases: Sequence[TrainingCase], spec: ModelSpec, *, dtype: DType = "float32", storage: Storage = "blosc2") -> int:
    """Estimate what prepared cases take on disk, in bytes; the crop to what is not zero, which makes them smaller, is not known yet."""
    voxels = [_voxels(case, spec)[1] for case in cases]
    one = len(spec.channels) * np.dtype(dtype).itemsize + 2 * (2 if spec.previous else 1)
    points = sum(min(MOST * len(spec.labels), size) for size in voxels) * _POINT_BYTES
    return int(sum(voxels) * one * (_SHRINKS_TO if storage == "blosc2" else 1)) + points


def room_bytes(
    cases: Sequence[TrainingCase], spec: ModelSpec, folder: Path, *, dtype: DType = "float32", storage: Storage = "blosc2", workers: int = 1
) -> int:
    """Estimate the room on disk that preparing cases into `folder` takes, in bytes; those of other settings there make way.

    Each of them stays until the new one is whole, so `workers` of them are there at the same time as what follows them.
    """
    made = cache_bytes(cases, spec, dtype=dtype, storage=storage)
    there = sorted((_stored(folder / case.name) for case in cases), reverse=True)
    return min(made, max(made - sum(there), 0) + sum(there[: max(workers, 1)]))


def _stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*"))


def case_memory(case: TrainingCase, spec: ModelSpec) -> int:
    """Upper bound of what preparing a case holds, in bytes: the image as read and as float32, the result and a copy, labels and masks."""
    image, working = _voxels(case, spec)
    channels = len(spec.channels)
    sorting = 20 if spec.ignore is not None else 0  # every voxel is annotated, and their indices are sorted by label
    return image * (8 * channels + 12) + working * (12 * channels + 24 + sorting) + _SLACK_BYTES


def _voxels(case: TrainingCase, spec: ModelSpec) -> tuple[int, int]:
    """Voxels of the image and of its working grid; zeros when the header cannot be read, which the reader will say better."""
    shape, spacing = _header(case.images)
    if shape is None:
        return 0, 0
    t = spec.transpose
    turned = (shape[t[0]], shape[t[1]], shape[t[2]])
    working, _ = working_grid(spec, turned, (spacing[t[0]], spacing[t[1]], spacing[t[2]]))
    return prod(shape), prod(working)


def _header(images: Sequence[Path]) -> tuple[Shape3 | None, Spacing3]:
    """Shape (z, y, x) and spacing in mm."""
    if images[0].suffix != ".npy":
        header = peek(images)
        return (None, _NO_SPACING) if header is None else (header[0].shape, header[0].spacing)
    try:
        z, y, x = np.load(images[0], mmap_mode="r", allow_pickle=False).shape[-3:]
    except (OSError, ValueError, EOFError):
        return None, _NO_SPACING
    return (z, y, x), _NO_SPACING
