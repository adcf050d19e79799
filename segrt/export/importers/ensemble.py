"""An ensemble that nnU-Net chose becomes a pair: both configurations, and the post-processing that was determined for their mean."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ...bundle import Bundle, check_replaceable
from ...errors import InputError
from ...files import staged_folder
from ...pair import check_pair
from ...spec import KeepLargest

_PREFIX = "ensemble___"


def is_ensemble(source: Path) -> bool:
    """Whether a folder is named as nnUNetv2_find_best_configuration names an ensemble's."""
    return source.is_dir() and source.name.startswith(_PREFIX)


def import_ensemble(
    source: Path,
    output: Path,
    *,
    folds: Sequence[str] | None,
    read: Callable[[Path, Path, Sequence[str]], Bundle],
    steps: Callable[[Path], tuple[KeepLargest, ...]],
    force: bool,
) -> Bundle:
    """Turn `ensembles/ensemble___<model>___<model>___<folds>` of a results folder, with the two models beside `ensembles`, into a pair.

    Parameters
    ----------
    folds : other folds than those the ensemble was scored with; its post-processing is left out then
    read : imports a model folder with some folds to a path
    steps : reads a postprocessing.json

    Raises
    ------
    InputError
        When the folder's name says something else, or a model is not there.
    """
    check_replaceable(output, force=force)
    first, second, named = _parts(source)
    chosen = tuple(folds) if folds is not None else named
    file = source / "postprocessing.json"
    postprocess = steps(file) if file.is_file() and sorted(chosen) == sorted(named) else ()
    with tempfile.TemporaryDirectory(prefix="segrt-") as name:
        bundles = [read(model, Path(name) / str(number), chosen) for number, model in enumerate((first, second))]
        spec = bundles[0].spec.model_copy(update={"postprocess": postprocess, "partner": bundles[1].identity})
        check_pair(output, spec, bundles[1].spec)
        with staged_folder(output) as folder:
            shutil.copytree(bundles[0].path, folder, dirs_exist_ok=True)
            shutil.copytree(bundles[1].path, folder / "partner")
            (folder / "model.json").write_text(spec.to_json(), encoding="utf-8")
    return Bundle.open(output)


def _parts(source: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """The two model folders and the folds that an ensemble's name says."""
    parts = source.name.removeprefix(_PREFIX).split("___")
    if len(parts) != 3 or ".." in parts:
        raise InputError(f"{source}: expected ensemble___<model>___<model>___<folds>, such as nnUNetv2_find_best_configuration names it")
    models = [source.resolve().parent.parent / name for name in parts[:2]]
    for model in models:
        if not (model / "plans.json").is_file():
            raise InputError(f"{source}: its model {model.name} is not in {model.parent}; the ensemble itself holds no weights")
    return models[0], models[1], tuple(parts[2].split("_"))
