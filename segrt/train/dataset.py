"""TRAIN, first step: `open_dataset` finds out how a folder of training images is laid out; `read_training_case` reads one of its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..arrays import Array
from ..errors import InputError
from ..io import read_volume
from ..io.cases import PICTURE_SUFFIXES, image_suffix
from ..volume import Grid, Volume
from .cases import Dataset, Mask, TrainingCase
from .dataset_json import Declared, Labels, parse_labels, pop_ignore, read_dataset_json
from .layouts import IMAGES, LABELS, Found, described, listed, paired, suffixed
from .masks import apply_mask, find_masks, grey_mask
from .npy import read_npy

__all__ = ["Dataset", "TrainingCase", "open_dataset", "read_image", "read_label_map", "read_training_case"]

_MOST_LABELS = 255  # more distinct values than this are intensities, not labels


def open_dataset(
    path: str | Path,
    *,
    name: str | None = None,
    channels: Sequence[str] | None = None,
    labels: Mapping[str, int | Sequence[int]] | None = None,
    class_order: Sequence[int] = (),
    image_suffix: str | Sequence[str] | None = None,
    label_suffix: str | None = None,
    masks: str | Path | None = None,
    mask_threshold: float | None = None,
    npy_window: tuple[float, float] | None = None,
) -> Dataset:
    """Give the dataset in a folder, whichever of four layouts it has; only label maps are read, and only when nobody names the labels.

    - a dataset.json of nnU-Net (channel_names, file_ending, regions, ignore, "dataset") or the Medical Decathlon (modality, training)
    - train_list.txt and val_list.txt with lines `images/a.npy labels/a.npy` (any image format), or such a file itself
    - the folders images and labels (or masks) with equal file names; `case_0000`, `case_0001` are channels
    - any folder tree, by how names end: `image_suffix` (one per channel) and `label_suffix`
    - a folder of images with their label maps in another, `masks`; by equal names, or how they end

    Parameters
    ----------
    name : of the dataset; by default the folder's
    channels : names of the channels, instead of the dataset's own; "CT" matters to the planner
    labels : name -> value or values (a region); the background may be left out. By default the dataset's own, else the values found
    class_order : value each region is painted with; with `labels`
    masks : folder of the label maps, where it is none of the dataset's own
    mask_threshold : label maps are grey: what is above is the one structure ("foreground" unless `labels` names it), the rest background.
        Its label is 255 in pictures, so that they can be looked at, else 1
    npy_window : the intensities .npy files hold as 0 and 255, (-1200, 600) in the article

    Raises
    ------
    InputError
        When there is no such layout, a folder cannot be read, no image has its label map, or what the dataset says about itself, or
        is told by an argument, cannot be right.
    """
    root = Path(path)
    if image_suffix is not None and not isinstance(image_suffix, str) and not image_suffix:
        raise InputError("image_suffix: expected how image names end, such as _image, one for each channel; got none")
    try:
        if masks is None:
            found, declared, folder = _find(root, image_suffix, label_suffix)
        else:
            found, declared, folder = find_masks(root, Path(masks), image_suffix, label_suffix), None, root
    except OSError as err:
        raise InputError(f"{err.filename or root} cannot be read ({err.strerror or err}); check its name and permissions") from err
    first = next((case for case in found.cases if case.complete), found.cases[0])
    if masks is not None:
        name = name or (root.resolve().parent.name if root.name in IMAGES else None)
    if channels is None:
        channels = declared.channels if declared else _channel_names(first)
    if mask_threshold is not None and labels is None and declared and len(declared.labels) > 2:
        raise InputError(
            f"mask_threshold: grey masks hold one structure, {folder} has {', '.join(declared.labels)}; leave the threshold out"
        )
    mask = None if mask_threshold is None else grey_mask(mask_threshold, first, labels)
    if mask is not None:
        declared = _given(labels or {"foreground": mask.value}, ())
    elif labels is not None:
        declared = _given(labels, class_order)
    elif declared is None:
        declared = Declared((), _labels_found(found.cases), (), None, {})
    dataset = Dataset(
        name=name or folder.resolve().name,
        folder=folder,
        channels=tuple(channels),
        labels=declared.labels,
        cases=found.cases,
        tests=found.tests,
        missing=found.missing,
        class_order=declared.class_order,
        ignore=declared.ignore,
        split=found.split,
        npy_window=npy_window,
        mask=mask,
    )
    if npy_window is not None and not dataset.arrays:
        raise InputError(f"npy_window: it tells what .npy files hold, and images of dataset {dataset.name} are none; leave it out")
    return dataset


def read_training_case(case: TrainingCase, dataset: Dataset) -> tuple[Volume, Array]:
    """Read a case and make sure that its label map belongs to its image.

    Returns
    -------
    volume : Volume
    labels : (Z, Y, X) int16, the values of the file

    Raises
    ------
    InputError
        When a file cannot be read, has another number of channels than the dataset, lies on another grid than its image or holds values
        that are no labels of the dataset.
    """
    volume = read_image(case, dataset)
    labels, grid, _ = read_label_map(case, dataset.mask)
    problem = geometry_problem(case, volume, grid) or value_problem(case, labels, dataset)
    if problem:
        raise InputError(problem)
    return volume, labels.astype(np.int16)


def read_image(case: TrainingCase, dataset: Dataset) -> Volume:
    """Read the image of a case.

    Raises
    ------
    InputError
        When it cannot be read or has another number of channels than the dataset.
    """
    if case.images[0].suffix == ".npy":
        volume = read_npy(case.images[0], dataset.npy_window)
    else:
        volume = read_volume(list(case.images))
    found, need = volume.data.shape[0], len(dataset.channels)
    if found != need:
        have = f"{found} channel{'s' * (found != 1)}"
        raise InputError(f"{volume.name} has {have}, dataset {dataset.name} has {need} ({', '.join(dataset.channels)})")
    return replace(volume, name=case.name)


def read_label_map(case: TrainingCase, mask: Mask | None = None) -> tuple[Array, Grid, str]:
    """Read the label map of a case: (Z, Y, X) integer labels, their grid, and the dtype the file holds them in; a grey one by `mask`.

    Raises
    ------
    InputError
        When it cannot be read, has several channels or values that are not whole numbers.
    """
    path = case.labels
    if path is None:
        raise InputError(f"case {case.name} has no label map")
    volume = read_npy(path, None) if path.suffix == ".npy" else read_volume(path)
    data = volume.data
    if mask is not None:
        return apply_mask(volume, mask), volume.grid, "uint8"
    if len(data) != 1:
        raise InputError(f"{volume.name} has {len(data)} channels, expected 1: a label map")
    if data.dtype.kind == "f" and (wrong := data[np.rint(data) != data]).size:
        raise InputError(f"{volume.name} holds {wrong.size} values that are not whole numbers (such as {wrong[0]:g}), expected labels")
    return data[0].astype(np.int32), volume.grid, str(data.dtype)


def geometry_problem(case: TrainingCase, volume: Volume, grid: Grid) -> str | None:
    """Say how the label map's grid differs from the image's, or None."""
    if (own := volume.grid).dimensions == grid.dimensions == 2 and own.shape != grid.shape:
        sizes = [f"{y} x {x}" for _, y, x in (grid.shape, own.shape)]
        return f"{_file(case.labels)} has {sizes[0]} pixels, its image {_file(case.images[0])} {sizes[1]}; a mask is as large as its image"
    why = volume.grid.mismatch(grid)
    return f"{_file(case.labels)} does not lie on the grid of {_file(case.images[0])}: it has {why}" if why else None


def value_problem(case: TrainingCase, labels: Array, dataset: Dataset) -> str | None:
    """Say which values of a label map are no labels of the dataset, or None."""
    known = [*dataset.values, *([dataset.ignore] if dataset.ignore is not None else [])]
    low, high = int(labels.min()), int(labels.max())
    table = np.zeros(high - low + 1, bool)
    table[[value - low for value in known if low <= value <= high]] = True
    hit = table[labels - low] if high - low < 2**20 else np.isin(labels, known)
    if hit.all():
        return None
    unknown, counts = np.unique(labels[~hit], return_counts=True)
    told = ", ".join(f"{v} ({n} voxels)" for v, n in zip(unknown[:5], counts[:5], strict=True)) + ", ..." * (len(unknown) > 5)
    return f"{_file(case.labels)} holds values that are no labels of dataset {dataset.name}: {told}; its labels are {_listing(known)}"


def _find(root: Path, image_suffixes: str | Sequence[str] | None, label_suffix: str | None) -> tuple[Found, Declared | None, Path]:
    """The cases, what a dataset.json says, and the dataset's folder."""
    if not root.exists():
        raise InputError(f"{root} does not exist; give a folder of training images")
    if root.is_file() and (label_suffix is not None or image_suffixes is not None):
        raise InputError(f"{root} names its images and label maps itself; leave image_suffix and label_suffix out, or give the folder")
    if root.name == "dataset.json":
        root = root.parent
    if root.is_file():
        return listed([root]), _declared(root.parent), root.parent
    images, labels = (next((root / n for n in names if (root / n).is_dir()), None) for names in (IMAGES, LABELS))
    if label_suffix is not None or image_suffixes is not None:
        ends = [image_suffixes or ""] if image_suffixes is None or isinstance(image_suffixes, str) else list(image_suffixes)
        return suffixed(images or root, labels or root, ends, label_suffix or ""), None, root
    if (root / "train_list.txt").is_file():
        lists = [path for path in (root / "train_list.txt", root / "val_list.txt") if path.is_file()]
        return listed(lists), _declared(root), root
    if (root / "dataset.json").is_file():
        declared = read_dataset_json(root / "dataset.json")
        return described(root, declared), declared, root
    if images and labels:
        return paired(images, labels), None, root
    if (root / "imagesTr").is_dir():
        raise InputError(f"{root} has imagesTr but no dataset.json; it says what channels and labels mean, write one as nnU-Net asks for")
    raise InputError(
        f"{root} is no dataset: expected a dataset.json, train_list.txt, the folders images and labels, or image_suffix and label_suffix "
        "that tell images and label maps apart"
    )


