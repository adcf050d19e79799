"""Small models, bundles and images: what the tests of the runtime are made of."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segrt.arrays import Array, FloatArray, Shape3, Spacing3
from segrt.bundle import Bundle
from segrt.engines.function import FunctionEngine
from segrt.files import sha256
from segrt.io import write_image
from segrt.spec import (
    Channel,
    Head,
    Inference,
    Label,
    ModelSpec,
    NoNorm,
    OnnxNetwork,
    PreviousStage,
    SpacingTarget,
    UNetSpec,
)
from segrt.volume import Grid, Volume

OWN_SPACING = SpacingTarget(spacing=(None, None, None))
UNET_3D = UNetSpec(
    family="plain_unet",
    dimensions=3,
    in_channels=1,
    out_channels=3,
    features=(4, 8),
    kernels=((3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 2)),
    blocks=(1, 1),
    decoder_convs=(1,),
)
UNET_2D = UNET_3D.model_copy(update={"dimensions": 2, "kernels": ((3, 3), (3, 3)), "strides": ((1, 1), (2, 2))})


def make_spec(
    *,
    values: Sequence[int] = (0, 1, 2),
    patch: Shape3 = (8, 8, 8),
    activation: str = "softmax",
    step: float = 0.5,
    blending: str = "gaussian",
    mirror_axes: Sequence[int] = (),
    **changes: Any,
) -> ModelSpec:
    """A model of one channel that keeps its image's spacing and intensities; `changes` are fields of ModelSpec."""
    channels = changes.pop("channels", (Channel(name="CT", normalization=NoNorm()),))
    previous: PreviousStage | None = changes.get("previous")
    inputs = len(channels) + (len(previous.values) if previous else 0)
    fields: dict[str, Any] = {
        "name": "tiny",
        "channels": channels,
        "labels": tuple(Label(name=f"label {v}", values=(v,)) for v in sorted(set(values)) if v),
        "head": Head(activation=activation, values=tuple(values)),
        "target": OWN_SPACING,
        "inference": Inference(patch=patch, step=step, blending=blending, mirror_axes=tuple(mirror_axes)),
        "network": OnnxNetwork(in_channels=inputs, out_channels=len(values)),
        "members": ("0",),
    }
    return ModelSpec(**fields | changes)


def nearest(centres: Sequence[float]) -> Callable[[FloatArray], FloatArray]:
    """A network whose class k wins where the first channel is nearest to centres[k]: 2 c x - c^2 for each c."""
    c = np.asarray(centres, np.float32)[None, :, None, None, None]
    return lambda patches: 2 * c * patches[:, :1] - c * c


def nearest_engine(centres: Sequence[float] = (0, 1, 2), **options: Any) -> FunctionEngine:
    """The engine of `nearest`."""
    return FunctionEngine(nearest(centres), **options)


class CountingEngine(FunctionEngine):
    """A function engine that remembers how many patches each call held."""

    def __init__(self, function: Callable[[FloatArray], FloatArray], **options: Any) -> None:
        super().__init__(function, **options)
        self.calls: list[int] = []
        self.closed = 0

    def __call__(self, patches: FloatArray) -> FloatArray:
        self.calls.append(len(patches))
        return super().__call__(patches)

    def close(self) -> None:
        self.closed += 1


def write_nearest_onnx(path: Path, spec: ModelSpec, centres: Sequence[float]) -> None:
    """`nearest` as an ONNX file: one 1x1 convolution, written without torch."""
    from onnx import TensorProto, helper

    axes = spec.dimensions
    weight = np.zeros((len(centres), spec.in_channels, *[1] * axes), np.float32)
    weight[:, 0] = 2 * np.reshape(centres, (-1, *[1] * axes))
    bias = -np.square(np.asarray(centres, np.float32))
    nodes = [helper.make_node("Conv", ["patches", "weight", "bias"], ["logits"])]
    spatial = spec.inference.patch[3 - axes :]
    inputs = [helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["batch", spec.in_channels, *spatial])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(centres), *spatial])]
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.ravel()) for name, array in (("weight", weight), ("bias", bias))
    ]
    graph = helper.make_graph(nodes, "nearest", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def make_bundle(
    path: Path,
    spec: ModelSpec | None = None,
    *,
    centres: Sequence[float] | None = None,
    previous: Bundle | None = None,
    partner: Bundle | None = None,
) -> Bundle:
    """A bundle whose members all are `nearest`; by default class k wins where the image is nearest to k."""
    spec = spec or make_spec()
    bundle = Bundle.create(path, spec, previous=previous, partner=partner)
    hashes = {}
    for member in spec.members:
        write_nearest_onnx(bundle.onnx_path(member), spec, centres or range(spec.classes))
        hashes[member] = sha256(bundle.onnx_path(member))
    (path / "onnx" / "build.json").write_text(json.dumps({"sha256": hashes}))
    return bundle


@functools.cache
def _unet_folder(dimensions: int) -> Path:
    """A random tiny U-Net with two folds, exported and compiled; made once per test run."""
    import torch

    from segrt.export.engine import build_engine
    from segrt.export.onnx import export_onnx, write_reference
    from segrt.networks import build

    network, patch = (UNET_3D, (8, 8, 8)) if dimensions == 3 else (UNET_2D, (1, 16, 16))
    spec = make_spec(patch=patch, network=network, members=("0", "1"), mirror_axes=(1, 2))
    folder = Path(tempfile.mkdtemp(prefix="segrt-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(dimensions)
        bundle = Bundle.create(folder / "bundle", spec, weights={m: build(network).state_dict() for m in spec.members})
    export_onnx(bundle)
    write_reference(bundle, np.random.default_rng(3).normal(size=(1, 1, *patch)).astype(np.float32))
    build_engine(bundle)
    return bundle.path


def unet_bundle(path: Path, dimensions: int = 3) -> Bundle:
    """A copy of a random U-Net's bundle at `path`: weights, ONNX files and compiled engines of two folds."""
    shutil.copytree(_unet_folder(dimensions), path)
    return Bundle.open(path)


def banded(shape: Shape3, *, classes: int = 3, seed: int = 0) -> Array:
    """(Z, Y, X) int16 image of boxes whose intensity is the class `nearest` gives them; the corner voxel is not background."""
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, np.int16)
    for _ in range(3 * classes):
        low = [int(rng.integers(0, n)) for n in shape]
        high = [int(rng.integers(a, n)) + 1 for a, n in zip(low, shape, strict=True)]
        image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = rng.integers(0, classes)
    image[0, 0, 0] = classes - 1
    return image


def volume_of(data: Array, spacing: Spacing3 = (1.0, 1.0, 1.0), **grid: Any) -> Volume:
    """A Volume of a (Z, Y, X) or (C, Z, Y, X) array."""
    data = data if data.ndim == 4 else data[None]
    return Volume(data, Grid(data.shape[1:], spacing, **grid), "image")


def write_case(path: Path, data: Array, spacing: Spacing3 = (1.0, 1.0, 1.0), **grid: Any) -> Path:
    """Write a (Z, Y, X) array as an image file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, data, Grid(data.shape, spacing, **grid))
    return path
