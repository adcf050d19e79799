"""Which files of a folder make up which case; knows names only and opens no image."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

logger = logging.getLogger(__name__)

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
SUFFIXES = VOLUME_SUFFIXES + PICTURE_SUFFIXES
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class Case:
    """One subject: its `name` and its `files`, one per channel (or one that holds them all, or one DICOM folder)."""

    name: str
    files: tuple[Path, ...]


def image_suffix(path: Path) -> str | None:
    """Give the image suffix `path` ends with, in lower case with its dot, or None."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s) and len(name) > len(s)), None)


def find_cases(folder_or_file: Path | str, channels: int, suffix: str | None = None) -> list[Case]:
    """Find the cases in a folder, a single file or a DICOM series, sorted by name.

    Understood are `case_0000.nii.gz`, `case_0001.nii.gz`, ... (one file per channel), `case.nii.gz` (one file with every
    channel), a folder of DICOM files (one case named after the folder) and a folder of such folders.

    Parameters
    ----------
    folder_or_file : where to look; subfolders are looked into only for DICOM series
    channels : number of channels the model needs
    suffix : take only files with this suffix (`.nii.gz`)

    Raises
    ------
    InputError
        When there is nothing to read, channels are missing or unexpected, or two files claim one name.
    """
    root = Path(folder_or_file)
    if root.is_file():
        return [_single(root)]
    entries = _listing(root)
    files = [p for p in entries if image_suffix(p) and (suffix is None or p.name.lower().endswith(suffix.lower()))]
    if files:
        _name_left_out(root, entries)
        return _from_files(files, channels)
    folders = _dicom_folders(root, entries) if suffix in (None, ".dcm") else []
    if not folders:
        wanted = suffix or ", ".join(SUFFIXES) + " or a DICOM series"
        hint = next((f"; its subfolder {f.name} holds images, give that one" for f in entries if f.is_dir() and _holds_images(f)), "")
        raise InputError(f"{root}: found no image among its {len(entries)} entries, expected {wanted}{hint}")
    return sorted((Case(f.resolve().name, (f,)) for f in folders), key=lambda c: c.name)


def output_name(case: str, like: Path, suffix: str | None = None) -> str:
    """Name the label file of `case`: the format of its input `like`, or the chosen `suffix`.

    Lossy pictures become `.png`; what cannot be written back (DICOM, `.hdr`, `.nhdr`) becomes `.nii.gz` or `.nrrd`.
    """
    if suffix is None:
        found = None if like.is_dir() else image_suffix(like)
        suffix = _WRITTEN_AS.get(found or "", found or ".nii.gz")
    return case + (suffix if suffix.startswith(".") else f".{suffix}")


_WRITTEN_AS = {".jpg": ".png", ".jpeg": ".png", ".hdr": ".nii.gz", ".hdr.gz": ".nii.gz", ".nhdr": ".nrrd"}


def _single(path: Path) -> Case:
    """One file; its channel number, if it has one, is not part of the case's name."""
    stem = path.name[: -len(image_suffix(path) or "") or None]
    match = _CHANNEL.match(stem)
    return Case(match["case"] if match else stem, (path,))


def _listing(root: Path) -> list[Path]:
    try:
        entries = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    except OSError as err:
        raise InputError(f"{root} cannot be read as a folder of images ({err.strerror or err}); give an image or a folder") from err
    if not entries:
        raise InputError(f"{root} is an empty folder; expected images or a DICOM series")
    return entries


def _from_files(files: Sequence[Path], channels: int) -> list[Case]:
    """Group files by case name and check that each case is complete."""
    groups: dict[str, dict[int | None, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        stem = path.name[: -len(image_suffix(path) or "")]
        match = _CHANNEL.match(stem)
        if match:
            groups[match["case"]][int(match["channel"])].append(path)
        else:
            groups[stem][None].append(path)
    return [Case(name, _complete(name, groups[name], channels)) for name in sorted(groups)]


def _complete(name: str, group: dict[int | None, list[Path]], channels: int) -> tuple[Path, ...]:
    """Give the files of one case in channel order, or say what is wrong with them."""
    twice = [p for paths in group.values() if len(paths) > 1 for p in paths]
    if twice or (None in group and len(group) > 1):
        raise InputError(
            f"case {name!r} exists more than once: {_names(twice or [p for ps in group.values() for p in ps])}; keep one of them"
        )
    if None in group:
        return tuple(group[None])
    found = {k: paths[0] for k, paths in group.items() if k is not None}
    # one file may hold every channel (an RGB picture, a 4-D NIfTI): reading it will tell
    if set(found) == {0}:
        if channels > 1 and not _may_hold_many(found[0]):
            raise InputError(_incomplete(name, found, channels))
        return (found[0],)
    if set(found) != set(range(channels)):
        raise InputError(_incomplete(name, found, channels))
    return tuple(found[k] for k in range(channels))


def _may_hold_many(path: Path) -> bool:
    return image_suffix(path) in PICTURE_SUFFIXES


def _incomplete(name: str, found: dict[int, Path], channels: int) -> str:
    """Say which channel files a case lacks or has too many of."""
    missing = [f"{name}_{k:04d}" for k in range(channels) if k not in found]
    extra = [found[k] for k in sorted(found) if k >= channels]
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    parts += [f"has {_names(extra)} too many"] if extra else []
    return f"case {name!r} {' and '.join(parts)}: the model needs {channels} channel{'s' * (channels != 1)}, found {_names(found.values())}"


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(p.name for p in paths)


def _dicom_folders(root: Path, entries: Sequence[Path]) -> list[Path]:
    """Give the root when it holds DICOM files itself, else those of its subfolders that do."""
    if any(is_dicom(p) for p in entries):
        return [root]
    return [f for f in entries if f.is_dir() and any(is_dicom(p) for p in _sorted_files(f))]


def _sorted_files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_file())
    except OSError as err:
        raise InputError(f"{folder} cannot be read ({err.strerror or err})") from err


def _name_left_out(root: Path, entries: Sequence[Path]) -> None:
    """Warn of DICOM series beside image files: a folder holds the one or the other."""
    with suppress(InputError):
        if left_out := _dicom_folders(root, [f for f in entries if f.is_dir()]):
            logger.warning("%s: left out: DICOM series beside image files (%s); give each of them by itself", root, _names(left_out))


def _holds_images(folder: Path) -> bool:
    return any(image_suffix(p) and not p.name.startswith(".") for p in _sorted_files(folder))


def is_dicom(path: Path) -> bool:
    """Tell whether `path` is a file with DICOM's mark at byte 128."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as err:
        raise InputError(f"{path} cannot be read ({err.strerror or err})") from err
