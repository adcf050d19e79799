"""MedicalSeg's model and datasets as fields of a `TrainConfig`; part of the import."""

from __future__ import annotations

from . import medicalseg_traps as traps
from .config import WINDOWS
from .medicalseg_section import Section
from .medicalseg_transforms import read_transforms

HOUNSFIELD = WINDOWS["article"]  # what MedicalSeg's preparation of CT maps to 0..255
_CT = frozenset({"LungCoronavirus"})  # datasets whose preparation does
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


def read_vnet_data(train: Section, val: Section) -> tuple[float, float] | None:
    """Take both datasets of a V-Net; the intensities its arrays hold as 0 and 255 come out, None where that is not known."""
    notes = train.notes
    kinds = {section.name("type"): section.text("type") for section in (train, val) if "type" in section}
    for key, kind in kinds.items():
        notes.use(key, kind, "how DATASET is laid out is found out")
    traps.datasets_of_vnet(notes, kinds)
    read_transforms(train)
    _drop_common(train)
    if val.take("transforms"):
        notes.warn(val.name("transforms"), val.take("transforms"), "validation sees images as they are")
    _drop_common(val)
    ct = bool(_CT & set(kinds.values()))
    told = (
        f"{HOUNSFIELD[0]:g} to {HOUNSFIELD[1]:g} HU, as MedicalSeg prepares CT" if ct else "that of CT for a channel named CT, else z-score"
    )
    notes.use("(window)", "in no file of MedicalSeg's", told, **({"window": "article"} if ct else {}))
    return HOUNSFIELD if ct else None


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
