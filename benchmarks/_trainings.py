"""What the benchmarks that train have in common: cores of their own, segrt's commands in processes, and what these leave behind."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def divide(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those after -- for segrt-train."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def cores_of(text: str) -> list[int]:
    """0,1,4-7 -> their numbers; all there are for an empty text."""
    pairs = [part.partition("-") for part in text.split(",") if part]
    return [core for first, _, last in pairs for core in range(int(first), int(last or first) + 1)] or sorted(os.sched_getaffinity(0))


def pin(cores: list[int]) -> int:
    """Keep this process, and every process and thread it starts from here on, on these cores; how many they are comes out."""
    os.sched_setaffinity(0, cores)
    return len(cores)


def command(name: str, *arguments: str | Path) -> None:
    """Run one of segrt's commands to its end, with as many threads as this process has cores."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(len(os.sched_getaffinity(0))))
    code = f"from segrt.cli.{name} import main; main()"
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, check=True)


def read_json(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """A value into a JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def rows_of(bundle: Path) -> list[dict[str, str]]:
    """The training's record: a row for each interval."""
    with (bundle / "reports" / "fold_0" / "training.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pace_of(bundle: Path) -> dict[str, float]:
    """Seconds of an iteration, and the share of them spent on waiting for its batch."""
    rows = rows_of(bundle)
    batch, reader = ([float(row[name]) for row in rows] for name in ("batch_cost", "reader_cost"))
    return {
        "iteration, median": round(statistics.median(batch), 4),
        "reader share": round(sum(reader) / sum(batch), 4),
        "reader, median": round(statistics.median(reader), 5),
    }
