"""Runs in a process of its own, with the shim's libraries in its search path: parses and builds ONNX files, and prints JSON lines.

python trt_jobs.py JOBS.json, a list of {"onnx": file, "precision": ..., "batch": n, ...}, or of {"bundle": folder, ...} with
"windows": file.npy for int8. Every job answers with "bytes" and "seconds" of its plan and the layers TensorRT saw, or with "error".
{"names": [...]} is answered with those that TensorRT's bindings lack, {"configured": options} with what a builder's configuration holds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_bindings

sys.modules["tensorrt"] = tensorrt_bindings  # the package of that name imports NVIDIA's own libraries first

from segrt.bundle import Bundle  # noqa: E402
from segrt.engines import trt_api  # noqa: E402
from segrt.engines.trt import deserialize  # noqa: E402
from segrt.errors import SegrtError  # noqa: E402
from segrt.export.tensorrt import TensorRTOptions, _configure, build_plan, member_model, parse  # noqa: E402


def model_of(job: dict[str, Any]) -> bytes:
    if "onnx" in job:
        return Path(job["onnx"]).read_bytes()
    windows = np.load(job["windows"]) if "windows" in job else None
    return member_model(Bundle.open(job["bundle"]), "0", job["precision"], windows)


def layers(model: bytes) -> list[tuple[str, list[str]]]:
    """(kind, floating types it reads and writes) of every layer TensorRT made of a model."""
    trt = trt_api.load()
    log = trt_api.make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(trt_api.network_flags(trt))
    parse(trt, network, log, model)
    found = []
    for layer in (network.get_layer(n) for n in range(network.num_layers)):
        # the third input of a quantisation is its zero point, which the parser makes of its own
        tensors = [layer.get_input(i) for i in range(min(2, layer.num_inputs))] + [layer.get_output(i) for i in range(layer.num_outputs)]
        kinds = {t.dtype.name for t in tensors if t is not None}
        found.append((layer.type.name, sorted(kinds & {"FLOAT", "HALF", "BF16", "INT8"})))
    return found


def missing(names: list[str]) -> list[str]:
    """Those of Class.attribute that the bindings do not have."""
    return [name for name in names if not hasattr(getattr(trt_api.load(), name.split(".")[0]), name.split(".")[1])]


def configured(options: dict[str, Any]) -> dict[str, Any]:
    """What TensorRT's own configuration holds of options."""
    trt = trt_api.load()
    log = trt_api.make_logger(trt)
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    _configure(trt, config, TensorRTOptions(**options))
    return {
        "flags": [flag for flag in ("TF32", "VERSION_COMPATIBLE") if config.get_flag(getattr(trt.BuilderFlag, flag))],
        "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    if "names" in job:
        return {"missing": missing(job["names"])}
    if "configured" in job:
        return configured(job["configured"])
    cache = Path(job["cache"]) if "cache" in job else None
    options = TensorRTOptions(job.get("batch", 8), job.get("workspace", 0), job.get("compatible", False), cache)
    try:
        model = model_of(job)
        start = time.perf_counter()
        plan = build_plan(model, job["precision"], options)
        answer = {"seconds": time.perf_counter() - start, "bytes": len(plan), "onnx_bytes": len(model), "layers": layers(model)}
        if job.get("open"):
            deserialize(trt_api.load(), trt_api.make_logger(trt_api.load()), plan, False)
    except SegrtError as err:
        return {"error": f"{type(err).__name__}: {err}"}
    return answer


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(job)), flush=True)
