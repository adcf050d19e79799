"""Image files that came with a request: their bytes become files in a folder of their own for as long as they are read."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

from ..arrays import Array
from ..errors import BackendError, InputError
from ..io.cases import SUFFIXES, image_suffix
from ..io.peek import count_voxels
from ..io.read import read_volume
from ..protocol import FILE, FILE_SIZES
from ..volume import Volume
from .limits import Limits

# a file's first bytes -> the suffix its reader goes by; what a client calls it is not trusted
_SIGNS = (
    (b"\x1f\x8b", ".nii.gz"),
    (b"\x89PNG", ".png"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"BM", ".bmp"),
    (b"\xff\xd8", ".jpg"),
    (b"NRRD", ".nrrd"),
)
_HEADER_BYTES = 540
_LONGEST_STEM = 60


def read_files(content: Array, sizes: Array | None, name: str, channels: Sequence[str], limits: Limits) -> Volume:
    """Read an image from the bytes of its files.

    Parameters
    ----------
    content : (bytes,) uint8, one file after the other
    sizes : (files,) bytes of each; one file by default
    name : what the image is called
    channels : the model's
    limits : checked by the headers, before any voxel is read

    Raises
    ------
    InputError
        When the sizes do not add up, or a file is damaged, too large, or of no format known here.
    """
    parts = _split(content, sizes, len(channels))
    with _folder() as folder:
        paths = [_write(folder, part, name, number if len(parts) > 1 else None) for number, part in enumerate(parts)]
        announced = 0
        for path in paths:
            shape = count_voxels(path)
            limits.check_voxels(path.name, shape, beside=announced)
            announced += prod(shape)
        return read_volume(paths, channels)


def plain_name(name: str) -> str:
    """What an image may be called in a sentence, a log and a temporary folder: its last part, without its suffix and odd characters."""
    last = re.split(r"[/\\]", name)[-1]
    stem = last[: -len(image_suffix(Path(last)) or "") or None]
    return re.sub(r"[^\w.() -]", "_", stem).strip(". ")[:_LONGEST_STEM] or "image"


def _split(content: Array, sizes: Array | None, channels: int) -> list[Array]:
    counts = [len(content)] if sizes is None else [int(size) for size in sizes]
    if len(counts) not in (1, channels):
        raise InputError(f"{FILE_SIZES} tells of {len(counts)} files, expected one, or one for each of the model's {channels} channels")
    if min(counts) < 1:
        raise InputError(f"{FILE} holds an empty file (bytes of each: {counts}), expected an image")
    if sum(counts) != len(content):
        raise InputError(f"{FILE_SIZES} adds up to {sum(counts)} bytes, {FILE} has {len(content)}; send the bytes of each file, in order")
    return [content[first:stop] for first, stop in pairwise(accumulate(counts, initial=0))]


@contextmanager
def _folder() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="segrt-request-") as folder:
            yield Path(folder)
    except OSError as err:
        raise BackendError(f"the server cannot keep the image's file ({err.strerror or err}); try again later") from err


def _write(folder: Path, content: Array, name: str, channel: int | None) -> Path:
    suffix = _suffix_of(bytes(content[:_HEADER_BYTES]))
    stem = plain_name(name)
    if not suffix:
        raise InputError(f"{stem} is of no image format known here, expected the bytes of one of {', '.join(SUFFIXES)}")
    path = folder / f"{stem}{'' if channel is None else f'_{channel:04d}'}{suffix}"
    with path.open("xb") as file:
        file.write(content.data)
    return path


def _suffix_of(start: bytes) -> str:
    """The suffix of the format that these bytes begin; "" for none."""
    for sign, suffix in _SIGNS:
        if start.startswith(sign):
            return suffix
    if start[344:348] == b"n+1\0" or start[4:7] == b"n+2":
        return ".nii"
    return ".mha" if b"NDims" in start and b"=" in start else ""
