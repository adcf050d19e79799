"""The layouts training data come in, each as a function from a folder to its cases; knows names only and opens no image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.cases import find_cases, image_suffix
from .cases import Missing, TrainingCase
from .dataset_json import Declared

_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
_SHOWN = 5  # files a sentence names
IMAGES, LABELS = ("images", "image", "imgs"), ("labels", "label", "masks", "mask", "segmentations")


@dataclass(frozen=True)
class Found:
    """Cases with labels, cases without, what makes no case, and the split the dataset itself makes; all sorted by name.

    Files that a list names may not be there.
    """

    cases: tuple[TrainingCase, ...]
    tests: tuple[TrainingCase, ...] = ()
    missing: tuple[Missing, ...] = ()
    split: tuple[tuple[str, ...], tuple[str, ...]] | None = None


def described(folder: Path, declared: Declared) -> Found:
    """Cases of a folder with a dataset.json: listed in it under "dataset" or "training", else those of imagesTr and labelsTr.

    Raises
    ------
    InputError
        When all files are missing, no image has a label map, or there are not "numTraining" cases.
    """
    values = declared.values
    if isinstance(values.get("dataset"), dict):
        found = Found(_sorted(_entry(folder, name, entry) for name, entry in values["dataset"].items()))
    elif isinstance(values.get("training"), list) and values["training"]:
        found = _decathlon(folder, values, len(declared.channels))
    else:
        found = _nnunet_raw(folder, len(declared.channels), values.get("file_ending"))
        _check_count(folder, values.get("numTraining"), len(found.cases) + len(found.missing))
    _check_some_exist(folder, found.cases)
    return found


def listed(lists: Sequence[Path]) -> Found:
    """Cases of text files with lines `images/a.npy labels/a.npy`, relative to the file; the first is for training, the second validates.

    Raises
    ------
    InputError
        When a line is not two file names or no file is there.
    """
    parts = [[_line(path, number, line) for number, line in enumerate(_lines(path), 1) if line.strip()] for path in lists]
    cases = _sorted(case for part in parts for case in part)
    _check_some_exist(lists[0].parent, cases)
    split = (_names(parts[0]), _names(parts[1])) if len(parts) == 2 else None
    return Found(cases, split=split)


def paired(images: Path, labels: Path) -> Found:
    """Cases of two folders with equal file names (`case`, or `case_0000`, `case_0001`, ... for channels, beside the label map `case`).

    Raises
    ------
    InputError
        When no image has a label map; the sentence names some.
    """
    maps = _by_stem(labels)
    files = _by_stem(images)
    groups: dict[str, list[Path]] = {}
    for stem, path in files.items():
        match = _CHANNEL.match(stem)
        groups.setdefault(match["case"] if match and stem not in maps and match["case"] in maps else stem, []).append(path)
    missing = _unpaired(groups, maps, images, labels)
    return Found(_pairs(groups, maps), missing=missing)


def suffixed(images: Path, labels: Path, image_suffixes: Sequence[str], label_suffix: str) -> Found:
    """Cases of folder trees whose files differ only in how their names end: `a_ct.nii.gz`, `a_pet.nii.gz` and `a_mask.nii.gz`.

    Parameters
    ----------
    images, labels : roots that are searched; may be the same
    image_suffixes : ends of the image's names before `.nii.gz`, or with it, one per channel; "" takes every file that is no label map
    label_suffix : end of the label map's name, likewise

    Raises
    ------
    InputError
        When nothing fits, or every case lacks a channel or its label map.
    """
    if images == labels and label_suffix in image_suffixes:
        raise InputError(
            f"label_suffix: expected one that tells label maps from images ({', '.join(image_suffixes)}), got {label_suffix!r}"
        )
    maps = _keyed(labels, label_suffix, other=None)
    other = label_suffix if images == labels else labels
    channels = [_keyed(images, suffix, other=other) for suffix in image_suffixes]
    groups = {key: [channel[key] for channel in channels if key in channel] for key in sorted({k for c in channels for k in c})}
    short = {key: files for key, files in groups.items() if len(files) != len(channels)}
    need = ", ".join(image_suffixes)
    if short and len(short) == len(groups):
        raise InputError(f"{images}: {len(short)} of {len(groups)} cases lack one of {need}: {_some(_title(key) for key in short)}")
    if not groups and any(image_suffixes):
        raise InputError(f"{images}: found no image whose name ends with {' or '.join(image_suffixes)}")
    missing = _unpaired(groups, maps, images, labels, label_suffix)
    for key, files in short.items():
        told = f"case {_title(key)} has {', '.join(file.name for file in files)} and lacks one of {need}"
        missing = (*missing, Missing(_title(key), tuple(files), told))
    whole = {key: files for key, files in groups.items() if key in maps and key not in short}
    last = [_title(key) for key in whole]
    names = last if len(set(last)) == len(last) else ["_".join(part for part in key if part) for key in whole]
    return Found(_sorted(TrainingCase(n, tuple(whole[k]), maps[k]) for n, k in zip(names, whole, strict=True)), missing=missing)


def _entry(folder: Path, name: str, entry: Any) -> TrainingCase:
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or not isinstance(entry.get("label"), str):
        raise InputError(f"{folder}/dataset.json: dataset.{name}: expected 'images' (a list of files) and 'label' (a file), got {entry!r}")
    return TrainingCase(name, tuple(folder / str(image) for image in entry["images"]), folder / entry["label"])


def _decathlon(folder: Path, values: Mapping[str, Any], channels: int) -> Found:
    cases = []
    for at, entry in enumerate(values["training"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not isinstance(entry.get("label"), str):
            raise InputError(f"{folder}/dataset.json: training.{at}: expected 'image' and 'label', got {entry!r}")
        image = folder / entry["image"]
        cases.append(TrainingCase(_stem(image), _channel_files(image, channels), folder / entry["label"]))
    tests = values.get("test")
    tests = [str(entry.get("image", "") if isinstance(entry, dict) else entry) for entry in tests] if isinstance(tests, list) else []
    left = [TrainingCase(_stem(folder / test), _channel_files(folder / test, channels)) for test in tests]
    return Found(_sorted(cases), _sorted(case for case in left if all(path.is_file() for path in case.images)))


def _channel_files(image: Path, channels: int) -> tuple[Path, ...]:
    """The listed file, or the files nnU-Net v1 means by it: a.nii.gz for a_0000.nii.gz, a_0001.nii.gz, ..."""
    stem = _stem(image)
    if image.exists() or not image.with_name(f"{stem}_0000{image.name[len(stem) :]}").exists():
        return (image,)
    return tuple(image.with_name(f"{stem}_{k:04d}{image.name[len(stem) :]}") for k in range(channels))


def _check_count(folder: Path, wanted: object, found: int) -> None:
    """A folder with fewer files than its author counted is an incomplete copy; a list names its files itself."""
    if isinstance(wanted, int) and wanted != found:
        raise InputError(f"{folder}/dataset.json: numTraining is {wanted}, found {found} cases; complete the copy or correct it")


def _nnunet_raw(folder: Path, channels: int, ending: Any) -> Found:
    images, labels = folder / "imagesTr", folder / "labelsTr"
    if not isinstance(ending, str | None):
        raise InputError(f"{folder}/dataset.json: file_ending: expected a suffix such as '.nii.gz', got {ending!r}")
    for part in (images, labels):
        if not part.is_dir():
            raise InputError(f"{folder}: {part.name} is missing; expected imagesTr and labelsTr beside dataset.json")
    groups = {case.name: list(case.files) for case in find_cases(images, channels, ending)}
    maps = _by_stem(labels, ending)
    missing = _unpaired(groups, maps, images, labels)
    cases = _pairs(groups, maps)
    tests = folder / "imagesTs"
    if not tests.is_dir() or not _by_stem(tests, ending):
        return Found(cases, missing=missing)
    return Found(cases, tuple(TrainingCase(case.name, case.files) for case in find_cases(tests, channels, ending)), missing)


def _pairs(groups: Mapping[str, Sequence[Path]], maps: Mapping[str, Path]) -> tuple[TrainingCase, ...]:
    return tuple(TrainingCase(name, tuple(groups[name]), maps[name]) for name in sorted(groups) if name in maps)


def _unpaired(
    groups: Mapping[Any, Sequence[Path]], maps: Mapping[Any, Path], images: Path, labels: Path, suffix: str = ""
) -> tuple[Missing, ...]:
    """Images without label map and label maps without image; an InputError where there are no others, as they were looked for wrongly."""
    ending = f" with a name that ends with {suffix}" if suffix else ""
    alone = {key: f"{groups[key][0].name} has no label map{ending} in {labels}" for key in groups if key not in maps}
    if alone and len(alone) == len(groups):
        raise InputError(
            f"{images}: {len(alone)} of {len(groups)} images have no label map{ending} in {labels}: {_some(_title(key) for key in alone)}"
        )
    if not groups:
        raise InputError(f"{images}: found no image with a label map in {labels}")
    missing = [Missing(_title(key), tuple(groups[key]), message) for key, message in alone.items()]
    missing += [
        Missing(_title(k), (file,), f"label map {file.name} has no image in {images}") for k, file in maps.items() if k not in groups
    ]
    return tuple(missing)


def _check_some_exist(folder: Path, cases: Sequence[TrainingCase]) -> None:
    missing = [path for case in cases for path in case.files if not path.exists()]
    if cases and not any(case.complete for case in cases):
        raise InputError(f"{folder}: {len(missing)} files that its list names are missing: {_some(str(path) for path in missing)}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: not a readable list of images and labels ({err})") from err


def _line(path: Path, number: int, line: str) -> TrainingCase:
    line = line.strip()
    pairs = [(path.parent / line[: gap.start()], path.parent / line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
    if len(pairs) > 1:  # names with spaces: the one way to read them that names two files
        pairs = [pair for pair in pairs if all(file.exists() for file in pair)]
    if len(pairs) != 1:
        raise InputError(f"{path}, line {number}: expected an image and a label map, such as 'images/a.npy labels/a.npy', got {line!r}")
    [(image, labels)] = pairs
    return TrainingCase(_stem(image), (image,), labels)


def _by_stem(folder: Path, ending: str | None = None) -> dict[str, Path]:
    """Image files of a folder by their name without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        fits = image_suffix(path) or path.suffix == ".npy" if ending is None else path.name.endswith(ending)
        if path.name.startswith(".") or not (fits or path.is_dir()):
            continue
        if (stem := _stem(path)) in found:
            raise InputError(f"{folder}: case {stem!r} is there twice ({found[stem].name}, {path.name}); keep one of them")
        found[stem] = path
    return found


