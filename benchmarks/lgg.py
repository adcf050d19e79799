"""UNet++ and the plain U-Net on brain tumour slices of patients neither has seen: Dice, and what pruning to a level costs and gains.

    python benchmarks/lgg.py train --cpus 0,1 --data ../shared/data --out runs/lgg          # 38 CPU minutes: each network 9.5 on two cores
    python benchmarks/lgg.py train --only unetpp --minutes 20 --out runs/lgg -- --width 0.5  # after --: segrt-train's own flags
    python benchmarks/lgg.py prune --cpus 0,1 --out runs/lgg                                # segrt-build --prune of the UNet++
    python benchmarks/lgg.py table

`train` writes results/lgg_unetpp.json and results/lgg_unet.json, `prune` adds its rows to the former. Data: 290 slices of 29 patients.
The last fifth of the patients by name is held back and chooses no weights: the last iteration's are taken. Dice is the mean over the slices
with tumour, without post-processing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _timer import RESULTS, commit, environment, write_results
from _trainings import ROOT, command, cores_of, divide, pace_of, pin, read_json, rows_of, write_json

FLAGS = (
    "--mask-threshold 0 --patients (TCGA_[^_]+_[^_]+)_ --split sorted:0.8 --fold 0 --weights last "
    "--validation-batches 4 --validation-interval 200 "
    "--save-interval 200 --log-interval 20 --width 0.5 --size 128 --batch-size 8 --optimizer adamw --weight-decay 1e-2 --lr 1e-3 "
    "--schedule cosine --lrf 0.01 --precision bf16 --grey 0.15 --grey-channel green"
)
MODELS = ("unetpp", "unet")
NAMES = {"unetpp": "UNet++", "unet": "U-Net"}


def main() -> None:
    if sys.argv[1:] == ["--toy"]:
        run_toy()
        return
    own, flags = divide(sys.argv[1:])
    options = _parser().parse_args(own)
    match options.command:
        case "train":
            for model in options.only or MODELS:
                train(model, options, flags)
            print_table()
        case "prune":
            prune(options)
        case "table":
            print_table()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    common.add_argument("--out", type=Path, default=ROOT / "build" / "lgg")
    common.add_argument("--cpus", default="", help="Core numbers, such as 0,1; all by default.")
    common.add_argument("--commit", default=commit(), help="That the code is of, where there is no git to ask.")
    training = commands.add_parser("train", parents=[common], help="Train and score the networks, one after the other.")
    training.add_argument("--minutes", type=float, default=38, help="CPU minutes of training, of all networks and cores together.")
    training.add_argument("--only", choices=MODELS, action="append", help="One network, which then has its usual share of the minutes.")
    commands.add_parser("prune", parents=[common], help="Build, time and score the levels of the trained UNet++.")
    commands.add_parser("table", help="What the results say.")
    return parser


def run_toy() -> None:
    """One network's training, and its pruning, for a moment on made-up slices."""
    with tempfile.TemporaryDirectory() as scratch:
        make_slices(Path(scratch) / "c_lgg2d")
        places = ["--data", scratch, "--out", scratch]
        small = ["--width", "0.0625", "--size", "32", "--batch-size", "2", "--workers", "0", "--validation-batches", "1"]
        minutes = ["--minutes", str(0.05 * len(cores_of("")))]
        train("unetpp", _parser().parse_args(["train", *places, *minutes]), small, toy=True)
        prune(_parser().parse_args(["prune", *places]), toy=True)


def make_slices(folder: Path, patients: int = 5) -> None:
    """Pictures with a bright disk and its mask, two for each patient, named as the real ones."""
    import numpy as np
    import SimpleITK as sitk

    from segrt.io import write_image
    from segrt.volume import Grid

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :40]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(2 * patients):
        disk = (y - rng.integers(12, 28)) ** 2 + (x - rng.integers(12, 28)) ** 2 < 64
        grid = Grid((1, 40, 40), (999.0, 1.0, 1.0), dimensions=2)
        name = f"TCGA_XX_{number // 2:04d}_20000101_{number % 2}.png"
        colours = (disk[..., None] * 120 + rng.integers(0, 80, (*disk.shape, 3))).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), folder / "images" / name)
        write_image(folder / "masks" / name, (disk * 255).astype(np.uint8)[None], grid)


