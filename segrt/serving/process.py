"""One tritonserver as a process: its log, its signals, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .options import is_noise

_KEPT_LINES = 1000
_REQUESTS_DONE = "All models are stopped, unloading models"
_PR_SET_PDEATHSIG = 1


class ServerProcess:
    """A program in a process group of its own, so that Ctrl-C reaches us alone.

    Parameters
    ----------
    command : the program and its arguments
    environment : all of its variables; None for ours
    show : gets each line it logs
    pass_fds : open files it is given

    Attributes
    ----------
    pid : the process; its group holds the models' processes
    requests_done : set once every request has had its answer, after it was asked to end
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None, show: Callable[[str], object], *, pass_fds: Sequence[int] = ()
    ) -> None:
        self.requests_done = threading.Event()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process = subprocess.Popen(
            [*_ending_with_us(), *command],
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=pass_fds,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, args=(show,), name="segrt-server-log", daemon=True)
        self._reader.start()

    @property
    def is_running(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None

    @property
    def log(self) -> list[str]:
        """The last lines it logged."""
        return list(self._lines)

    @property
    def reason(self) -> str:
        """The line of the log that says why it ended."""
        if not self.is_running:
            self._reader.join(5)
        return reason_in(self.log)

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code (negative: minus the signal); None when it still runs after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def hide(self, secret: str) -> bool:
        """Cross out a secret among its arguments, which every user of this machine can read; give whether none is left to be read.

        The program must have read them by then.
        """
        hidden = secret.encode()
        try:
            with Path(f"/proc/{self.pid}/mem").open("r+b", buffering=0) as memory:
                start, end = _arguments_of(self.pid)
                memory.seek(start)
                found = memory.read(end - start)
                memory.seek(start)
                memory.write(found.replace(hidden, b"x" * len(hidden)))
            return hidden not in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except (OSError, ValueError, OverflowError):
            return False

    def kill(self) -> int:
        """End it and all that it started, now, and give the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._reader.join()
        return code

    def _read(self, show: Callable[[str], object]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                text = line.rstrip("\n")
                self._lines.append(text)
                if _REQUESTS_DONE in text:
                    self.requests_done.set()
                show(text)


def reason_in(lines: Sequence[str]) -> str:
    """The line of a log that says why a server ended, without its prefix of time and place."""
    # an argument it does not know makes it print all it does know; what fails to load first is why the rest does
    usage = [line.split("tritonserver: ", 1)[1] for line in lines if "tritonserver: " in line]
    models = [line for line in lines if line.startswith("E") and "failed to load '" in line][:1]
    told = [line for line in lines if not is_noise(line)]
    failures = [line for line in told if line.startswith("E") or any(sign in line.lower() for sign in ("failed", "error", "what():"))]
    return (usage or models or failures or told or ["it logged nothing"])[-1].split("] ", 1)[-1].strip('" ')


def _arguments_of(pid: int) -> tuple[int, int]:
    """Where they begin and end in its memory."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return int(fields[45]), int(fields[46])


def _ending_with_us() -> list[str]:
    """What runs a program so that it is asked to end when we are killed; the kernel watches the thread, so only the main one will do.

    It is a program of its own because a function between fork and exec would upset the threads of libraries that watch for forks.
    """
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        return []
    ask = f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})"
    return [sys.executable, "-I", "-S", "-c", f"import ctypes, os, sys; {ask}; os.execv(sys.argv[1], sys.argv[1:])"]
