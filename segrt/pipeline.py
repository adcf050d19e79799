"""Many cases with one Predictor, here or on a server: skip what is done, keep going when a case fails, leave nothing half written."""

from __future__ import annotations

import io
import json
import logging
import platform
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from . import __version__
from .arrays import ProgressFn
from .errors import InputError, SegrtError
from .files import write_atomic
from .io import Case, output_name, write_labels
from .io.cases import image_suffix
from .io.peek import find_labels
from .io.read import Source
from .io.write import WRITABLE
from .memory import peak_bytes
from .spec import ModelSpec
from .volume import Segmentation

if TYPE_CHECKING:
    from .predictor import Previous

logger = logging.getLogger(__name__)

_COMPUTING = (
    "numpy",
    "numba",
    "SimpleITK",
    "openvino",
    "onnxruntime",
    "torch",
    "cupy-cuda13x",
    "numba-cuda",
    "onnxruntime-gpu",
    "tensorrt-cu13",
)

CaseProgress = Callable[[str, int, int], None]


class Segmenter(Protocol):
    """What `predict_many` asks of a `Predictor`, or of what stands for one on a server."""

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        ...

    @property
    def takes_previous(self) -> bool:
        """Whether a call may be given labels of a cascade's first stage."""
        ...

    @property
    def provenance(self) -> dict[str, object]:
        """What labels depend on besides the image; see `Predictor.provenance`."""
        ...

    def __call__(
        self, image: Source, *, previous: Previous | None = None, probabilities: bool = False, progress: ProgressFn | None = None
    ) -> Segmentation:
        """Segment one image; see `Predictor.__call__`."""
        ...


@dataclass(frozen=True)
class CaseResult:
    """What became of one case: seconds per stage, voxels per label, and the sentence of its error when it failed."""

    name: str
    status: Literal["done", "skipped", "failed"]
    output: str
    seconds: dict[str, float] = field(default_factory=dict)
    windows: int = 0
    shared_windows: int = 0
    voxels: dict[str, int] = field(default_factory=dict)
    error: str = ""


def predict_many(
    cases: Iterable[Case],
    output: str | Path,
    predictor: Segmenter | Sequence[Segmenter],
    *,
    format: str | None = None,  # noqa: A002 - the command's flag has this name
    overwrite: bool = False,
    probabilities: bool = False,
    previous: str | Path | None = None,
    progress: CaseProgress | None = None,
    done: Callable[[CaseResult], None] | None = None,
) -> list[CaseResult]:
    """Segment cases and write predictions.json beside the label files.

    Parameters
    ----------
    cases : from `segrt.io.find_cases`
    output : folder for the labels, made when missing
    predictor : one, or several of the same model on different devices or servers, which take the next case as they become free
    format : suffix of the label files, such as ".nii.gz"; the input's own by default
    overwrite : do finished cases again
    probabilities : also write <case>.npz with `probabilities` (K, Z, Y, X) float32
    previous : folder with labels of a cascade's first stage, made elsewhere
    progress : called with (case, windows done, windows in all)
    done : called after each case

    Returns
    -------
    list of CaseResult
        one per case, in order; failed cases carry their error and do not stop the others

    Raises
    ------
    InputError
        When the output folder cannot be made or predictions.json not be written, a label file would replace an image or cannot have
        that format, or `previous` is given for a model that is no cascade.
    """
    predictors = list(predictor) if isinstance(predictor, Sequence) else [predictor]
    _check(predictors[0], format, previous)
    folder = make_folder(output)
    finished: dict[str, CaseResult] = {}
    now, earlier = _provenance(predictors[0]), {entry["name"]: entry for entry in _earlier(folder)}
    targets = _targets(cases, folder, format)

    def run(case: Case, target: Path, chosen: Segmenter) -> CaseResult:
        finished[case.name] = result = _one(case, target, chosen, overwrite, probabilities, previous, progress)
        return result

    def keep() -> None:
        _write_record([finished[case.name] for case, _ in targets if case.name in finished], predictors[0], folder)

    try:
        with closing(_as_completed(targets, predictors, run)) as results:
            for target, result in results:
                if result.status == "skipped" and _differs(earlier.get(result.name), now):
                    logger.warning("%s was made by another model or with other settings and is kept; --overwrite makes it again", target)
                # after every case, so that whatever ends the run leaves a record of what is finished
                keep()
                if done:
                    done(result)
                elif result.status == "failed":
                    logger.error("%s failed: %s", result.name, result.error)
    except KeyboardInterrupt:
        keep()  # with the cases that others of several predictors finished after the run was stopped
        raise
    return [finished[case.name] for case, _ in targets]


def _as_completed(
    targets: Sequence[tuple[Case, Path]], predictors: Sequence[Segmenter], run: Callable[[Case, Path, Segmenter], CaseResult]
) -> Generator[tuple[Path, CaseResult]]:
    """Results as they come; with several predictors each has a thread, and the next case goes to the one that is free."""
    if len(predictors) == 1:
        for case, target in targets:
            yield target, run(case, target, predictors[0])
        return
    free: SimpleQueue[Segmenter] = SimpleQueue()
    for predictor in predictors:
        free.put(predictor)

    def work(case: Case, target: Path) -> CaseResult:
        chosen = free.get()
        try:
            return run(case, target, chosen)
        finally:
            free.put(chosen)

    pool = ThreadPoolExecutor(len(predictors))
    try:
        futures = {pool.submit(work, case, target): target for case, target in targets}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # when the run is stopped, cases that have begun are finished and no other is begun
        pool.shutdown(cancel_futures=True)