# ------------------------------------------------------------------ training
def train(model: str, options: argparse.Namespace, flags: list[str], *, toy: bool = False) -> None:
    """Train one network by segrt-train and write its result."""
    cores, folder = pin(cores_of(options.cpus)), options.data / "c_lgg2d"
    share = options.minutes / len(MODELS)
    minutes = share / cores
    arguments = [
        *(str(folder / "images"), "--masks", str(folder / "masks"), "--model", model, "-o", str(options.out / model)),
        *("--minutes", f"{minutes:g}", "--device", "cpu", "--workers", str(max(1, cores // 2)), "--force"),
        *FLAGS.split(),
        *flags,
    ]
    began = time.perf_counter()
    command("train", *arguments)
    result = describe(options.out / model) | {
        # without this machine's folders
        "command": " ".join(["segrt-train", "c_lgg2d/images", "--masks", "c_lgg2d/masks", "--model", model, "-o", model, *arguments[7:]]),
        "seconds": {"whole command": round(time.perf_counter() - began)} | pace_of(options.out / model),
        "minutes": minutes,
        "cores": cores,
        "cpu_minutes": share,
        **environment(),
        "commit": options.commit,
    }
    write_json(options.out / f"{model}.json", result)
    print(
        f"{NAMES[model]}: mean Dice {result['mean_dice']:.4f}, IoU {result['mean_iou']:.4f} over {result['slices']['with tumour']} slices"
    )
    write_results(f"lgg_{model}", result, toy=toy)


def describe(bundle: Path) -> dict[str, Any]:
    """What a bundle reports of the slices held back."""
    reports = bundle / "reports"
    summary, split, machine = (read_json(reports / name) for name in ("summary.json", "fold_0/split.json", "fold_0/environment.json"))
    scores = {case["name"]: next(iter(case["metrics"].values())) for case in summary["metric_per_case"]}
    tumour = {name: score for name, score in scores.items() if score["n_ref"]}
    false = [name for name, score in scores.items() if not score["n_ref"] and score["n_pred"]]
    patients = {patient: [s["Dice"] for name, s in tumour.items() if name.startswith(patient)] for patient in split["patients"]["val"]}
    return {
        "mean_dice": statistics.mean(score["Dice"] for score in tumour.values()),
        "mean_iou": statistics.mean(score["IoU"] for score in tumour.values()),
        "slices": {"held back": len(scores), "with tumour": len(tumour), "without, in which some was found": len(false)},
        "dice_per_patient": {patient: statistics.mean(dice) for patient, dice in patients.items() if dice},
        "patients": split["patients"],
        "parameters": machine["parameters"],
        "flops_per_patch": machine["flops_per_patch"],
        "iterations": int(rows_of(bundle)[-1]["iteration"]),
        "config": read_json(reports / "fold_0" / "config.json"),
    }


# ------------------------------------------------------------------ pruning
def prune(options: argparse.Namespace, *, toy: bool = False) -> None:
    """Build every level of the trained UNet++, and add what it costs and is worth to its result."""
    bundle, cores = options.out / "unetpp", pin(cores_of(options.cpus))
    command("build", bundle, "--prune", "L1,L2,L3,L4", "--force")
    levels = read_json(bundle / "reports" / "prune.json")
    result = read_json(options.out / "unetpp.json") | {name: levels.pop(name) for name in ("L1", "L2", "L3", "L4")}
    result["pruning"] = {**levels, "cores": cores, **environment()}
    write_json(options.out / "unetpp.json", result)
    write_results("lgg_unetpp", {key: value for key, value in result.items() if key != "benchmark"}, toy=toy)


# ------------------------------------------------------------------ side by side
def print_table() -> None:
    """The networks that have a result, side by side."""
    print("| network | parameters | GFLOP | iterations | Dice of slices with tumour | IoU |\n|---|---|---|---|---|---|")
    for model in MODELS:
        if (path := RESULTS / f"lgg_{model}.json").is_file():
            r = read_json(path)
            numbers = f"{r['parameters']:,} | {r['flops_per_patch'] / 1e9:.1f} | {r['iterations']}"
            print(f"| {NAMES[model]} | {numbers} | {r['mean_dice']:.4f} | {r['mean_iou']:.4f} |")


if __name__ == "__main__":
    main()
