"""What can be known of a case before its voxels are read: its size, and where its first-stage labels are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..volume import Grid
from .cases import image_suffix
from .dicom import peek_series
from .geometry import grid_of
from .headers import first_look, meta_header, nrrd_header
from .itk import itk, reading
from .nifti import COLOURS, grid_from, open_header
from .nifti_header import DTYPES


def peek(files: Sequence[Path]) -> tuple[Grid, int] | None:
    """Grid of a case and bytes a voxel and channel takes, from headers alone; None when the header cannot be read.

    A damaged file is not refused here but when it is read, with its reason.
    """
    try:
        return _headers_only(files[0])
    except (InputError, OSError):
        return None


def _headers_only(first: Path) -> tuple[Grid, int]:
    if first.is_dir():
        return peek_series(first)
    suffix = first_look(first)
    if suffix.startswith((".nii", ".hdr")):
        header, _ = open_header(first)
        return grid_from(header, first.name), np.dtype(DTYPES.get(header.datatype, "u1")).itemsize
    reader = itk.ImageFileReader()
    reader.SetFileName(str(first))
    with reading(first.name):
        reader.ReadImageInformation()
        itemsize = itk.Image([1, 1], reader.GetPixelID(), reader.GetNumberOfComponents()).GetSizeOfPixelComponent()
        return grid_of(reader), max(1, int(itemsize))


def count_voxels(file: Path) -> tuple[int, ...]:
    """Sizes of all axes and components that an image file's header announces; nothing else of it is read.

    Raises
    ------
    InputError
        When it is no image file, or its header is damaged.
    """
    suffix = first_look(file)
    if suffix.startswith((".nii", ".hdr")):
        header, _ = open_header(file)
        return (*header.dim[1 : header.dim[0] + 1], COLOURS.get(header.datatype, 1))
    if suffix in (".mha", ".mhd", ".nrrd", ".nhdr"):
        text = (meta_header if suffix.startswith(".m") else nrrd_header)(file)
        return (*text.sizes, text.components)
    reader = itk.ImageFileReader()
    reader.SetFileName(str(file))
    with reading(file.name, "a picture"):
        reader.ReadImageInformation()
        return (*reader.GetSize(), reader.GetNumberOfComponents())


def find_labels(folder: str | Path, case: str) -> Path:
    """Find the label file of `case` in a folder, whatever its format.

    Raises
    ------
    InputError
        When there is none, or more than one.
    """
    root = Path(folder)
    found = [p for p in sorted(root.glob(f"{_escaped(case)}.*")) if (suffix := image_suffix(p)) and p.name == case + p.name[-len(suffix) :]]
    if len(found) != 1:
        what = "no label file" if not found else f"{len(found)} label files ({', '.join(p.name for p in found)})"
        raise InputError(f"{root}: {what} for case {case!r}; expected one, such as {case}.nii.gz")
    return found[0]


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
