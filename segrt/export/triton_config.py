"""SERVE: config.pbtxt of the models of a repository, from the bundle they serve."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..bundle import Bundle
from ..engines import Backend, Precision
from ..engines.batches import gpu_batch
from ..engines.openvino import batch_size
from ..protocol import IMAGE_INT16, INPUTS, LOGITS, PATCHES, PREVIOUS, PROGRESS, SPACING, ServedModel, outputs_of
from ..repository import Deployment, Network, Role, networks_of
from ..spec import ModelSpec, SpacingTarget
from .pbtxt import Message, Value, Word, map_field

# how many requests work at once through the patch models: enough for their windows to share batches
_SHARING = 4
_STREAMS = 2
# windows of one batch, and what comes back, all lie in the server's and the model's shared memory at once
_MOST_BYTES = 2**29
# on a GPU half-full batches are worth waiting for, but not for long: a window takes milliseconds
DELAY_US = 200
# versions of a patch model that stay loaded, so that requests in flight can finish with the one they began with
_KEPT = 2

WARMUP_SPACING = "spacing"


@dataclass(frozen=True)
class Export:
    """A bundle on its way into a repository: all that its models' configurations depend on.

    Attributes
    ----------
    name : of the model of the whole pipeline
    bundle : the one that is served
    shas : version -> fingerprint of its bundle, newest last
    earlier : the bundle of the version before, which the patch models keep; None without one
    device : "cpu", "cuda" for every GPU the server sees, or "cuda:1"
    backend, precision : what the engines were asked to be
    instances : requests that run at once, each with engines of its own
    """

    name: str
    bundle: Bundle
    shas: Mapping[str, str]
    earlier: Bundle | None = None
    device: str = "cpu"
    backend: Backend = "auto"
    precision: Precision | None = None
    instances: int = 1

    @property
    def networks(self) -> tuple[Network, ...]:
        """Every network of the bundle, and the model that runs it."""
        return networks_of(self.name, self.bundle)

    @property
    def on_gpu(self) -> bool:
        """Whether instances live on a GPU."""
        return self.device.startswith("cuda")

    def deployment(self, role: Role, networks: Sequence[Network] = ()) -> Deployment:
        """What a model of this export is told."""
        return Deployment(
            role=role,
            name=self.name,
            bundle=f"{self.name}/{{version}}/bundle",
            bundle_sha=list(self.shas.values())[-1],
            bundle_shas=dict(self.shas),
            patch_models=tuple(networks),
            backend=self.backend,
            precision=self.precision,
        )


def pipeline_config(export: Export, role: Role, model: str) -> Message:
    """The configuration of a model that answers whole images.

    Parameters
    ----------
    role : "pipeline", or "bls" and "stream", which hold no engine
    model : its name
    """
    spec, streams = export.bundle.spec, role == "stream"
    outputs = {**outputs_of(spec), **({PROGRESS: ("INT32", (2,))} if streams else {})}
    takes = any(one.spec.previous is not None for one in _models(export.bundle))
    client = ServedModel(spec=spec, bundle_sha=export.bundle.fingerprint, takes_previous=takes)
    told = export.deployment(role, () if role == "pipeline" else export.networks)
    count = {"pipeline": export.instances, "bls": max(_SHARING, export.instances), "stream": max(_STREAMS, export.instances)}[role]
    return {
        "name": model,
        "backend": "python",
        "max_batch_size": 0,
        "version_policy": _latest(1),
        "input": [{**tensor(name, kind, dims), "optional": True} for name, (kind, dims) in INPUTS.items()],
        "output": [tensor(name, kind, dims) for name, (kind, dims) in outputs.items()],
        "instance_group": instances(export.device, count),
        "model_transaction_policy": {"decoupled": streams},
        # the others need the patch models, which may be loaded after them
        **({"model_warmup": _image_warmup(export.bundle)} if role == "pipeline" else {}),
        "parameters": parameters({**client.to_parameters(), **told.to_parameters()}),
    }


def patch_config(export: Export, network: Network) -> Message:
    """The configuration of the python-backed model of one network: patches (N, C, Z, Y, X) to logits (N, K, Z, Y, X)."""
    bundle = network.bundle_in(export.bundle)
    batch, most = batches(bundle.spec, engine_batch(bundle, on_gpu=export.on_gpu))
    waiting: Message = {"preferred_batch_size": [batch], "max_queue_delay_microseconds": DELAY_US} if batch > 1 and export.on_gpu else {}
    window, logits = _kept_shapes(export, network)
    return {
        "name": network.model,
        "backend": "python",
        "max_batch_size": most,
        "version_policy": _latest(_KEPT),
        "input": [tensor(PATCHES, "FP32", window)],
        "output": [tensor(LOGITS, "FP32", logits)],
        "instance_group": instances(export.device, 1),
        # without a delay, what queued up while the engine was busy is its next batch
        "dynamic_batching": {**waiting, "default_queue_policy": {"allow_timeout_override": True}},
        "model_warmup": window_warmup(PATCHES, window_shape(bundle.spec), batch),
        "parameters": parameters(export.deployment("patch", [network]).to_parameters()),
    }


def tensor(name: str, kind: str, dims: Sequence[int]) -> dict[str, Value]:
    """One input or output."""
    return {"name": name, "data_type": Word(f"TYPE_{kind}"), "dims": list(dims)}


def parameters(values: Mapping[str, str]) -> list[Message]:
    """Parameters of a configuration, in the order of their names."""
    return map_field({key: {"string_value": value} for key, value in sorted(values.items())})


def instances(device: str, count: int) -> list[Message]:
    """`count` instances on the CPU, on each GPU, or on the one that is named."""
    number = device.partition(":")[2]
    kind = Word("KIND_GPU" if device.startswith("cuda") else "KIND_CPU")
    return [{"count": count, "kind": kind, **({"gpus": [int(number)]} if number else {})}]


def window_warmup(name: str, shape: Sequence[int], batch: int) -> list[Message]:
    """One batch of empty windows, run before the model is ready."""
    inputs: dict[str, Value] = {name: {"data_type": Word("TYPE_FP32"), "dims": list(shape), "zero_data": True}}
    return [{"name": "windows", "batch_size": batch, "inputs": map_field(inputs)}]


def window_shape(spec: ModelSpec) -> tuple[int, ...]:
    """(C, Z, Y, X) of a window."""
    return (spec.in_channels, *spec.inference.patch)


def logits_shape(spec: ModelSpec) -> tuple[int, ...]:
    """(K, Z, Y, X) of a window's logits."""
    return (spec.classes, *spec.inference.patch)


