"""Every benchmark that needs no rival environment runs at toy size; its figures are no test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["kernels", "files", "engine", "gpu", "precision", "loader", "train_runs", "lgg", "study", "frames", "serve"]
)
def test_benchmark_runs_at_toy_size(script: str) -> None:
    before = {p: p.read_bytes() for p in (ROOT / "benchmarks" / "results").glob("*.json")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--toy"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.read_bytes() for p in (ROOT / "benchmarks" / "results").glob("*.json")} == before, "a toy run leaves results alone"
