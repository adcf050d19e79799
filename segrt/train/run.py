"""The TRAIN flow, from a dataset folder to a bundle: one line per stage, each of which goes on from where an earlier run stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..bundle import Bundle, check_replaceable, sha256, write_atomic
from ..errors import BackendError, InputError
from ..report.tables import write_tables
from ..spec import ModelSpec
from .cache import Prepared
from .cases import Dataset
from .check import CheckReport, check_dataset
from .config import TrainConfig
from .configuration import Configuration, Plan, load_plan
from .dataset import open_dataset
from .fingerprint import Fingerprint, load_fingerprint, measure
from .folds import Fold, Show, reports_of, train_fold, validate_fold
from .kept import kept
from .override import choose_configuration
from .plan import plan_nnunet, plan_vnet
from .prepare import prepare
from .processes import rank, wait_for_all
from .select import Choice, choose_best, choose_postprocess
from .splits import covering_folds, split_of
from .validate import Summary, merge


@dataclass(frozen=True)
class Work:
    """The folder a training works in, beside the bundle: reports, plan, prepared cases, and a folder per configuration.

    Attributes
    ----------
    shared : where that is which trainings of the same dataset may have in common: what was read of it, and its prepared cases
    """

    folder: Path
    dataset: Dataset
    config: TrainConfig
    device: torch.device
    shared: Path
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
        return self.summary_of(tuple(self.folds))

    def summary_of(self, folds: Sequence[str]) -> Summary:
        """The cases of some folds together."""
        return merge([summary for fold, summary in zip(self.folds, self.summaries, strict=True) if fold in folds])

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
    shared: str | Path | None = None,
    plan: str | Path | None = None,
    plan_only: bool = False,
    prepare_only: bool = False,
    candidates: Sequence[str] | None = None,
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
    shared : folder for prepared cases and what was read of the dataset, where several trainings have that in common; by default `work`
    plan : a plan.json to train by instead of planning
    plan_only : stop when the plan is written
    prepare_only : stop when the cases are prepared
    candidates : configurations of which the best becomes the bundle, all of the plan's when empty; without it, the config's own is trained
    force : replace a bundle at `output`
    dataset_options : further arguments of `open_dataset`

    Returns
    -------
    Bundle, or None after `plan_only` or `prepare_only`, when a signal stopped the training, and in all processes but the first

    Raises
    ------
    InputError, SpecError, BackendError
        When the dataset, the configuration, an earlier run's files or the machine do not allow it.
    """
    target = Path(output)
    if not (plan_only or prepare_only):
        check_replaceable(target, force=force)
    dataset = open_dataset(source, **(dataset_options or {}))
    for fold in () if plan_only else config.folds:
        split_of(dataset, config, fold)  # what cannot be split is said before anything is read
    device = _device(config.device)
    if config.precision == "auto":
        config = config.model_copy(update={"precision": "fp16" if device.type == "cuda" else "fp32"})
    folder = Path(work) if work else target.with_name(target.name + ".train")
    place = Work(folder, dataset, config, device, Path(shared) if shared else folder, show or Show())
    if rank() == 0:
        write_atomic(place.folder / "config.json", config.to_json())
    _in_turn(lambda: _checked(place))
    fingerprint = _in_turn(lambda: _measured(place))
    chosen = _in_turn(lambda: _planned(place, fingerprint, plan))
    place.show.stage(f"plan: {place.folder / 'plan.json'} ({', '.join(chosen.configurations)})")
    if plan_only:
        return None
    trained = dict[str, Trained]()
    names = (config.configuration,) if candidates is None else tuple(candidates) or tuple(chosen.configurations)
    if prepare_only:
        for name in names:
            first = _stages(chosen, place, name)[0][0]  # what a cascade's second stage is prepared with, its first has to predict
            prepare_cases(place, choose_configuration(chosen, config, first), first)
        return None
    for name in names:
        for stage, folds in _stages(chosen, place, name):
            if stage in trained and set(folds) <= trained[stage].folds.keys():
                continue
            done = train_configuration(place, chosen, stage, folds, previous=_before(chosen, place, stage, trained))
            if done is None:
                return None
            trained[stage] = done
    if rank() > 0:
        return None
    best = choose_best({name: trained[name].summary_of(config.folds) for name in names})
    if len(names) > 1:
        place.show.stage(best.text)
    write_atomic(place.folder / "reports" / "configurations.json", best.to_json())
    stages = [trained[stage] for stage, _ in _stages(chosen, place, best.name)]
    choice = choose_postprocess(stages[-1].summary, dataset, workers=max(1, config.workers))
    for sentence in choice.tried:
        place.show.stage(f"post-processing, {sentence}")
    return write_bundle(place, target, stages, choice, force=force)


