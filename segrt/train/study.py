"""The optimizer study: models x optimizers under one budget, each run a training of its own; TRAIN, several times over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, SpecError
from ..files import write_atomic
from ..report.curves import write_comparison
from ..report.tables import write_panels, write_rows
from .config import TrainConfig
from .dataset import open_dataset
from .folds import Show
from .kept import digest_of
from .records import environment
from .run import train_model
from .splits import split_of
from .study_jobs import Order, Outcome, ProgressRun, run_orders, share_cores
from .study_plan import StudyRun, with_same_split
from .study_results import RunRecord, Study, collect, load_study

_COUNTS = frozenset({"folds", "split", "weights"})  # free in a resumed training, but not in its scores


def _silent(name: str, text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class StudyShow:
    """What a study tells while it works: `preparing` as a training does, `stage` (run, a line of text), `step` (run, iteration)."""

    preparing: Show
    stage: Callable[[str, str], None] = _silent
    step: ProgressRun | None = None


def run_study(
    source: str | Path,
    output: str | Path,
    runs: Sequence[StudyRun],
    *,
    jobs: int = 1,
    cores: int | None = None,
    force: bool = False,
    dataset_options: Mapping[str, Any] | None = None,
    show: StudyShow | None = None,
) -> Study:
    """Train every run and compare them: study.json, curves.png, dice.* and runs.* in `output`, beside a bundle per run.

    The cases are prepared once, before the first run; then each run is what `train_model` does, in a process of its own that sees only
    its share of the cores. A run's minutes count its iterations alone, and poly and cosine fall over them, so the rate ends with the
    budget whatever a step takes; under `iterations` a study repeated on as many cores gives the same weights. Call it again after an
    interruption: finished runs stay, others go on from their checkpoints. A run that fails does not end the others.

    Parameters
    ----------
    output : folder of the study
    jobs : runs at once
    cores : of each run; an equal share of those this process may use by default
    force : begin again, removing what `output` holds of these runs
    dataset_options : further arguments of `open_dataset`

    Returns
    -------
    Study : what study.json says; a run is "finished", "failed" (with the sentence), "stopped" by a signal, or still "waiting" after one

    Raises
    ------
    InputError, SpecError, BackendError
        When nothing can be trained: the dataset, the split, the number of cores, or earlier runs with other settings in `output`.
    """
    folder, show = Path(output), show or StudyShow(Show())
    slots = share_cores(jobs, cores)
    dataset = open_dataset(source, **(dataset_options or {}))
    digest = digest_of(dataset)
    if dataset.split is None:
        runs = [with_same_split(run) for run in runs]
    training = {run.name: tuple(len(split_of(dataset, run.config, fold).train) for fold in run.config.folds) for run in runs}
    if force:
        _remove(folder, runs)
    finished = _finished(folder, runs, digest)
    new = {run.name: RunRecord(name=run.name, config=run.config, cores=len(slots[0]), training=training[run.name]) for run in runs}
    records = new | finished
    for name, record in finished.items():
        other = "" if record.cores == len(slots[0]) else f", on {record.cores} cores where the others get {len(slots[0])}"
        show.stage(name, f"finished before{other}")

    def study() -> Study:
        return Study(schema=1, dataset=dataset.name, digest=digest, environment=_environment(), runs=tuple(records.values()))

    def settle(name: str, outcome: Outcome) -> None:
        records[name] = _record(records[name], folder, outcome)
        write_study(folder, study())
        show.stage(name, _sentence(records[name]))

    options = dict(dataset_options or {})
    todo = [run for run in runs if run.name not in finished]
    for run in todo:
        config = run.config.model_copy(update={"workers": max(run.config.workers, sum(len(slot) for slot in slots))})
        where: dict[str, Any] = {"work": _work(folder, run.name), "shared": folder / "shared", "dataset_options": options}
        train_model(source, folder / run.name, config, prepare_only=True, show=show.preparing, **where)
    write_study(folder, study())
    orders = [Order(run.name, str(source), folder, run.config, options) for run in todo]
    run_orders(orders, slots, settle, stage=show.stage, step=show.step)
    return study()


def write_study(folder: Path, study: Study) -> None:
    """Write study.json, and what there is to compare so far: curves.png, dice.csv/.md/.tex and runs.csv/.md/.tex."""
    write_atomic(folder / "study.json", study.to_json())
    begun = {(run.model, run.optimizer): _folds(folder, run) for run in study.runs}
    begun = {key: folders for key, folders in begun.items() if folders}
    if begun:
        write_comparison(folder / "curves.png", begun)
    if study.finished:
        write_panels(folder / "dice", "post-processing", study.panels, caption=study.caption)
        write_rows(folder / "runs", study.rows, caption=f"Runs of the study on {study.dataset}")


def _finished(folder: Path, runs: Sequence[StudyRun], digest: str) -> dict[str, RunRecord]:
    """Runs that an earlier call ended with the same settings.

    Raises SpecError where what lies there was made otherwise.
    """
    earlier = load_study(folder / "study.json") if (folder / "study.json").is_file() else None
    if earlier is not None and earlier.digest != digest:
        raise SpecError(f"{folder} holds a study of other files (dataset {earlier.dataset}); choose another folder, or --force")
    found = {} if earlier is None else {record.name: record for record in earlier.runs}
    for run in runs:
        if run.name in found:
            _same_settings(folder / run.name, run.config, found[run.name].config)
        elif (folder / run.name).exists():
            raise InputError(f"{folder / run.name} is there already and of no study; choose another folder, or --force")
    return {run.name: found[run.name] for run in runs if run.name in found and _is_whole(folder, found[run.name])}


def _same_settings(path: Path, now: TrainConfig, then: TrainConfig) -> None:
    different = now.differences(then) | {name: (getattr(now, name), getattr(then, name)) for name in _COUNTS}
    told = ", ".join(f"{name} {old!r} (now {new!r})" for name, (new, old) in different.items() if new != old)
    if told:
        raise SpecError(f"{path} was trained with {told}; go on with the same settings, choose another folder, or --force")


def _is_whole(folder: Path, record: RunRecord) -> bool:
    return record.status == "finished" and (folder / record.name / "model.json").is_file()


def _record(record: RunRecord, folder: Path, outcome: Outcome) -> RunRecord:
    """What is known of a run now that its process ended."""
    ended = record.model_copy(update={"status": outcome.status, "error": outcome.error})
    return collect(ended, folder / record.name, _folds(folder, record)) if outcome.status == "finished" else ended


def _sentence(record: RunRecord) -> str:
    match record.status:
        case "finished" if record.mean_dice is not None:
            before, after = record.mean_dice.without, record.mean_dice.with_
            return f"finished, mean Dice {_score(before)}, {_score(after)} with post-processing"
        case "failed":
            return f"failed: {record.error}"
    return f"{record.status}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _folds(folder: Path, record: RunRecord) -> list[Path]:
    """The folders of a run's folds that hold records."""
    work = _work(folder, record.name) / record.config.configuration
    return [path for fold in record.config.folds if ((path := work / f"fold_{fold}") / "training.csv").is_file()]


def _work(folder: Path, name: str) -> Path:
    return folder / f"{name}.train"


def _remove(folder: Path, runs: Sequence[StudyRun]) -> None:
    """Clear the runs away; folders that are none of ours stay, and are refused later."""
    for run in runs:
        for path, mark in ((folder / run.name, "model.json"), (_work(folder, run.name), "config.json")):
            if (path / mark).is_file():
                shutil.rmtree(path)
    (folder / "study.json").unlink(missing_ok=True)


def _environment() -> dict[str, object]:
    return environment(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
