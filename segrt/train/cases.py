"""`Dataset` and `TrainingCase`: what a folder of training images holds, as values; the first thing of the TRAIN flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError


@dataclass(frozen=True)
class TrainingCase:
    """One subject: its image `images` (one file per channel, or one that holds them all) and its label map, None for a test case."""

    name: str
    images: tuple[Path, ...]
    labels: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Image and label map."""
        return (*self.images, *([self.labels] if self.labels else []))

    @property
    def complete(self) -> bool:
        """Whether all files are there."""
        return all(path.exists() for path in self.files)


@dataclass(frozen=True)
class Missing:
    """Files that make no case, as an image, a channel or a label map that belongs to them is not there."""

    case: str
    files: tuple[Path, ...]
    message: str


@dataclass(frozen=True)
class Mask:
    """How grey masks are read: what is above `threshold` has the label `value`, the rest is background."""

    threshold: float
    value: int


@dataclass(frozen=True)
class Dataset:
    """Cases with labels, and what the labels mean.

    Attributes
    ----------
    name : of the dataset
    folder : where it lies
    channels : names of the image's channels; "CT" is the one the planner treats differently
    labels : name -> the values it has in label maps (several for a region); "background" is (0,)
    cases : sorted by name, each with a label map
    tests : cases without labels, sorted by name
    missing : what else lies there and is no case; such a dataset is not trained on, see `check_dataset`
    class_order : value each region is painted with, in this order; empty unless there are regions
    ignore : value of voxels nobody labelled, or None
    split : names of the cases to train on and to validate on, where the dataset itself says so (npy lists)
    npy_window : intensities that arrays in .npy files hold as 0 and 255; reading maps them back, so that models are trained on what
        their own window will give them later
    mask : how label maps are read that are grey pictures of one structure; None where they hold labels
    """

    name: str
    folder: Path
    channels: tuple[str, ...]
    labels: Mapping[str, tuple[int, ...]]
    cases: tuple[TrainingCase, ...]
    tests: tuple[TrainingCase, ...] = ()
    missing: tuple[Missing, ...] = ()
    class_order: tuple[int, ...] = ()
    ignore: int | None = None
    split: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    npy_window: tuple[float, float] | None = None
    mask: Mask | None = None

    def __post_init__(self) -> None:
        _check_labels(self)
        if not self.channels:
            raise InputError(f"dataset {self.name}: it names no channel, expected at least one")
        names = [case.name for case in self.cases]
        if not names:
            raise InputError(f"dataset {self.name}: {self.folder} holds no case with an image and a label map")
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise InputError(f"dataset {self.name}: case {twice[0]!r} is there more than once; give every case its own name")

    @property
    def arrays(self) -> bool:
        """Whether its images are .npy files, which know no spacing and no unit."""
        return self.cases[0].images[0].suffix == ".npy"

    @property
    def regions(self) -> bool:
        """Whether some structure is made of several values, so that structures overlap."""
        return any(len(values) > 1 for values in self.labels.values())

    @property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """The labels but the background."""
        return {name: values for name, values in self.labels.items() if set(values) != {0}}

    @property
    def values(self) -> tuple[int, ...]:
        """Every value label maps may hold but the ignored one, sorted, the background's 0 first."""
        return tuple(sorted({value for values in self.labels.values() for value in values}))


def _check_labels(dataset: Dataset) -> None:
    where, values = f"dataset {dataset.name}: labels", dataset.values
    if 0 not in values:
        raise InputError(f"{where}: expected 'background' with the value 0, got {', '.join(dataset.labels) or 'none'}")
    if not dataset.foreground:
        raise InputError(f"{where}: there is only background, expected at least one structure to learn")
    if values[0] < 0 or values[-1] > 32767:
        raise InputError(f"{where}: expected values from 0 to 32767, got {values[0] if values[0] < 0 else values[-1]}")
    if dataset.ignore is not None and dataset.ignore in values:
        raise InputError(f"{where}: {dataset.ignore} is both a label and the value to ignore")
    if dataset.regions and len(dataset.class_order) != len(dataset.foreground):
        raise InputError(
            f"{where}: some are made of several values, so regions_class_order needs {len(dataset.foreground)} values "
            f"(one per region), got {list(dataset.class_order)}"
        )
    single = [v[0] for v in dataset.foreground.values() if len(v) == 1]
    if not dataset.regions and len(set(single)) != len(single):
        raise InputError(f"{where}: two names share one value in {dict(dataset.foreground)}")
