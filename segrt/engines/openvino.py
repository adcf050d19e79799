"""OpenVINO on the CPU: the default engine of machines without an NVIDIA GPU."""

from __future__ import annotations

import logging
import platform
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import FloatArray, require
from ..bundle import Bundle
from ..errors import BackendError
from ..files import sha256
from ..spec import ShapeTarget
from . import read_build
from .compiled import check_compiled, check_window
from .openvino_norm import stabilize

logger = logging.getLogger(__name__)

_PRECISIONS = ("fp32", "bf16", "fp16", "int8")


class OpenVINOEngine:
    """A compiled model with a fixed batch on the CPU plugin."""

    def __init__(self, compiled: Any, *, precision: str, dimensions: int, held_bytes: int = 0) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        # a request serves one call at a time and refuses a second; what it returned lies in its own memory until then
        self._lock = threading.Lock()
        self._dimensions = dimensions
        self.held_bytes = held_bytes
        self.device = "cpu"
        self.batch = int(compiled.input(0).shape[0])
        self.window = tuple(int(n) for n in compiled.input(0).shape)[1:]  # channels first
        self.name = f"openvino, cpu, {precision}"

    def __call__(self, patches: FloatArray) -> FloatArray:
        """Run the network; see `Engine`."""
        if self._dimensions == 2:
            return self._run(patches[:, :, 0])[:, :, None]
        return self._run(patches)

    def _run(self, patches: FloatArray) -> FloatArray:
        out = np.empty((len(patches), *self._compiled.output(0).shape[1:]), np.float32)
        for first in range(0, len(patches), self.batch):
            part = patches[first : first + self.batch]
            full = (
                part if len(part) == self.batch else np.concatenate([part, np.zeros((self.batch - len(part), *part.shape[1:]), np.float32)])
            )
            with self._lock:
                result = self._request.infer([np.ascontiguousarray(full)], share_inputs=True, share_outputs=True)
                out[first : first + len(part)] = result[0][: len(part)]
        return out

    def close(self) -> None:
        """Release the compiled model."""
        del self._request, self._compiled


@cache
def open_core() -> Any:
    """OpenVINO's core, one for the process and never given back.

    Its CPU plugin gives the thread a stack for signals, and at its end puts back the one it found, which may be an earlier plugin's that is
    gone: the next signal that Python handles (Ctrl-C, a child that ended) then killed the process.
    """
    return require("openvino", extra="export").Core()


def open_member(bundle: Bundle, member: str, precision: str, threads: int) -> OpenVINOEngine:
    """Open the compiled blob made for this machine; fp32, which needs no verdict, is compiled where there is none."""
    core = open_core()
    check_precision(core, precision)
    blob = bundle.engine_path(engine_key(precision)) / f"{member}.blob"
    build = read_build(blob.with_name("build.json"))
    if blob.is_file() and build.get("cpu") == cpu_name():
        held = check_compiled(bundle, member, blob, build).get("held_bytes", 0)
        engine = open_blob(blob, precision=precision, dimensions=bundle.spec.dimensions, threads=threads, held_bytes=held)
        check_window(bundle, blob, engine.window, build)
        return engine
    if precision != "fp32":
        # what loses digits is not trusted before it was held against the fp32 network
        raise BackendError(
            f"{bundle.path} has no verified {precision} engine for this machine; make one with: {bundle.build_command} --{precision}"
        )
    logger.warning("%s has no compiled engine for this machine: compiling now; keep and verify one with segrt-build", bundle.path)
    compiled = compile_member(core, bundle, member, precision, threads)
    return OpenVINOEngine(compiled, precision=precision, dimensions=bundle.spec.dimensions)


def open_blob(blob: Path, *, precision: str, dimensions: int, threads: int = 0, held_bytes: int = 0) -> OpenVINOEngine:
    """Open a compiled blob as it is; `open_member` checks first that it belongs to its bundle and machine."""
    core = open_core()
    compiled = core.import_model(blob.read_bytes(), "CPU", _settings(core, precision, threads))
    return OpenVINOEngine(compiled, precision=precision, dimensions=dimensions, held_bytes=held_bytes)


