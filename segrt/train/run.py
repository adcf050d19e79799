"""The TRAIN flow, from a dataset folder to a bundle: one line per stage, each of which goes on from where an earlier run stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle, check_replaceable
from ..files import write_atomic
from .cases import Dataset
from .config import TrainConfig
from .configuration import Plan
from .dataset import open_dataset
from .finish import write_bundle
from .folds import Fold, Show, train_fold, validate_fold
from .npy import check_intensities
from .override import choose_configuration
from .pairs import name_candidates, split_pair, validate_candidate
from .processes import rank, wait_for_all
from .records import environment, tell_environment
from .select import choose_best, choose_nothing, choose_postprocess
from .space import check_space
from .splits import covering_folds, scored_on, split_of
from .start import check_once, check_writable, choose_device, measure_once, plan_once, prepare_cases, record_split, settle_threads
from .tell import tell_plan
from .work import Trained, Work, in_turn, labels_of


def train_model(
    source: str | Path | Dataset,
    output: str | Path,
    config: TrainConfig,
    *,
    work: str | Path | None = None,
    shared: str | Path | None = None,
    plan: str | Path | None = None,
    plan_only: bool = False,
    prepare_only: bool = False,
    candidates: Sequence[str] | None = None,
    pairs: bool = True,
    force: bool = False,
    dataset_options: Mapping[str, Any] | None = None,
    reports: Mapping[str, str] | None = None,
    show: Show | None = None,
) -> Bundle | None:
    """Train a model on a folder of images with labels, and write it as a bundle.

    What an earlier run with the same settings has done is kept: call it again after an interruption. Under `torchrun` all processes call
    it; the first one writes the bundle.

    Parameters
    ----------
    source : dataset, or its folder, see `open_dataset`
    output : the bundle to write
    work : folder for prepared cases, checkpoints and records; by default `output` with .train at its end
    shared : folder for prepared cases and what was read of the dataset, where several trainings have that in common; by default `work`
    plan : a plan.json to train by instead of planning
    plan_only : stop when the plan is written and told, and what would be trained by it was checked
    prepare_only : stop when the cases are prepared
    candidates : configurations of which the best becomes the bundle, all of the plan's when empty; without it, the config's own is trained
    pairs : every pair of the candidates is one too, see `segrt.train.pairs`
    force : replace a bundle at `output`
    dataset_options : further arguments of `open_dataset`
    reports : file name -> text that goes into the bundle's reports too

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
        check_writable(target.parent, "output")
    dataset = source if isinstance(source, Dataset) else open_dataset(source, **(dataset_options or {}))
    for fold in config.folds if not dataset.missing else ():
        split_of(dataset, config, fold)  # what cannot be split is said before anything is read
    check_intensities(dataset, config)
    settle_threads()
    device = choose_device(config.device)
    if config.precision == "auto":
        config = config.model_copy(update={"precision": "fp16" if device.type == "cuda" else "fp32"})
    folder = Path(work) if work else target.with_name(target.name + ".train")
    place = Work(folder, dataset, config, device, Path(shared) if shared else folder, show or Show())
    check_writable(folder, "work folder")
    if rank() == 0:
        write_atomic(place.folder / "config.json", config.to_json())
        for name, text in (reports or {}).items():
            write_atomic(place.folder / "reports" / name, text)
    in_turn(lambda: check_once(place))
    fingerprint = in_turn(lambda: measure_once(place))
    chosen = in_turn(lambda: plan_once(place, fingerprint, plan))
    place.show.stage(f"plan: {place.folder / 'plan.json'} ({', '.join(chosen.configurations)})")
    names = name_candidates(config.configuration, candidates, chosen.configurations, pairs=pairs)
    singles = tuple(dict.fromkeys(part for name in names for part in split_pair(name)))
    stages = {name: _stages(chosen, place, name) for name in singles}
    trainable = {stage: choose_configuration(chosen, config, stage) for parts in stages.values() for stage, _ in parts}
    if plan_only:
        for line in tell_plan(chosen, trainable):
            place.show.stage(line)
    if rank() == 0:
        check_space(place, trainable)
    if plan_only:
        return None
    if prepare_only:
        for (first, _), *_ in stages.values():  # what a cascade's second stage is prepared with, its first has to predict
            prepare_cases(place, choose_configuration(chosen, config, first), first)
        return None
    for line in tell_environment(environment(device)):
        place.show.stage(line)
    trained = dict[str, Trained]()
    for stage, folds in (part for parts in stages.values() for part in parts):
        if stage in trained and set(folds) <= trained[stage].folds.keys():
            continue
        done = train_configuration(place, chosen, stage, folds, previous=_before(chosen, place, stage, trained))
        if done is None:
            return None
        trained[stage] = done
    if rank() > 0:
        return None
    scores = {name: validate_candidate(place, [trained[part] for part in split_pair(name)]) for name in names}
    best = choose_best(scores, where=scored_on(config.folds))
    if len(names) > 1:
        place.show.stage(best.text)
    write_atomic(place.folder / "reports" / "configurations.json", best.to_json())
    chains = [[trained[stage] for stage, _ in stages[part]] for part in split_pair(best.name)]
    # a configuration whose folds all serve a cascade is judged by all of them
    summary = best.summary if len(chains) > 1 else chains[0][-1].summary
    seen = any("all" in chain[-1].folds for chain in chains)
    choice = choose_nothing(summary) if seen else choose_postprocess(summary, dataset, workers=max(1, config.workers))
    for sentence in choice.tried:
        place.show.stage(f"post-processing, {sentence}")
    return write_bundle(place, target, chains, choice, name=best.name, force=force)


def train_configuration(place: Work, plan: Plan, name: str, folds: Sequence[str], *, previous: Trained | None) -> Trained | None:
    """Prepare the cases, train and validate the folds of one configuration; None when a signal stopped it."""
    config, dataset = place.config, place.dataset
    configuration = choose_configuration(plan, config, name)
    earlier = None if previous is None else labels_of(place, previous)
    prepared = in_turn(lambda: prepare_cases(place, configuration, name, previous=earlier))
    own = config.model_copy(update={"configuration": name})
    made = {
        fold: Fold(
            fold,
            split,
            configuration,
            prepared,
            own.with_epoch(len(split.train), configuration.batch_size),
            place.fold(name, fold),
            place.device,
            place.show,
        )
        for fold, split in ((fold, split_of(dataset, config, fold)) for fold in folds)
    }
    for fold in made.values():
        if rank() == 0:
            record_split(place, fold.name, fold.split, fold.folder)
        place.show.stage(f"{name}: training fold {fold.name} for {fold.config.length}")
        if not train_fold(fold):
            return None
    summaries = tuple(validate_fold(fold, dataset, previous=earlier) for fold in made.values()) if rank() == 0 else ()
    wait_for_all()
    return Trained(name, configuration, made, summaries)


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
