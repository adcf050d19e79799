"""A model on a Triton server under load: what serving adds to the Predictor, several clients at once, a long run, memory, a killed model.

    python benchmarks/serve.py [--golden FOLDER] [--soak 300] [--requests 1000] [--toy]

The whole CT of golden set S2 is segmented in this process and by the server in turn; crops of it make the load. Every answer is compared
with the Predictor's, byte by byte. About a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _timer import environment, write_results

from segrt.bundle import Bundle
from segrt.errors import SegrtError
from segrt.export.build import build_model
from segrt.export.triton import write_triton
from segrt.io import read_volume
from segrt.predictor import Predictor
from segrt.serving.connection import Connection
from segrt.serving.options import ServerOptions
from segrt.serving.remote import RemotePredictor
from segrt.serving.server import Server

ROOT = Path(__file__).resolve().parents[1]
MODEL = "ct"
CONCURRENCY = (1, 4, 16)


@dataclass(frozen=True)
class Size:
    """How much is done."""

    crop: tuple[int, int, int]  # voxels of the working grid's spacing, about
    turns: int
    level_s: float
    soak_s: float
    requests: int
    concurrency: tuple[int, ...] = CONCURRENCY


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        """What is written of it."""
        p50, p99 = (float(np.percentile(self.seconds, share)) for share in (50, 99))
        found = {"requests": len(self.seconds), "cases_per_s": len(self.seconds) / self.wall_s, "p50_s": p50, "p99_s": p99}
        what = {"max_s": max(self.seconds), "wrong": self.wrong, "errors": len(self.errors)}
        return found | what | {"first_error": next(iter(self.errors), None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden", help="folder of the golden sets")
    parser.add_argument("--soak", type=float, default=300, help="seconds")
    parser.add_argument("--turns", type=int, default=7, help="of the whole image, and each way of asking for it")
    parser.add_argument("--seconds", type=float, default=30, help="for each number of clients")
    parser.add_argument("--requests", type=int, default=1000, help="over which memory is watched")
    parser.add_argument("--toy", action="store_true", help="the demo's model, small and short, to see that it runs")
    options = parser.parse_args()
    size = (
        Size((16, 24, 24), 2, 1, 2, 10, (1, 2))
        if options.toy
        else Size((32, 64, 64), options.turns, options.seconds, options.soak, options.requests)
    )
    with tempfile.TemporaryDirectory() as folder:
        bundle, image = _toy() if options.toy else _golden(options.golden / "S2_organs_ct", Path(folder) / "bundle")
        write_triton(bundle, Path(folder) / "repository", name=MODEL, device="cpu")
        with Predictor(bundle, device="cpu") as predictor, Server(Path(folder) / "repository", ServerOptions(log_level="error")) as server:
            results = run(server, predictor, image, size)
    print(results)
    write_results("serve", results | environment(), toy=options.toy)


def run(server: Server, predictor: Predictor, image: Any, size: Size) -> dict[str, Any]:
    volume = read_volume(image, [channel.name for channel in predictor.spec.channels])
    crop = _crop(volume.data, predictor, size.crop)
    small: Any = (crop, volume.grid.spacing)
    expected = predictor(small).labels
    results: dict[str, Any] = {"model": predictor.spec.name, "crop": list(crop.shape), "image": list(volume.data.shape)}
    results["whole_image"] = overhead(server, predictor, image, size.turns)
    print("whole image", results["whole_image"], flush=True)
    results["crop_in_process_s"] = statistics.median(_seconds(lambda: predictor(small)) for _ in range(size.turns))
    for model in (MODEL, f"{MODEL}_bls"):
        results[model] = {str(n): level(server, model, small, expected, n, size.level_s) for n in size.concurrency}
        print(model, results[model], flush=True)
    results["soak"] = soak(server, small, expected, size.soak_s)
    print("soak", results["soak"], flush=True)
    results["memory"] = memory(server, small, expected, size.requests)
    results["killed_process"] = killed(server, small, expected)
    return results


def overhead(server: Server, predictor: Predictor, image: Any, turns: int) -> dict[str, Any]:
    """The whole image in this process, and by the server over each transport, in turn; reading the file is part of all."""
    expected = predictor(image).labels
    ways = {"grpc_shared_memory": (server.grpc, "auto"), "grpc": (server.grpc, "off"), "http": (f"http://{server.http}", "off")}
    opened = {name: RemotePredictor(url, MODEL, connection=Connection(shared_memory=how)) for name, (url, how) in ways.items()}  # type: ignore[arg-type]
    calls: dict[str, Callable[[Any], Any]] = {"in_process": predictor, **opened}
    for name, call in calls.items():
        assert np.array_equal(call(image).labels, expected), f"{name}: labels differ from the Predictor's"
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            seconds[name].append(_seconds(lambda call=call: call(image)))  # type: ignore[misc]
    for remote in opened.values():
        remote.close()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    shares = {name: median[name] / median["in_process"] - 1 for name in opened}
    return {"median_s": median, "all_s": seconds, "overhead": shares}


def level(server: Server, model: str, image: Any, expected: Any, clients: int, seconds: float) -> dict[str, Any]:
    """Figures of `clients` at once for some seconds, and how many windows' requests the patch model ran in how many executions."""
    counters = ("nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count")
    before = [_patch_metric(server, name) for name in counters]
    load = _load(server, model, image, expected, clients, until_s=seconds)
    requests, windows, executions = (_patch_metric(server, name) - count for name, count in zip(counters, before, strict=True))
    return load.figures() | {"patch_requests": requests, "patch_windows": windows, "patch_executions": executions}


