"""Fixtures every test may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# before Numba is imported: without a GPU its CUDA simulator runs the kernels' CUDA form
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")

# a shell that starts the tests in its background has SIGINT ignored, which every command that a test starts and interrupts would inherit
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# the first call of a kernel compiles it, which no deadline fits; the same examples in every run, `--hypothesis-profile=search` for new ones
hypothesis.settings.register_profile("segrt", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile("segrt")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} in a folder 'shared' beside the project")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images."""
    return _shared("data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """What nnU-Net v2 itself produced."""
    return _shared("golden")


# two processes share the files: those that take a minute or more go first, the longest at the head, so that both end together
LONG = (
    "test_benchmarks.py",
    "test_study.py",
    "test_golden.py",
    "test_ptx.py",
    "test_train_flow.py",
    "test_train.py",
    "test_memory.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; and with a GPU Numba compiles for it, and its simulator, which takes the whole process, is off."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
        for item in items:
            if "simulator" in item.name:
                item.add_marker(pytest.mark.skip(reason="Numba's CUDA simulator is off; set NUMBA_ENABLE_CUDASIM=1"))
