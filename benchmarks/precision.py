"""What bf16 and int8 cost and bring on a CPU: labels on the golden sets, Dice of a trained model, time of a window.

    python benchmarks/precision.py --golden ../shared/golden     # a quiet machine; about half an hour on two cores
    python benchmarks/precision.py --toy                         # a small network, one small phantom, nothing written

Engines are OpenVINO's, built as segrt-build builds them, int8 calibrated on the set's own images. They are kept whatever verification
says, for this is where its limits come from: the golden networks were trained for minutes and leave many voxels near a tie, so their labels
move more than a finished model's. The demo's network is trained to the end, on phantoms; what it loses is what a user would.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from _gpu_setting import FULL, TOY, make_bundle
from _timer import RESULTS, environment, median_in_turn, write_results
from same_labels import SETS, bundle_of

from segrt import Bundle, Predictor, Volume, predict_many
from segrt.engines import open_engine
from segrt.errors import BackendError, BuildError
from segrt.export.build import export
from segrt.export.engine import build_engine
from segrt.export.onnx import export_onnx
from segrt.io import find_cases, read_labels
from segrt.metrics import dice, mean_dice
from segrt.phantom import ORGANS, make_phantom

PRECISIONS = ("fp32", "bf16", "int8")
DEMO = Path(__file__).parents[1] / "examples" / "demo" / "bundle"
# seeds the demo's network has not been trained on; spacing (z, y, x) in mm
PHANTOMS = {20_001: (5.0, 1.2, 1.2), 20_002: (2.5, 1.6, 1.6), 20_003: (7.0, 1.0, 1.0), 20_004: (4.0, 1.4, 1.4)}
Maps = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--golden", type=Path, default=Path("../shared/golden"))
    parser.add_argument("--only", default="golden,demo,speed", help="comma list; the other parts' results stay as they are")
    parser.add_argument("--sets", default="", help="comma list of beginnings of names, such as S1,S4; all by default")
    args = parser.parse_args()
    written = RESULTS / "precision.json"
    results: dict[str, Any] = {part: json.loads(written.read_text()).get(part) for part in PARTS if written.is_file()}
    for part in args.only.split(","):
        with tempfile.TemporaryDirectory(prefix="segrt-precision-") as folder:
            found = PARTS[part](args, Path(folder))
        results[part] = {**environment(), **found} if part == "speed" else with_rows_kept(results.get(part) or {}, found)
        print(part, json.dumps(results[part], indent=1), flush=True)
        write_results("precision", {k: v for k, v in results.items() if v}, toy=args.toy or bool(args.sets))


def with_rows_kept(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Tables with a row for each precision; a row that this machine cannot make stays as it was, and `made` says where each comes from."""
    made = {precision for rows in found.values() for precision, row in rows.items() if "skipped" not in row}
    tables = {name: {**before.get(name, {}), **{p: row for p, row in rows.items() if p in made}} for name, rows in found.items()}
    return {**before, **tables, "made": before.get("made", {}) | dict.fromkeys(sorted(made), environment())}


# ------------------------------------------------------------------ golden sets
def golden(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Labels of every set in every precision, against fp32's, nnU-Net's own and the reference labels."""
    if args.toy or not args.golden.is_dir():
        print("a toy run needs no golden sets" if args.toy else f"{args.golden} is not here")
        return {}
    chosen = [name for name in SETS if not args.sets or name.startswith(tuple(args.sets.split(",")))]
    return {name: golden_set(args.golden, name, work / name) for name in chosen}


def golden_set(root: Path, name: str, work: Path) -> dict[str, Any]:
    folder, configuration, expected, previous, _ = SETS[name]
    images = root / folder / "imagesTs"
    bundle = bundle_of(root, folder, configuration, work / "bundle")
    export(bundle)  # a cascade's first stage too
    stage = root / folder / f"{previous}_notta" if previous else None

    def labels(precision: str) -> Maps:
        out = work / precision
        with opened(bundle, precision, previous_stage=False, postprocess=False) as predictor:
            results = predict_many(find_cases(images, len(bundle.spec.channels)), out, predictor, previous=stage)
        assert all(result.status == "done" for result in results), results
        return read_folder(out)

    others = {"nnunet": read_folder(root / folder / f"{expected}_notta"), "reference": read_folder(root / folder / "labelsTs")}
    return in_all_precisions(bundle, images, labels, others, sorted({v for label in bundle.spec.labels for v in label.values} - {0}))


def read_folder(folder: Path) -> Maps:
    """Label maps by file name."""
    return {p.name: read_labels(p)[0] for p in sorted(folder.iterdir()) if p.name.endswith((".nii.gz", ".png"))}


# ------------------------------------------------------------------ the demo's network
def demo(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Dice against the truth of phantoms."""
    shutil.copytree(DEMO, work / "bundle")
    bundle = Bundle.open(work / "bundle")
    phantoms = {20_001: (12.0, 5.0, 5.0)} if args.toy else PHANTOMS
    made = {str(seed): make_phantom(np.random.default_rng(seed), spacing=spacing) for seed, spacing in phantoms.items()}

    def labels(precision: str) -> Maps:
        with opened(bundle, precision) as predictor:
            return {name: predictor(Volume(image[None], grid)).labels for name, (image, _, grid) in made.items()}

    truth = {name: labels for name, (_, labels, _) in made.items()}
    return {"phantoms": in_all_precisions(bundle, None, labels, {"truth": truth}, sorted(ORGANS))}


# ------------------------------------------------------------------ both
def in_all_precisions(
    bundle: Bundle, calibration: Path | None, labels: Callable[[str], Maps], others: Mapping[str, Maps], values: list[int]
) -> dict[str, Any]:
    """Build, predict and compare; a precision that this machine lacks is left out with its reason."""
    found: dict[str, Maps] = {}
    report: dict[str, Any] = {}
    for precision in PRECISIONS:
        reason = built(bundle, precision, calibration)
        if reason:
            report[precision] = {"skipped": reason}
            continue
        found[precision] = labels(precision)
        report[precision] = {
            f"against {name}": compared(expected, found[precision], values)
            for name, expected in {"fp32": found["fp32"], **others}.items()
            if name != precision
        }
    return report


def built(bundle: Bundle, precision: str, calibration: Path | None) -> str | None:
    """Build an engine; the reason when that is not possible here."""
    if precision == "int8" and importlib.util.find_spec("nncf") is None:
        return "nncf is not installed"
    try:
        build_engine(bundle, backend="openvino", device="cpu", precision=precision, calibration=calibration, force=True)  # type: ignore[arg-type]
    except (BackendError, BuildError) as err:
        return str(err)
    return None


def opened(bundle: Bundle, precision: str, **options: Any) -> Predictor:
    return Predictor(bundle, backend="openvino", device="cpu", precision=precision, tta=False, **options)  # type: ignore[arg-type]


def compared(expected: Maps, found: Maps, values: list[int]) -> dict[str, float]:
    """Share of equal voxels, and Dice: its mean over the labels of all cases, and that of the worst label."""
    assert set(expected) <= set(found), sorted(set(expected) - set(found))
    equal = sum(int((expected[name] == found[name]).sum()) for name in expected)
    scores = [dice(expected[name].astype(np.int64), found[name].astype(np.int64), values) for name in expected]
    present = [score for case in scores for score in case.values() if not np.isnan(score)]
    return {
        "label_agreement": equal / sum(array.size for array in expected.values()),
        "mean_dice": float(np.mean([mean_dice(case) for case in scores])),
        "lowest_dice": min(present, default=float("nan")),
    }


# ------------------------------------------------------------------ speed
def speed(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds of one window of the default-size network, the engines in turn."""
    patch = TOY.patch if args.toy else FULL.patch
    bundle = make_bundle(work / "bundle", patch, toy=args.toy)
    export_onnx(bundle)
    skipped = {precision: reason for precision in PRECISIONS if (reason := built(bundle, precision, None))}
    names = [precision for precision in PRECISIONS if precision not in skipped]
    engines = {name: open_engine(bundle, "0", backend="openvino", precision=name) for name in names}  # type: ignore[arg-type]
    window = np.random.default_rng(0).normal(size=(1, 1, *patch)).astype(np.float32)
    reference = engines["fp32"](window)
    errors = {name: float(np.linalg.norm(e(window) - reference) / np.linalg.norm(reference)) for name, e in engines.items()}
    seconds = median_in_turn({name: (lambda e=e: e(window)) for name, e in engines.items()}, runs=2 if args.toy else 7)
    return {
        "patch": patch,
        "seconds": seconds,
        "speedup_over_fp32": {name: seconds["fp32"] / s for name, s in seconds.items()},
        "relative_error": errors,
        "skipped": skipped,
    }


PARTS = {"golden": golden, "demo": demo, "speed": speed}

if __name__ == "__main__":
    main()
