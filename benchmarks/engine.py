"""One window of the default-size nnU-Net (31 M parameters, 64x96x96, 269 GFLOP) through every CPU engine, in turn.

    python benchmarks/engine.py [--toy]

Each engine is held against torch fp32 before it is timed. Weights are random, so bf16's label agreement says nothing about trained models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _timer import environment, median_in_turn, write_results

from segrt import Bundle
from segrt.engines import Engine, open_engine
from segrt.engines.openvino import check_precision, open_core
from segrt.errors import BackendError
from segrt.export.engine import build_engine
from segrt.export.onnx import export_onnx, load_member
from segrt.networks import build, count_parameters
from segrt.spec import Channel, Head, Inference, Label, ModelSpec, SpacingTarget, UNetSpec, ZScoreNorm

# at most this relative error against torch fp32, by precision
_LARGEST_ERROR = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}


def has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 here; PyTorch does everywhere, slowly."""
    try:
        check_precision(open_core(), "bf16")
    except BackendError:
        return False
    return True


def make_bundle(folder: Path, patch: tuple[int, int, int], features: tuple[int, ...]) -> Bundle:
    stages = len(features)
    network = UNetSpec(
        family="plain_unet",
        dimensions=3,
        in_channels=1,
        out_channels=16,
        features=features,
        kernels=((3, 3, 3),) * stages,
        strides=((1, 1, 1),) + ((2, 2, 2),) * (stages - 1),
        blocks=(2,) * stages,
        decoder_convs=(2,) * (stages - 1),
    )
    spec = ModelSpec(
        name="random",
        channels=(Channel(name="CT", normalization=ZScoreNorm()),),
        members=("0",),
        network=network,
        labels=tuple(Label(name=f"l{k}", values=(k,)) for k in range(16)),
        head=Head(activation="softmax", values=tuple(range(16))),
        target=SpacingTarget(spacing=(1.0, 1.0, 1.0)),
        inference=Inference(patch=patch),
    )
    import torch

    torch.manual_seed(0)
    bundle = Bundle.create(folder, spec, weights={"0": build(network).state_dict()})
    export_onnx(bundle)
    return bundle


def air_errors(bundle: Bundle, engines: dict[str, Engine], window: np.ndarray) -> dict[str, dict[str, float]]:
    """How every engine, and OpenVINO's own instance normalisation, do where most of a window is one value; float64 torch is the truth."""
    import openvino
    import torch

    airy = np.where(np.arange(window.shape[-1]) < 0.6 * window.shape[-1], np.float32(-2.0), window)
    with torch.inference_mode():
        truth = load_member(bundle, "0").double()(torch.from_numpy(airy).double()).numpy()
    core = openvino.Core()
    model = core.read_model(str(bundle.onnx_path("0")))
    model.reshape(list(airy.shape))
    plain = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answers = {name: engine(airy) for name, engine in engines.items()} | {"OpenVINO's own MVN, fp32": plain([airy])[0]}
    return {
        name: {
            "relative_error": float(np.linalg.norm(logits - truth) / np.linalg.norm(truth)),
            "label_agreement": float((logits.argmax(1) == truth.argmax(1)).mean()),
        }
        for name, logits in answers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    patch, features = ((16, 16, 16), (4, 8)) if args.toy else ((64, 96, 96), (32, 64, 128, 256, 320, 320))
    with tempfile.TemporaryDirectory() as tmp:
        bundle = make_bundle(Path(tmp) / "bundle", patch, features)
        window = np.random.default_rng(0).normal(size=(1, 1, *patch)).astype(np.float32)
        wanted = [
            ("pytorch", "fp32"),
            ("pytorch", "bf16"),
            ("onnxruntime", "fp32"),
            ("openvino", "fp32"),
            ("openvino", "bf16"),
            ("openvino", "int8"),
        ]
        if not has_bf16():
            wanted.remove(("openvino", "bf16"))
        # random weights: engines are timed, their labels say nothing, so they are kept whatever verification says
        for precision in dict.fromkeys(precision for backend, precision in wanted if backend == "openvino"):
            build_engine(bundle, precision=precision, force=True)
        engines = {f"{b} {p}": open_engine(bundle, "0", backend=b, precision=p) for b, p in wanted}
        reference = engines["pytorch fp32"](window)
        checks: dict[str, Any] = {}
        for name, engine in engines.items():
            error = float(np.linalg.norm(engine(window) - reference) / np.linalg.norm(reference))
            assert error <= _LARGEST_ERROR[name.split()[1]], (name, error)
            checks[name] = error
        air = air_errors(bundle, engines, window)
        seconds = median_in_turn({name: (lambda e=engine: e(window)) for name, engine in engines.items()}, runs=2 if args.toy else 7)
        speedup = {name: seconds["pytorch fp32"] / s for name, s in seconds.items()}
        results = {
            "parameters": count_parameters(build(bundle.spec.network)),
            "patch": patch,
            "seconds": seconds,
            "speedup_over_torch_fp32": speedup,
            "relative_error": checks,
            "window_with_60_percent_air": air,
        }
        print(json.dumps(results, indent=1))
        write_results("engine", {**environment(), **results}, toy=args.toy)


if __name__ == "__main__":
    main()
