"""MedicalSeg's model, datasets and transforms as fields of a `TrainConfig`; part of the import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arrays import Shape3
from . import medicalseg_traps as traps
from .medicalseg_section import Section

HOUNSFIELD = (-1200.0, 600.0)  # what MedicalSeg's preparation of CT maps to 0..255
_CT = frozenset({"LungCoronavirus"})  # datasets whose preparation does
_FULL_PLANES, _FULL_AXES = ([0, 1], [0, 2], [1, 2]), (0, 1, 2)
_OWN_DATA = "DATASET takes its place"
_OWN_FOLDER = "segrt works in a folder of its own (--work)"
_NOT_USED = {
    "dataset_root": _OWN_DATA,
    "raw_data_dir": _OWN_DATA,
    "decathlon_dir": _OWN_DATA,
    "dataset_json_path": _OWN_DATA,
    "anno_path": "the lists train_list.txt and val_list.txt beside the images, or --split",
    "result_dir": _OWN_FOLDER,
    "cropped_data_dir": _OWN_FOLDER,
    "preprocessed_dir": _OWN_FOLDER,
    "dataset_directory": _OWN_FOLDER,
}


def read_vnet(section: Section, kind: str, classes: int) -> None:
    """Take `model` of a VNet or VNetDeepSup; `classes` are 0 where the file does not say."""
    notes, deep = section.notes, kind == "VNetDeepSup"
    told = "V-Net with heads at the coarser levels of its decoder" if deep else "V-Net"
    notes.use(section.name("type"), kind, told, deep_supervision=deep, configuration="vnet")
    elu = section.yes("elu", False)
    notes.use(section.name("elu"), elu, "ELU" if elu else "PReLU", elu=elu)
    for key, name in (("kernel_size", "kernels"), ("stride_size", "strides")):
        if key in section:
            notes.use(
                section.name(key), section.take(key), f"{name} of the four steps down, from (x, y, z)", **{name: _steps(section, key)}
            )
    _drop_pretrained(section)
    for key in ("num_classes", "in_channels"):
        if key in section:
            notes.use(section.name(key), section.take(key), "the dataset decides; a warning where it has another number")
    traps.size_of_vnet(notes, classes or 2, count(section, "in_channels", 1), elu=elu)


def count(section: Section, key: str, default: int) -> int:
    """A number of classes or channels."""
    number = section.whole(key, default)
    if key in section and not 0 < number < 65536:
        section.notes.refuse(section.name(key), number, "a number from 1 on")
    return number


def _steps(section: Section, key: str) -> tuple[tuple[int, ...], ...]:
    rows = section.take(key)
    if not isinstance(rows, list) or len(rows) != 4 or not all(isinstance(row, list) and len(row) == 3 for row in rows):
        section.notes.refuse(section.name(key), rows, "four lists of three whole numbers")
    return tuple(tuple(row) for row in rows)


def read_nnunet(section: Section, train: Section) -> None:
    """Take `model` of an NNUNet; with what `train_dataset` says of the plan, that is one of nnU-Net's configurations."""
    notes = section.notes
    notes.use(section.name("type"), "NNUNet", "nnU-Net")
    stage, cascade = section.take("stage"), section.yes("cascade", False)
    if stage not in (0, 1, None):
        notes.refuse(section.name("stage"), stage, "0 or 1", "configuration", flag="--config")
    if stage is None and train.take("stage") in (0, 1):
        stage = train.take("stage")
    flat = _is_flat(section, train)
    name = "2d" if flat else _configuration(stage or 0, cascade=cascade or train.take("cascade") is True)
    notes.use(section.name("stage"), "2D" if flat else stage or 0, name, configuration=name)
    if name == "3d_lowres":
        traps.low_resolution(notes, section.name("stage"), stage or 0)
    if stage == 0 and name == "3d_fullres":
        notes.warn(
            section.name("stage"), stage, "without a cascade and in a plan of one stage that is 3d_fullres; of two, 3d_lowres (--config)"
        )
    section.take("plan_path")
    notes.warn(
        section.name("plan_path"),
        section.take("plan_path"),
        "a pickle, which is never opened; the dataset is planned anew by the same rules, those of nnU-Net 1 (--planner, or --plan for a "
        "plan.json)",
    )
    notes.changes["planner"] = "v1"
    _drop_pretrained(section)


def _is_flat(section: Section, train: Section) -> bool:
    """Whether the plan is of slices; its file's name decides where both kinds were made."""
    named = [str(value) for value in (section.take("plan_path"), train.take("plans_name")) if value]
    if named:
        return any("2D" in name for name in named)
    return train.yes("plan2d", False) and not train.yes("plan3d", False)


