"""`import_medicalseg`: a MedicalSeg YAML becomes a `TrainConfig`, with what was made of each key and a warning where it is not the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, SpecError
from . import medicalseg_traps as traps
from .cases import Dataset
from .config import Model, TrainConfig, make_config
from .dataset import open_dataset
from .medicalseg_data import compare_datasets, count, read_nnunet, read_nnunet_data, read_vnet, read_vnet_data
from .medicalseg_learning import read_optimizer, read_schedule
from .medicalseg_loss import read_loss
from .medicalseg_section import Notes, Row, Section, shown
from .medicalseg_yaml import Document, inside, read_document, relative_path

_MODELS: Mapping[str, Model] = {"VNet": "vnet", "VNetDeepSup": "vnet", "NNUNet": "nnunet"}
_DEEP_HEADS = 4
_AXES = ("patch", "kernels", "strides")  # MedicalSeg's arrays are (x, y, z)


@dataclass(frozen=True)
class Recipe:
    """What a file asks for, before a dataset is known.

    Attributes
    ----------
    changes : fields of `TrainConfig`; those along axes are (x, y, z), as in the file
    npy_window : intensities that arrays of its dataset hold as 0 and 255, where that is known
    classes, channels : what the network is for; 0 where the file does not say
    rows : what was made of each key
    warnings : what is not honoured, or not as it stands, one sentence each
    """

    document: Document
    model: Model
    changes: Mapping[str, Any]
    npy_window: tuple[float, float] | None
    classes: int
    channels: int
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def text(self) -> str:
        """A table: key, value, what segrt does; a "!" where that is something else."""
        widths = [max(len(row.key) for row in self.rows), max(len(row.value) for row in self.rows)]
        lines = [f"{row.key:<{widths[0]}}  {row.value:<{widths[1]}}  {row.does}" for row in self.rows]
        files = [str(file.relative_to(self.document.root)) for file in self.document.files]
        above = f" (with {', '.join(files[1:])})" if files[1:] else ""
        return "\n".join([f"{files[0]}{above} means to segrt:", *lines]) + "\n"


@dataclass(frozen=True)
class Imported:
    """A training that is ready to run: `train_model(dataset, output, config)`."""

    dataset: Dataset
    config: TrainConfig
    recipe: Recipe
    warnings: tuple[str, ...]


def import_medicalseg(
    path: str | Path,
    source: str | Path | None = None,
    *,
    root: str | Path | None = None,
    dataset_options: Mapping[str, Any] | None = None,
    **chosen: Any,
) -> Imported:
    """Make a training of a MedicalSeg configuration and a dataset.

    Parameters
    ----------
    path : of the YAML file; its `_base_` files are read with it
    source : dataset folder, see `open_dataset`; by default the one the file names, where it lies beside the file or below the working
        directory
    root : folder no `_base_` file may lie outside; see `read_document`
    dataset_options : arguments of `open_dataset`, which beat the file
    chosen : fields of `TrainConfig`, which beat the file; None leaves it to the file

    Raises
    ------
    InputError
        When a file or the dataset cannot be read.
    SpecError
        When the file asks for what segrt does not train.
    """
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if "memory_gb" in chosen:
        chosen.setdefault("planner", "default")  # those rules know one size of GPU
    recipe = read_medicalseg(Path(path), root=Path(root) if root else None, given=frozenset(chosen))
    model = chosen.pop("model", recipe.model)
    if model != recipe.model:
        raise InputError(f"model: {path} describes a {recipe.model}, not a {model}; leave --model out, or the file")
    dataset = open_dataset(source or find_dataset(recipe), **{k: v for k, v in (dataset_options or {}).items() if v is not None})
    if dataset.arrays and dataset.npy_window is None:
        dataset = replace(dataset, npy_window=recipe.npy_window)
    own = dict(recipe.changes)
    if not dataset.arrays:
        own |= {name: _reversed(own[name]) for name in _AXES if name in own}
    try:
        config = make_config(recipe.model, **{**own, **chosen})
    except SpecError as err:
        raise SpecError(f"{path}: {err}") from err
    return Imported(dataset, config, recipe, (*recipe.warnings, *_differences(recipe, dataset)))


def read_medicalseg(path: Path, *, root: Path | None = None, given: frozenset[str] = frozenset()) -> Recipe:
    """Read what a file asks for; `given` are the fields of `TrainConfig` it does not decide, as the caller does.

    Raises
    ------
    InputError, SpecError
        See `import_medicalseg`.
    """
    document = read_document(path, root=root)
    notes = Notes(str(path), given)
    top = Section(document.values, notes)
    iterations = _read_iterations(top)
    network, train, val = (top.section(key) if key in top else Section({}, notes, key) for key in ("model", "train_dataset", "val_dataset"))
    kind = network.text("type")
    if kind not in _MODELS:
        notes.refuse("model.type", kind, f"a network that segrt trains ({', '.join(_MODELS)})")
    model, npy_window = _MODELS[kind], None
    classes, channels = count(network, "num_classes", 0) or count(train, "num_classes", 0), count(network, "in_channels", 0)
    _read_batch(top, model)
    if model == "vnet":
        read_vnet(network, kind, classes)
        npy_window = read_vnet_data(train, val)
        traps.time_of_article(notes, "model.type", kind, "2")
    else:
        read_nnunet(network, train)
        read_nnunet_data(train, val)
        traps.time_of_article(notes, "model.type", kind, "9.5")
    compare_datasets(network, train, val)
    read_optimizer(top.section("optimizer"))
    read_schedule(top, iterations)
    read_loss(top.section("loss"), heads=_DEEP_HEADS if kind == "VNetDeepSup" else 1)
    _close(top, (network, train, val))
    return Recipe(document, model, notes.changes, npy_window, classes, channels, notes.in_order(document.values), tuple(notes.warnings))


def _read_iterations(top: Section) -> int:
    notes = top.notes
    if "iters" not in top and "iterations" in notes.given:
        return 0
    iterations = top.whole("iters")
    notes.use("iters", iterations, f"{iterations} iterations", iterations=iterations)
    if not notes.beaten("iterations"):
        traps.iterations_of_article(notes, iterations)
    return iterations


def _read_batch(top: Section, model: Model) -> None:
    batch = top.whole("batch_size", 1)
    if model == "vnet":
        top.notes.use("batch_size", batch, "the same", batch_size=batch)
    elif "batch_size" in top.notes.given:
        top.notes.use("batch_size", batch, "as you say instead")
    else:
        traps.batch_of_nnunet(top.notes, batch)


def _close(top: Section, sections: tuple[Section, ...]) -> None:
    if "data_root" in top:
        top.notes.use("data_root", top.take("data_root"), "DATASET takes its place")
    top.drop(
        {
            "to_static_training": "segrt trains as PyTorch does by default; segrt-build compiles what was trained",
            "export": "segrt-build exports the bundle, which holds all preprocessing",
        }
    )
    for section in (*sections, top):
        section.close()


def find_dataset(recipe: Recipe) -> Path:
    """The dataset that the file names, where it lies below the folder of the file, one above it up to the root, or the working directory.

    Raises
    ------
    InputError
        When the file names none, or it is not there.
    """
    file, names = recipe.document.files[0], list(_dataset_names(recipe.document.values))
    root = recipe.document.root
    above = [folder for folder in file.parents if folder.is_relative_to(root)]
    # MedicalSeg keeps its folder data beside configs, and both below the folder it is started in
    for folder in (*above, *([root.parent] if root.name == "configs" else []), Path.cwd()):
        for name in names:
            if (folder / name).is_dir() and inside(folder / name, folder):
                return folder / name
    named = f"the one it names ({', '.join(map(shown, names))}) is neither beside it nor in {Path.cwd()}" if names else "it names none"
    raise InputError(f"DATASET is missing: {file} says how to train, and {named}; give the dataset's folder")


def _dataset_names(values: Mapping[str, Any]) -> Iterator[str]:
    """Relative paths a file gives its training data, the most likely first."""
    train = values.get("train_dataset")
    for key in ("raw_data_dir", "decathlon_dir", "dataset_root"):
        name = train.get(key) if isinstance(train, dict) else None
        if not isinstance(name, str) or not relative_path(name) or ".." in Path(name).parts or not name.strip("./"):
            continue
        data_root = values.get("data_root")
        if isinstance(data_root, str) and relative_path(data_root) and ".." not in Path(data_root).parts:
            yield str(Path(data_root) / name)
        yield name


def _reversed(value: Any) -> Any:
    """(x, y, z) -> (z, y, x), of one triple or several."""
    return tuple(_reversed(item) for item in value) if isinstance(value[0], tuple) else tuple(reversed(value))


def _differences(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Where the file and the dataset disagree."""
    classes = len(dataset.values)
    if recipe.classes and recipe.classes != classes and not dataset.regions:
        yield f"num_classes ({recipe.classes}): dataset {dataset.name} has {classes} with its background, which the network gets"
    if recipe.channels and recipe.channels != len(dataset.channels):
        yield f"model.in_channels ({recipe.channels}): dataset {dataset.name} has {len(dataset.channels)}, which the network gets"
