"""TRAIN, everything before the first iteration: the dataset is checked, measured and planned for, its cases are prepared."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numba
import torch

from ..errors import BackendError, InputError
from ..files import write_atomic
from .cache import Prepared
from .check import CheckReport, check_dataset
from .configuration import Configuration, Plan, load_plan
from .fingerprint import Fingerprint, load_fingerprint, measure
from .kept import kept
from .patients import find_patients, guess_patients, name_some, torn_patients
from .plan import plan_nnunet, plan_unetpp, plan_vnet
from .prepare import prepare
from .splits import Split
from .stored import parse_stored, read_stored
from .v1_plan import plan_nnunet_v1
from .work import Work


def check_writable(folder: Path, what: str) -> None:
    """Raise an InputError unless files can be made in a folder, which is made when missing: later it would cost a whole training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as err:
        raise InputError(f"{folder} is no folder, or lies in a file; choose another {what}") from err
    except OSError as err:
        raise InputError(f"nothing can be written into {folder} ({err.strerror or err}); choose another {what}") from err


def check_once(place: Work) -> CheckReport:
    """Read every file once; a dataset with problems goes no further."""

    def check() -> CheckReport:
        place.show.stage(f"checking {len(place.dataset.cases)} cases")
        return check_dataset(place.dataset, workers=place.config.workers, progress=place.show.cases)

    def load(path: Path) -> CheckReport | None:
        # a problem may have gone without a trace in names, sizes and times: a permission, a disk that is back
        found = parse_stored(CheckReport, read_stored(path), where=str(path))
        return found if found.ok else None

    report = kept(place.shared, "dataset", place.dataset, check, load)
    report.require_ok(place.shared / "reports" / "dataset.json")
    for warning in report.warnings:
        place.show.stage(f"warning: {warning}")
    return report


def measure_once(place: Work) -> Fingerprint:
    """Measure the dataset, or take what an earlier run measured."""

    def take() -> Fingerprint:
        place.show.stage(f"measuring {len(place.dataset.cases)} cases")
        return measure(place.dataset, workers=place.config.workers, progress=place.show.cases)

    return kept(place.shared, "fingerprint", place.dataset, take, load_fingerprint)


def plan_once(place: Work, fingerprint: Fingerprint, given: str | Path | None) -> Plan:
    """Make the plan of the dataset, or read the one given; it is written down either way."""
    config = place.config
    own: dict[str, Any]
    # what a V-Net and a UNet++ may be told alike
    common: dict[str, Any] = {name: getattr(config, name) for name in ("window", "sliding", "resampling", "width", "deep_supervision")}
    if given is not None:
        plan = load_plan(Path(given))
    elif config.model == "vnet":
        own = {"shape": config.patch or (128, 128, 128), "elu": config.elu, "kernels": config.kernels, "strides": config.strides}
        plan = plan_vnet(place.dataset, fingerprint, **own, **common)
    elif config.model == "unetpp" or config.model == "unet":
        own = {"family": config.model, "shape": config.patch, "mode": config.mode, "dropout": config.dropout}
        plan = plan_unetpp(place.dataset, fingerprint, **own, **common)
    elif config.planner == "v1":
        plan = plan_nnunet_v1(place.dataset, fingerprint)
    else:
        plan = plan_nnunet(place.dataset, fingerprint, planner=config.planner, memory_gb=config.memory_gb)
    write_atomic(place.folder / "plan.json", plan.to_json())
    write_atomic(place.folder / "reports" / "plan.json", plan.to_json())
    return plan


def prepare_cases(place: Work, configuration: Configuration, name: str, *, previous: Path | None = None) -> Prepared:
    """Prepare the cases for one configuration; of a cascade's second stage, those of this training alone."""
    place.show.stage(f"{name}: preparing {len(place.dataset.cases)} cases")
    config, folder = place.config, place.prepared(name, cascaded=previous is not None)
    options: dict[str, Any] = {"dtype": config.cache, "storage": config.storage, "previous": previous, "progress": place.show.cases}
    return prepare(place.dataset, configuration, folder, workers=max(1, config.workers), **options)


def record_split(place: Work, fold: str, split: Split, folder: Path) -> None:
    """Write a fold's split.json, name the patients held back, and warn of those who are on both sides."""
    values: dict[str, Any] = {"train": split.train, "val": split.validation}
    patients = None if fold == "all" else find_patients(place.dataset, place.config)
    if patients is not None:
        train, held = (sorted({patients[name] for name in names}) for names in (split.train, split.validation))
        values["patients"] = {"train": train, "val": held}
        place.show.stage(f"fold {fold}: {len(train)} patients to train on, {len(held)} held back: {name_some(held)}")
    by_name = None if fold == "all" else patients or guess_patients(place.dataset)
    if by_name is not None and (torn := torn_patients(by_name, split.train, split.validation)):
        asked = place.config.patients == "none"
        place.show.stage(f"fold {fold}: split one by one, by --patients none: {torn}" if asked else f"warning: {torn}; see --patients")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "split.json", json.dumps(values, indent=1) + "\n")


def settle_threads() -> None:
    """Let numba start its threads, which sets the number of torch's (OpenMP's) too, and set that back.

    Otherwise the first stage that runs a kernel changes it, and a training that goes on from there computes with another number of threads
    than one that goes on from a checkpoint: under OMP_NUM_THREADS, as torchrun sets it, losses would differ in their last digits.
    """
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


def choose_device(name: str) -> torch.device:
    """Give the torch device that `name` means; an InputError or BackendError when there is none."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BackendError(f"device {name}: torch {torch.__version__} sees no GPU; train on --device cpu, or install torch for CUDA")
    return torch.device("cuda:0" if name == "cuda" else name)
