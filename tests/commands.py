"""segrt's commands, each in a process of its own that a fork server has imported torch for: it starts in no time instead of in ten seconds.

Where a command's own start, environment or memory is what is tested, it is started afresh.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

# what trainings import, torch's compiler included, which its optimizers do
PRELOADED = ["torch._dynamo", "segrt.train.run", "segrt.cli.train", "segrt.cli.study"]


def run_command(name: str, *arguments: object, code: int | None = 0, threads: int | None = None) -> CompletedProcess[str]:
    """Run `segrt-<name>`; of `threads`, sums over more may differ in their last digits. Its exit code has to be `code`, None for any."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        told = [Path(folder, stream) for stream in ("stdout", "stderr")]
        process = context.Process(target=_work, args=(name, list(map(str, arguments)), list(map(str, told)), threads))
        process.start()
        process.join()
        out, err = (path.read_text() for path in told)
    assert process.exitcode is not None
    assert code in (None, process.exitcode), err
    return CompletedProcess([f"segrt-{name}", *map(str, arguments)], process.exitcode, out, err)


def _work(name: str, arguments: list[str], told: list[str], threads: int | None) -> None:
    for number, path in enumerate(told, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    if threads is not None:
        importlib.import_module("torch").set_num_threads(threads)
    sys.argv = [f"segrt-{name}", *arguments]
    importlib.import_module(f"segrt.cli.{name}").main()
