"""SERVE: configurations that run a network in Triton's own backends, with the same tensors as our model of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engines import read_build
from ..engines.batches import gpu_batch
from ..engines.onnxrt import CUDA_SETTINGS
from ..engines.openvino import batch_size, open_core
from ..protocol import LOGITS, PATCHES
from ..repository import Network
from ..spec import ModelSpec, OnnxNetwork
from .pbtxt import Message, map_field, to_text
from .triton_config import DELAY_US, Export, batches, instances, logits_shape, parameters, tensor, window_shape, window_warmup


@dataclass(frozen=True)
class Plan:
    """A TensorRT plan of the bundle: its folder in the bundle ("" when none was built), profile and precision."""

    folder: str
    batch: int
    precision: str

    @property
    def logits(self) -> str:
        """Type of the logits, as `export.tensorrt.member_model` has them."""
        return "FP16" if self.precision in ("fp16", "int8") else "FP32"


@dataclass(frozen=True)
class Native:
    """A network that one of Triton's own backends is to run.

    Attributes
    ----------
    export, network : which one
    bundle : the bundle whose member it is
    names : what its ONNX file calls patches and logits
    """

    export: Export
    network: Network
    bundle: Bundle
    names: tuple[str, str]


def native_files(export: Export, network: Network) -> dict[str, str]:
    """File name -> text: <platform>.pbtxt for TensorRT, ONNX Runtime and OpenVINO, and a README that says how to take one.

    They lie in the model's folder configs/, where tritonserver looks for what --model-config-name names.
    """
    bundle = network.bundle_in(export.bundle)
    native = Native(export, network, bundle, tensor_names(bundle, network.member))
    plan = find_any_plan(bundle, network.member, export.precision)
    configs = {
        "tensorrt_plan": tensorrt_config(native, plan),
        "onnxruntime": onnxruntime_config(native),
        "openvino": openvino_config(native),
    }
    texts = {f"{platform}.pbtxt": to_text(config) for platform, config in configs.items()}
    return {**texts, "README.md": _readme(native, plan)}


def native_models(export: Export, network: Network, version: int) -> dict[str, Path]:
    """File name a backend looks for in the version's folder -> the file in the repository: the ONNX file, and a plan if there is one."""
    bundle = network.bundle_in(export.bundle)
    served, plan = Path(export.name, str(version), "bundle", network.stage), find_any_plan(bundle, network.member, export.precision)
    files = {"model.onnx": bundle.onnx_path(network.member)}
    if plan.folder:
        files["model.plan"] = bundle.path / "engines" / plan.folder / f"{network.member}.plan"
    return {name: served / file.relative_to(bundle.path) for name, file in files.items() if file.is_file()}


def tensorrt_config(native: Native, plan: Plan) -> Message:
    """For the plan in model.plan: its one profile, of 1 to `plan.batch` windows, and a CUDA graph for full batches."""
    device = native.export.device if native.export.on_gpu else "cuda"
    return {
        **_head(native, "tensorrt", "tensorrt_plan"),
        "default_model_filename": "model.plan",
        "max_batch_size": plan.batch,
        **_tensors(native, logits=plan.logits),
        "instance_group": [{**group, "profile": ["0"]} for group in instances(device, 1)],
        "dynamic_batching": _batching(plan.batch),
        "optimization": {
            "cuda": {"graphs": True, "graph_spec": [{"batch_size": plan.batch}], "output_copy_stream": True},
            "eager_batching": True,
        },
        **_tail(native, plan.batch, {}),
    }


def onnxruntime_config(native: Native) -> Message:
    """For the ONNX file in model.onnx: on CUDA where there is a GPU, with the settings segrt's own engine has."""
    spec, on_gpu = native.bundle.spec, native.export.on_gpu
    batch, most = batches(spec, gpu_batch(spec.inference.patch) if on_gpu else 1)
    accelerators: Message = {"gpu_execution_accelerator": [{"name": "cuda", "parameters": map_field(CUDA_SETTINGS)}]}
    return {
        **_head(native, "onnxruntime", "onnxruntime_onnx"),
        "default_model_filename": "model.onnx",
        "max_batch_size": most,
        **_tensors(native),
        "instance_group": instances(native.export.device, 1),
        "dynamic_batching": _batching(batch),
        # without a level of its own the graph gets every optimisation there is
        **({"optimization": {"execution_accelerators": accelerators}} if on_gpu else {}),
        **_tail(native, batch, {"intra_op_thread_count": "0", "execution_mode": "0"}),
    }