def make_folder(path: str | Path) -> Path:
    """Make an output folder, its parents included, unless it is there; an InputError says why that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder} cannot be made ({err.strerror or err}); choose another output folder") from err
    return folder


def _check(predictor: Segmenter, format: str | None, previous: str | Path | None) -> None:  # noqa: A002
    """Refuse what would fail for every case."""
    if format is not None and image_suffix(Path(output_name("case", Path(), format))) not in WRITABLE:
        raise InputError(f"format: expected one of {', '.join(WRITABLE)}, got {format!r}")
    if previous is not None and not predictor.takes_previous:
        raise InputError(f"model {predictor.spec.name!r} is not the second stage of a cascade; leave out the labels in {previous}")


def _targets(cases: Iterable[Case], folder: Path, format: str | None) -> list[tuple[Case, Path]]:  # noqa: A002
    """Each case with its label file, which must not be one of the images."""
    pairs = [(case, folder / output_name(case.name, case.files[0], format)) for case in cases]
    for case, target in pairs:
        if target.exists() and any(target.samefile(file) for file in case.files if file.exists()):
            raise InputError(f"{target} is an image and would be replaced by its labels; choose another output folder")
    return pairs


def _one(
    case: Case, target: Path, predictor: Segmenter, overwrite: bool, probabilities: bool, previous: Any, progress: CaseProgress | None
) -> CaseResult:
    scores = target.parent / f"{case.name}.npz"
    if not overwrite and target.exists() and (scores.exists() or not probabilities):
        return CaseResult(case.name, "skipped", target.name)
    try:
        return _predict(case, target, scores if probabilities else None, predictor, previous, progress)
    except MemoryError as err:
        reason = f"not enough memory ({str(err) or 'allocation failed'}); free some, or give an image of fewer or larger voxels"
        return CaseResult(case.name, "failed", target.name, error=reason)
    except (SegrtError, OSError, RuntimeError) as err:
        # libraries tell their errors over many lines
        return CaseResult(case.name, "failed", target.name, error=" ".join(str(err).split()) or type(err).__name__)


def _predict(
    case: Case, target: Path, scores: Path | None, predictor: Segmenter, previous: Any, progress: CaseProgress | None
) -> CaseResult:
    stage = find_labels(previous, case.name) if previous is not None else None
    report = None if progress is None else lambda n, total: progress(case.name, n, total)
    segmentation = predictor(
        case.files if len(case.files) > 1 else case.files[0], previous=stage, probabilities=scores is not None, progress=report
    )
    start = time.perf_counter()
    if scores is not None and segmentation.probabilities is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, probabilities=segmentation.probabilities)
        try:
            write_atomic(scores, buffer.getvalue())
        except OSError as err:
            raise InputError(f"{scores} cannot be written ({err.strerror or err}); free some space or choose another folder") from err
    write_labels(target, segmentation.labels, segmentation.grid)  # last: its presence says that the case is done
    seconds = {**segmentation.seconds, "write": time.perf_counter() - start}
    windows, shared = segmentation.windows
    return CaseResult(case.name, "done", target.name, seconds, windows, shared, segmentation.voxels())


def _write_record(results: list[CaseResult], predictor: Segmenter, folder: Path) -> None:
    path = folder / "predictions.json"
    try:
        write_atomic(path, json.dumps(_record(results, predictor, folder), indent=1) + "\n")
    except OSError as err:
        raise InputError(f"{path} cannot be written ({err.strerror or err}); free some space or choose another output folder") from err


def _record(results: list[CaseResult], predictor: Segmenter, folder: Path) -> dict[str, Any]:
    """The content of predictions.json; what earlier runs into the same folder said of a skipped case is kept."""
    cases = {r.name: asdict(r) for r in results if r.status == "skipped"} | {c["name"]: c for c in _earlier(folder)}
    cases |= {r.name: asdict(r) for r in results if r.status != "skipped"}
    # the folder's cases in their order, whichever was finished first; those of other runs before them
    cases = {name: case for name, case in cases.items() if name not in {r.name for r in results}} | {r.name: cases[r.name] for r in results}
    now = _provenance(predictor)
    return {
        "segrt": __version__,
        "python": platform.python_version(),
        "libraries": _libraries(),
        "machine": platform.machine(),
        "model": predictor.spec.name,
        **now,
        "peak_bytes": peak_bytes(),
        # what an earlier run made with other means keeps them beside it
        "cases": [{k: v for k, v in case.items() if now.get(k) != v} for case in cases.values()],
    }


def _provenance(predictor: Segmenter) -> dict[str, Any]:
    """What labels depend on besides the image, as JSON gives it back."""
    known: dict[str, Any] = json.loads(json.dumps(predictor.provenance))
    return known


def _differs(entry: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether a case of an earlier run came from another model or other settings; the number of threads does not count."""
    if entry is None or not isinstance(entry.get("settings"), dict):
        return False
    same = {"threads": now["settings"]["threads"]}
    return bool(entry.get("bundle_sha256") != now["bundle_sha256"] or {**entry["settings"], **same} != now["settings"])


def _libraries() -> dict[str, str]:
    """Versions of what computes; those that are not installed are left out."""
    found = {}
    for name in _COMPUTING:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """Cases the folder's record knows, each with the model and the settings it was made with."""
    try:
        record = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
        means = {key: record[key] for key in ("bundle_sha256", "settings") if key in record}
        return [means | c for c in record["cases"] if isinstance(c, dict) and "name" in c]
    except (OSError, ValueError, KeyError, TypeError):
        return []
