"""TensorRT 11 that is none: its names, on the GPU of `gpu_stand_in`. A plan holds the ONNX model, and ONNX Runtime computes it."""

from __future__ import annotations

import json
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from gpu_stand_in import Gpu

WORKSPACE = 4096  # bytes for each window
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class TensorRT(ModuleType):
    """The module. `refuses`: call -> what TensorRT reports when it does not succeed. `seen`: what was made, by kind."""

    __version__ = "11.4.0.106"
    ILogger = ILogger
    NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    OnnxParserFlag = IntEnum("OnnxParserFlag", "NATIVE_INSTANCENORM", start=0)
    ExecutionContextAllocationStrategy = IntEnum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0)
    BuilderFlag = IntEnum("BuilderFlag", "TF32 VERSION_COMPATIBLE", start=0)
    HardwareCompatibilityLevel = IntEnum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS", start=0)
    MemoryPoolType = IntEnum("MemoryPoolType", "WORKSPACE", start=0)
    TensorIOMode = IntEnum("TensorIOMode", "NONE INPUT OUTPUT", start=0)

    def __init__(self, gpu: Gpu) -> None:
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", None)
        self.gpu, self.refuses = gpu, dict[str, str]()
        self.seen: dict[str, list[Any]] = {"config": [], "runtime": [], "context": []}
        for kind in (Builder, OnnxParser, Runtime):
            setattr(self, kind.__name__, lambda *args, kind=kind: kind(self, *args))

    def nptype(self, kind: Any) -> Any:
        return kind

    def succeeds(self, call: str, log: ILogger) -> bool:
        if call in self.refuses:
            log.log(ILogger.ERROR, self.refuses[call])
        return call not in self.refuses


def make_plan(model: bytes, batch: int) -> bytes:
    return json.dumps({"batch": batch, "onnx": model.hex()}).encode()


# ------------------------------------------------------------------ building
class Cache:
    """A timing cache: a line for each network whose kernels were timed."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class Config:
    def __init__(self) -> None:
        self.flags = {TensorRT.BuilderFlag.TF32}
        self.hardware_compatibility_level = TensorRT.HardwareCompatibilityLevel.NONE
        self.limits: dict[Any, int] = {}
        self.profiles: list[Any] = []
        self.cache: Cache | None = None
        self.read = b""

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool] = size

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if cache.content.startswith(b"another GPU"):
            return False
        self.cache, self.read = cache, cache.content
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


class Builder:
    def __init__(self, trt: TensorRT, log: ILogger) -> None:
        if not trt.succeeds("builder", log):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.trt, self.log = trt, log

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << TensorRT.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return SimpleNamespace(model=b"", num_inputs=0, num_outputs=0)

    def create_builder_config(self) -> Config:
        self.trt.seen["config"].append(Config())
        made: Config = self.trt.seen["config"][-1]
        return made

    def create_optimization_profile(self) -> Any:
        profile = SimpleNamespace(shapes={})
        profile.set_shape = lambda name, *shapes: profile.shapes.update({name: shapes})
        return profile

    def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
        if not self.trt.succeeds("build", self.log):
            return None
        (profile,) = config.profiles
        ((_, _, largest),) = profile.shapes.values()
        if config.cache is not None:
            config.cache.content += b"timed\n"
        return make_plan(network.model, largest[0])


class OnnxParser:
    def __init__(self, trt: TensorRT, network: Any, log: ILogger) -> None:
        self.network, self.flags = network, set[Any]()

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def parse(self, model: bytes) -> bool:
        graph = onnx.load_model_from_string(model).graph
        self.network.model, self.network.num_inputs, self.network.num_outputs = model, len(graph.input), len(graph.output)
        shape = [dim.dim_value or -1 for dim in graph.input[0].type.tensor_type.shape.dim]
        self.network.get_input = lambda number: SimpleNamespace(name=graph.input[0].name, shape=shape)
        return True


# ------------------------------------------------------------------ running
class Runtime:
    def __init__(self, trt: TensorRT, log: ILogger) -> None:
        if not trt.succeeds("runtime", log):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.trt, self.log, self.engine_host_code_allowed = trt, log, False
        trt.seen["runtime"].append(self)

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Engine(self, json.loads(plan)) if self.trt.succeeds("deserialize", self.log) else None


class Engine:
    num_io_tensors = 2

    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.runtime, self.batch = runtime, int(plan["batch"])
        self.session = onnxruntime.InferenceSession(bytes.fromhex(plan["onnx"]), options, providers=["CPUExecutionProvider"])
        self.tensors = [*self.session.get_outputs(), *self.session.get_inputs()]  # TensorRT promises no order
        self.device_memory_size_v2 = self.batch * WORKSPACE

    def get_tensor_name(self, number: int) -> str:
        return str(self.tensors[number].name)

    def get_tensor_mode(self, name: str) -> Any:
        return TensorRT.TensorIOMode.INPUT if name == self.tensors[1].name else TensorRT.TensorIOMode.OUTPUT

    def _tensor(self, name: str) -> Any:
        (found,) = (tensor for tensor in self.tensors if tensor.name == name)
        return found

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._tensor(name).shape[1:])

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self._tensor(name).type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        return [(n, *self.get_tensor_shape(name)[1:]) for n in (1, self.batch, self.batch)]

    def create_execution_context(self, strategy: Any) -> Context | None:
        assert strategy == TensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self) if self.runtime.trt.succeeds("context", self.runtime.log) else None


class Context:
    """Computes with what lies at its addresses when its turn comes in the stream."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt, self.shape = engine, engine.runtime.trt, tuple[int, ...]()
        self.addresses: dict[str, int] = {}
        self.lent = (0, 0)
        self.calls = 0
        self.trt.seen["context"].append(self)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert 1 <= shape[0] <= self.engine.batch
        self.shape = shape
        return self.trt.succeeds("shape", self.engine.runtime.log)

    def update_device_memory_size_for_shapes(self) -> int:
        return self.shape[0] * WORKSPACE

    def set_device_memory(self, address: int, size: int) -> None:
        self.lent = (address, size)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.calls += 1
        call = "execute" if self.trt.gpu.streams[stream].graph is None else "execute in a capture"
        if not self.trt.succeeds(call, self.engine.runtime.log):
            return False
        self.trt.gpu.streams[stream].add(self._compute)
        return True

    def _compute(self) -> None:
        gpu, (logits, patches) = self.trt.gpu, self.engine.tensors
        address, size = self.lent
        assert size >= self.shape[0] * WORKSPACE
        gpu.memory(address, size)[:] = 7
        read = self._at(patches.name, self.shape)
        written = self._at(logits.name, (self.shape[0], *logits.shape[1:]))
        written[...] = self.engine.session.run(None, {patches.name: read})[0]

    def _at(self, name: str, shape: tuple[int, ...]) -> Any:
        kind = np.dtype(self.engine.get_tensor_dtype(name))
        memory = self.trt.gpu.memory(self.addresses[name], int(np.prod(shape)) * kind.itemsize)
        return memory.view(kind).reshape(shape)
