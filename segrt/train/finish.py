"""TRAIN, last stage: what was trained becomes a bundle, with the stages before it, its partner, and all reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..files import sha256, write_atomic
from ..report.tables import write_tables
from .cases import Dataset
from .folds import reports_of
from .select import Choice
from .splits import scored_on
from .work import Trained, Work


def write_bundle(place: Work, target: Path, chains: Sequence[Sequence[Trained]], choice: Choice, *, name: str, force: bool) -> Bundle:
    """Write a trained configuration as a bundle.

    Parameters
    ----------
    chains : the configuration with the stages before it, first to last; of a pair both
    choice : its post-processing
    name : of the configuration or pair
    """
    *before, last = chains[0]
    partner = _write_chain(place, chains[1]) if len(chains) > 1 else None
    _write_tables(place, last, choice, name)
    folders = (place.shared, place.folder)
    reports = {path.name: path.read_bytes() for folder in folders for path in sorted((folder / "reports").iterdir())}
    if partner is not None:
        reports |= {"summary.json": choice.before.to_json().encode(), f"summary_{last.name}.json": last.summary.to_json().encode()}
    if place.dataset.npy_window is None:
        reports["validation.json"] = held_back(place.dataset, last).encode()
    parts: dict[str, Any] = {"previous": _write_chain(place, before), "partner": partner}
    bundle = _write(last, target, {"postprocess": choice.steps}, reports, **parts, force=force)
    scores = f"mean Dice {choice.after.mean_dice:.4f}, mean IoU {choice.after.mean_iou:.4f}"
    place.show.stage(f"{target}: {scores} {scored_on(last.folds)}, ready for segrt-build and segrt-predict")
    return bundle


def held_back(dataset: Dataset, trained: Trained) -> str:
    """The text of reports/validation.json: the cases each fold held back, where they lie, and how their masks are read.

    The fold "all" is validated on what it was trained on, and holds none back.
    """
    cases = {case.name: case for case in dataset.cases}
    members = {
        fold: [
            {"name": name, "images": [str(file.resolve()) for file in case.images], "labels": str(case.labels.resolve())}
            for name in (scored.name for scored in summary.cases if fold != "all")
            if (case := cases.get(name)) is not None and case.labels is not None
        ]
        for fold, summary in zip(trained.folds, trained.summaries, strict=True)
    }
    threshold = None if dataset.mask is None else dataset.mask.threshold
    return json.dumps({"mask_threshold": threshold, "members": members}, indent=1) + "\n"


def _write_chain(place: Work, chain: Sequence[Trained]) -> Bundle | None:
    """A configuration and the stages before it, in the work folder."""
    bundle: Bundle | None = None
    for trained in chain:
        bundle = _write(trained, place.folder / trained.name / "bundle", {}, {}, previous=bundle, partner=None, force=True)
    return bundle


def _write(
    trained: Trained,
    path: Path,
    changes: Mapping[str, Any],
    reports: Mapping[str, bytes],
    *,
    previous: Bundle | None,
    partner: Bundle | None,
    force: bool,
) -> Bundle:
    spec = trained.spec.model_copy(update=dict(changes))
    weights = {name: fold.weights for name, fold in trained.folds.items()}
    tensors = {name: part.tensors for name, part in weights.items()}
    own: dict[str, str | bytes] = {**reports_of(trained.folds), "summary.json": trained.summary.to_json(), **reports}
    bundle = Bundle.create(path, spec, weights=tensors, previous=previous, partner=partner, reports=own, force=force)
    files = {name: {"sha256": sha256(bundle.weights_path(name)), "iteration": weights[name].iteration} for name in spec.members}
    bundle.write_report("weights.json", files)
    return bundle


def _write_tables(place: Work, trained: Trained, choice: Choice, name: str) -> None:
    write_atomic(place.folder / "reports" / "postprocess.json", choice.to_json())
    write_tables(
        place.folder / "reports" / "dice", choice.table, caption=f"Dice of {trained.spec.name}, {name}, {scored_on(trained.folds)}"
    )
    overlap = {"without post-processing": choice.before.iou, "with post-processing": choice.after.iou}
    write_tables(place.folder / "reports" / "iou", overlap, caption=f"IoU of {trained.spec.name}, {name}, {scored_on(trained.folds)}")
