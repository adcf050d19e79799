"""TRAIN, third stage: every case goes through the runtime's own `preprocess` once, into a cache that patches are read from."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import Array, FloatArray, ProgressFn, cpu_threads
from ..errors import InputError
from ..files import sha256, staged_folder
from ..io import read_labels
from ..io.peek import find_labels
from ..memory import available_bytes
from ..preprocess import place_labels, preprocess
from ..spec import ModelSpec, PreviousStage
from ..volume import Placement, Volume
from .cache import MARKER, SUFFIXES, Prepared, PreparedCase, Storage, find_case, write_array
from .cases import Dataset, TrainingCase
from .configuration import Configuration
from .dataset import read_training_case
from .locations import find_locations
from .parallel import run_each
from .sizes import DType, case_memory, room_bytes

logger = logging.getLogger(__name__)

_FORMAT = 1  # raised when what is written for the same key changes
_STALE_S = 3600.0


@dataclass(frozen=True)
class _Job:
    """What a worker needs to prepare one case."""

    case: TrainingCase
    dataset: Dataset
    spec: ModelSpec
    folder: Path
    dtype: DType
    storage: Storage
    previous: Path | None


def prepare(
    dataset: Dataset,
    configuration: Configuration,
    folder: Path,
    *,
    workers: int = 2,
    dtype: DType = "float32",
    storage: Storage = "blosc2",
    previous: Path | None = None,
    progress: ProgressFn | None = None,
) -> Prepared:
    """Bring every case of a dataset onto the working grid and keep it in `folder`, one subfolder a case.

    The image is what the runtime's `preprocess` makes of it, so what a network learns from is what it will be given. (nnU-Net takes
    mean and variance of a masked channel over the labelled voxels too, where it trains, and cannot where it predicts.) Labels are brought
    onto the same grid by the model's rule for labels.

    A case is done again when its files are not whole, when the dataset's files changed, or when something its result depends on differs
    (normalisation, grid, resampling, labels, `dtype`, `storage`); what the network, the patch or the batch is changes nothing.

    Parameters
    ----------
    workers : processes; fewer when the largest case would not fit into memory that often, none of their own for 1
    previous : folder with the label maps of the stage before, on the images' own grids, for a cascade
    progress : called with (cases done, cases in all)

    Raises
    ------
    InputError
        When a case cannot be read, has a label the dataset does not declare or leaves float16's range, a cascade gets no labels, or the
        disk is too small or full; cases that were finished stay.
    BackendError
        When a worker was killed.
    """
    spec = configuration.spec
    jobs = [_Job(case, dataset, spec, folder, dtype, storage, _earlier(case, spec, previous)) for case in dataset.cases]
    found = {job.case.name: find_case(folder / job.case.name, _key(job)) for job in jobs}
    todo = [job for job in jobs if found[job.case.name] is None]
    _clear(folder)
    _check_disk(todo, folder, workers)
    logger.info("%s: %d of %d cases are prepared already", folder, len(jobs) - len(todo), len(jobs))
    at_once, ready = _at_once(todo, spec, workers), len(jobs) - len(todo)
    # the largest first, so that none of them is left when the others are done
    todo.sort(key=lambda job: case_memory(job.case, spec), reverse=True)
    made = run_each(
        _prepare_case if at_once < 2 else _in_worker,
        todo,
        workers=at_once,
        progress=progress and (lambda done, _: progress(ready + done, len(jobs))),
    )
    found |= {case.name: case for case in made}
    return Prepared(folder, tuple(case for case in found.values() if case is not None))


def unprepared(
    dataset: Dataset, configuration: Configuration, folder: Path, *, dtype: DType = "float32", storage: Storage = "blosc2"
) -> list[TrainingCase]:
    """Cases that `prepare` has yet to make; of a cascade's second stage those never made, as the labels they need may not be there yet.

    Raises
    ------
    InputError
        When a case cannot be read.
    """
    spec = configuration.spec
    if spec.previous is not None:
        return [case for case in dataset.cases if not (folder / case.name / MARKER).is_file()]
    jobs = [_Job(case, dataset, spec, folder, dtype, storage, None) for case in dataset.cases]
    return [job.case for job in jobs if find_case(folder / job.case.name, _key(job)) is None]


def _earlier(case: TrainingCase, spec: ModelSpec, previous: Path | None) -> Path | None:
    """The label map of the stage before."""
    if spec.previous is None:
        return None
    if previous is None:
        raise InputError(f"{spec.name} is the second stage of a cascade: its cases need the labels of the first, give their folder")
    return find_labels(previous, case.name)


def _key(job: _Job) -> str:
    """Hash of all that a prepared case depends on."""
    parts = {"transpose", "crop_nonzero", "target", "resample_image", "resample_labels", "ignore", "previous"}
    files = [*job.case.images, *(path for path in (job.case.labels, job.previous) if path is not None)]
    try:
        stats = [path.stat() for file in files for path in (sorted(file.iterdir()) if file.is_dir() else [file])]
    except OSError as err:
        raise InputError(f"case {job.case.name} cannot be read: {err.filename}: {_reason(err)}") from err
    depends = {
        "format": _FORMAT,
        "spec": job.spec.model_dump(mode="json", include=parts),
        "normalization": [channel.normalization.model_dump(mode="json") for channel in job.spec.channels],
        "labels": [label.values for label in job.spec.labels],
        "npy_window": job.dataset.npy_window,
        "stored": [job.dtype, job.storage],
        **({"mask": [job.dataset.mask.threshold, job.dataset.mask.value]} if job.dataset.mask else {}),
        "files": [[str(file) for file in files], *([stat.st_size, stat.st_mtime_ns] for stat in stats)],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _clear(folder: Path) -> None:
    """Remove what a killed run left half-written; another run may be at work in the same folder, so only when it is old."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder} cannot be made: {_reason(err)}") from err
    for left in [*folder.glob(".*.part"), *folder.glob(".*.old")]:
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _check_disk(jobs: Sequence[_Job], folder: Path, workers: int) -> None:
    if not jobs:
        return
    first = jobs[0]
    need = room_bytes([job.case for job in jobs], first.spec, folder, dtype=first.dtype, storage=first.storage, workers=workers)
    free = shutil.disk_usage(folder).free
    logger.info("%s: %d cases to prepare, about %.2f GB", folder, len(jobs), need / 1e9)
    if need > free:
        hint = "store float16 (--cache-dtype float16), " if first.dtype == "float32" else ""
        raise InputError(
            f"{folder}: {len(jobs)} cases to prepare need about {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; {hint}"
            "free some space or choose another folder"
        )


