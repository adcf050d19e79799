"""A trained nnU-Net v2 becomes a bundle; nnunetv2 itself is not needed."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...bundle import Bundle
from ...errors import BuildError, InputError, SpecError
from ...networks import build_empty, check_weights
from ...spec import KeepLargest, ModelSpec
from . import sources
from .checkpoint import Checkpoint, read_checkpoint
from .ensemble import import_ensemble, is_ensemble
from .plans import model_spec, postprocess_steps, resolve_configuration

logger = logging.getLogger(__name__)

FINAL = "checkpoint_final.pth"
# Trainers of nnU-Net 2.8 whose networks are not the ones the plans describe.
_OTHER_NETWORKS = ("nnUNet_Primus", "_Primus")


@dataclass(frozen=True)
class Model:
    """A trained configuration in memory, before it is written.

    Attributes
    ----------
    spec : its description
    weights : member -> tensor name -> float32 tensor
    folder : where it came from; None for a lone checkpoint
    previous : name of the configuration of the stage before, or None
    reports : file name -> text for the bundle's reports/
    """

    spec: ModelSpec
    weights: dict[str, dict[str, torch.Tensor]]
    folder: sources.ModelFolder | None = None
    previous: str | None = None
    reports: dict[str, str | bytes] = field(default_factory=dict)


def import_nnunet(
    source: str | Path,
    output: str | Path,
    *,
    configuration: str | None = None,
    folds: Sequence[str] | None = None,
    trainer: str | None = None,
    plans: str | None = None,
    checkpoint: str = FINAL,
    force: bool = False,
) -> Bundle:
    """Turn a trained nnU-Net v2 into a bundle; a cascade brings its first stage along into previous/.

    Parameters
    ----------
    source : a folder <trainer>__<plans>__<configuration>, a results folder that holds such folders, a zip from
        nnUNetv2_export_model_to_zip, one .pth, or a folder ensembles/ensemble___... of a results folder, which becomes a pair
    output : folder of the new bundle
    configuration, trainer, plans : which model, where `source` holds several; 3d_fullres is taken when nothing is said
    folds : names such as ("0", "1", "all"); None for all that are there
    checkpoint : file name inside a fold; checkpoint_best.pth replaces a missing checkpoint_final.pth
    force : replace a bundle that is already at `output`

    Raises
    ------
    InputError
        When the source, a fold or a configuration is not there.
    SpecError
        When the plans ask for something segrt does not do.
    BuildError
        When a checkpoint is damaged, holds code, or does not fit the plans.
    """
    source = Path(source)
    if is_ensemble(source):

        def read(model: Path, target: Path, members: Sequence[str]) -> Bundle:
            return import_nnunet(model, target, folds=members, checkpoint=checkpoint)

        return import_ensemble(source, Path(output), folds=folds, read=read, steps=lambda p: postprocess_steps(_read_json(p)), force=force)
    with _as_folder(source) as folder:
        if folder.is_file():
            return _write(read_checkpoint_model(folder, configuration=configuration), Path(output), force=force)
        if not sources.list_model_folders(folder):
            raise InputError(f"{source}: {sources.NO_MODEL}")  # a zip by its own name, not by where it was unpacked
        chosen = sources.choose_model_folder(folder, configuration=configuration, trainer=trainer, plans=plans)
        model = read_model(chosen, folds=folds, checkpoint=checkpoint)
        with tempfile.TemporaryDirectory(prefix="segrt-") as temporary:
            previous = _previous_bundle(model, Path(temporary), folds=folds, checkpoint=checkpoint)
            return _write(model, Path(output), previous=previous, force=force)


def read_model(folder: sources.ModelFolder | Path, *, folds: Sequence[str] | None = None, checkpoint: str = FINAL) -> Model:
    """Read one configuration folder: its description and the weights of each fold; see `import_nnunet` for errors."""
    if isinstance(folder, Path):
        folder = sources.choose_model_folder(folder, configuration=None, trainer=None, plans=None)
    available = sources.available_folds(folder.path, checkpoint)
    if folds is not None and not folds:
        raise InputError(f"folds: none was chosen; {folder.path} has {', '.join(available) or 'none'}")
    # "all" is nnU-Net's fold that saw every case; where there is none it can only mean all the folds there are
    every = folds is None or (tuple(folds) == ("all",) and sources.find_checkpoint(folder.path, "all", checkpoint) is None)
    names = available if every or folds is None else tuple(folds)
    _check_folds(names, folder.path, checkpoint)
    checkpoints = {fold: read_checkpoint(_checkpoint_path(folder.path, fold, checkpoint)) for fold in names}
    configuration = _configuration(checkpoints, folder)
    plans, dataset = (_read_json(folder.path / name) for name in ("plans.json", "dataset.json"))
    return _model(plans, dataset, configuration, checkpoints, folder=folder, postprocess=_postprocess(folder.path, names))


def read_checkpoint_model(path: Path, *, configuration: str | None = None) -> Model:
    """Read one .pth on its own: nnU-Net stores the plans and dataset.json it was started with inside; see `import_nnunet` for errors."""
    checkpoint = read_checkpoint(path)
    if not checkpoint.plans or not checkpoint.dataset:
        raise BuildError(f"{path}: init_args holds no plans or dataset_json; give the folder it came from instead")
    if configuration not in (None, checkpoint.configuration):
        raise InputError(f"{path}: was trained as configuration {checkpoint.configuration}, not {configuration}")
    return _model(checkpoint.plans, checkpoint.dataset, checkpoint.configuration, {checkpoint.fold: checkpoint})


def _model(
    plans: dict[str, Any],
    dataset: dict[str, Any],
    configuration: str,
    checkpoints: dict[str, Checkpoint],
    *,
    folder: sources.ModelFolder | None = None,
    postprocess: tuple[KeepLargest, ...] = (),
) -> Model:
    first = next(iter(checkpoints.values()))
    _check_trainer(first)
    spec = model_spec(
        plans,
        dataset,
        configuration,
        members=tuple(checkpoints),
        mirror_axes=first.mirror_axes,
        # nnUNetTrainerBN and trainers like it leave running statistics behind, whatever the plans say.
        batch_norm=any(name.endswith("norm.running_mean") for name in first.weights),
        postprocess=postprocess,
        source=f"nnU-Net v2, {first.trainer}, {plans.get('plans_name', 'plans')}, {configuration}",
    )
    network = build_empty(spec.network)
    for item in checkpoints.values():
        check_weights(network, item.weights, where=str(item.path))
    return Model(
        spec,
        {fold: item.weights for fold, item in checkpoints.items()},
        folder,
        resolve_configuration(plans, configuration).get("previous_stage"),
        {"nnunet_plans.json": json.dumps(plans, indent=1), "nnunet_dataset.json": json.dumps(dataset, indent=1)},
    )


def _write(model: Model, output: Path, *, previous: Bundle | None = None, force: bool) -> Bundle:
    if model.previous is not None and previous is None:
        logger.warning("the first stage %s is not beside this model; prediction will need its labels (--previous DIR)", model.previous)
    return Bundle.create(output, model.spec, weights=model.weights, previous=previous, reports=model.reports, force=force)


def _previous_bundle(model: Model, temporary: Path, *, folds: Sequence[str] | None, checkpoint: str) -> Bundle | None:
    """Import the cascade's first stage into `temporary` if it is there, with the same folds where it has them."""
    if model.previous is None or model.folder is None:
        return None
    path = model.folder.sibling(model.previous)
    if not (path / "plans.json").is_file():
        return None
    available = sources.available_folds(path, checkpoint)
    same = tuple(folds) if folds is not None and set(folds) <= set(available) else None
    return _write(read_model(path, folds=same, checkpoint=checkpoint), temporary / "previous", force=False)