def openvino_config(native: Native) -> Message:
    """For the ONNX file in model.onnx, on the CPU.

    That backend compiles the network for batches of `max_batch_size` and no others: fewer windows are padded to it, or refused. So it is
    the batch that segrt's own engine has, which is one for volumes.
    """
    batch = batch_size(native.bundle)
    padding = {"ENABLE_BATCH_PADDING": "YES"} if batch > 1 else {}
    return {
        **_head(native, "openvino"),
        "default_model_filename": "model.onnx",
        "max_batch_size": batch,
        **_tensors(native),
        "instance_group": instances("cpu", 1),
        "dynamic_batching": _batching(batch),
        **_tail(native, batch, {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", **padding}),
    }


def find_any_plan(bundle: Bundle, member: str, precision: str | None) -> Plan:
    """Give the largest plan there is of a member, of the precision when one is asked for; else what a build would make."""
    wanted = precision or "fp16"
    for record in sorted((bundle.path / "engines").glob("tensorrt-*/build.json"), key=lambda path: -_batch(read_build(path))):
        values = read_build(record)
        if values.get("precision") == wanted and values.get("level") == bundle.level and record.with_name(f"{member}.plan").is_file():
            return Plan(record.parent.name, _batch(values), wanted)
    return Plan("", gpu_batch(bundle.spec.inference.patch), wanted)


def _batch(record: dict[str, Any]) -> int:
    found = record.get("batch")
    return found if isinstance(found, int) and found > 0 else 1


def tensor_names(bundle: Bundle, member: str) -> tuple[str, str]:
    """What the ONNX file calls patches and logits: names of our own, but for networks that were not exported here."""
    if not isinstance(bundle.spec.network, OnnxNetwork):
        return PATCHES, LOGITS
    model = open_core().read_model(str(bundle.onnx_path(member)))
    return model.input(0).get_any_name(), model.output(0).get_any_name()


def _head(native: Native, backend: str, platform: str = "") -> Message:
    return {"name": native.network.model, **({"platform": platform} if platform else {}), "backend": backend}


def _tensors(native: Native, *, logits: str = "FP32") -> Message:
    """Input and output."""
    spec, (patches, scores) = native.bundle.spec, native.names
    return {
        "input": [_reshaped(tensor(patches, "FP32", window_shape(spec)), spec)],
        "output": [_reshaped(tensor(scores, logits, logits_shape(spec)), spec)],
    }


def _reshaped(described: Message, spec: ModelSpec) -> Message:
    """A network that sees slices has no axis for z, which our patches keep."""
    dims = described["dims"]
    assert isinstance(dims, list)
    return described if spec.dimensions == 3 else {**described, "reshape": {"shape": [dims[0], *dims[2:]]}}


def _batching(preferred: int) -> Message:
    waiting: Message = {"preferred_batch_size": [preferred], "max_queue_delay_microseconds": DELAY_US} if preferred > 1 else {}
    return {**waiting, "default_queue_policy": {"allow_timeout_override": True}}


def _tail(native: Native, batch: int, options: dict[str, str]) -> Message:
    return {
        "version_policy": {"latest": {"num_versions": 1}},
        "model_warmup": window_warmup(native.names[0], window_shape(native.bundle.spec), batch),
        "parameters": parameters({"bundle_sha": native.export.bundle.fingerprint, **options}),
    }


def _readme(native: Native, plan: Plan) -> str:
    name, model, bundle = native.export.name, native.network.model, native.bundle
    prune = f" --prune {bundle.level}" if bundle.level else ""
    notes = [] if plan.folder else [f"The bundle has no plan yet; on the GPU: `segrt-build BUNDLE --backend tensorrt{prune}`."]
    notes.append(f"A plan belongs to one GPU and one version of TensorRT, which has to be the server's; its logits are {plan.logits}.")
    if native.names != (PATCHES, LOGITS):
        notes.append(f"This network's own file calls its tensors {' and '.join(native.names)}, so `{name}_bls` cannot call these.")
    said = "\n".join(notes)
    return f"""# {model} in a backend of Triton's own

`../config.pbtxt` runs this network on segrt's engine, which every server with Python can do. A server that has one of these backends can
run it without Python, on the same tensors, so `{name}_bls` notices nothing:

    tritonserver --model-repository=... --model-config-name=onnxruntime         # or openvino, tensorrt_plan

Models without a configuration of that name keep their own. The versions' folders hold links to the network's files, `model.onnx` and,
where one was built, `model.plan`.

{said}
What is tested: Triton's parser reads each file, and a real server takes it by that name and asks for the backend. The backends themselves
were not run.
"""
