"""A member's network and weights become one ONNX file: input "patches" (N, C, (Z,) Y, X), batch free, patch fixed by default."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import __version__
from ..arrays import Array, FloatArray, require
from ..bundle import Bundle
from ..engines import read_build
from ..errors import BuildError, InputError
from ..files import held, sha256, write_atomic
from ..spec import OnnxNetwork, VNetSpec

if TYPE_CHECKING:
    from ..networks import Network

logger = logging.getLogger(__name__)

Head = Literal["logits", "softmax", "argmax"]

# All an export needs, and what most runtimes have kernels for: ONNX Runtime hands nodes whose operator changed in opset 19 (AveragePool,
# Resize) to the CPU where its CUDA provider has only the older one (microsoft/onnxruntime#27415), and TensorRT 8.6 reads up to 17.
OPSET = 17
IR_VERSION = 8  # of the release that brought this opset
# Logits kept per member in the reference: about a megabyte.
MAX_REFERENCE_VALUES = 300_000
# The name each head gives the graph's output.
_OUTPUTS = {"logits": "logits", "softmax": "probabilities", "argmax": "labels"}
# A protobuf message ends at 2 GiB; what the graph needs besides weights is far below the margin.
_MAX_BYTES = 2**31 - 2**24


def export_onnx(bundle: Bundle, *, members: Sequence[str] | None = None, dynamic: bool = False, head: Head = "logits") -> list[Path]:
    """Write each member's ONNX file: onnx/<member>.onnx, the one segrt's engines run, with its SHA-256 in onnx/build.json.

    Other kinds are for use elsewhere and lie beside it as onnx/<member>[-<head>][-dynamic].onnx.

    Parameters
    ----------
    bundle : a bundle with weights
    members : which ones; None for all
    dynamic : leave the spatial shape free too (multiples of the network's stride)
    head : "softmax" gives probabilities (by sigmoid for models with regions), "argmax" label values (N, (Z,) Y, X)

    Returns
    -------
    list of Path : the files, in the order of the members

    Raises
    ------
    InputError
        For a member the bundle does not have, or an unknown head.
    BuildError
        When the bundle has no weights, they do not fit its network, or the file would pass 2 GiB.
    """
    if head not in _OUTPUTS:
        raise InputError(f"head: expected one of {', '.join(_OUTPUTS)}, got {head!r}")
    paths = []
    for member in members if members is not None else bundle.spec.members:
        path = bundle.onnx_path("-".join([member, *([head] if head != "logits" else []), *(["dynamic"] if dynamic else [])]))
        content = _serialize(bundle, member, head=head, dynamic=dynamic)
        paths.append(write_atomic(path, content))
        if path == bundle.onnx_path(member):
            _record(bundle, member)
        logger.info("wrote %s (%.1f MB)", path, len(content) / 1e6)
    return paths


def load_member(bundle: Bundle, member: str) -> Network:
    """Build a member's network with its weights, in evaluation mode; see `export_onnx` for errors."""
    if member not in bundle.spec.members:
        raise InputError(f"{bundle.path}: no member {member!r}; it has {', '.join(bundle.spec.members)}")
    path = bundle.weights_path(member)
    if isinstance(bundle.spec.network, OnnxNetwork) or not path.is_file():
        raise BuildError(f"{path} is missing: this bundle holds only compiled or ONNX networks; export from the bundle they were made from")
    safetensors = require("safetensors", extra="export")
    torch = require("torch", extra="export")
    from ..networks import build, load_weights

    # whatever device and type a program has made torch's default
    with torch.device("cpu"):
        try:
            weights = require("safetensors.torch", extra="export").load_file(str(path))
        except (safetensors.SafetensorError, OSError) as err:
            raise BuildError(f"{path}: not readable as safetensors ({err}); copy the bundle again") from err
        network = build(bundle.spec.network).float()
    load_weights(network, weights, where=str(path), whole=bundle.whole.spec.network if bundle.whole else None)
    return network


def write_reference(bundle: Bundle, inputs: FloatArray, *, max_values: int = MAX_REFERENCE_VALUES) -> Path:
    """Run every member in torch on `inputs` and keep a thinned-out part of its logits in onnx/reference.npz.

    Parameters
    ----------
    inputs : (n, C, Z, Y, X) windows of the model's patch; rounded to float16 first, so that half precision reads the same numbers
    max_values : logits kept per member

    Raises
    ------
    InputError
        When the windows do not have the model's channels and patch, or are not finite in float16.
    BuildError
        When a member's weights are missing or do not fit.
    """
    torch = require("torch", extra="export")
    expected = (bundle.spec.in_channels, *bundle.spec.inference.patch)
    if inputs.ndim != 5 or inputs.shape[1:] != expected:
        raise InputError(f"inputs: expected (n, {', '.join(map(str, expected))}), got {inputs.shape}")
    with np.errstate(over="ignore"):
        half = inputs.astype(np.float16)
    if not np.isfinite(half).all():
        raise InputError("inputs: hold NaN, or numbers beyond float16's range of 65504")
    exact = torch.from_numpy(half.astype(np.float32))
    stride = _stride(inputs.shape[0] * bundle.spec.classes, inputs.shape[2:], max_values)
    arrays: dict[str, Array] = {"inputs": half, "stride": np.array([stride] * 3)}
    for member in bundle.spec.members:
        network = load_member(bundle, member)
        # One window at a time: a full-size network takes gigabytes for each.
        kept = [_run_window(network, window, bundle.spec.dimensions)[:, ::stride, ::stride, ::stride] for window in exact]
        arrays[f"logits_{member}"] = np.stack(kept)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return write_atomic(bundle.reference_path, buffer.getvalue())


def _run_window(network: Network, window: Any, dimensions: int) -> FloatArray:
    """(C, Z, Y, X) -> logits (K, Z, Y, X)."""
    torch = require("torch", extra="export")
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        logits: Any = network(window[None, :, 0] if dimensions == 2 else window[None])[0]
    result: FloatArray = (logits[:, None] if dimensions == 2 else logits).numpy()
    return result


def _serialize(bundle: Bundle, member: str, *, head: Head, dynamic: bool) -> bytes:
    """The content of a member's ONNX file; of the weights, an export's memory, each copy is let go as soon as there is the next."""
    onnx = require("onnx", extra="export")
    said = {"segrt": __version__, "model": bundle.spec.name, "member": bundle.keyed(member), "head": head, "dynamic": str(dynamic).lower()}
    try:
        model = _assemble(bundle, member, head=head, dynamic=dynamic)
        onnx.helper.set_model_props(model, said)
        content: bytes = model.SerializeToString(deterministic=True)
        del model
        onnx.checker.check_model(content, full_check=True)
    except (NotImplementedError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        reason = str(err).splitlines()[0]
        raise BuildError(f"{bundle.path}: member {member!r} cannot be written as ONNX: {reason}; check network in model.json") from err
    return content


def _assemble(bundle: Bundle, member: str, *, head: Head, dynamic: bool) -> Any:
    """The model of a member's network, with what follows it."""
    from onnx import GraphProto, TensorProto, helper

    from .head import append_labels, append_probabilities

    spec = bundle.spec
    graph = _traced(bundle, member, dynamic=dynamic)
    shape = spec.inference.patch[3 - spec.dimensions :]
    spatial = ("z", "y", "x")[3 - spec.dimensions :] if dynamic else shape
    kind: int = TensorProto.FLOAT
    channels = [spec.classes]
    if head == "softmax":
        append_probabilities(graph, "logits", spec.head)
    elif head == "argmax":
        kind, channels = append_labels(graph, "logits", spec), []
    patches = helper.make_tensor_value_info("patches", TensorProto.FLOAT, ("batch", spec.in_channels, *spatial))
    output = helper.make_tensor_value_info(_OUTPUTS[head], kind, ("batch", *channels, *spatial))
    made_by = {"producer_name": "segrt", "producer_version": __version__}
    model = helper.make_model(GraphProto(), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, **made_by)
    graph.fill(model.graph, spec.name or "model", [patches], [output])
    return model


def _traced(bundle: Bundle, member: str, *, dynamic: bool) -> Any:
    """The graph of a member's network; of the network only the numbers stay, and nothing but the graph holds them."""
    from .graph import Graph
    from .trace import trace

    network, spec = load_member(bundle, member), bundle.spec
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if size > _MAX_BYTES:
        raise BuildError(f"member {member!r} has {size / 2**30:.1f} GiB of weights; one ONNX file holds 2 GiB at most")
    if dynamic and isinstance(spec.network, VNetSpec) and spec.network.kernels != spec.network.strides:
        raise BuildError(f"member {member!r}: a free spatial shape needs a V-Net whose kernels are as large as their strides")
    graph = Graph()
    output = trace(network, graph, "patches", (spec.in_channels, *spec.inference.patch[3 - spec.dimensions :]))
    graph.rename(output, "logits")
    return graph


def _record(bundle: Bundle, member: str) -> None:
    """Keep the hash, by which engines notice a file that was changed; of a level also that of the whole network's file."""
    path = bundle.onnx_path(member)
    record = path.with_name("build.json")
    with held(record.parent):  # members exported by several threads or processes are entries of one record
        before = read_build(record)
        kept = {key: value for key in ("sha256", "level_of", "fp16_of") if isinstance(value := before.get(key), dict)}
        values = {**kept, "sha256": {**kept.get("sha256", {}), path.stem: sha256(path)}}
        if bundle.whole is not None:
            values["level_of"] = {**kept.get("level_of", {}), path.stem: sha256(bundle.whole.onnx_path(member))}
        values.get("fp16_of", {}).pop(path.stem, None)
        made_by = {"opset": OPSET, "segrt": __version__, "torch": require("torch", extra="export").__version__}
        write_atomic(record, json.dumps({**values, **made_by}, indent=1) + "\n")


def _stride(channels: int, shape: tuple[int, ...], limit: int) -> int:
    """Smallest odd stride that keeps at most `limit` values; an odd one meets every phase of the network's strides of two."""
    stride = 1
    while channels * prod(ceil(n / stride) for n in shape) > limit and stride < max(shape):
        stride += 2
    return stride
