"""The trainings that claims about training rest on: each one `segrt-train` command on a few CPU cores, with a limit in minutes.

    python benchmarks/train_runs.py train hippocampus_nnunet --cpus 0,1 --data ../shared/data --out runs
    python benchmarks/train_runs.py all --cpus 0-15 --data ../shared/data --out runs       # every run and variant at once, two cores each
    python benchmarks/train_runs.py status --out runs
    python benchmarks/train_runs.py verify runs/hippocampus_nnunet --data ../shared/data   # segrt-build, segrt-predict, the same Dice

`train` leaves OUT/RUN/bundle and OUT/RUN/result.json; `verify` adds what the built bundle predicts, and writes results/<benchmark>.json.
What follows `--` goes to segrt-train as it stands, and wins over the run's own settings. The cases held back are the last by name; they
choose no weights: the last iteration's are taken.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _timer import commit, environment, write_results
from _trainings import ROOT, command, cores_of, divide, pace_of, pin, read_json, rows_of, write_json

TOLERANCE = 5e-4
SPLIT = "sorted:0.8"


@dataclass(frozen=True)
class Recipe:
    """A run: which figure it is for, the folder of its data, and the flags of segrt-train."""

    benchmark: str
    folder: str
    flags: str
    minutes: float


_FAST = "--optimizer adamw --weight-decay 1e-2 --precision bf16 --validation-interval 500 --validation-batches 10"
_UNET = f"--model nnunet --config 3d_fullres --batch-size 2 --lr 3e-3 {_FAST}"
_VNET = f"--model vnet --batch-size 2 --patch 48,64,48 --width 0.25 --lr 2e-3 --clip 12 {_FAST}"
_PET = "--channels PET --image-suffix PET_image --label-suffix PET_mask"
RECIPES = {
    "hippocampus_nnunet": Recipe("hippocampus_nnunet", "b_hippocampus", f"{_UNET} --width 0.5", 29),
    "hippocampus_nnunet-unmirrored": Recipe("hippocampus_nnunet", "b_hippocampus", f"{_UNET} --width 0.5 --no-mirroring", 29),
    "hippocampus_vnet": Recipe("hippocampus_vnet", "b_hippocampus", f"{_VNET} --augmentation nnunet", 29),
    "sts_pet_nnunet": Recipe("sts_pet_nnunet", "b_sts_pet", f"{_UNET} {_PET} --width 0.5", 20),
    "openkbp_nnunet": Recipe(
        "openkbp_nnunet",
        "a_openkbp_hn7",
        f"{_UNET} --channels CT --width 0.25 --patch 64,96,64 --no-mirroring --oversampling 0.66 --batch-dice",
        29,
    ),
    "hippocampus_nnunet-slow": Recipe("hippocampus_nnunet", "b_hippocampus", f"{_UNET} --width 0.5 --no-mirroring --lr 1e-3", 29),
    "hippocampus_nnunet-narrow": Recipe("hippocampus_nnunet", "b_hippocampus", f"{_UNET} --width 0.25", 29),
    "hippocampus_vnet-small": Recipe("hippocampus_vnet", "b_hippocampus", f"{_VNET} --augmentation nnunet --patch 32,48,32", 29),
    "hippocampus_vnet-article": Recipe("hippocampus_vnet", "b_hippocampus", f"{_VNET} --augmentation article", 29),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    common.add_argument("--out", type=Path, default=ROOT / "build" / "train_runs")
    common.add_argument("--cpus", default="", help="Core numbers, such as 4,5 or 0-15; of `train` all are used.")
    common.add_argument("--cores", type=int, default=2, help="Cores of a run.")
    common.add_argument("--minutes", type=float, help="Of training; each run has its own by default.")
    common.add_argument("--device", default="cpu")
    common.add_argument("--commit", default=commit(), help="That the code is of, where there is no git to ask.")
    one = commands.add_parser("train", parents=[common], help="One run, in the foreground.")
    one.add_argument("run", choices=RECIPES)
    one.add_argument("--name", help="Folder of the run in OUT; the run's own by default.")
    everything = commands.add_parser("all", parents=[common], help="Start runs in the background, each on cores of its own.")
    everything.add_argument("--runs", default=",".join(RECIPES))
    commands.add_parser("status", parents=[common], help="The last line of every run's log.")
    check = commands.add_parser("verify", parents=[common], help="Build and predict with a run's bundle, and write the result.")
    check.add_argument("folder", type=Path)
    if sys.argv[1:] == ["--toy"]:
        run_toy(parser)
        return
    own, flags = divide(sys.argv[1:])
    options = parser.parse_args(own)
    match options.command:
        case "train":
            train(options, flags)
        case "all":
            start_all(options, flags)
        case "status":
            show_status(options.out)
        case "verify":
            verify(options)


def run_toy(parser: argparse.ArgumentParser) -> None:
    """Train and verify for a moment on made-up images."""
    from loader import make_images

    with tempfile.TemporaryDirectory() as scratch:
        make_images(Path(scratch) / "b_hippocampus", 5)
        places = ["--data", scratch, "--out", scratch]
        run = parser.parse_args(["train", "hippocampus_nnunet", *places, "--minutes", "0.05"])
        small = "--width 0.0625 --patch 16,16,16 --no-mirroring --workers 0 --validation-batches 1 --precision fp32"
        train(run, small.split())
        verify(parser.parse_args(["verify", f"{scratch}/hippocampus_nnunet", *places]), toy=True)


# ------------------------------------------------------------------ training
def train(options: argparse.Namespace, flags: list[str]) -> None:
    """Run segrt-train on the cores given, and write result.json."""
    recipe = RECIPES[options.run]
    cores = pin(cores_of(options.cpus)[: options.cores])
    folder = options.out / (options.name or options.run)
    minutes = options.minutes or recipe.minutes
    arguments = [
        *(str(options.data / recipe.folder), "-o", str(folder / "bundle")),
        *("--work", str(folder / "work"), "--split", SPLIT, "--fold", "0", "--minutes", f"{minutes:g}", "--device", options.device),
        *("--workers", str(max(1, cores // 2)), "--save-interval", "500", "--log-interval", "50", "--force"),
        *recipe.flags.split(),
        *flags,
    ]
    began = time.perf_counter()
    command("train", *arguments)
    seconds = time.perf_counter() - began
    result = describe(folder, recipe) | {
        "command": " ".join(["segrt-train", recipe.folder, "-o", "bundle", *arguments[5:]]),  # without this machine's folders
        "seconds": {"whole command": round(seconds)} | pace_of(folder / "bundle"),
        "cores": cores,
        **_trained_on(folder / "bundle"),
        **environment(),
        "commit": options.commit,
    }
    write_json(folder / "result.json", result)
    print(f"{options.run}: mean Dice {result['mean_dice']:.4f} after {result['iterations']} iterations, {folder / 'result.json'}")


def describe(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What a run's bundle reports: Dice of the cases held back without post-processing, and all settings."""
    reports = folder / "bundle" / "reports"
    summary = read_json(reports / "summary.json")
    structures = summary["structures"]
    cases = {c["name"]: {structures[k]: m["Dice"] for k, m in c["metrics"].items()} for c in summary["metric_per_case"]}
    config = read_json(reports / "fold_0" / "config.json")
    chosen = read_json(reports / "postprocess.json")
    return {
        "benchmark": recipe.benchmark,
        "mean_dice": summary["foreground_mean"]["Dice"],
        "dice": {structures[key]: metrics["Dice"] for key, metrics in summary["mean"].items()},
        "mean_dice_postprocessed": chosen["mean_dice"]["with"],
        "iterations": int(rows_of(folder / "bundle")[-1]["iteration"]),
        "minutes": config["minutes"],
        "per_case": cases,
        "config": config,
    }


