"""MedicalSeg's transforms of a V-Net's training as fields of a `TrainConfig`; part of the import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arrays import Shape3
from .medicalseg_section import Section

_ORDER = ("RandomResizedCrop3D", "RandomRotation3D", "RandomFlip3D")
_FULL_PLANES, _FULL_AXES = ([0, 1], [0, 2], [1, 2]), (0, 1, 2)


def read_transforms(train: Section) -> None:
    """Take the transforms; segrt has the article's three, in their order."""
    notes, name = train.notes, train.name("transforms")
    parts = [] if train.take("transforms") is None else train.sections("transforms")
    kinds = [part.text("type") for part in parts]
    known: dict[str, Any] = {"scale": None, "degrees": 0.0, "flip": 0.0}
    for kind, part in zip(kinds, parts, strict=True):
        known |= _read_transform(part, kind)
        part.close()
    ours = [kind for kind in kinds if kind in _ORDER]
    if ours != sorted(set(ours), key=_ORDER.index):
        notes.warn(name, ours, f"each once, in the order {', '.join(_ORDER)}")
    used = "article" if ours else "none"
    told = "their order" if ours else "no augmentation"
    notes.use(name, kinds, told, augmentation=used, transforms=known)
    if not {"patch"} & (notes.changes.keys() | notes.given):
        notes.warn(name, kinds, "no size is given, so images are resized to 128 x 128 x 128 (--patch for another)")


def _read_transform(part: Section, kind: str) -> Mapping[str, Any]:
    notes = part.notes
    match kind:
        case "RandomResizedCrop3D":
            return _read_crop(part)
        case "RandomRotation3D":
            return {"degrees": _read_degrees(part)}
        case "RandomFlip3D":
            chance = part.number("prob", 0.5)
            notes.use(part.name("prob"), chance, "flips along one axis")
            _all_of(part, "flip_axis", _FULL_AXES)
            return {"flip": chance}
        case "Resize3D":
            size = _size(part, "size")
            notes.use(part.name("size"), list(size), f"images are resized to {_times(size)}", patch=size)
            return {}
    notes.warn(part.name("type"), kind, "segrt has no such transform, it is left out")
    part.drop(dict.fromkeys(part.left(), "belongs to that transform"))
    return {}


def _read_crop(part: Section) -> dict[str, Any]:
    notes, size = part.notes, _size(part, "size")
    notes.use(part.name("size"), part.take("size"), f"images are resized to {_times(size)}", patch=size)
    scale, ratio = _pair(part, "scale", (0.8, 1.2)), _pair(part, "ratio", (3 / 4, 4 / 3))
    notes.use(part.name("scale"), list(scale), "boxes of these shares of the volume")
    notes.use(part.name("ratio"), [round(side, 3) for side in ratio], "ratios of two of their sides")
    if part.take("interpolation", 1) != 1:
        notes.warn(part.name("interpolation"), part.take("interpolation"), "boxes are resized linearly")
    for key in ("pre_crop", "nonzero_mask"):
        if part.yes(key, False):
            notes.warn(part.name(key), True, "boxes are cut from the whole image")
    return {"scale": scale, "ratio": ratio}


def _read_degrees(part: Section) -> float:
    value = part.take("degrees")
    if isinstance(value, list):
        low, high = _pair(part, "degrees", (0.0, 0.0))
        degrees = max(abs(low), abs(high))
        if low != -high:
            part.notes.warn(part.name("degrees"), value, f"rotated by up to {degrees:g} degrees to either side")
    else:
        degrees = abs(part.number("degrees"))
    part.notes.use(part.name("degrees"), value, f"up to {degrees:g} to either side; labels take the nearest, not the mean, of their voxels")
    _all_of(part, "rotate_planes", _FULL_PLANES)
    return degrees


def _all_of(part: Section, key: str, full: Any) -> None:
    """A choice among axes or planes, which segrt always leaves to chance; MedicalSeg counts from 0, with a channel in front from 1."""
    if key not in part:
        return
    value = part.take(key)
    shifted = [[n + 1 for n in item] if isinstance(item, list) else item + 1 for item in full]
    if value in (list(full), shifted):
        part.notes.use(part.name(key), value, "any of them, by chance")
    else:
        part.notes.warn(part.name(key), value, "any of the three is taken, by chance")


def _pair(part: Section, key: str, default: tuple[float, float]) -> tuple[float, float]:
    numbers = part.numbers(key, default)
    if len(numbers) != 2:
        part.notes.refuse(part.name(key), list(numbers), "two numbers")
    return numbers[0], numbers[1]


def _size(part: Section, key: str) -> Shape3:
    """(x, y, z); one number is a cube."""
    value = part.take(key)
    sides = [part.whole(key)] * 3 if not isinstance(value, list) else [int(n) for n in part.numbers(key)]
    if len(sides) != 3 or min(sides) < 1 or (isinstance(value, list) and list(sides) != value):
        part.notes.refuse(part.name(key), value, "a whole number, or three (x, y, z)")
    return sides[0], sides[1], sides[2]


def _times(size: Shape3) -> str:
    return " x ".join(str(side) for side in size) + (" (x, y, z)" if len(set(size)) > 1 else "")