def _keyed(root: Path, suffix: str, *, other: str | Path | None) -> dict[tuple[str, ...], Path]:
    """Files below `root` whose name ends with `suffix`, by where they lie and what their name says besides; not those of `other`.

    other : how the names of other files end, or the folder they lie in
    """
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(root.rglob("*")):
        if path.name.startswith(".") or not image_suffix(path) or not _ends(path, suffix):
            continue
        if other in path.parents if isinstance(other, Path) else other and _ends(path, other):
            continue
        name = path.name.removesuffix(suffix) if _is_whole(suffix) else _stem(path).removesuffix(suffix)
        key = (*path.relative_to(root).parts[:-1], name)
        if key in found:
            raise InputError(f"{root}: {found[key].name} and {path.name} both end with {suffix!r} for one case; keep one of them")
        found[key] = path
    return found


def _is_whole(suffix: str) -> bool:
    """Whether a suffix says the format too, as _mask.png does."""
    return image_suffix(Path(f"a{suffix}")) is not None


def _ends(path: Path, suffix: str) -> bool:
    return path.name.endswith(suffix) if _is_whole(suffix) else _stem(path).endswith(suffix)


def _stem(path: Path) -> str:
    return path.name[: -len(image_suffix(path) or path.suffix) or None]


def _title(key: str | tuple[str, ...]) -> str:
    return key if isinstance(key, str) else next((part for part in reversed(key) if part), "image")


def _sorted(cases: Iterable[TrainingCase]) -> tuple[TrainingCase, ...]:
    return tuple(sorted(cases, key=lambda case: case.name))


def _names(cases: Sequence[TrainingCase]) -> tuple[str, ...]:
    return tuple(sorted(case.name for case in cases))


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