def engine_batch(bundle: Bundle, *, on_gpu: bool) -> int:
    """Windows the engine likes best to get in one call."""
    return gpu_batch(bundle.spec.inference.patch) if on_gpu else batch_size(bundle)


def batches(spec: ModelSpec, batch: int) -> tuple[int, int]:
    """(windows an engine likes best, most windows of a batch): room for several requests where their memory allows it."""
    window_bytes = 4 * (prod(window_shape(spec)) + prod(logits_shape(spec)))
    return batch, max(batch, min(max(8, 4 * batch), _MOST_BYTES // window_bytes))


def warmup_files(spec: ModelSpec) -> dict[str, bytes]:
    """File name -> content of what the pipeline's warm-up reads: a spacing, at which its image is one window."""
    target = spec.target.spacing if isinstance(spec.target, SpacingTarget) else (None, None, None)
    return {WARMUP_SPACING: struct.pack("<3d", *(target[axis] or 1.0 for axis in _working_axes(spec)))}


def _image_warmup(bundle: Bundle) -> list[Message]:
    spec = bundle.spec
    shape = [spec.inference.patch[axis] for axis in _working_axes(spec)]
    inputs: dict[str, Value] = {
        IMAGE_INT16: {"data_type": Word("TYPE_INT16"), "dims": [len(spec.channels), *shape], "random_data": True},
        SPACING: {"data_type": Word("TYPE_FP64"), "dims": [3], "input_data_file": WARMUP_SPACING},
    }
    if any(model.spec.previous is not None and model.previous is None for model in _models(bundle)):
        inputs[PREVIOUS] = {"data_type": Word("TYPE_UINT16"), "dims": shape, "zero_data": True}
    return [{"name": "image", "inputs": map_field(inputs)}]


def _working_axes(spec: ModelSpec) -> list[int]:
    """For each axis of an image the one it becomes on the working grid."""
    return [spec.transpose.index(axis) for axis in range(3)]


def _models(bundle: Bundle) -> tuple[Bundle, ...]:
    """The bundle, and the partner of a pair."""
    return (bundle,) if bundle.partner is None else (bundle, bundle.partner)


def _kept_shapes(export: Export, network: Network) -> tuple[list[int], list[int]]:
    """Window and logits of all versions that stay loaded: -1 where they differ, for they share the configuration."""
    specs = [network.bundle_in(export.bundle).spec]
    if export.earlier is not None:
        specs += [n.bundle_in(export.earlier).spec for n in networks_of(export.name, export.earlier) if n.model == network.model]
    return _common([window_shape(spec) for spec in specs]), _common([logits_shape(spec) for spec in specs])


def _common(shapes: Sequence[Sequence[int]]) -> list[int]:
    return [sides[0] if len(set(sides)) == 1 else -1 for sides in zip(*shapes, strict=True)]


def _latest(count: int) -> Message:
    return {"latest": {"num_versions": count}}
