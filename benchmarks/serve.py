"""A model on a Triton server under load: what serving adds to the Predictor, several clients at once, a long run, memory, a killed model.

    python benchmarks/serve.py [--golden FOLDER] [--soak 300] [--requests 1000] [--overhead] [--toy]

The whole CT of golden set S2 is segmented in this process and by the server in turn; crops of it make the load. Every answer is compared
with the Predictor's, byte by byte; what must hold is judged under `criteria`. About a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _serving import CORRECT, growth, judge, put_under_load, watching
from _timer import RESULTS, environment, write_results

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden", help="folder of the golden sets")
    parser.add_argument("--soak", type=float, default=300, help="seconds")
    parser.add_argument("--turns", type=int, default=8, help="of the whole image, and each way of asking for it")
    parser.add_argument("--seconds", type=float, default=30, help="for each number of clients")
    parser.add_argument("--requests", type=int, default=1000, help="over which memory is watched")
    parser.add_argument("--overhead", action="store_true", help="only what serving adds, into the result that is there")
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
            results = again(server, predictor, image, size) if options.overhead else run(server, predictor, image, size)
    results["criteria"] = judge(results)
    print(results)
    write_results("serve", environment() | results, toy=options.toy)
    for criterion in CORRECT:
        assert results["criteria"][criterion], f"not so: {criterion}"


def again(server: Server, predictor: Predictor, image: Any, size: Size) -> dict[str, Any]:
    """The result that is there with the whole image timed anew; where and of which commit stands beside it."""
    results: dict[str, Any] = json.loads((RESULTS / "serve.json").read_text(encoding="utf-8"))
    return results | {"whole_image": overhead(server, predictor, image, size.turns) | environment()}


def run(server: Server, predictor: Predictor, image: Any, size: Size) -> dict[str, Any]:
    volume = read_volume(image, [channel.name for channel in predictor.spec.channels])
    crop = _crop(volume.data, size.crop)
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
    one_window: Any = (_crop(crop, tuple(side // 2 for side in size.crop)), volume.grid.spacing)  # many requests, little work
    results["memory"] = memory(server, one_window, predictor(one_window).labels, size.requests)
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
    names = list(calls)
    for turn in range(turns):
        first = turn % len(names)
        # in another order each time: threads of this process still spin while the next one is asked
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(lambda call=calls[name]: call(image)))  # type: ignore[misc]
    for remote in opened.values():
        remote.close()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    shares = {name: median[name] / median["in_process"] - 1 for name in opened}
    return {"median_s": median, "all_s": seconds, "overhead": shares}


def level(server: Server, model: str, image: Any, expected: Any, clients: int, seconds: float) -> dict[str, Any]:
    """Figures of `clients` at once for some seconds, and how many windows' requests the patch model ran in how many executions."""
    counters = ("nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count")
    before = [_patch_metric(server, name) for name in counters]
    load = put_under_load(server, model, image, expected, clients, until_s=seconds)
    requests, windows, executions = (_patch_metric(server, name) - count for name, count in zip(counters, before, strict=True))
    return load.figures() | {"patch_requests": requests, "patch_windows": windows, "patch_executions": executions}


def soak(server: Server, image: Any, expected: Any, seconds: float) -> dict[str, Any]:
    """Four clients for minutes, two on each way through the server."""
    with watching(server) as used, ThreadPoolExecutor(2) as pool:
        models = (MODEL, f"{MODEL}_bls")
        loads = [pool.submit(put_under_load, server, model, image, expected, 2, until_s=seconds) for model in models]
        found = {model: load.result().figures() for model, load in zip(models, loads, strict=True)}
    return found | growth(used)


def memory(server: Server, image: Any, expected: Any, requests: int) -> dict[str, Any]:
    """Memory of the server and its models over many requests of one client."""
    with watching(server) as used:
        load = put_under_load(server, MODEL, image, expected, 1, count=requests)
    return load.figures() | growth(used)


def killed(server: Server, image: Any, expected: Any) -> dict[str, Any]:
    """Seconds from the death of a model's process to a right answer, for a client that asks right away and repeats by itself."""
    (process,) = (process for process, model in server.processes().items() if model == MODEL)
    with RemotePredictor(server.grpc, MODEL, connection=Connection(retries=20)) as remote:
        os.kill(process, signal.SIGKILL)
        start = time.perf_counter()
        try:
            labels = remote(image).labels
        except SegrtError as err:
            return {"right_answer": False, "error": str(err), "restarts": server.restarts}
    took = time.perf_counter() - start
    return {"right_answer": bool(np.array_equal(labels, expected)), "answer_after_s": took, "restarts": server.restarts}


def _patch_metric(server: Server, name: str) -> float:
    """A counter of tritonserver, summed over the patch models."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="{MODEL}_patch'))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _crop(data: Any, side: tuple[int, ...]) -> Any:
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
