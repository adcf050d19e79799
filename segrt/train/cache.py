"""TRAIN, prepared cases on disk: of a compressed array only the blocks under a patch are read; written by `prepare`, read by `sampler`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import floor, prod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import ValidationError

from ..arrays import Array, Shape3, require
from ..errors import InputError
from ..spec import Part
from ..volume import Placement

Storage = Literal["blosc2", "npy"]
SUFFIXES: dict[Storage, str] = {"blosc2": ".b2nd", "npy": ".npy"}

_BLOCK_BYTES = 128 * 2**10  # fits a core's cache
_CHUNK_BYTES = 6 * 2**20
_PATCH_RATIO = 1.5  # a chunk is at most this much longer than the patch
_LEVEL = 5
MARKER = "case.json"


class Locations(Part):
    """Voxels of one label, or of a region's `values`: rows `start` to `stop` of locations.npy."""

    values: tuple[int, ...]
    start: int
    stop: int


class PreparedCase(Part):
    """A case ready to be sampled from; its JSON is written last and says what the files beside it were made from.

    Attributes
    ----------
    key : hash of all that the files depend on: the spec's preprocessing, the storage, size and time of the dataset's files
    shape : (z, y, x) on the working grid
    placement : where that grid sits in the image
    locations : of each foreground label, for oversampling
    sizes : file name -> bytes
    sha256 : of the files' content
    """

    name: str
    key: str
    shape: Shape3
    storage: Storage
    dtype: Literal["float32", "float16"]
    placement: Placement
    locations: tuple[Locations, ...]
    sizes: dict[str, int]
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared cases, one subfolder each, sorted by name."""

    folder: Path
    cases: tuple[PreparedCase, ...]

    @property
    def digest(self) -> str:
        """One hash for the content of all cases: what a resumed training compares."""
        return hashlib.sha256("".join(f"{case.name} {case.sha256}\n" for case in self.cases).encode()).hexdigest()

    def select(self, names: Iterable[str]) -> Prepared:
        """Give the cases with these names, for a fold; an InputError names the first that is not here."""
        wanted = set(names)
        if missing := sorted(wanted - {case.name for case in self.cases}):
            raise InputError(f"{self.folder}: case {missing[0]!r} is not among the {len(self.cases)} prepared cases")
        return replace(self, cases=tuple(case for case in self.cases if case.name in wanted))


@dataclass(frozen=True)
class OpenCase:
    """The arrays of a prepared case, read where they are sliced.

    Attributes
    ----------
    data : (C, Z, Y, X) float32 or float16
    labels : (Z, Y, X) int16 label values, -1 outside the image's non-zero region
    previous : (Z, Y, X) int16 labels of the stage before, None unless the model is a cascade
    locations : (N, 3) unsigned, (z, y, x) of voxels; which rows are whose stands in `PreparedCase.locations`
    """

    data: Stored
    labels: Stored
    previous: Stored | None
    locations: Array


class Stored(Protocol):
    """An array on disk: slices of it are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def __getitem__(self, key: Any) -> Array: ...


def open_case(folder: Path, case: PreparedCase) -> OpenCase:
    """Open the arrays of a case in a `Prepared` folder.

    Raises
    ------
    InputError
        When a file is missing or damaged.
    """
    suffix, place = SUFFIXES[case.storage], folder / case.name
    try:
        previous = open_array(place / f"previous{suffix}") if f"previous{suffix}" in case.sizes else None
        locations = np.load(place / "locations.npy", mmap_mode="r", allow_pickle=False)
        return OpenCase(open_array(place / f"data{suffix}"), open_array(place / f"labels{suffix}"), previous, locations)
    except (OSError, RuntimeError, ValueError) as err:  # blosc2 calls a damaged file a RuntimeError
        raise InputError(f"{place}: the prepared case cannot be opened ({err}); delete the folder and prepare again") from err


