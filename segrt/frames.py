"""PREDICT for streams of pictures: each frame is prepared and decided by itself, and several share the network's batches as one stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice

import numpy as np

from .arrays import Array, FloatArray
from .device import get_xp, to_device, to_host
from .errors import InputError
from .opened import OpenModel, Worked
from .postprocess import postprocess
from .preprocess import preprocess
from .restore import restore
from .spec import ModelSpec, PostprocessStep
from .volume import Grid, Placement, Volume

# what pictures have, see `segrt.io`: slices a volume's neighbours would be far away from
_THICK = 999.0


def check_stream(spec: ModelSpec, *, pair: bool) -> None:
    """Raise an InputError unless the model sees single slices, one frame after the other."""
    reason = (
        f"its network has {spec.dimensions} dimensions"
        if spec.dimensions != 2
        else "it is the second stage of a cascade"
        if spec.previous
        else "it is a pair"
        if pair
        else "its slices are not those of its images"
        if spec.transpose[0] != 0
        else ""
    )
    if reason:
        raise InputError(f"frames: model {spec.name!r} cannot take a stream of frames, for {reason}; call the Predictor on each image")


def in_groups(frames: Iterable[Array], count: int, spec: ModelSpec, spacing: tuple[float, float]) -> Iterator[list[Volume]]:
    """Yield `count` frames at a time, the last ones as many as there are, as volumes of one slice.

    Raises
    ------
    InputError
        When `count` is below 1, or a frame is none of the model's; like what the stream itself raises, it comes after the frames before it.
    """
    if count < 1:
        raise InputError(f"batch: expected 1 or more frames, got {count}")
    volumes = (_volume(frame, spec, spacing, f"frame {number}") for number, frame in enumerate(frames))
    while True:
        group = list[Volume]()
        try:
            for volume in islice(volumes, count):
                group.append(volume)
        except Exception:  # a camera's own, which is foreign code
            if group:
                yield group
            raise
        if not group:
            return
        yield group


def segment(group: Sequence[Volume], model: OpenModel, steps: Sequence[PostprocessStep]) -> list[Array]:
    """Labels (Y, X), on the host, of some frames whose windows share the engines' batches.

    Parameters
    ----------
    steps : post-processing
    """
    labels, spec = list[Array](), model.spec
    for data, places in _stacks([preprocess(replace(v, data=to_device(v.data, model.device)), spec) for v in group]):
        logits = model.run(data).whole()
        for place, placement in places:
            found = restore(logits[:, place], placement, spec)
            labels.append(to_host(postprocess(found, steps, voxel_mm3=placement.grid.voxel_mm3))[0])
    return labels


def _stacks(prepared: Sequence[Worked]) -> Iterator[tuple[FloatArray, list[tuple[slice, Placement]]]]:
    """Yield working arrays of equal shape that follow each other as one, with the slices and the placement of each."""
    for shape, group in groupby(prepared, key=lambda one: one[0].shape):
        alike = list(group)
        stack: FloatArray = get_xp(alike[0][0]).empty((shape[0], shape[1] * len(alike), *shape[2:]), np.float32)
        places = [slice(n * shape[1], (n + 1) * shape[1]) for n in range(len(alike))]
        for place, (data, _) in zip(places, alike, strict=True):
            stack[:, place] = data
        yield stack, [(place, placement) for place, (_, placement) in zip(places, alike, strict=True)]


def _volume(frame: Array, spec: ModelSpec, spacing: tuple[float, float], name: str) -> Volume:
    frame, channels = np.asarray(frame), len(spec.channels)
    given = frame.shape
    if frame.ndim == 2:
        frame = frame[None]
    elif frame.ndim == 3 and frame.shape[0] != channels and frame.shape[2] == channels:
        frame = np.moveaxis(frame, 2, 0)  # as cameras and most libraries give colours
    if frame.ndim != 3 or frame.shape[0] != channels or frame.dtype.kind not in "buif":
        expected = "(Y, X)" if channels == 1 else f"({channels}, Y, X) or (Y, X, {channels})"
        raise InputError(f"{name}: expected real numbers {expected} for model {spec.name!r}, got {frame.dtype} {given}")
    if frame.dtype.kind == "f" and not np.isfinite(frame).all():
        raise InputError(f"{name}: holds NaN or infinity")
    _, y, x = frame.shape
    return Volume(frame[:, None], Grid((1, y, x), (_THICK, *spacing), dimensions=2), name)
