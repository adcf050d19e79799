"""The TRAIN flow, from a dataset folder to a bundle: one line per stage, each of which goes on from where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ..bundle import Bundle, check_replaceable, sha256, write_atomic
from ..errors import BackendError, InputError
from ..report.tables import write_tables
from ..spec import ModelSpec
from .cases import Dataset
from .check import CheckReport, check_dataset
from .config import TrainConfig
from .configuration import Configuration, Plan, load_plan
from .dataset import open_dataset
from .fingerprint import Fingerprint, load_fingerprint, measure
from .folds import Fold, Show, reports_of, train_fold, validate_fold
from .override import choose_configuration
from .plan import plan_nnunet, plan_vnet
from .prepare import prepare
from .processes import rank, wait_for_all
from .select import Choice, choose_postprocess
from .splits import Split, choose_split, make_splits
from .validate import Summary, merge

logger = logging.getLogger(__name__)


class _Json(Protocol):
    def to_json(self) -> str: ...


_T = TypeVar("_T", bound=_Json)


@dataclass(frozen=True)
class Work:
    """The folder a training works in, beside the bundle: reports, plan, prepared cases, and a folder per configuration."""

    folder: Path
    dataset: Dataset
    config: TrainConfig
    device: torch.device
    show: Show = field(default_factory=Show)

    def fold(self, name: str, fold: str) -> Path:
        """The folder of one fold of a configuration."""
        return self.folder / name / f"fold_{fold}"


@dataclass(frozen=True)
class Trained:
    """A configuration whose folds are trained and validated.

    Attributes
    ----------
    configuration : what was trained
    folds : name -> fold
    summaries : of each fold's validation, in their order
    """

    name: str
    configuration: Configuration
    folds: Mapping[str, Fold]
    summaries: tuple[Summary, ...]

    @property
    def summary(self) -> Summary:
        """The cases of all folds together."""
        return merge(self.summaries)

    @property
    def spec(self) -> ModelSpec:
        """The model with a member per fold."""
        return self.configuration.spec.model_copy(update={"members": tuple(self.folds)})


def train_model(
    source: str | Path,
    output: str | Path,
    config: TrainConfig,
    *,
    work: str | Path | None = None,
    plan: str | Path | None = None,
    plan_only: bool = False,
    force: bool = False,
    dataset_options: Mapping[str, Any] | None = None,
    show: Show | None = None,
) -> Bundle | None:
    """Train a model on a folder of images with labels, and write it as a bundle.

    What an earlier run with the same settings has done is kept: call it again after an interruption. Under `torchrun` all processes call
    it; the first one writes the bundle.

    Parameters
    ----------
    source : dataset folder, see `open_dataset`
    output : the bundle to write
    work : folder for prepared cases, checkpoints and records; by default `output` with .train at its end
    plan : a plan.json to train by instead of planning
    plan_only : stop when the plan is written
    force : replace a bundle at `output`
    dataset_options : further arguments of `open_dataset`

    Returns
    -------
    Bundle, or None after `plan_only`, when a signal stopped the training, and in all processes but the first

    Raises
    ------
    InputError, SpecError, BackendError
        When the dataset, the configuration, an earlier run's files or the machine do not allow it.
    """
    target = Path(output)
    if not plan_only:
        check_replaceable(target, force=force)
    dataset = open_dataset(source, **(dataset_options or {}))
    place = Work(Path(work) if work else target.with_name(target.name + ".train"), dataset, config, _device(config.device), show or Show())
    if rank() == 0:
        write_atomic(place.folder / "config.json", config.to_json())
    _in_turn(lambda: _checked(place))
    fingerprint = _in_turn(lambda: _measured(place))
    chosen = _in_turn(lambda: _planned(place, fingerprint, plan))
    place.show.stage(f"plan: {place.folder / 'plan.json'} ({', '.join(chosen.configurations)})")
    if plan_only:
        return None
    stages = list[Trained]()
    for name, folds in _stages(chosen, place):
        trained = train_configuration(place, chosen, name, folds, previous=stages[-1] if stages else None)
        if trained is None:
            return None
        stages.append(trained)
    if rank() > 0:
        return None
    choice = choose_postprocess(stages[-1].summary, dataset, workers=max(1, config.workers))
    for sentence in choice.tried:
        place.show.stage(f"post-processing, {sentence}")
    return write_bundle(place, target, stages, choice, force=force)


def train_configuration(place: Work, plan: Plan, name: str, folds: Sequence[str], *, previous: Trained | None) -> Trained | None:
    """Prepare the cases, train and validate the folds of one configuration; None when a signal stopped it."""
    config, dataset = place.config, place.dataset
    configuration = choose_configuration(plan, config, name)
    earlier = None if previous is None else _labels_of(place, previous)
    place.show.stage(f"{name}: preparing {len(dataset.cases)} cases")
    cache = place.folder / "prepared" / name
    options: dict[str, Any] = {"dtype": config.cache, "previous": earlier, "progress": place.show.cases}
    prepared = _in_turn(lambda: prepare(dataset, configuration, cache, workers=max(1, config.workers), **options))
    own = config.model_copy(update={"configuration": name})
    made = {
        fold: Fold(fold, split_of(dataset, config, fold), configuration, prepared, own, place.fold(name, fold), place.device, place.show)
        for fold in folds
    }
    for fold in made.values():
        place.show.stage(f"{name}: training fold {fold.name} for {config.iterations} iterations")
        if not train_fold(fold):
            return None
    summaries = tuple(validate_fold(fold, dataset, previous=earlier) for fold in made.values()) if rank() == 0 else ()
    wait_for_all()
    return Trained(name, configuration, made, summaries)


def write_bundle(place: Work, target: Path, stages: Sequence[Trained], choice: Choice, *, force: bool) -> Bundle:
    """Write the last stage as a bundle that holds the stages before it, with all reports."""
    bundle: Bundle | None = None
    for trained in stages:
        last = trained is stages[-1]
        spec = trained.spec.model_copy(update={"postprocess": choice.steps}) if last else trained.spec
        weights = {name: fold.weights for name, fold in trained.folds.items()}
        reports: dict[str, str | bytes] = dict(reports_of(trained.folds))
        reports["summary.json"] = trained.summary.to_json()
        if last:
            _write_tables(place, trained, choice)
            reports |= {path.name: path.read_bytes() for path in sorted((place.folder / "reports").iterdir())}
        path = target if last else place.folder / trained.name / "bundle"
        tensors = {name: part.tensors for name, part in weights.items()}
        bundle = Bundle.create(path, spec, weights=tensors, previous=bundle, reports=reports, force=force or not last)
        files = {name: {"sha256": sha256(bundle.weights_path(name)), "iteration": weights[name].iteration} for name in spec.members}
        bundle.write_report("weights.json", files)
    assert bundle is not None
    place.show.stage(f"{target}: mean Dice {choice.after.mean_dice:.4f} in validation, ready for segrt-build and segrt-predict")
    return bundle


# ------------------------------------------------------------------ stages before the training
def _checked(place: Work) -> CheckReport:
    """Every file read once; a dataset with problems goes no further."""
    config, dataset = place.config, place.dataset
    report = _kept(
        place,
        "dataset",
        lambda: check_dataset(dataset, workers=config.workers, progress=place.show.cases),
        lambda path: CheckReport.model_validate_json(path.read_bytes()),
    )
    report.require_ok()
    for warning in report.warnings:
        place.show.stage(f"warning: {warning}")
    return report


def _measured(place: Work) -> Fingerprint:
    return _kept(
        place,
        "fingerprint",
        lambda: measure(place.dataset, workers=place.config.workers, progress=place.show.cases),
        load_fingerprint,
    )


def _planned(place: Work, fingerprint: Fingerprint, given: str | Path | None) -> Plan:
    """The plan of the dataset, or the one given; written down either way."""
    config = place.config
    if given is not None:
        plan = load_plan(Path(given))
    elif config.model == "vnet":
        plan = plan_vnet(
            place.dataset,
            fingerprint,
            window=config.window,
            shape=config.patch or (128, 128, 128),
            sliding=config.sliding,
            resampling=config.resampling,
            width=config.width,
            deep_supervision=config.deep_supervision,
        )
    else:
        plan = plan_nnunet(place.dataset, fingerprint, planner=config.planner, memory_gb=config.memory_gb)
    write_atomic(place.folder / "plan.json", plan.to_json())
    write_atomic(place.folder / "reports" / "plan.json", plan.to_json())
    return plan


def _stages(plan: Plan, place: Work) -> list[tuple[str, tuple[str, ...]]]:
    """(configuration, folds) to train, a cascade's first stage first.

    The second stage learns from labels that the first one predicted without having seen the case, so all folds of that are needed.
    """
    config = place.config
    configuration = choose_configuration(plan, config)
    stages = [(config.configuration, config.folds)]
    while configuration.previous is not None:
        stages.insert(0, (configuration.previous, ("all",) if config.folds == ("all",) else _every_fold(place)))
        configuration = choose_configuration(plan, config, configuration.previous)
    return stages


def _labels_of(place: Work, previous: Trained) -> Path:
    """Folder with the first stage's label map of every case: predicted by the fold that held the case back, where there is one."""
    folder = place.folder / previous.name / "labels"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        held = {case.name: case.prediction for case in previous.summary.cases}
        for case in place.dataset.cases:
            path = held.get(case.name)
            if path is None:
                raise InputError(
                    f"{previous.name}: no fold holds case {case.name} back, so the second stage of the cascade has no labels of it "
                    "to learn from; use --split kfold, or --fold all"
                )
            _link(path, folder / path.name)
    wait_for_all()
    return folder