def write_member(bundle: Bundle, member: str, precision: str, folder: Path, *, model: Path | None = None) -> dict[str, Any]:
    """Compile a member (or, for INT8, its quantised `model`) into `folder`/<member>.blob; its record for build.json comes out."""
    core = open_core()
    check_precision(core, precision)
    blob = folder / f"{member}.blob"
    blob.write_bytes(compile_member(core, bundle, member, precision, 0, model=model).export_model().getbuffer())
    return {"onnx_sha256": sha256(bundle.onnx_path(member)), "sha256": sha256(blob)}


def compile_member(core: Any, bundle: Bundle, member: str, precision: str, threads: int, *, model: Path | None = None) -> Any:
    """Compile a member's ONNX file, or the quantised `model` that INT8 needs, with a fixed batch and patch."""
    network = core.read_model(str(model or bundle.onnx_path(member)))
    if precision == "fp16":
        network = _with_half_weights(core, network)
    patch = bundle.spec.inference.patch
    spatial = patch if bundle.spec.dimensions == 3 else patch[1:]
    network.reshape([batch_size(bundle), bundle.spec.in_channels, *spatial])
    # after quantisation: NNCF would put the sums themselves into 8 bits
    stabilize(network)
    return core.compile_model(network, "CPU", _settings(core, precision, threads))


def batch_size(bundle: Bundle) -> int:
    """Windows per call: one in 3-D, or where an image is one; else enough small slices to keep the cores busy, as one of 256 x 256 does.

    A call with fewer takes as long as a full one: a single picture in a batch of four took four times as long, and four of them no less
    than one after the other.
    """
    spec = bundle.spec
    single = isinstance(spec.target, ShapeTarget) and spec.target.shape == spec.inference.patch
    voxels = int(np.prod(spec.inference.patch))
    return 1 if spec.dimensions == 3 or single else max(1, min(8, 2**16 // voxels))


def engine_key(precision: str) -> str:
    """Folder name under engines/: backend, version, device and precision."""
    version = require("openvino", extra="export").__version__.split("-")[0]
    return f"openvino-{version}-cpu-{precision}"


def check_precision(core: Any, precision: str) -> None:
    """Raise a BackendError when this CPU cannot compute in `precision`."""
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision not in _PRECISIONS:
        raise BackendError(f"precision {precision!r} is not available with OpenVINO on a CPU; expected one of {', '.join(_PRECISIONS)}")
    if precision == "bf16" and "BF16" not in able:
        raise BackendError("this CPU has no bf16 arithmetic (AVX-512 BF16 or AMX); use precision fp32")


def _with_half_weights(core: Any, model: Any) -> Any:
    """The same model with its weights rounded to float16 and stored so."""
    openvino = require("openvino", extra="export")
    with tempfile.TemporaryDirectory(prefix="segrt-") as folder:
        path = Path(folder) / "half.xml"
        openvino.save_model(model, str(path), compress_to_fp16=True)
        return core.read_model(str(path), config={"ENABLE_MMAP": False})


def _settings(core: Any, precision: str, threads: int) -> dict[str, Any]:
    # a CPU without fp16 arithmetic keeps 16-bit weights and computes in fp32; left to itself the plugin would fall back to bf16
    has_half = "FP16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16" if has_half else "f32", "int8": "f32"}[precision]
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


@cache
def cpu_name() -> str:
    """What a blob is compiled for: the CPU's model and family, and the machine type."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    wide = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile") if f in flags]
    model = " ".join(fields.get(k, "") for k in ("vendor_id", "cpu family", "model", "stepping")).strip()
    return f"{platform.machine()} {model or platform.processor()} {' '.join(wide)}".strip()
