"""Records: CSV to the last digit, TensorBoard, curves, samples, tables, the machine."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import UNET_3D

from segrt.errors import InputError
from segrt.networks import build_empty
from segrt.report.curves import read_rows, write_curves
from segrt.report.samples import write_samples
from segrt.report.tables import to_csv, to_latex, to_markdown, write_tables
from segrt.train.epoch import EpochSums
from segrt.train.records import Records, count_flops, environment

PNG = b"\x89PNG"


def _fill(folder: Path, first: int, last: int, *, start: int = 0) -> None:
    with Records(folder, ("liver", "spleen"), iteration=start) as records:
        for i in range(first, last + 1):
            values = {"loss": 1 / i, "dice": 0.1 * i if i % 2 == 0 else None, "lr": 0.01, "batch_cost": 0.2, "reader_cost": 0.1}
            records.training(i, values)
            if i % 4 == 0:
                records.validation(i, {"loss": 2 / i, "dice": 0.5, "average": 0.4}, [0.5, math.nan])


def test_a_row_per_iteration_with_all_digits(tmp_path: Path) -> None:
    _fill(tmp_path, 1, 9)
    rows = read_rows(tmp_path / "training.csv")
    assert [float(row["loss"]) for row in rows] == [1 / i for i in range(1, 10)]
    assert [row["dice"] for row in rows][:4] == ["", "0.2", "", "0.4"]
    checks = read_rows(tmp_path / "validation.csv")
    assert [(row["iteration"], row["liver"], row["spleen"]) for row in checks] == [("4", "0.5", ""), ("8", "0.5", "")]


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    _fill(tmp_path, 1, 9)
    with (tmp_path / "training.csv").open("a") as file:
        file.write("10,0.")  # killed while writing
    _fill(tmp_path, 6, 7, start=5)
    assert [row["iteration"] for row in read_rows(tmp_path / "training.csv")] == [str(i) for i in range(1, 8)]
    assert [row["iteration"] for row in read_rows(tmp_path / "validation.csv")] == ["4"]


FULL = """
import resource, sys
from pathlib import Path
from segrt.cli.training import ending_on_signals
from segrt.errors import InputError
from segrt.train.records import Records

folder, first, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # writes fail half way, as on a full disk
try:
    with ending_on_signals({}), Records(folder, ("liver", "spleen"), iteration=first) as records:
        for i in range(first + 1, first + 2000):
            records.training(i, {"loss": 1 / i, "dice": None, "lr": 0.01, "batch_cost": 0.2, "reader_cost": 0.1})
except InputError as err:
    print(err)
