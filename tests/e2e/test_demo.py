"""The demo as `make demo` runs it, and the README's examples on the demo's model."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segrt.io.write import write_image
from segrt.phantom import make_phantom

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(DEMO / "bundle", tmp_path_factory.mktemp("model") / "liver"))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra report")
def test_demo_finds_the_organs_without_torch(tmp_path: Path) -> None:
    """A module named torch that refuses to load stands first on the path of the demo and of the commands it calls."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('no torch here')\n", encoding="utf-8")
    out = tmp_path / "out"
    answer = subprocess.run(
        [sys.executable, DEMO / "run.py", out],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(blocked)},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert json.loads((out / "demo.json").read_text())["mean_dice"] >= 0.7
    assert (out / "overlay.png").stat().st_size > 10_000
    assert "gall bladder" in answer.stdout


def test_the_bundle_in_the_repository_is_small() -> None:
    sizes = [path.stat().st_size for path in (DEMO / "bundle").rglob("*") if path.is_file()]
    assert max(sizes) < 2_000_000
    assert sum(sizes) < 2_500_000


def test_readme_python_runs_as_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _, grid = make_phantom(np.random.default_rng(5), spacing=(6.0, 4.0, 4.0))
    write_image(tmp_path / "case_0000.nii.gz", image, grid)
    shutil.copytree(model, tmp_path / "liver")
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "labels.nii.gz").is_file()


def test_readme_commands_have_the_options_they_show() -> None:
    lines = [line.split("#")[0].split() for block in _blocks("bash") for line in block.splitlines() if line.startswith("segrt-")]
    assert {words[0] for words in lines} == {"segrt-build", "segrt-predict", "segrt-serve", "segrt-train"}
    for command, *words in lines:
        answer = subprocess.run([Path(sys.executable).parent / command, "--help"], capture_output=True, text=True, check=True)
        for option in (w for w in words if w.startswith("-")):
            assert option in answer.stdout, f"{command} has no {option}"
