"""Writing a network as ONNX: segrt against torch.onnx.export, for the three families of networks at their published sizes.

    python benchmarks/export.py [--toy]

Both start from the weights in a bundle and end with the file's bytes. ONNX Runtime has to find the same logits in both files.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parent))

from _timer import environment, median_in_turn, write_results

from segrt.bundle import Bundle
from segrt.export.onnx import OPSET, export_onnx, load_member
from segrt.networks import build, count_parameters
from segrt.spec import Channel, Head, Inference, Label, ModelSpec, NetworkSpec, SpacingTarget, UNetPPSpec, UNetSpec, VNetSpec, ZScoreNorm

CLASSES = 3
Shape = tuple[int, int, int]


def unet(*features: int) -> UNetSpec:
    return UNetSpec(
        family="plain_unet",
        dimensions=3,
        in_channels=1,
        out_channels=CLASSES,
        features=features,
        kernels=((3, 3, 3),) * len(features),
        strides=((1, 1, 1),) + ((2, 2, 2),) * (len(features) - 1),
        blocks=(2,) * len(features),
        decoder_convs=(2,) * (len(features) - 1),
    )


def networks(toy: bool) -> dict[str, tuple[NetworkSpec, Shape]]:
    """Name -> network and patch."""
    plus: dict[str, Any] = {"family": "unetpp", "in_channels": 1, "out_channels": CLASSES, "deep_supervision": True}
    if toy:
        return {"U-Net": (unet(4, 8), (8, 8, 8))}
    return {
        "U-Net": (unet(32, 64, 128, 256, 320, 320), (64, 64, 64)),
        "V-Net": (VNetSpec(in_channels=1, out_channels=CLASSES), (32, 32, 32)),
        "UNet++, 2-D": (UNetPPSpec(**plus), (1, 128, 128)),
    }


def make_bundle(folder: Path, network: NetworkSpec, patch: Shape) -> Bundle:
    spec = ModelSpec(
        name="random",
        channels=(Channel(name="CT", normalization=ZScoreNorm()),),
        members=("0",),
        network=network,
        labels=tuple(Label(name=f"label {k}", values=(k,)) for k in range(CLASSES)),
        head=Head(activation="softmax", values=tuple(range(CLASSES))),
        target=SpacingTarget(spacing=(1.0, 1.0, 1.0)),
        inference=Inference(patch=patch),
    )
    torch.manual_seed(0)
    return Bundle.create(folder, spec, weights={"0": build(network).state_dict()})


def by_segrt(bundle: Bundle) -> bytes:
    (path,) = export_onnx(bundle)
    return path.read_bytes()


def by_torch(bundle: Bundle) -> bytes:
    patch = bundle.spec.inference.patch[3 - bundle.spec.dimensions :]
    program = torch.onnx.export(
        load_member(bundle, "0"),
        (torch.zeros(2, 1, *patch),),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["patches"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


WRITERS: dict[str, Callable[[Bundle], bytes]] = {"segrt": by_segrt, "torch.onnx.export": by_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # what torch's exporter says of packages that are missing
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (network, patch) in networks(toy).items():
            bundle = make_bundle(Path(folder) / name, network, patch)
            results[name] = compared(bundle, runs=1 if toy else 5)
            print(name, results[name], flush=True)
    write_results("export", {**environment(), "networks": results}, toy=toy)


def compared(bundle: Bundle, *, runs: int) -> dict[str, Any]:
    spec = bundle.spec
    data = np.random.default_rng(0).normal(size=(1, 1, *spec.inference.patch[3 - spec.dimensions :])).astype(np.float32)
    logits = {}
    for name, write in WRITERS.items():
        session = onnxruntime.InferenceSession(write(bundle), providers=["CPUExecutionProvider"])
        logits[name] = session.run(None, {"patches": data})[0]
    ours, theirs = logits["segrt"], logits["torch.onnx.export"]
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert error < 1e-5, f"the two files give other logits (relative error {error})"
    seconds = median_in_turn({name: (lambda write=write: write(bundle)) for name, write in WRITERS.items()}, runs=runs)
    return {
        "parameters": count_parameters(build(spec.network)),
        "seconds": seconds,
        "times_as_fast": seconds["torch.onnx.export"] / seconds["segrt"],
        "relative_error": error,
    }


if __name__ == "__main__":
    main()
