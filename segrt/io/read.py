"""Files, SimpleITK images and arrays in; `Volume` and label maps out. The first step of the PREDICT flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import SimpleITK

from ..arrays import Array, Spacing3
from ..errors import InputError
from ..volume import Grid, Volume
from .cases import PICTURE_SUFFIXES
from .dicom import read_series
from .geometry import FLAT_FACTOR, check_axes, grid_of
from .headers import TextHeader, first_look, meta_header, nrrd_header
from .itk import itk, reading
from .nifti import read_nifti
from .pictures import read_picture

_LABEL_OBJECTS = (itk.sitkLabelUInt8, itk.sitkLabelUInt16, itk.sitkLabelUInt32, itk.sitkLabelUInt64)

Source: TypeAlias = str | Path | Sequence[str | Path] | SimpleITK.Image | Volume | tuple[Array, Sequence[float]]


def read_volume(source: Source, channels: Sequence[str] | None = None) -> Volume:
    """Read an image with all its channels.

    Parameters
    ----------
    source : a file, a folder with one DICOM series, one file per channel (list or tuple, all on one grid), a SimpleITK image,
        a `Volume` (returned as it is) or `(array, spacing)` with a (Z, Y, X), (C, Z, Y, X) or (Y, X) array and (z, y, x) in mm
    channels : the model's channel names; when given, the image must have as many

    Returns
    -------
    Volume
        (C, Z, Y, X) in the file's own real dtype (64-bit numbers become 32-bit). The fourth axis of a 4-D file, the components
        of a vector image and the colours of a picture are channels. May share memory with an array that was given.

    Raises
    ------
    InputError
        When the source cannot be read, is damaged, holds NaN or infinite voxels, or does not have the channels asked for.
    """
    volume = _read(source, None if channels is None else len(channels))
    found = volume.data.shape[0]
    if channels is not None and found != len(channels):
        have, need = f"{found} channel{'s' * (found != 1)}", f"{len(channels)} ({', '.join(channels)})"
        raise InputError(f"{volume.name} has {have}, model needs {need}")
    return volume


def read_labels(path: str | Path) -> tuple[Array, Grid]:
    """Read a label map.

    Returns
    -------
    labels : (Z, Y, X) integer
    grid : Grid

    Raises
    ------
    InputError
        When the file cannot be read, has several channels or values that are not whole numbers.
    """
    volume = read_volume(path)
    if volume.data.shape[0] != 1:
        raise InputError(f"{volume.name} has {volume.data.shape[0]} channels, expected 1: a label map")
    data = volume.data[0]
    if data.dtype.kind == "f":
        whole = np.rint(data)
        wrong = data[whole != data]
        if wrong.size:
            raise InputError(f"{volume.name} holds {wrong.size} values that are not whole numbers (such as {wrong[0]:g}), expected labels")
        data = whole.astype(np.int32)
    return (data.astype(np.uint8) if data.dtype.kind == "b" else data), volume.grid


def read_previous(source: str | Path | Array, name: str, grid: Grid) -> Array:
    """Labels (Z, Y, X) of a cascade's first stage for the image `name` on `grid`: an array as it is, a file when it lies on that grid.

    Raises
    ------
    InputError
        When the file cannot be read or lies elsewhere.
    """
    if not isinstance(source, str | Path):
        return np.asarray(source)
    labels, found = read_labels(source)
    if difference := grid.mismatch(found):
        raise InputError(f"{source}: labels of the previous stage are not on the grid of {name}: {difference}")
    return labels


def _read(source: Source, needed: int | None) -> Volume:
    if isinstance(source, Volume):
        if source.data.dtype.kind == "f":
            _check_finite(source.data, source.name)
        return source
    if isinstance(source, SimpleITK.Image):
        kind: Any = source
        if kind.GetPixelID() in _LABEL_OBJECTS:  # SimpleITK ends the whole process when asked for their components
            raise InputError("image is a label map object, expected voxels; turn it with SimpleITK.LabelMapToLabel")
        return _volume(_channels_first(source), grid_of(source), "image")
    if isinstance(source, str | Path):
        return _read_path(Path(source), needed)
    if isinstance(source, np.ndarray):
        raise InputError("an array comes with its spacing: pass (array, (z, y, x) in mm)")
    parts: list[Any] = list(source) if isinstance(source, list | tuple) else [None]
    if len(parts) == 2 and isinstance(parts[0], np.ndarray) and not isinstance(parts[1], np.ndarray):
        return _from_array(parts[0], parts[1])
    if not all(isinstance(part, str | Path) for part in parts):
        kinds = f" of {', '.join(type(part).__name__ for part in parts)}" if isinstance(source, list | tuple) else ""
        raise InputError(
            f"expected a path, a list of paths, a SimpleITK image or (array, (z, y, x) spacing in mm), got a {type(source).__name__}{kinds}"
        )
    return _join([_read_path(Path(p), needed if len(parts) == 1 else None) for p in parts])


def _read_path(path: Path, needed: int | None) -> Volume:
    """Read one file or DICOM folder with the reader its kind asks for."""
    if path.is_dir():
        return _volume(*read_series(path), path.resolve().name)
    if path.name.lower().endswith((".img", ".img.gz")):
        path = _header_of(path)
    suffix = first_look(path)
    if suffix.startswith((".nii", ".hdr")):
        return _volume(*read_nifti(path), path.name)
    if suffix in PICTURE_SUFFIXES:
        return _volume(*read_picture(path, needed), path.name)
    header = meta_header(path) if suffix in (".mha", ".mhd") else nrrd_header(path)
    return _volume(*_read_text_headed(path, header), path.name)


def _header_of(path: Path) -> Path:
    """Give the `.hdr[.gz]` that belongs to an `.img[.gz]`."""
    stem = path.name[: path.name.lower().rindex(".img")]
    found = [p for p in (path.with_name(stem + ".hdr"), path.with_name(stem + ".hdr.gz")) if p.is_file()]
    if not found:
        raise InputError(f"{path.name} holds voxels alone: {stem}.hdr or {stem}.hdr.gz is missing beside it")
    return found[0]


def _read_text_headed(path: Path, header: TextHeader) -> tuple[Array, Grid]:
    """Read MetaImage and NRRD voxels with every byte accounted for; only text and odd types are left to SimpleITK."""
    if header.payload is None or not 2 <= len(header.sizes) <= 4:
        return _read_itk(path)
    data = header.payload.read(path.name)
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    with reading(path.name):
        reader.ReadImageInformation()
        grid = grid_of(reader)
    if header.components > 1:
        data = np.moveaxis(data, -1, 0)
    elif len(header.sizes) < 4:
        data = data[None]
    return (data[:, None] if len(header.sizes) == 2 else data), grid


def _read_itk(path: Path) -> tuple[Array, Grid]:
    with reading(path.name):
        image = itk.ReadImage(str(path))
        return _channels_first(image), grid_of(image)


def _from_array(array: Array, spacing: Any) -> Volume:
    """Give a volume from an array whose position in space is not known."""
    if array.ndim not in (2, 3, 4):
        raise InputError(f"array has {array.ndim} axes, expected (Y, X), (Z, Y, X) or (C, Z, Y, X)")
    try:
        steps = tuple(float(s) for s in spacing)
    except (TypeError, ValueError) as err:
        raise InputError(f"spacing: expected (z, y, x) in mm, got {spacing!r}") from err
    if array.ndim == 2 and len(steps) == 2:
        steps = (FLAT_FACTOR * max(steps), *steps)
    if len(steps) != 3:
        raise InputError(f"spacing {steps} has {len(steps)} numbers, expected (z, y, x) in mm")
    data = array[None, None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    z, y, x = data.shape[1:]
    mm: Spacing3 = (steps[0], steps[1], steps[2])
    return _volume(data, Grid((z, y, x), mm, dimensions=2 if array.ndim == 2 else 3), "array")


def _join(parts: Sequence[Volume]) -> Volume:
    """Put the channels of several images, which must lie on one grid, into one."""
    if not parts:
        raise InputError("no files given, expected one per channel")
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        why = first.grid.mismatch(other.grid)
        if why:
            raise InputError(f"{other.name} does not lie on the grid of {first.name}: it has {why}; resample one onto the other")
    dtype = np.result_type(*(p.data for p in parts))
    out = np.empty((sum(len(p.data) for p in parts), *first.grid.shape), np.float32 if dtype.itemsize == 8 else dtype)
    at = 0
    for part in parts:
        out[at : at + len(part.data)] = part.data
        at += len(part.data)
    return Volume(out, first.grid, first.name)


def _channels_first(image: Any) -> Array:
    """Give the voxels of a SimpleITK image as (C, Z, Y, X)."""
    data: Array = itk.GetArrayFromImage(image)
    axes = image.GetDimension()
    if axes == 2:
        data = data[None]
    if image.GetNumberOfComponentsPerPixel() > 1 and data.dtype.kind != "c":
        if axes == 4:
            count = image.GetNumberOfComponentsPerPixel()
            raise InputError(f"image is 4-D with {count} components a voxel, expected only one of the two to hold the channels")
        return np.moveaxis(data, -1, 0)
    return data if axes == 4 else data[None]


def _volume(data: Array, grid: Grid, name: str) -> Volume:
    """Check what holds for every source: right angles, real and finite voxels; keep real dtypes of up to 32 bits."""
    check_axes(grid, name)
    if data.dtype.kind not in "biuf":
        what = "complex" if data.dtype.kind == "c" else str(data.dtype)
        raise InputError(f"{name} holds {what} voxels, expected real numbers")
    data = np.ascontiguousarray(data, data.dtype.newbyteorder("="))
    if data.dtype.kind in "iu" and data.dtype.itemsize == 8:
        fits = int(data.min()) >= -(2**31) and int(data.max()) < 2**31
        data = data.astype(np.int32 if fits else np.float32)
    if data.dtype.kind == "f":
        _check_finite(data, name)
        if data.dtype != np.float32:
            with np.errstate(over="ignore"):
                data = data.astype(np.float32)
            _check_finite(data, name)
    return Volume(data, grid, name)


def _check_finite(data: Array, name: str) -> None:
    """Refuse NaN and infinite voxels; one pass where all is well."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(data.sum(dtype=np.float64)):
            return
    bad = int(data.size - np.count_nonzero(np.isfinite(data)))
    if bad:
        raise InputError(f"{name} has {bad} NaN or infinite voxels of {data.size}, expected numbers everywhere; repair or mask them first")
