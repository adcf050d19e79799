"""BUILD: compile a bundle's ONNX files for this machine, measure and verify the result, and keep it in the bundle."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import __version__
from ..arrays import FloatArray
from ..bundle import Bundle
from ..device import use_device
from ..engines import Backend, Engine, Precision, open_engine, resolve_device
from ..engines.batches import gpu_batch
from ..engines.openvino import cpu_name, engine_key, open_blob, write_member
from ..engines.trt import open_plan, this_machine
from ..engines.trt_plan import engine_key as plan_key
from ..engines.trt_plan import make_record
from ..errors import BuildError, InputError
from ..files import sha256, staged_folder, write_atomic
from .calibrate import calibration_windows, quantize
from .tensorrt import TensorRTOptions, build_plan, member_model
from .typed import write_typed
from .verify import can_run_reference, checked_windows, verify

logger = logging.getLogger(__name__)


def build_engine(
    bundle: Bundle,
    *,
    backend: Backend = "auto",
    device: str = "auto",
    precision: Precision | None = None,
    sample: str | Path | None = None,
    calibration: str | Path | None = None,
    force: bool = False,
    tensorrt: TensorRTOptions | None = None,
) -> dict[str, Any]:
    """Compile, measure and verify the engine of every member, the first stage of a cascade and the partner of a pair included.

    Parameters
    ----------
    backend : "openvino" keeps a compiled blob, "tensorrt" a plan, "onnxruntime" in fp16 a typed ONNX file; else nothing is kept and the
        engine is verified only.
        "auto" takes OpenVINO on the CPU and, where it is installed, TensorRT on a GPU
    device : "cpu", "cuda", "cuda:1", or "auto": the first GPU when there is one
    precision : fp32 on the CPU and fp16 on a GPU by default
    sample : image whose windows the engine is checked on; a phantom by default
    calibration : folder of images whose windows set INT8's ranges; a phantom by default
    force : keep an engine that falls short, marked as such
    tensorrt : batch, workspace, compatibility and timing cache of a plan

    Returns
    -------
    dict
        the report, also written to reports/verify-<key>.json

    Raises
    ------
    BuildError
        When an engine falls short of the reference and `force` is not set.
    BackendError
        When the backend cannot run here, or not in this precision.
    InputError
        When options of TensorRT are given for another backend.
    """
    device, backend = resolve_target(device, backend, tensorrt)
    chosen: Precision = precision or ("fp16" if device.startswith("cuda") and backend != "openvino" else "fp32")
    options: dict[str, Any] = {"calibration": calibration, "force": force, "tensorrt": tensorrt}
    for other in (bundle.previous, bundle.partner):
        if other is not None and bundle.whole is None:
            build_engine(other, backend=backend, device=device, precision=chosen, **options)
    request = _Request(bundle, chosen, sample, calibration, force)
    if backend == "openvino":
        return _build_openvino(request)
    if backend == "tensorrt":
        return _build_tensorrt(request, device, tensorrt or TensorRTOptions())
    checks = {}
    for member in bundle.spec.members:
        if chosen == "fp16" and device != "cpu" and backend != "pytorch":
            write_typed(bundle, member)
        with closing(open_engine(bundle, member, backend=backend, precision=chosen, device=device)) as engine:
            checks[member] = verify(engine, bundle, member, chosen, windows=request.windows)
    return _judge(request, f"{backend}-{device.split(':')[0]}-{chosen}", checks)


def resolve_target(device: str, backend: Backend, tensorrt: TensorRTOptions | None) -> tuple[str, Backend]:
    """Make device and backend of a build concrete, and refuse what cannot go together; see `build_engine`."""
    # whoever names one of these means its device: on TensorRT's they are told when it is not there
    device = resolve_device({"tensorrt": "cuda", "openvino": "cpu"}.get(backend, device) if device == "auto" else device)
    backend = _resolve_backend(backend, device)
    if backend != "tensorrt" and tensorrt not in (None, TensorRTOptions()):
        raise InputError(
            f"batch, workspace, compatibility and timing cache are TensorRT's, and this engine is built by {backend}; leave these options "
            "out or take backend tensorrt"
        )
    return device, backend


def _resolve_backend(backend: Backend, device: str) -> Backend:
    if backend != "auto":
        return backend
    if not device.startswith("cuda"):
        return "openvino"
    if importlib.util.find_spec("tensorrt") is not None:
        return "tensorrt"
    logger.warning("TensorRT is not installed: nothing is compiled for %s; it is the fastest there: pip install 'segrt[trt]'", device)
    return "auto"


@dataclass(frozen=True)
class _Request:
    """What is to be built, and what it is held against."""

    bundle: Bundle
    precision: Precision
    sample: str | Path | None
    calibration: str | Path | None
    force: bool

    @cached_property
    def windows(self) -> FloatArray | None:
        """Windows to verify on; None where the stored reference is all there is."""
        return checked_windows(self.bundle, self.sample) if can_run_reference(self.bundle) else None

    @cached_property
    def ranges(self) -> FloatArray | None:
        """Windows that set INT8's ranges."""
        return calibration_windows(self.bundle, self.calibration) if self.precision == "int8" else None


