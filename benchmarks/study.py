"""The optimizer study on the hippocampus: SGD-Nesterov, Adam, AdamW x nnU-Net, V-Net, 5 minutes each; one segrt-study.

    python benchmarks/study.py [--data FOLDER] [--out FOLDER] [--seconds 300] [--jobs N] [--cores 2] [--report FOLDER] ...
    python benchmarks/study.py --publish FOLDER

What is none of these goes to segrt-study, such as --lr sgd=0.05. The first 168 cases by name train, the last 42 validate. OUT keeps what
segrt-study writes, so the same command goes on where it stopped.
REPORT gets the summary, tables and picture alone; --publish takes such a folder into benchmarks/results and docs/study.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from _timer import RESULTS, environment

from segrt.io import write_image
from segrt.volume import Grid

ROOT = Path(__file__).resolve().parents[1]
NAME = "hippocampus_study"
SHOWN = ("curves.png", "dice.csv", "dice.md", "dice.tex", "runs.csv", "runs.md", "runs.tex")
DOCS = "docs/study"
CORES = 2

# small enough for some thousand iterations in five minutes on two cores
SETTINGS = (
    "--models nnunet,vnet --optimizers sgd,adam,adamw --split sorted:0.8 --width 0.25 --batch-size 2 --patch vnet=32,48,32 --nesterov "
    "--augmentation nnunet --validation-interval 100 --validation-batches 5 --save-interval 200 --workers 1 --device cpu"
)
TOY = (
    "--models vnet --optimizers adamw --width 0.125 --batch-size 2 --patch vnet=16,16,16 --augmentation nnunet --workers 0 "
    "--split sorted:0.6 --device cpu"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "b_hippocampus")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "study")
    parser.add_argument("--seconds", type=float, default=300.0, help="training time of each run")
    parser.add_argument("--jobs", type=int, help="runs at once; by default as many as the cores allow")
    parser.add_argument("--cores", type=int, default=CORES, help="of each run")
    parser.add_argument("--report", type=Path, help="folder for the summary, tables and picture")
    parser.add_argument("--commit", help="of the code, where no git tells")
    parser.add_argument("--publish", type=Path, help="take a report into the repository, and nothing else")
    parser.add_argument("--toy", action="store_true")
    options, more = parser.parse_known_args()
    if options.publish:
        publish(options.publish)
        return
    if options.toy:
        with tempfile.TemporaryDirectory() as folder:
            data = make_images(Path(folder) / "data")
            run(data, Path(folder) / "study", shlex.split(TOY), seconds=1.0, jobs=1, cores=1)
            summarise(Path(folder) / "study", seconds=1.0, wall=0.0, command="toy")
        return
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = options.jobs or max(1, usable // options.cores)
    began = time.perf_counter()
    how: dict[str, Any] = {"seconds": options.seconds, "jobs": jobs, "cores": min(options.cores, usable)}
    command = run(options.data, options.out, [*shlex.split(SETTINGS), *more], **how)
    values = summarise(options.out, seconds=options.seconds, wall=time.perf_counter() - began, command=command)
    if options.commit:
        values["commit"] = options.commit
    report(values, options.out, options.report or options.out)


def run(data: Path, out: Path, settings: list[str], *, seconds: float, jobs: int, cores: int) -> str:
    """Run segrt-study, as its console command does; how one would type it comes out."""
    budget = ["--minutes", f"{seconds / 60:g}", "--jobs", str(jobs), "--cores", str(cores)]
    arguments = [str(data), "-o", str(out), *settings, *budget]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    code = "from segrt.cli.study import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(done.returncode)
    return shlex.join(["segrt-study", data.name, "-o", out.name, *settings, *budget])


def summarise(out: Path, *, seconds: float, wall: float, command: str) -> dict[str, Any]:
    """The figures of study.json that a claim may refer to."""
    study = json.loads((out / "study.json").read_text(encoding="utf-8"))
    runs = [summary_of(record) for record in study["runs"]]
    finished = [record for record in runs if record["status"] == "finished"]
    best = max(finished, key=lambda record: record["mean_dice"]["with"] or 0.0)
    return {
        "benchmark": NAME,
        "command": command,
        "mean_dice": best["mean_dice"]["with"],
        "best": best["name"],
        "cases": {"training": sum(best["training"]), "validation": best["validation"]},
        "seconds": {"training of each run": seconds, "whole command": round(wall, 1)},
        "runs": runs,
        "files": [f"{DOCS}/{name}" for name in SHOWN],
        **environment(),
    }


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    wanted = ("name", "status", "error", "cores", "training", "validation", "iterations", "training_s", "iteration_s", "parameters")
    config = {
        name: record["config"][name] for name in ("lr", "momentum", "nesterov", "betas", "weight_decay", "width", "batch_size", "seed")
    }
    return {name: record[name] for name in wanted} | {"dice": record["dice"], "mean_dice": record["mean_dice"], "config": config}


def report(values: dict[str, Any], out: Path, folder: Path) -> None:
    """Put summary, tables and picture into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for name in SHOWN:
        if folder != out and (out / name).is_file():
            shutil.copy2(out / name, folder / name)
    print(f"wrote {folder / NAME}.json, mean Dice {values['mean_dice']:.4f} ({values['best']})")


def publish(folder: Path) -> None:
    """Take a report into the repository."""
    (ROOT / DOCS).mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        shutil.copyfile(folder / name, ROOT / DOCS / name)
    shutil.copyfile(folder / f"{NAME}.json", RESULTS / f"{NAME}.json")
    print(f"wrote {RESULTS / NAME}.json and {ROOT / DOCS}")


def make_images(folder: Path) -> Path:
    """Five volumes of noise with a brighter block each."""
    for number in range(5):
        rng = np.random.default_rng(number)
        labels = np.zeros((16, 20, 18), np.uint8)
        z, y, x = rng.integers(2, 8, 3)
        labels[z : z + 6, y : y + 8, x : x + 7] = 1
        image = (rng.normal(100, 10, labels.shape) + 100 * labels).astype(np.int16)
        for kind, data in (("images", image), ("labels", labels)):
            path = folder / kind / f"case_{number:03d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, data, Grid(labels.shape, (1.0, 1.0, 1.0)))
    return folder


if __name__ == "__main__":
    main()