def soak(server: Server, image: Any, expected: Any, seconds: float) -> dict[str, Any]:
    """Four clients for minutes, two on each way through the server."""
    with _watching(server) as used, ThreadPoolExecutor(2) as pool:
        models = (MODEL, f"{MODEL}_bls")
        loads = [pool.submit(_load, server, model, image, expected, 2, until_s=seconds) for model in models]
        found = {model: load.result().figures() for model, load in zip(models, loads, strict=True)}
    return found | _growth(used)


def memory(server: Server, image: Any, expected: Any, requests: int) -> dict[str, Any]:
    """Memory of the server and its models over many requests of one client."""
    with _watching(server) as used:
        load = _load(server, MODEL, image, expected, 1, count=requests)
    return load.figures() | _growth(used)


def killed(server: Server, image: Any, expected: Any) -> dict[str, Any]:
    """Seconds from the death of a model's process to a right answer, for a client that asks right away and repeats by itself."""
    (process,) = (process for process, model in server.processes().items() if model == MODEL)
    with RemotePredictor(server.grpc, MODEL, connection=Connection(retries=20)) as remote:
        os.kill(process, signal.SIGKILL)
        start = time.perf_counter()
        labels = remote(image).labels
    took = time.perf_counter() - start
    assert np.array_equal(labels, expected), "labels after the restart differ"
    return {"answer_after_s": took, "restarts": server.restarts}


def _load(server: Server, model: str, image: Any, expected: Any, clients: int, *, until_s: float = np.inf, count: float = np.inf) -> Load:
    """`clients` that ask again as soon as they have an answer, for a time or a number of requests; each asks once before, as a warm-up."""
    load, begin, lock = Load(), threading.Barrier(clients + 1), threading.Lock()
    left, end = [count], [np.inf]

    def ask(remote: RemotePredictor) -> None:
        start = time.perf_counter()
        try:
            labels = remote(image).labels
        except SegrtError as err:
            load.errors.append(str(err))
            return
        load.seconds.append(time.perf_counter() - start)
        load.wrong += not np.array_equal(labels, expected)

    def client() -> None:
        with RemotePredictor(server.grpc, model) as remote:
            try:
                remote(image)
            except SegrtError:
                begin.abort()
                raise
            begin.wait()
            while True:
                with lock:
                    left[0] -= 1
                    if left[0] < 0:
                        return
                ask(remote)
                if time.perf_counter() > end[0]:
                    return

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        with suppress(threading.BrokenBarrierError):  # whose cause the client's result raises
            begin.wait()
        start = time.perf_counter()
        end[0] = start + until_s
        for one in running:
            one.result()
    load.wall_s = time.perf_counter() - start
    return load


@contextmanager
def _watching(server: Server) -> Iterator[list[float]]:
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


def _growth(used: list[float]) -> dict[str, Any]:
    """Memory after a fifth of the time, which is warm-up, and at the end, as medians of a tenth of the samples each."""
    tenth = max(1, len(used) // 10)
    warm, end = (statistics.median(part) if part else float("nan") for part in (used[2 * tenth : 3 * tenth], used[-tenth:]))
    return {"bytes_after_warm_up": warm, "bytes_at_the_end": end, "growth": end / warm - 1, "bytes_peak": max(used, default=float("nan"))}


def _proportional_bytes(process: int) -> float:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def _patch_metric(server: Server, name: str) -> float:
    """A counter of tritonserver, summed over the patch models."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="{MODEL}_patch'))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _crop(data: Any, predictor: Predictor, side: tuple[int, int, int]) -> Any:
    """The middle of the image: what is in the middle of a CT is body."""
    starts = [max(0, (have - want) // 2) for have, want in zip(data.shape[1:], side, strict=True)]
    return np.ascontiguousarray(data[(slice(None), *(slice(start, start + want) for start, want in zip(starts, side, strict=True)))])


def _golden(folder: Path, bundle: Path) -> tuple[Bundle, Any]:
    """S2's model, built for this machine, and its first CT."""
    model = next(path for path in (folder / "model").iterdir() if path.name.endswith("__3d_fullres"))
    made, _ = build_model(model, bundle, device="cpu")
    return made, sorted((folder / "imagesTs").iterdir())[0]


def _toy() -> tuple[Bundle, Any]:
    """The demo's model and noise."""
    rng = np.random.default_rng(0)
    return Bundle.open(ROOT / "examples" / "demo" / "bundle"), (rng.normal(50, 80, (1, 20, 28, 28)).astype(np.float32), (4.0, 4.0, 4.0))


if __name__ == "__main__":
    main()