def split_of(dataset: Dataset, config: TrainConfig, fold: str) -> Split:
    """The cases of one fold; the split "auto" is the dataset's own, else kfold, for a V-Net a shuffled share of .75."""
    own = dataset.split if config.split == "auto" else None
    if own is not None and fold == "0":
        return Split(*(tuple(sorted(names)) for names in own))
    if own is not None and fold != "all":
        raise InputError(f"fold {fold}: dataset {dataset.name} brings one split of its own, fold 0; use --split kfold for more")
    return choose_split([case.name for case in dataset.cases], _how(config), fold)


def _every_fold(place: Work) -> tuple[str, ...]:
    if place.config.split == "auto" and place.dataset.split is not None:
        return ("0",)
    names = [case.name for case in place.dataset.cases]
    return tuple(str(i) for i in range(len(make_splits(names, _how(place.config)))))


def _how(config: TrainConfig) -> str:
    if config.split != "auto":
        return config.split
    return "shuffled:0.75" if config.model == "vnet" else "kfold"


def _link(path: Path, target: Path) -> None:
    """`target` holds what `path` holds, without a second copy where the disk allows it; unchanged files keep their time."""
    if target.exists() and target.samefile(path):
        return
    target.unlink(missing_ok=True)
    target.hardlink_to(path)