def _at_once(jobs: Sequence[_Job], spec: ModelSpec, workers: int) -> int:
    """How many of the largest case fit into memory, at most `workers`."""
    largest = max((case_memory(job.case, spec) for job in jobs), default=1)
    free = available_bytes()
    fit = max(1, free // largest) if free else workers
    if fit < min(workers, len(jobs)):
        logger.warning("%d workers instead of %d: the largest case takes %.1f GB of memory", fit, workers, largest / 1e9)
    return min(workers, fit)


def _in_worker(job: _Job) -> PreparedCase:
    with cpu_threads(1):  # the other cores have a process of their own
        return _prepare_case(job)


def _prepare_case(job: _Job) -> PreparedCase:
    key = _key(job)  # before anything is read: what changes later is noticed the next time
    volume, labels = read_training_case(job.case, job.dataset)
    data, placement, earlier = _working(job, volume)
    placed = place_labels(labels, volume, job.spec, placement)
    rows, points = find_locations(placed, job.spec)
    if job.dtype == "float16" and (largest := np.abs(data).max()) > np.finfo(np.float16).max:
        raise InputError(f"{job.case.name}: normalised intensities up to {largest:g} do not fit into float16; store float32")
    suffix = SUFFIXES[job.storage]
    arrays = {f"data{suffix}": data.astype(job.dtype, copy=False), f"labels{suffix}": placed}
    if earlier is not None:
        arrays[f"previous{suffix}"] = earlier
    place = job.folder / job.case.name
    with _disk_errors(place), staged_folder(place) as part:
        for name, array in arrays.items():
            write_array(part / name, array, job.spec.inference.patch)
        np.save(part / "locations.npy", points, allow_pickle=False)
        files = sorted(part.iterdir())
        case = PreparedCase(
            name=job.case.name,
            key=key,
            shape=placement.shape,
            storage=job.storage,
            dtype=job.dtype,
            placement=placement,
            locations=rows,
            sizes={file.name: file.stat().st_size for file in files},
            sha256=hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest(),
        )
        (part / MARKER).write_text(case.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return case


def _working(job: _Job, volume: Volume) -> tuple[FloatArray, Placement, Array | None]:
    """The image on the working grid, the placement, and the labels of the stage before there."""
    spec = job.spec
    if spec.previous is None or job.previous is None:
        return *preprocess(volume, spec), None
    earlier, grid = read_labels(job.previous)
    if wrong := volume.grid.mismatch(grid):
        raise InputError(f"{job.previous}: labels of the stage before have {wrong}, as the image {job.case.name} has")
    # of the one-hot channels one is made and left out: what they hold is stored as labels
    one = spec.model_copy(update={"previous": PreviousStage(values=spec.previous.values[:1])})
    data, placement = preprocess(volume, one, previous=earlier)
    return data[:-1], placement, place_labels(earlier, volume, spec, placement)


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise InputError(f"{place} cannot be written: {_reason(err)}") from err


def _reason(err: OSError) -> str:
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another folder, finished cases are kept"
    return (err.strerror or str(err)).lower()