def find_case(folder: Path, key: str) -> PreparedCase | None:
    """Read what stands in a case's own `folder` if it was made from `key` and every file still has its size."""
    try:
        case = PreparedCase.model_validate_json((folder / MARKER).read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in case.sizes.items())
    except (OSError, ValidationError):
        return None
    return case if whole and case.key == key else None


def write_array(path: Path, array: Array, patch: Shape3) -> None:
    """Write `array` as `path` says: .b2nd compressed by LZ4HC in blocks suited to `patch`, .npy as it lies.

    Parameters
    ----------
    array : (C, Z, Y, X) or (Z, Y, X); not modified
    patch : (z, y, x) in voxels, what will be read at a time

    Raises
    ------
    OSError
        When the file cannot be written.
    """
    array = np.ascontiguousarray(array)
    if path.suffix == SUFFIXES["npy"]:
        np.save(path, array, allow_pickle=False)
        return
    # packed in memory and written by us: a full disk is then an OSError, and blosc2 would make it a RuntimeError
    path.write_bytes(_packed(array, patch))


def open_array(path: Path) -> Stored:
    """Open what `write_array` wrote, memory-mapped and read only."""
    if path.suffix == SUFFIXES["npy"]:
        mapped: Stored = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    blosc2 = require("blosc2", extra="train")
    stored: Stored = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    return stored


def block_shapes(shape: Shape3, patch: Shape3, itemsize: int) -> tuple[Shape3, Shape3]:
    """Give the shapes (z, y, x) of blocks (what is decompressed at a time) and chunks that nnU-Net 2.8.1 chooses for one channel.

    Blocks are powers of two no larger than 128 KiB, chunks grow from them to 6 MiB or 1.5 times the patch; a patch of one slice keeps
    both one slice thin.
    """
    wanted = [max(1, min(n, floor(_PATCH_RATIO * p))) for n, p in zip(shape, patch, strict=True)]
    block = [min(1 << (p - 1).bit_length(), n) for p, n in zip(patch, shape, strict=True)]
    while prod(block) * itemsize > _BLOCK_BYTES:
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / wanted[a], a))
        block[axis] = 1 << ((block[axis] - 1).bit_length() - 1)
    chunk = list(block)
    while grown := [c for axis in range(3) if patch[axis] > 1 and (c := _grown(chunk, block, wanted, axis, itemsize))]:
        axis, size = min(grown, key=lambda c: (chunk[c[0]] / wanted[c[0]], -shape[c[0]], c[0]))
        chunk[axis] = size
    return (block[0], block[1], block[2]), (chunk[0], chunk[1], chunk[2])


def _grown(chunk: list[int], block: list[int], wanted: list[int], axis: int, itemsize: int) -> tuple[int, int] | None:
    """(axis, its next length), or None when the chunk may not grow along it."""
    size = min(chunk[axis] + block[axis], wanted[axis])
    if size <= chunk[axis] or prod(chunk) // chunk[axis] * size * itemsize > _CHUNK_BYTES:
        return None
    return axis, size


def _packed(array: Array, patch: Shape3) -> bytes:
    blosc2 = require("blosc2", extra="train")
    z, y, x = array.shape[-3:]
    blocks, chunks = block_shapes((z, y, x), patch, array.itemsize)
    leading = (1,) * (array.ndim - 3)
    shapes = {"blocks": leading + blocks, "chunks": leading + chunks}
    # smooth images shrink more when their bytes are sorted by place, whole numbers when not: one chunk from the middle tells
    middle = tuple(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(array.shape, shapes["chunks"], strict=True))
    trial = np.ascontiguousarray(array[middle])
    filters = (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE)
    sizes = [blosc2.asarray(trial, **shapes, cparams=_parameters(blosc2, f)).schunk.cbytes for f in filters]
    best = filters[sizes.index(min(sizes))]
    packed: bytes = blosc2.asarray(array, **shapes, cparams=_parameters(blosc2, best)).to_cframe()
    return packed


def _parameters(blosc2: Any, chosen: Any) -> dict[str, Any]:
    return {"codec": blosc2.Codec.LZ4HC, "clevel": _LEVEL, "filters": [chosen], "nthreads": 1}