def _kept(place: Work, name: str, make: Callable[[], _T], load: Callable[[Path], _T]) -> _T:
    """What reports/<name>.json says, when it was made from these files; else made anew."""
    path, mark = place.folder / "reports" / f"{name}.json", place.folder / f"{name}.sha256"
    key = digest_of(place.dataset)
    if path.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == key:
        return load(path)
    place.show.stage(f"{name}: reading {len(place.dataset.cases)} cases")
    value = make()
    mark.unlink(missing_ok=True)
    write_atomic(path, value.to_json())
    write_atomic(mark, key)
    return value


def digest_of(dataset: Dataset) -> str:
    """SHA-256 over what a dataset declares and over its files' names, sizes and times."""
    files = [path for case in dataset.cases for path in (*case.images, case.labels) if path is not None]
    each = [entry for file in files for entry in (sorted(file.iterdir()) if file.is_dir() else [file])]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in each]
    declared = [dataset.name, dataset.channels, dict(dataset.labels), dataset.class_order, dataset.ignore]
    return hashlib.sha256(json.dumps([declared, stats]).encode()).hexdigest()


def _in_turn(stage: Callable[[], Any]) -> Any:
    """Run a resumable stage in the first process, then in the others, who find it done."""
    result = stage() if rank() == 0 else None
    wait_for_all()
    return result if rank() == 0 else stage()


def _device(name: str) -> torch.device:
    """The torch device that `name` means."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BackendError(f"device {name}: torch {torch.__version__} sees no GPU; train on --device cpu, or install torch for CUDA")
    return torch.device("cuda:0" if name == "cuda" else name)


def _write_tables(place: Work, trained: Trained, choice: Choice) -> None:
    write_atomic(place.folder / "reports" / "postprocess.json", choice.to_json())
    write_tables(place.folder / "reports" / "dice", choice.table, caption=f"Dice of {trained.spec.name}, {trained.name}")
