"""Everything that only a GPU can tell, in one command and under nine minutes: kernels, engines, the whole case, repeats, memory checks.

    PYTHONUNBUFFERED=1 python benchmarks/gpu.py           # results/gpu_<device>.json, a short table last
    python benchmarks/gpu.py --toy                        # the same lines on the simulated device at tiny sizes; nothing is written
    python benchmarks/gpu.py --only kernels,case          # the other stages' results stay as they are
    python benchmarks/gpu.py --only plans --work FOLDER   # TensorRT takes minutes to build: again until it says all of them, then the rest
    python benchmarks/gpu.py --second-python FILE         # another Python, for engines that the first one cannot import
    python benchmarks/gpu.py --only variants --jobs blend # which form of each CUDA C kernel wins; in no other run

Needs torch for CUDA, CuPy, Numba with numba-cuda, scipy and scikit-image; onnxruntime-gpu, TensorRT and compute-sanitizer where they are
installed. Every stage runs in a process of its own: what a bad kernel does to its CUDA context ends with it, the job is recorded as failed
and the next one starts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from _gpu_machine import identity
from _gpu_report import summary
from _gpu_setting import Setting, Skip
from _timer import RESULTS, environment, write_results

from segrt.device import compute_on, open_stream
from segrt.engines import resolve_device
from segrt.kernels._cuda.native import use_cuda_c


class Stage(NamedTuple):
    """Jobs as module:name, and the seconds that they may take beside other stages; alone they may take all."""

    jobs: str
    seconds: float
    cuda_c: bool | None = None  # None: what SEGRT_CUDA_C says, as with the commands


STAGES = {
    "machine": Stage("_gpu_machine:JOBS", 45),
    "plans": Stage("_gpu_engines:PLANS", 120),
    "kernels": Stage("_gpu_kernels:JOBS", 130, cuda_c=False),
    "kernels_cuda_c": Stage("_gpu_kernels:IN_CUDA_C", 90, cuda_c=True),
    "case": Stage("_gpu_case:JOBS", 250),
    "engines": Stage("_gpu_engines:JOBS", 130),
    "repeats": Stage("_gpu_case:REPEATS", 45),
    "same": Stage("_gpu_same:JOBS", 90),
    "sanitizer": Stage("_gpu_checks:CHECKS", 120, cuda_c=False),
    "sanitizer_cuda_c": Stage("_gpu_checks:IN_CUDA_C", 60, cuda_c=True),
    "variants": Stage("_gpu_variants:JOBS", 240, cuda_c=True),
}
TOTAL_S = 525
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99", "--print-limit", "5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the simulated device, nothing written")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default=",".join(stage for stage in STAGES if stage != "variants"), help="comma list of stages")
    parser.add_argument("--jobs", default="", help="only those with this in their name; a stage's other results are dropped")
    parser.add_argument("--second-python", help="interpreter that runs the jobs this one had to skip")
    parser.add_argument("--work", type=Path, help="folder for models, plans and cases, kept; a temporary one by default")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--without", default="[]", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "simulated" if args.toy else resolve_device(args.device)
    if args.worker:
        work(args.worker, Setting(device, args.toy, args.work), args.jobs, set(json.loads(args.without)))
        return
    unknown = set(args.only.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    started = time.monotonic()
    name = identity(Setting(device, args.toy, Path()))["name"]
    results: dict[str, Any] = {}
    with kept_or_temporary(args.work) as folder:
        stages = args.only.split(",")
        for stage in stages:
            left = TOTAL_S - (time.monotonic() - started)
            # a toy run says whether jobs work, however busy the machine is
            limit = math.inf if args.toy else left if len(stages) == 1 else min(STAGES[stage].seconds, left)
            begun = time.monotonic()
            results[stage] = run_stage(stage, args, folder, limit)
            results[stage]["stage_seconds"] = round(time.monotonic() - begun, 1)
            print(f"{stage}: {results[stage]['stage_seconds']} s", flush=True)
            keep(results, name, toy=args.toy)
    print(summary(results))
    broken = [f"{stage}, {job}" for stage, jobs in results.items() for job, found in jobs.items() if is_broken(job, found)]
    if broken:
        sys.exit(f"failed or not finished: {'; '.join(broken)}")


def is_broken(job: str, found: Any) -> bool:
    """Whether a job, or the process that jobs ran in, failed."""
    return job == "incomplete" or (isinstance(found, dict) and "failed" in found)


def uses_cuda_c(stage: str) -> bool:
    """Whether a stage runs the kernels that are written in CUDA C too, or their thread bodies."""
    asked = STAGES[stage].cuda_c
    return os.environ.get("SEGRT_CUDA_C") == "1" if asked is None else asked


def keep(results: dict[str, Any], device: str, *, toy: bool) -> None:
    """Write what there is; after every stage, so that a run that is cut short leaves something."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    written = RESULTS / f"gpu_{slug}.json"
    before = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    here = environment()
    made = {stage: {"commit": here["commit"], "versions": here["versions"], "cuda_c": uses_cuda_c(stage)} for stage in results}
    write_results(f"gpu_{slug}", merged(before, results, made) | {"device": device, "host": here["machine"]}, toy=toy)


