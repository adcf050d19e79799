"""An image becomes the tensors a model is asked with, and its answer a `Segmentation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ..arrays import Array
from ..errors import BackendError, InputError
from ..io.cases import image_suffix
from ..io.read import Source
from ..protocol import FILE, FILE_SIZES, IMAGE, IMAGE_INT16, LABELS, PREVIOUS, PROBABILITIES, REPORT, Report, geometry_of, grid_of
from ..spec import ModelSpec
from ..volume import Grid, Segmentation, Volume
from .shared import Wanted
from .wire import Answer

# whole in one file; a header that names another file, or a folder, is read here
_WHOLE = (".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
_INT16 = np.iinfo(np.int16)


def tensors_of(volume: Volume, previous: Array | None) -> dict[str, Array]:
    """The inputs for an image: its voxels as int16 where that is exact, else float32, where it lies, and labels of a first stage.

    Raises
    ------
    InputError
        When the labels are none that fit into 16 bits.
    """
    name, data = _voxels(volume.data)
    inputs = {name: data, **{key: np.array(value, np.float64) for key, value in geometry_of(volume.grid).items()}}
    if previous is not None:
        inputs[PREVIOUS] = _labels(previous, volume.name)
    return inputs


def file_tensors(files: Sequence[Path]) -> dict[str, Array]:
    """The inputs for an image that is sent as it lies on the disk, a file per channel or one with all of them.

    Raises
    ------
    InputError
        When a file cannot be read.
    """
    try:
        contents = [np.fromfile(path, np.uint8) for path in files]
    except OSError as err:
        raise InputError(f"{err.filename or files[0]} cannot be read ({err.strerror or err})") from err
    sizes = np.array([content.size for content in contents], np.int64)
    return {FILE: contents[0] if len(contents) == 1 else np.concatenate(contents), FILE_SIZES: sizes}


def files_of(source: Source) -> list[Path] | None:
    """The files of an image when each can be sent as it is, else None."""
    given = [source] if isinstance(source, str | Path) else source
    if not isinstance(given, list | tuple) or not all(isinstance(part, str | Path) for part in given):
        return None
    paths = [Path(str(part)) for part in given]
    return paths if paths and all(path.is_file() and image_suffix(path) in _WHOLE for path in paths) else None


def answers_of(spec: ModelSpec, grid: Grid, *, probabilities: bool) -> dict[str, Wanted]:
    """Type and shape of the large outputs for an image on a known grid."""
    wanted: dict[str, Wanted] = {LABELS: (spec.label_dtype.upper(), grid.shape)}
    return wanted | {PROBABILITIES: ("FP32", (spec.classes, *grid.shape))} if probabilities else wanted


def report_in(answer: Answer) -> Report:
    """The report of an answer.

    Raises
    ------
    BackendError
        When there is none that can be read.
    """
    text = answer[REPORT].tobytes() if REPORT in answer else b""
    try:
        return Report.model_validate_json(text)
    except ValidationError as err:
        raise BackendError(f"the server sent {text[:80]!r} as its report, expected JSON; is the model one that segrt-build wrote?") from err


def segmentation_of(
    answer: Answer, report: Report, spec: ModelSpec, grid: Grid | None, name: str, seconds: Mapping[str, float]
) -> Segmentation:
    """The answer as a Predictor gives it, on the image's grid, which the server tells when only it has read the image.

    Raises
    ------
    BackendError
        When the labels do not lie on that grid.
    """
    labels = answer.get(LABELS)
    if labels is None or labels.ndim != 3 or (grid is not None and labels.shape != grid.shape):
        have, want = "no labels" if labels is None else f"labels of shape {labels.shape}", grid.shape if grid else "(z, y, x)"
        raise BackendError(f"the server sent {have}, expected shape {want}; is the model one that segrt-build wrote?")
    if grid is None:
        z, y, x = labels.shape
        grid = grid_of((z, y, x), report.spacing, report.origin, report.direction, flat=report.dimensions == 2)
    return Segmentation(labels, grid, spec.names, name, answer.get(PROBABILITIES), dict(seconds), report.windows)


def _voxels(data: Array) -> tuple[str, Array]:
    if data.dtype.kind == "b" or data.dtype in (np.int8, np.uint8, np.int16):
        return IMAGE_INT16, np.ascontiguousarray(data, np.int16)
    if data.dtype.kind in "iu" and data.size and data.min() >= _INT16.min and data.max() <= _INT16.max:
        return IMAGE_INT16, np.ascontiguousarray(data, np.int16)
    return IMAGE, np.ascontiguousarray(data, np.float32)


def _labels(previous: Array, name: str) -> Array:
    fits = previous.dtype.kind in "bu" or (previous.dtype.kind == "i" and previous.size and previous.min() >= 0)
    if not fits or (previous.dtype.itemsize > 2 and previous.max() > np.iinfo(np.uint16).max):
        raise InputError(f"{name}: labels of the previous stage: expected whole numbers from 0 to 65535, got {previous.dtype} beyond them")
    return np.ascontiguousarray(previous, np.uint16)