def _declared(folder: Path) -> Declared | None:
    return read_dataset_json(folder / "dataset.json") if (folder / "dataset.json").is_file() else None


def _given(labels: Mapping[str, int | Sequence[int]], class_order: Sequence[int]) -> Declared:
    """What the caller says; the background goes without saying."""
    own = parse_labels(labels, where="labels")
    ignore = pop_ignore(own, where="labels")
    background = {} if any(set(values) == {0} for values in own.values()) else {"background": (0,)}
    return Declared((), {**background, **own}, tuple(class_order), ignore, {})


def _labels_found(cases: Sequence[TrainingCase]) -> Labels:
    """A name for every value in the label maps."""
    values: set[int] = {0}
    for case in cases:
        if not case.complete:
            continue  # `check_dataset` tells of it
        labels, _, _ = read_label_map(case)
        values.update(int(v) for v in np.unique(labels))
        if len(values) > _MOST_LABELS + 1:
            raise InputError(
                f"{_file(case.labels)}: label maps hold more than {_MOST_LABELS} values, so they are no labels; check the folder"
            )
        if min(values) < 0:
            raise InputError(f"{_file(case.labels)} holds the value {min(values)}, expected labels from 0 on")
    return {f"label {v}" if v else "background": (v,) for v in sorted(values)}


def _channel_names(case: TrainingCase) -> tuple[str, ...]:
    """Names for the channels of a dataset that does not name them."""
    if len(case.images) == 1:
        first = case.images[0]
        count = len(read_npy(first, None).data if first.suffix == ".npy" else read_volume(first).data)
        if count == 3 and image_suffix(first) in PICTURE_SUFFIXES:
            return "red", "green", "blue"
    else:
        count = len(case.images)
    return ("image",) if count == 1 else tuple(f"channel {k}" for k in range(count))


def _file(path: Path | None) -> str:
    return path.name if path else "no file"


def _listing(values: Sequence[int]) -> str:
    return ", ".join(str(v) for v in values[:20]) + ", ..." * (len(values) > 20)
