"""TRAIN, validation of a fold: its held-back cases through the runtime, as `segrt-predict` will run it, scored on their own grid."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arrays import ProgressFn
from ..bundle import Bundle
from ..engines import Precision
from ..errors import InputError
from ..files import write_atomic
from ..io import write_labels
from ..io.peek import find_labels
from ..metrics import Overlap, overlaps
from ..predictor import Predictor
from .cases import Dataset, TrainingCase
from .dataset import read_training_case

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
_COUNTS: dict[str, Callable[[Overlap], float]] = {
    "Dice": lambda o: o.dice,
    "IoU": lambda o: o.iou,
    "TP": lambda o: o.tp,
    "FP": lambda o: o.fp,
    "FN": lambda o: o.fn,
    "TN": lambda o: o.tn,
    "n_pred": lambda o: o.tp + o.fp,
    "n_ref": lambda o: o.tp + o.fn,
}


@dataclass(frozen=True)
class CaseScores:
    """How the prediction of one case overlaps its truth: structure -> voxels; and the two files."""

    name: str
    prediction: Path
    reference: Path
    overlaps: Mapping[str, Overlap]

    @property
    def dice(self) -> dict[str, float]:
        """Structure -> Dice; NaN where neither map holds it."""
        return {name: overlap.dice for name, overlap in self.overlaps.items()}


@dataclass(frozen=True)
class Summary:
    """The scores of a set of cases.

    Attributes
    ----------
    cases : in their order
    structures : name -> label values
    model : `Bundle.fingerprint` of what predicted them; of several folds, joined by commas
    """

    cases: tuple[CaseScores, ...]
    structures: Mapping[str, tuple[int, ...]]
    model: str

    @property
    def dice(self) -> dict[str, float]:
        """Structure -> mean Dice over the cases that have it."""
        return {name: _mean([case.overlaps[name].dice for case in self.cases]) for name in self.structures}

    @property
    def mean_dice(self) -> float:
        """Mean of `dice` over the structures."""
        return _mean(list(self.dice.values()))

    @property
    def iou(self) -> dict[str, float]:
        """Structure -> mean IoU over the cases that have it."""
        return {name: _mean([case.overlaps[name].iou for case in self.cases]) for name in self.structures}

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the structures."""
        return _mean(list(self.iou.values()))

    def to_json(self) -> str:
        """The text of summary.json: nnU-Net's keys, null where it writes NaN, and the names of the structures."""
        means = {
            _key(v): {m: _mean([f(c.overlaps[n]) for c in self.cases]) for m, f in _COUNTS.items()} for n, v in self.structures.items()
        }
        values = {
            "foreground_mean": {metric: _mean([mean[metric] for mean in means.values()]) for metric in _COUNTS},
            "mean": means,
            "metric_per_case": [
                {
                    "name": case.name,
                    "metrics": {_key(v): {m: f(case.overlaps[n]) for m, f in _COUNTS.items()} for n, v in self.structures.items()},
                    "prediction_file": str(case.prediction),
                    "reference_file": str(case.reference),
                }
                for case in self.cases
            ],
            "structures": {_key(values): name for name, values in self.structures.items()},
            "model": self.model,
        }
        return json.dumps(_without_nan(values), indent=1) + "\n"


def validate(
    dataset: Dataset,
    names: Sequence[str],
    bundle: Bundle,
    folder: Path,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    previous: Path | None = None,
    progress: ProgressFn | None = None,
) -> Summary:
    """Segment cases of a dataset with a bundle's weights and score them; label maps and summary.json go into `folder`.

    Cases that this bundle has done already are kept. Post-processing is not applied: it is chosen from what comes out here.

    Parameters
    ----------
    names : cases to validate on
    previous : folder with the label maps of a cascade's first stage
    progress : called with (cases done, cases in all)

    Raises
    ------
    InputError, BackendError
        When a case cannot be read, or a label map not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    structures = bundle.spec.names
    done = {case.name: case for case in _finished(folder, bundle, structures)}
    cases = [case for case in dataset.cases if case.name in set(names)]
    options: dict[str, Any] = {"backend": "pytorch", "device": device, "precision": precision, "previous_stage": previous is None}
    with Predictor(bundle, postprocess=False, **options) as predictor:
        for number, case in enumerate(cases):
            if case.name not in done:
                done[case.name] = _score(dataset, case, predictor, folder, previous)
                _write(_summary(cases, done, bundle), folder)
            if progress:
                progress(number + 1, len(cases))
    summary = _summary(cases, done, bundle)
    _write(summary, folder)
    logger.info("%s: mean Dice %.4f over %d cases", folder, summary.mean_dice, len(cases))
    return summary


def load_summary(folder: Path) -> Summary:
    """Read the summary.json of `validate`.

    Raises
    ------
    InputError
        When there is none, or it is no summary of ours.
    """
    path = folder / SUMMARY
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = dict(values["structures"])
        cases = tuple(
            CaseScores(
                case["name"],
                Path(case["prediction_file"]),
                Path(case["reference_file"]),
                {names[k]: Overlap(m["TP"], m["FP"], m["FN"], m["TN"]) for k, m in case["metrics"].items()},
            )
            for case in values["metric_per_case"]
        )
        structures = {name: tuple(int(part) for part in key.strip("()").split(",") if part.strip()) for key, name in names.items()}
        return Summary(cases, structures, values["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(f"{path}: not a readable summary of a validation ({err}); validate again") from err


def merge(summaries: Sequence[Summary]) -> Summary:
    """The cases of several folds together, sorted by name; of a case that is there twice the first one."""
    cases = {case.name: case for summary in reversed(summaries) for case in summary.cases}
    models = dict.fromkeys(summary.model for summary in summaries)
    return Summary(tuple(cases[name] for name in sorted(cases)), summaries[0].structures, ",".join(models))


def _write(summary: Summary, folder: Path) -> None:
    write_atomic(folder / SUMMARY, summary.to_json())


def _score(dataset: Dataset, case: TrainingCase, predictor: Predictor, folder: Path, previous: Path | None) -> CaseScores:
    volume, truth = read_training_case(case, dataset)
    earlier = None if previous is None else find_labels(previous, case.name)
    labels = predictor(volume, previous=earlier).labels
    target = folder / f"{case.name}.nii.gz"
    write_labels(target, labels, volume.grid)
    found = overlaps(truth, labels, predictor.spec.names, ignore=dataset.ignore)
    return CaseScores(case.name, target, case.labels or target, found)


def _summary(cases: Sequence[TrainingCase], done: Mapping[str, CaseScores], bundle: Bundle) -> Summary:
    scored = tuple(done[case.name] for case in cases if case.name in done)
    return Summary(scored, bundle.spec.names, bundle.fingerprint)


def _finished(folder: Path, bundle: Bundle, structures: Mapping[str, tuple[int, ...]]) -> tuple[CaseScores, ...]:
    """Cases that the same weights have done before and whose label maps are still there."""
    if not (folder / SUMMARY).is_file():
        return ()
    earlier = load_summary(folder)
    if earlier.model != bundle.fingerprint or dict(earlier.structures) != dict(structures):
        return ()
    return tuple(case for case in earlier.cases if case.prediction.is_file())


def _mean(values: Sequence[float]) -> float:
    """Mean of what is a number; NaN when nothing is."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def _key(values: tuple[int, ...]) -> str:
    """nnU-Net's name of a label or region: "1", or "(1, 2)"."""
    return str(values[0]) if len(values) == 1 else str(tuple(values))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
