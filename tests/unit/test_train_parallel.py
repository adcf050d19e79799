"""Cases in several processes: results in order, and what is left of the workers when the process that started them is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segrt.errors import BackendError, InputError
from segrt.train.parallel import run_each

PATIENCE_S = 60
JOB = """
import sys, time
from pathlib import Path
from test_train_parallel import linger
from segrt.train.parallel import run_each
if __name__ == "__main__":
    try:
        run_each(linger, [Path(sys.argv[1], name) for name in "abcd"], workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def linger(path: Path) -> None:
    """Leave the number of this process in a file, and stay."""
    (path.parent / f".{path.name}").write_text(str(os.getpid()))
    (path.parent / f".{path.name}").rename(path)
    time.sleep(PATIENCE_S)


def double(number: int) -> int:
    if number < 0:
        raise InputError(f"{number} is below 0")
    return 2 * number


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PATIENCE_S if number == 0 else 0)
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_errors_are_passed_on(workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    assert run_each(double, range(5), workers=workers, progress=lambda *step: told.append(step)) == [0, 2, 4, 6, 8]
    assert told == [(number, 5) for number in range(1, 6)]
    with pytest.raises(InputError, match="-1 is below 0"):
        run_each(double, [1, -1, *range(50)], workers=workers)
    assert capfd.readouterr().err == ""


def test_a_worker_that_is_killed_is_a_sentence_and_ends_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(BackendError, match="one of 2 workers was killed"):
        run_each(die, range(4), workers=2)
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize(
    ("number", "whole"), [(signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGINT, False), (signal.SIGINT, True)]
)
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals, whole: bool) -> None:
    """Whether it is told to go or killed, alone or (`whole`) as Ctrl-C reaches all processes of a terminal; and none complains."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        workers = [_read(tmp_path / name) for name in "ab"]
        (os.killpg if whole else os.kill)(process.pid, number)
        process.wait(PATIENCE_S / 2)
        for worker in workers:
            _wait_until_gone(worker)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == (130 if number == signal.SIGINT else -number)


def _read(path: Path) -> int:
    end = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(path.read_text())


def _wait_until_gone(pid: int) -> None:
    end = time.monotonic() + PATIENCE_S / 4
    while _runs(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended
