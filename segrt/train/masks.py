"""Images and masks in folders of their own, and masks that are grey: TRAIN, part of opening a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..arrays import Array
from ..errors import InputError
from ..io.cases import PICTURE_SUFFIXES, image_suffix
from ..volume import Volume
from .cases import Mask, TrainingCase
from .layouts import Found, paired, suffixed

_PICTURE, _VOLUME = 255, 1  # what foreground is painted with, where a viewer shows values as they are, and elsewhere


def find_masks(images: Path, masks: Path, image_suffixes: str | Sequence[str] | None, mask_suffix: str | None) -> Found:
    """Give the cases of a folder of images and one of masks; by equal names, or by how they end.

    Raises
    ------
    InputError
        When a folder is not there, nothing is found, or an image has no mask or a mask no image.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            why = "is no folder" if folder.exists() else "does not exist"
            raise InputError(f"{folder} {why}; give a folder of images and one of masks")
    if image_suffixes is None and mask_suffix is None:
        return paired(images, masks)
    ends = [image_suffixes or ""] if image_suffixes is None or isinstance(image_suffixes, str) else list(image_suffixes)
    return suffixed(images, masks, ends, mask_suffix or "")


def grey_mask(threshold: float, case: TrainingCase, labels: Mapping[str, int | Sequence[int]] | None) -> Mask:
    """Give the way masks like that of `case` are read; the structure's value is what `labels` says, else 255 in pictures and 1 in volumes.

    Raises
    ------
    InputError
        When `labels` names several structures.
    """
    named = [value for value in (labels or {}).values() if value != 0]
    if len(named) > 1 or not all(isinstance(value, int) for value in named):
        raise InputError(f"mask_threshold: grey masks hold one structure, got labels {dict(labels or {})}; leave the threshold out")
    picture = case.labels is not None and image_suffix(case.labels) in PICTURE_SUFFIXES
    return Mask(threshold, next((v for v in named if isinstance(v, int)), _PICTURE if picture else _VOLUME))


def apply_mask(volume: Volume, mask: Mask) -> Array:
    """(Z, Y, X) int32: `mask.value` where a grey volume is above the threshold, else 0; grey that is stored as colours is grey.

    Raises
    ------
    InputError
        When the volume has colours.
    """
    grey = volume.data[0]
    if (volume.data != grey).any():
        raise InputError(f"{volume.name} has colours, expected a grey mask; save one mask per structure as grey")
    return np.where(grey > mask.threshold, mask.value, 0).astype(np.int32)
