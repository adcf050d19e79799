"""segrt's commands, each in a process of its own that a fork server has imported torch for: it starts in no time instead of in ten seconds.

Where a command's own start, environment or memory is what is tested, it is started afresh.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

# what trainings import, torch's compiler included, which its optimizers do
PRELOADED = ["torch._dynamo", "segrt.train.run", "segrt.cli.train", "segrt.cli.study"]


def start(target: Callable[..., object], *arguments: Any) -> Any:
    """Run a function of a module in a process, which is given."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def end(processes: Sequence[Any], patience_s: float = 600) -> list[int | None]:
    """Wait for processes; their exit codes. When one fails or time is over, those still running are killed: they may wait for it."""
    until = time.monotonic() + patience_s
    while any(process.is_alive() for process in processes):
        if time.monotonic() > until or any(process.exitcode for process in processes):
            time.sleep(1)  # what fails with it says so itself
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return [process.exitcode for process in processes]


class Command:
    """A running `segrt-<name>`; of `threads`, sums over more may differ in their last digits."""

    def __init__(self, name: str, *arguments: object, threads: int | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.line = [f"segrt-{name}", *map(str, arguments)]
        self._folder = TemporaryDirectory()
        self._told = [str(Path(self._folder.name, stream)) for stream in ("stdout", "stderr")]
        self._process = start(_work, name, self.line, self._told, threads, dict(environment or {}))

    def finish(self) -> CompletedProcess[str]:
        """Wait for its end."""
        (code,) = end([self._process])
        out, err = (Path(path).read_text() for path in self._told)
        self._folder.cleanup()
        return CompletedProcess(self.line, -9 if code is None else code, out, err)


def run_command(name: str, *arguments: object, code: int | None = 0, threads: int | None = None) -> CompletedProcess[str]:
    """Run a command to its end; its exit code has to be `code`, None for any."""
    done = Command(name, *arguments, threads=threads).finish()
    assert code in (None, done.returncode), done.stderr
    return done


def _work(name: str, line: list[str], told: list[str], threads: int | None, environment: dict[str, str]) -> None:
    for number, path in enumerate(told, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ |= environment
    if threads is not None:
        importlib.import_module("torch").set_num_threads(threads)
    sys.argv = line
    importlib.import_module(f"segrt.cli.{name}").main()