def _configuration(stage: int, *, cascade: bool) -> str:
    if cascade:
        return "3d_lowres" if stage == 0 else "3d_cascade_fullres"
    return "3d_fullres"


def _drop_pretrained(section: Section) -> None:
    if section.take("pretrained") is not None:
        section.notes.warn(section.name("pretrained"), section.take("pretrained"), "Paddle's weights are not read; training begins anew")


def read_vnet_data(train: Section, val: Section) -> dict[str, Any]:
    """Take both datasets of a V-Net; further arguments of `open_dataset` come out."""
    notes = train.notes
    kinds = {section.name("type"): section.text("type") for section in (train, val) if "type" in section}
    for key, kind in kinds.items():
        notes.use(key, kind, "how DATASET is laid out is found out")
    traps.datasets_of_vnet(notes, kinds)
    _read_transforms(train)
    _drop_common(train)
    if val.take("transforms"):
        notes.warn(val.name("transforms"), val.take("transforms"), "validation sees images as they are")
    _drop_common(val)
    ct = bool(_CT & set(kinds.values()))
    told = (
        f"{HOUNSFIELD[0]:g} to {HOUNSFIELD[1]:g} HU, as MedicalSeg prepares CT" if ct else "that of CT for a channel named CT, else z-score"
    )
    notes.use("(window)", "in no file of MedicalSeg's", told, **({"window": "article"} if ct else {}))
    return {"npy_window": HOUNSFIELD} if ct else {}


def read_nnunet_data(train: Section, val: Section) -> None:
    """Take both datasets of an nnU-Net."""
    notes = train.notes
    for section in (train, val):
        if "type" in section:
            notes.use(section.name("type"), section.text("type"), "how DATASET is laid out is found out")
        if section.take("transforms"):
            notes.warn(section.name("transforms"), section.take("transforms"), "nnU-Net's own transforms are trained with")
        if not section.yes("unpack_data", True):
            notes.warn(section.name("unpack_data"), False, "prepared cases are always memory-mapped")
        elif "unpack_data" in section:
            notes.use(section.name("unpack_data"), True, "prepared cases are memory-mapped")
        for key in ("plans_name", "plan2d", "plan3d"):
            if key in section:
                notes.use(section.name(key), section.take(key), "see model.stage")
        _drop_common(section)
    epoch = train.whole("num_batches_per_epoch", 250)
    notes.use(train.name("num_batches_per_epoch"), epoch, f"an epoch is {epoch} iterations", epoch=epoch, validation_interval=epoch)
    batches = val.whole("num_batches_per_epoch", 50)
    notes.use(val.name("num_batches_per_epoch"), batches, f"{batches} batches of validation per epoch", validation_batches=batches)
    _read_fold(train, val)


def _read_fold(train: Section, val: Section) -> None:
    fold = train.take("fold", 0)
    if fold != "all" and (isinstance(fold, bool) or not isinstance(fold, int) or fold < 0):
        train.notes.refuse(train.name("fold"), fold, "a number from 0 on, or all", "folds", flag="--fold")
    train.notes.use(train.name("fold"), fold, f"fold {fold} of nnU-Net's five", folds=(str(fold),))
    traps.folds_of_article(train.notes, train.name("fold"), fold)


def compare_datasets(model: Section, train: Section, val: Section) -> None:
    """Say where `model`, `train_dataset` and `val_dataset` contradict each other."""
    for key in ("stage", "cascade", "fold", "num_classes"):
        told = {section.name(key): section.take(key) for section in (model, train, val) if key in section}
        for name, value in list(told.items())[1:]:
            first = next(iter(told))
            if value != told[first]:
                model.notes.warn(name, value, f"{first} says {told[first]}, which counts")
            elif key == "num_classes" or key == "fold":
                model.notes.use(name, value, f"as {first}")


def _drop_common(section: Section) -> None:
    for key in section.left():
        if key in _NOT_USED:
            section.notes.use(section.name(key), section.take(key), _NOT_USED[key])
    mode = section.text("mode", "train")
    if mode not in ("train", "val"):
        section.notes.warn(section.name("mode"), mode, "the section's name says what it is for")


# ------------------------------------------------------------------ transforms of a V-Net
def _read_transforms(train: Section) -> None:
    """Take the transforms; segrt has the article's three, in their order."""
    notes, name = train.notes, train.name("transforms")
    parts = train.sections("transforms", [])
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


_ORDER = ("RandomResizedCrop3D", "RandomRotation3D", "RandomFlip3D")


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
    if len(sides) != 3 or min(sides) < 1:
        part.notes.refuse(part.name(key), value, "a whole number, or three (x, y, z)")
    return sides[0], sides[1], sides[2]


def _times(size: Shape3) -> str:
    return " x ".join(str(side) for side in size) + (" (x, y, z)" if len(set(size)) > 1 else "")
