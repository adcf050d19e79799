"""What the benchmark of serving judges: each criterion fails for its own reason and no other."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_serving")


def good() -> dict[str, Any]:
    load = {"requests": 1000, "wrong": 0, "errors": 0, "p99_s": 1.0, "patch_requests": 9.0, "patch_executions": 9.0}
    levels = {"1": load, "4": load | {"patch_executions": 5.0}, "16": load | {"patch_executions": 3.0}}
    return copy.deepcopy(
        {
            "whole_image": {"overhead": {"grpc": 0.03, "http": 0.05}},
            "ct": {"1": load, "4": load, "16": load},
            "ct_bls": levels,
            "soak": {"ct": load, "ct_bls": load, "growth": 0.01},
            "memory": load | {"growth": -0.1},
            "killed_process": {"right_answer": True},
        }
    )


@pytest.mark.parametrize(
    ("path", "value", "failed"),
    [
        ((), None, []),
        (("whole_image", "overhead", "http"), 0.051, ["overhead of http <= 5%"]),
        (("ct_bls", "4", "patch_executions"), 9.0, ["4 clients share executions"]),
        (("ct_bls", "16", "patch_executions"), 9.0, ["16 clients share executions"]),
        (("soak", "growth"), 0.03, ["memory grows <= 2% in the soak"]),
        (("soak", "growth"), None, ["memory grows <= 2% in the soak"]),
        (("memory", "growth"), 0.03, ["memory grows <= 2% over 1000 requests"]),
        (("soak", "ct", "wrong"), 1, ["no wrong answer"]),
        (("ct", "16", "requests"), 0, ["no wrong answer"]),
        (("ct_bls", "1", "errors"), 1, ["no failed request"]),
        (("soak", "ct_bls", "p99_s"), None, ["p99 is known"]),
        (("killed_process", "right_answer"), False, ["a killed process answers again"]),
    ],
)
def test_a_criterion_fails_alone(judged: Any, path: tuple[str, ...], value: Any, failed: list[str]) -> None:
    results = good()
    if path:
        place = results
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    assert [name for name, holds in judged.judge(results).items() if not holds] == failed


def test_nothing_but_failures_is_written_too(judged: Any) -> None:
    load = judged.Load(errors=3, first_error="gone", wall_s=1.0)
    assert load.figures() | {"p50_s": None, "p99_s": None, "requests": 0, "errors": 3} == load.figures()
    assert judged.growth([])["growth"] is None
    assert judged.growth([5.0] * 40 + [6.0] * 4)["growth"] == pytest.approx(0.2)
