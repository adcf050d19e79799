"""What the benchmark of serving needs: clients that ask without end, the server's memory meanwhile, and what must hold of the results."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segrt.errors import SegrtError
from segrt.serving.connection import Connection
from segrt.serving.remote import RemotePredictor
from segrt.serving.server import Server

MOST_OVERHEAD, MOST_GROWTH = 0.05, 0.02
RIGHT, BACK = "no wrong answer", "a killed process answers again"
CORRECT = (RIGHT, BACK)


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: int = 0
    first_error: str | None = None
    wall_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        """What is written of it; times are None without any answer."""
        p50, p99 = (float(np.percentile(self.seconds, share)) if self.seconds else None for share in (50, 99))
        found = {"requests": len(self.seconds), "cases_per_s": len(self.seconds) / self.wall_s, "p50_s": p50, "p99_s": p99}
        what = {"max_s": max(self.seconds, default=None), "wrong": self.wrong, "errors": self.errors}
        return found | what | {"first_error": self.first_error}


def put_under_load(
    server: Server, model: str, image: Any, expected: Any, clients: int, *, until_s: float = np.inf, count: float = np.inf
) -> Load:
    """`clients` that ask again as soon as they have an answer, for a time or a number of requests; each asks once before, as a warm-up.

    They repeat nothing by themselves: every request that fails is an error.
    """
    load, begin, lock = Load(), threading.Barrier(clients + 1), threading.Lock()
    left, end = [count], [np.inf]

    def ask(remote: RemotePredictor, seconds: list[float]) -> None:
        start = time.perf_counter()
        try:
            labels = remote(image).labels
        except SegrtError as err:
            with lock:
                load.errors += 1
                load.first_error = load.first_error or str(err)
            return
        took, wrong = time.perf_counter() - start, not np.array_equal(labels, expected)
        with lock:
            seconds.append(took)
            load.wrong += wrong

    def client() -> None:
        try:
            remote = RemotePredictor(server.grpc, model, connection=Connection(retries=0))
        except SegrtError:
            begin.abort()
            raise
        with remote:
            ask(remote, [])
            begin.wait()
            while True:
                with lock:
                    left[0] -= 1
                    if left[0] < 0:
                        return
                ask(remote, load.seconds)
                if time.perf_counter() > end[0]:
                    return

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        with suppress(threading.BrokenBarrierError):  # whose cause a client's result raises
            begin.wait()
        start = time.perf_counter()
        end[0] = start + until_s
    for one in running:
        one.result()
    load.wall_s = time.perf_counter() - start
    return load


@contextmanager
def watching(server: Server) -> Iterator[list[float]]:
    """Bytes that the server and its models use, once a second; memory they share counts once."""
    used, done = list[float](), threading.Event()

    def look() -> None:
        while not done.wait(1):
            used.append(sum(_proportional_bytes(process) for process in (server.pid, *server.processes())))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield used
    finally:
        done.set()
        thread.join()


def growth(used: list[float]) -> dict[str, Any]:
    """Memory after a fifth of the time, which is warm-up, and at the end, as medians of a tenth of the samples; None without enough."""
    tenth = max(1, len(used) // 10)
    warm, end = (statistics.median(part) if part else None for part in (used[2 * tenth : 3 * tenth], used[-tenth:]))
    grown = end / warm - 1 if warm and end else None
    return {"bytes_after_warm_up": warm, "bytes_at_the_end": end, "growth": grown, "bytes_peak": max(used, default=None)}


def judge(results: Mapping[str, Any]) -> dict[str, bool]:
    """Criterion -> whether it holds; what was not measured does not."""
    overhead: Mapping[str, float] = results["whole_image"]["overhead"]
    soak = {name: part for name, part in results["soak"].items() if isinstance(part, dict)}
    # by model: each number of clients
    levels = {name: results[name] for name in soak}
    loads = [load for by_clients in levels.values() for load in by_clients.values()] + [*soak.values(), results["memory"]]
    shared = {n: load for name, by_clients in levels.items() if name.endswith("_bls") for n, load in by_clients.items() if int(n) > 1}
    return {
        **{f"overhead of {way} <= {MOST_OVERHEAD:.0%}": share <= MOST_OVERHEAD for way, share in overhead.items()},
        **{f"{n} clients share executions": load["patch_executions"] < load["patch_requests"] for n, load in shared.items()},
        f"memory grows <= {MOST_GROWTH:.0%} in the soak": _flat(results["soak"]["growth"]),
        f"memory grows <= {MOST_GROWTH:.0%} over {results['memory']['requests']} requests": _flat(results["memory"]["growth"]),
        RIGHT: all(load["requests"] > 0 and load["wrong"] == 0 for load in loads),
        "no failed request": all(load["errors"] == 0 for load in loads),
        "p99 is known": all(load["p99_s"] is not None for load in loads),
        BACK: results["killed_process"]["right_answer"],
    }


def _flat(grown: float | None) -> bool:
    return grown is not None and grown <= MOST_GROWTH


def _proportional_bytes(process: int) -> float:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
