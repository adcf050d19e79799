"""Small datasets and configurations: what the tests of preparing, sampling and loading are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from factories import UNET_3D, banded, make_spec, write_case

from segrt.arrays import Shape3, Spacing3
from segrt.spec import ModelSpec
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.configuration import Configuration


def write_dataset(
    folder: Path,
    shapes: Sequence[Shape3] = ((12, 14, 10), (9, 16, 11)),
    *,
    values: Sequence[int] = (0, 1, 2),
    spacing: Spacing3 = (1.0, 1.0, 1.0),
    channels: int = 1,
    **fields: Any,
) -> Dataset:
    """Cases a, b, ... whose label is `values`[intensity // 100] and whose corners are 0."""
    cases = []
    for number, shape in enumerate(shapes):
        name = chr(ord("a") + number)
        classes = banded(shape, classes=len(values), seed=number)
        noise = np.random.default_rng(number).integers(0, 50, (channels, *shape))
        images = []
        for channel in range(channels):
            image = (classes * 100 + 1 + noise[channel]).astype(np.int16)
            image[0, :, :] = 0
            images.append(write_case(folder / "images" / f"{name}_{channel:04d}.nii.gz", image, spacing))
        labels = write_case(folder / "labels" / f"{name}.nii.gz", np.asarray(values, np.uint8)[classes], spacing)
        cases.append(TrainingCase(name, tuple(images), labels))
    declared = {"labels": {"background": (0,)} | {f"organ {v}": (v,) for v in values if v}, **fields}
    return Dataset("tiny", folder, tuple(f"MR {c}" for c in range(channels)), cases=tuple(cases), **declared)


def configure(spec: ModelSpec | None = None, *, batch_size: int = 2, deep_supervision: bool = False, **changes: Any) -> Configuration:
    """A configuration around a spec, by default one of `make_spec` with a small U-Net."""
    spec = spec or make_spec(**{"network": UNET_3D} | changes)
    return Configuration(spec=spec, batch_size=batch_size, batch_dice=False, median_shape=(8, 8, 8), deep_supervision=deep_supervision)