def merged(before: dict[str, Any], results: dict[str, Any], made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The stages of this run in place of those written before, each with the commit, the versions and the kernels it was made with."""
    earlier = {name: before[name] for name in ("versions", "commit") if name in before}
    kept = {stage: earlier for stage in STAGES if stage in before} | before.get("made", {})
    stages = {stage: found for stage in STAGES if (found := results.get(stage, before.get(stage))) is not None}
    newest = next(({name: one[name] for name in ("versions", "commit")} for one in made.values()), {})
    return {**before, **newest, "made": kept | made, **stages, "summary": summary(stages).splitlines()}


# ------------------------------------------------------------------ the process that starts the others
@contextmanager
def kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    """Yield a folder to work in."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="segrt-gpu-") as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.jsonl"):
        log.unlink()  # of an earlier run
    yield folder.resolve()


def run_stage(stage: str, args: argparse.Namespace, folder: Path, limit: float) -> dict[str, Any]:
    """Run a stage's jobs, those that this interpreter had to skip in the second one."""
    deadline = time.monotonic() + limit
    found = run_jobs(stage, args, folder, deadline, sys.executable)
    log = folder / f"{stage}.jsonl"
    done = {job: result for job, result in read_log(log).items() if "skipped" not in result}
    if not args.second_python or under_sanitizer(stage) or done.keys() == read_log(log).keys():
        return found
    log.write_text("".join(json.dumps({"job": job, "result": result}) + "\n" for job, result in done.items()))
    return found | run_jobs(stage, args, folder, deadline, args.second_python)


def run_jobs(stage: str, args: argparse.Namespace, folder: Path, deadline: float, python: str) -> dict[str, Any]:
    """Run the jobs not yet in the stage's log; each that ends its process is recorded as failed, and the rest goes on in a new one."""
    found = read_log(folder / f"{stage}.jsonl")
    limit = deadline - time.monotonic()
    command = [
        python,
        str(Path(__file__).resolve()),
        "--worker",
        stage,
        "--work",
        str(folder),
        "--device",
        args.device,
        "--jobs",
        args.jobs,
    ]
    command += ["--toy"] if args.toy else []
    if under_sanitizer(stage):
        if shutil.which(SANITIZER[0]) is None and not args.toy:
            return {"skipped": f"{SANITIZER[0]} is not on the PATH"}
        command = command if args.toy else [*SANITIZER, *command]
    while True:
        # arrays of PyTorch in memory of their own, where the sanitizer sees a step beside one
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if under_sanitizer(stage) else {}
        left = deadline - time.monotonic()
        code, errors = run_worker([*command, "--without", json.dumps(list(found))], left, folder / "errors", os.environ | extra)
        found = read_log(folder / f"{stage}.jsonl") | {k: v for k, v in found.items() if "failed" in v}  # which the log does not undo
        running = next((name for name, result in found.items() if result == {"state": "started"}), None)
        if code == 0:
            return found
        late = code is None
        reason = f"the {limit:.0f} s of the stage were over" if late else f"exit code {code}: {errors[-1500:]}"
        if late or running is None:
            # not in a job: the process did not start, or what it ran on complained at its end
            return found | {"incomplete": reason} | ({running: {"failed": reason}} if running else {})
        found[running] = {"failed": reason}


def under_sanitizer(stage: str) -> bool:
    return stage.startswith("sanitizer")


def run_worker(command: list[str], limit: float, errors: Path, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """(exit code, what it wrote to stderr); no exit code when it had to be stopped."""
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)
        try:
            code: int | None = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: compilers it started end with it
            process.wait()
            code = None
    return code, errors.read_text(errors="replace")


def read_log(path: Path) -> dict[str, Any]:
    """The last state of every job that a worker wrote down."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        entry = json.loads(line)
        found[entry.pop("job")] = entry.get("result", entry)
    return found


# ------------------------------------------------------------------ a process that measures
def work(stage: str, setting: Setting, named: str, without: set[str]) -> None:
    """Run the jobs of a stage in the stream that everything is timed in, and write each result down at once."""
    use_cuda_c(uses_cuda_c(stage))
    module, name = STAGES[stage].jobs.split(":")
    jobs = getattr(importlib.import_module(module), name)
    with (setting.work / f"{stage}.jsonl").open("a", buffering=1) as log, compute_on(setting.device, open_stream(setting.device)):
        for job, function in jobs.items():
            if job in without or named not in job:
                continue
            log.write(json.dumps({"job": job, "state": "started"}) + "\n")
            try:
                result = function(setting)
            except Skip as reason:
                result = {"skipped": str(reason)}
            log.write(json.dumps({"job": job, "result": result}) + "\n")


if __name__ == "__main__":
    main()