def _trained_on(bundle: Path) -> dict[str, Any]:
    values = read_json(bundle / "reports" / "fold_0" / "environment.json")
    return {name: values[name] for name in ("device", "gpu", "parameters", "flops_per_patch") if name in values}


# ------------------------------------------------------------------ several at once
def start_all(options: argparse.Namespace, flags: list[str]) -> None:
    """Start every run on cores of its own in a session of its own, and return; OUT/RUN.log has what it says."""
    cores = cores_of(options.cpus)
    options.out.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(options.runs.split(",")):
        own = cores[number * options.cores : (number + 1) * options.cores]
        if len(own) < options.cores:
            raise SystemExit(f"{run} and those after it were not started: {len(cores)} cores are enough for {number} runs")
        given = ["--data", options.data, "--out", options.out, "--cpus", ",".join(map(str, own)), "--cores", options.cores]
        given += [
            "--device",
            options.device,
            "--commit",
            options.commit,
            *(["--minutes", options.minutes] if options.minutes else []),
            "--",
            *flags,
        ]
        with (options.out / f"{run}.log").open("w") as log:
            started = subprocess.Popen(
                [sys.executable, "-u", __file__, "train", run, *map(str, given)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        print(f"{run}: process {started.pid} on cores {own}")


def show_status(out: Path) -> None:
    for log in sorted(out.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"{log.stem}: {lines[-1] if lines else 'nothing yet'}")


# ------------------------------------------------------------------ the bundle afterwards
def verify(options: argparse.Namespace, *, toy: bool = False) -> None:
    """Build the bundle, predict the cases held back from their files by the two commands, and compare every Dice with the validation's."""
    from segrt.train.dataset import open_dataset

    result = read_json(options.folder / "result.json")
    recipe = next(recipe for recipe in RECIPES.values() if recipe.benchmark == result["benchmark"])
    source: dict[str, Any] = {"image_suffix": ("PET_image",), "label_suffix": "PET_mask"} if "PET" in recipe.flags else {}
    dataset = open_dataset(options.data / recipe.folder, **source)
    cases = {case.name: case for case in dataset.cases if case.name in result["per_case"]}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "images").mkdir()
        for name, case in cases.items():
            shutil.copy(case.images[0], work / "images" / f"{name}.nii.gz")
        shutil.copytree(options.folder / "bundle", work / "bundle")
        command("build", work / "bundle")
        command("predict", work / "images", work / "labels", "--model", work / "bundle", "--no-postprocess")
        found = _scores(work / "bundle", dataset, cases, work / "labels")
    difference = max(abs(value - result["per_case"][name][label]) for name, row in found.items() for label, value in row.items())
    labels = result["dice"]
    mean = statistics.mean(statistics.mean(row[label] for row in found.values() if label in row) for label in labels)
    result["predicted"] = {
        "mean_dice": mean,
        "difference": mean - result["mean_dice"],
        "largest difference of a case": difference,
        "cases": len(found),
        **environment(),
    }
    print(
        f"{options.folder.name}: validation {result['mean_dice']:.5f}, segrt-predict {mean:.5f}, a case differs by at most {difference:.5f}"
    )
    assert len(found) == len(result["per_case"])
    assert abs(mean - result["mean_dice"]) <= TOLERANCE, result["predicted"]
    write_results(result["benchmark"], result, toy=toy)


def _scores(bundle: Path, dataset: Any, cases: dict[str, Any], predictions: Path) -> dict[str, dict[str, float]]:
    """Case -> structure -> Dice of label files against the dataset's, leaving out what neither holds."""
    from segrt.bundle import Bundle
    from segrt.io import read_labels
    from segrt.metrics import overlaps
    from segrt.train.dataset import read_label_map

    names = Bundle.open(bundle).spec.names
    scores = {}
    for name, case in cases.items():
        labels, _ = read_labels(predictions / f"{name}.nii.gz")
        truth, _, _ = read_label_map(case)
        found = {label: overlap.dice for label, overlap in overlaps(truth, labels, names, ignore=dataset.ignore).items()}
        scores[name] = {label: value for label, value in found.items() if value == value}
    return scores


if __name__ == "__main__":
    main()