@contextmanager
def _as_folder(source: Path) -> Iterator[Path]:
    """A folder or .pth as it is; a zip unpacked."""
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; expected a trained nnU-Net v2")
    if source.is_dir() or source.suffix == ".pth":
        yield source
    elif source.suffix == ".zip":
        with sources.unpacked(source) as folder:
            yield folder
    else:
        raise InputError(f"{source}: expected a folder, a .zip or a .pth of nnU-Net v2")


def _check_folds(folds: Sequence[str], folder: Path, checkpoint: str) -> None:
    if not folds:
        raise InputError(f"{folder}: no fold_*/{checkpoint} in it; the training has not finished, or files are missing")
    if len(set(folds)) != len(folds):
        raise InputError(f"folds: each fold counts once, got {','.join(folds)}")


def _checkpoint_path(folder: Path, fold: str, checkpoint: str) -> Path:
    found = sources.find_checkpoint(folder, fold, checkpoint)
    if found is None:
        there = ", ".join(sorted(p.parent.name for p in folder.glob(f"fold_*/{checkpoint}"))) or "none"
        raise InputError(f"{folder}: no fold_{fold}/{checkpoint}; folds that have one: {there}")
    if found.name != checkpoint:
        logger.warning("fold %s has no %s, taking %s", fold, checkpoint, found.name)
    return found


def _configuration(checkpoints: dict[str, Checkpoint], folder: sources.ModelFolder) -> str:
    """What the checkpoints were trained as; the folder's name is only a hint, folders get renamed."""
    names = {c.configuration for c in checkpoints.values()}
    if len(names) > 1:
        raise InputError(f"{folder.path}: its folds were trained as different configurations ({', '.join(sorted(names))})")
    return names.pop() or folder.configuration


def _check_trainer(checkpoint: Checkpoint) -> None:
    if checkpoint.trainer.startswith(_OTHER_NETWORKS):
        raise SpecError(f"{checkpoint.path}: trainer {checkpoint.trainer} builds a transformer; segrt builds nnU-Net's U-Nets only")
    if not checkpoint.trainer.startswith("nnUNetTrainer"):
        logger.warning("trainer %s is not known; its network is taken to be the one the plans describe", checkpoint.trainer)


def _postprocess(folder: Path, folds: Sequence[str]) -> tuple[KeepLargest, ...]:
    """Steps nnU-Net chose for exactly these folds; those it chose for others do not count."""
    for found in sorted(folder.glob("crossval_results_folds_*/postprocessing.json")):
        theirs = found.parent.name.removeprefix("crossval_results_folds_").split("_")
        if sorted(theirs) == sorted(folds):
            return postprocess_steps(_read_json(found))
        logger.warning("%s is for folds %s and is not used with folds %s", found, ",".join(theirs), ",".join(folds))
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: not readable as JSON ({err})") from err
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