"""


def test_a_full_disk_is_a_sentence_and_loses_no_row_of_before(tmp_path: Path) -> None:
    _fill(tmp_path, 1, 200)
    before = (tmp_path / "training.csv").read_bytes()
    for first, limit in ((200, len(before) - 1000), (200, len(before) + 1000)):
        arguments = [sys.executable, "-c", FULL, str(tmp_path), str(first), str(limit)]
        answer = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
        assert answer.stderr == ""
        assert answer.stdout.startswith(f"{tmp_path}: records cannot be written (File too large); free some space")
        assert (tmp_path / "training.csv").read_bytes().startswith(before)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _fill(tmp_path, 1, 8)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {"loss", "dice", "lr", "batch_cost", "reader_cost"}
    assert {f"train/{n}" for n in names} | {"validation/loss", "validation/class/liver"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([1 / i for i in range(1, 9)], rel=1e-6)


def test_curves_of_one_and_of_several_runs(tmp_path: Path) -> None:
    _fill(tmp_path / "a", 1, 900)
    _fill(tmp_path / "b", 1, 3)
    write_curves(tmp_path / "one.png", {"a": tmp_path / "a"})
    write_curves(tmp_path / "two.png", {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in ("one", "two"))
    with pytest.raises(InputError, match=r"no training.csv with a row"):
        write_curves(tmp_path / "none.png", {"none": tmp_path})
    with pytest.raises(InputError, match="no run given"):
        write_curves(tmp_path / "none.png", {})


def test_contact_sheet(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image, labels = rng.normal(size=(3, 9, 8)).astype(np.float32), rng.integers(-1, 3, (3, 9, 8))
    write_samples(tmp_path / "samples.png", [(f"case {i}", image[None], labels) for i in range(5)], {1: "liver", 2: "spleen"})
    assert (tmp_path / "samples.png").read_bytes().startswith(PNG)
    with pytest.raises(InputError, match=r"'a' have shape \(2, 9, 8\), its image \(3, 9, 8\)"):
        write_samples(tmp_path / "bad.png", [("a", image[None], labels[:2])], {1: "liver"})
    with pytest.raises(InputError, match="none given"):
        write_samples(tmp_path / "bad.png", [], {})


RUNS = {"sgd": {"left_kidney": 0.9, "liver": math.nan}, "adam|w": {"left_kidney": 0.95, "spleen": 0.5}}


def test_tables(tmp_path: Path) -> None:
    rows = list(csv.reader(to_csv(RUNS).splitlines()))
    assert rows == [
        ["organ", "sgd", "adam|w"],
        ["left_kidney", "0.9", "0.95"],
        ["liver", "", ""],
        ["spleen", "", "0.5"],
        ["mean", "0.9", "0.725"],
    ]
    assert to_markdown(RUNS).splitlines() == [
        r"| organ | sgd | adam\|w |",
        "|---|---|---|",
        "| left_kidney | 0.9000 | **0.9500** |",
        "| liver | - | - |",
        "| spleen | - | 0.5000 |",
        "| mean | **0.9000** | 0.7250 |",
    ]
    latex = to_latex(RUNS, caption="Dice & more")
    assert r"left\_kidney & 0.9000 & \textbf{0.9500} \\" in latex
    assert r"\caption{Dice \& more}" in latex
    paths = write_tables(tmp_path / "table.v1", RUNS)
    assert [path.name for path in paths] == ["table.v1.csv", "table.v1.md", "table.v1.tex"]
    with pytest.raises(InputError, match="no run given"):
        to_csv({})


def test_machine_and_network() -> None:
    found = environment(torch.device("cpu"))
    json.dumps(found)
    assert {"segrt", "python", "cores", "versions"} <= found.keys()
    # two 3x3x3 convolutions, a stride-2 one each way, heads: multiplications and additions counted
    first = 2 * 27 * 1 * 4 * 8**3
    assert count_flops(build_empty(UNET_3D), (1, 1, 8, 8, 8)) > first
    assert count_flops(build_empty(UNET_3D), (2, 1, 8, 8, 8)) == 2 * count_flops(build_empty(UNET_3D), (1, 1, 8, 8, 8))


def test_epochs_are_rows_of_their_own(tmp_path: Path) -> None:
    counts = torch.tensor([[8.0], [2.0], [4.0]], dtype=torch.float64)
    sums = EpochSums()
    sums.add(1.0, counts)
    sums.add(2.0, None)
    sums.add(3.0, 2 * counts)
    means = sums.end(1, 3, counts * 0, 0.5)
    with Records(tmp_path, ("a",)) as records:
        records.epoch(3, means)
    row = read_rows(tmp_path / "epochs.csv")[0]
    assert (row["iteration"], row["number"], row["loss"], row["lr"]) == ("3", "1.0", "2.0", "0.5")
    dice, iou = float(row["dice"]), float(row["iou"])
    assert dice == pytest.approx(16 / 22)
    assert dice == pytest.approx(2 * iou / (1 + iou)), "SEEDS 3"
    assert (row["validation_dice"], row["validation_iou"]) == ("", "")
    sums.add(7.0, None)
    assert sums.end(2, 3, None, 0.5).loss == 7.0, "begun anew"