def train_configuration(place: Work, plan: Plan, name: str, folds: Sequence[str], *, previous: Trained | None) -> Trained | None:
    """Prepare the cases, train and validate the folds of one configuration; None when a signal stopped it."""
    config, dataset = place.config, place.dataset
    configuration = choose_configuration(plan, config, name)
    earlier = None if previous is None else _labels_of(place, previous)
    prepared = _in_turn(lambda: prepare_cases(place, configuration, name, previous=earlier))
    own = config.model_copy(update={"configuration": name})
    made = {
        fold: Fold(fold, split_of(dataset, config, fold), configuration, prepared, own, place.fold(name, fold), place.device, place.show)
        for fold in folds
    }
    for fold in made.values():
        place.show.stage(f"{name}: training fold {fold.name} for {config.length}")
        if not train_fold(fold):
            return None
    summaries = tuple(validate_fold(fold, dataset, previous=earlier) for fold in made.values()) if rank() == 0 else ()
    wait_for_all()
    return Trained(name, configuration, made, summaries)


def prepare_cases(place: Work, configuration: Configuration, name: str, *, previous: Path | None = None) -> Prepared:
    """Prepare the cases for one configuration; of a cascade's second stage, those of this training alone."""
    place.show.stage(f"{name}: preparing {len(place.dataset.cases)} cases")
    folder = (place.shared if previous is None else place.folder) / "prepared" / name
    options: dict[str, Any] = {"dtype": place.config.cache, "previous": previous, "progress": place.show.cases}
    return prepare(place.dataset, configuration, folder, workers=max(1, place.config.workers), **options)


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
            own = (place.shared, place.folder)
            reports |= {path.name: path.read_bytes() for folder in own for path in sorted((folder / "reports").iterdir())}
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

    def check() -> CheckReport:
        place.show.stage(f"checking {len(place.dataset.cases)} cases")
        return check_dataset(place.dataset, workers=place.config.workers, progress=place.show.cases)

    report = kept(place.shared, "dataset", place.dataset, check, lambda path: CheckReport.model_validate_json(path.read_bytes()))
    report.require_ok()
    for warning in report.warnings:
        place.show.stage(f"warning: {warning}")
    return report


def _measured(place: Work) -> Fingerprint:
    def take() -> Fingerprint:
        place.show.stage(f"measuring {len(place.dataset.cases)} cases")
        return measure(place.dataset, workers=place.config.workers, progress=place.show.cases)

    return kept(place.shared, "fingerprint", place.dataset, take, load_fingerprint)


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


def _stages(plan: Plan, place: Work, name: str) -> list[tuple[str, tuple[str, ...]]]:
    """(configuration, folds) to train for one configuration, a cascade's first stage first.

    The second stage learns from labels that the first one predicted without having seen the case, so all folds of that are needed.
    """
    config = place.config
    configuration = choose_configuration(plan, config, name)
    stages = [(name, config.folds)]
    while configuration.previous is not None:
        stages.insert(0, (configuration.previous, covering_folds(place.dataset, config, configuration.previous)))
        configuration = choose_configuration(plan, config, configuration.previous)
    return stages


def _before(plan: Plan, place: Work, name: str, trained: Mapping[str, Trained]) -> Trained | None:
    previous = choose_configuration(plan, place.config, name).previous
    return None if previous is None else trained[previous]


def _labels_of(place: Work, previous: Trained) -> Path:
    """Folder with the first stage's label map of every case: predicted by the fold that held the case back, where there is one."""
    folder = place.folder / previous.name / "labels"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for case in previous.summary.cases:
            _link(case.prediction, folder / case.prediction.name)
    wait_for_all()
    return folder


def _link(path: Path, target: Path) -> None:
    """`target` holds what `path` holds, without a second copy where the disk allows it; unchanged files keep their time."""
    if target.exists() and target.samefile(path):
        return
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(path)
    except OSError:
        shutil.copy2(path, target)


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