def _build_openvino(request: _Request) -> dict[str, Any]:
    bundle, precision, key = request.bundle, request.precision, engine_key(request.precision)

    def write(member: str, folder: Path) -> dict[str, Any]:
        with TemporaryDirectory(prefix="segrt-") as temporary:
            ranges = request.ranges
            model = None if ranges is None else quantize(bundle, member, ranges, Path(temporary) / f"{member}.xml")
            return write_member(bundle, member, precision, folder, model=model)

    def opened(member: str, folder: Path) -> Engine:
        return open_blob(folder / f"{member}.blob", precision=precision, dimensions=bundle.spec.dimensions)

    def described(records: dict[str, dict[str, Any]], verified: bool) -> dict[str, Any]:
        values = {"key": bundle.keyed(key), "precision": precision, "level": bundle.level, "cpu": cpu_name()}
        return {**values, "verified": verified, "members": records}

    report, records = _compile(request, key, write, opened, described)
    for member, record in records.items():
        record["held_bytes"] = _measure(bundle, member, precision)
    _write_build(bundle.engine_path(key), described(records, not report["forced"]))
    return report


def _build_tensorrt(request: _Request, device: str, tensorrt: TensorRTOptions) -> dict[str, Any]:
    bundle, precision, machine = request.bundle, request.precision, this_machine(device)
    cache = tensorrt.timing_cache or bundle.path / "engines" / "timing.cache"
    options = replace(tensorrt, batch=tensorrt.batch or gpu_batch(bundle.spec.inference.patch), timing_cache=cache)
    key = plan_key(machine, precision, options.batch, compatible=options.compatible)

    def write(member: str, folder: Path) -> dict[str, Any]:
        plan, model = folder / f"{member}.plan", member_model(bundle, member, precision, request.ranges)
        logger.info("TensorRT measures kernels for member %s on %s, which takes minutes", member, machine.gpu)
        with use_device(device):
            plan.write_bytes(build_plan(model, precision, options))
        return {"onnx_sha256": sha256(bundle.onnx_path(member)), "sha256": sha256(plan)}

    def opened(member: str, folder: Path) -> Engine:
        try:
            return open_plan(folder / f"{member}.plan", device=device, precision=precision, compatible=options.compatible)
        except MemoryError as err:
            raise BuildError(f"the memory of {device} does not hold the plan of member {member!r}: {err}; free some of it") from err

    def described(records: dict[str, dict[str, Any]], verified: bool) -> dict[str, Any]:
        record = make_record(machine, precision, options.batch, records, compatible=options.compatible, verified=verified)
        return {**record, "key": bundle.keyed(key), "level": bundle.level}

    return _compile(request, key, write, opened, described)[0]


def _compile(
    request: _Request,
    key: str,
    write: Callable[[str, Path], dict[str, Any]],
    opened: Callable[[str, Path], Engine],
    described: Callable[[dict[str, dict[str, Any]], bool], dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Write every member's engine, open and verify it; give the report and the members' records."""
    bundle, records, checks = request.bundle, {}, {}
    # an engine takes its place only after it was verified: a build that is stopped or refused leaves none behind
    with staged_folder(bundle.engine_path(key)) as folder:
        for member in bundle.spec.members:
            records[member] = write(member, folder)
            with closing(opened(member, folder)) as engine:
                checks[member] = verify(engine, bundle, member, request.precision, windows=request.windows)
        report = _judge(request, key, checks)
        _write_build(folder, described(records, not report["forced"]))
    return report, records


def _judge(request: _Request, key: str, checks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Keep the report; raise a BuildError when a member falls short and nothing forces it."""
    short = {member: check["reason"] for member, check in checks.items() if not check["passed"]}
    seen_on = Path(request.sample).name if request.sample else "phantom"
    key = request.bundle.keyed(key)
    report = {"key": key, "segrt": __version__, "sample": seen_on, "forced": bool(short), "members": checks}
    request.bundle.write_report(f"verify-{key}.json", report)
    if short and not request.force:
        member, reason = next(iter(short.items()))
        raise BuildError(
            f"the {key} engine of member {member!r} is refused: {reason}; "
            "use another precision, check on an image of your own with --sample, or keep it marked as unverified with --force"
        )
    return report


def _write_build(folder: Path, values: dict[str, Any]) -> None:
    write_atomic(folder / "build.json", json.dumps({**values, "segrt": __version__}, indent=1) + "\n")


_MEASURE = """
import sys, numpy as np
import segrt.predictor
from segrt.bundle import Bundle
from segrt.engines import open_engine
from segrt.memory import peak_bytes, resident_bytes
bundle = Bundle.open(sys.argv[1])
bundle = bundle.at_level(sys.argv[4]) if sys.argv[4:] else bundle
before = resident_bytes()
engine = open_engine(bundle, sys.argv[2], backend="openvino", precision=sys.argv[3])
engine(np.zeros((engine.batch, bundle.spec.in_channels, *bundle.spec.inference.patch), np.float32))
print(peak_bytes() - before)
"""


def _measure(bundle: Bundle, member: str, precision: str) -> int:
    """Peak memory an engine takes to open and run once, in a process of its own; 0 when that fails."""
    command: Sequence[str] = (
        sys.executable,
        "-c",
        _MEASURE,
        str(bundle.path),
        member,
        precision,
        *([bundle.level] if bundle.level else []),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        logger.warning("memory of member %s could not be measured: %s", member, done.stderr.strip()[-300:])
        return 0
    return int(done.stdout.split()[-1])
