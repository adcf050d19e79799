"""TensorRT 8.6, 10 and 11 behind one set of names: what differs between them is looked for here, and nowhere else.

| what                        | 8.6                                    | 10                              | 11                    |
|-----------------------------|----------------------------------------|---------------------------------|-----------------------|
| types                       | weak: BuilderFlag.FP16, INT8           | strong, weak also possible      | strong only           |
| network                     | EXPLICIT_BATCH                         | STRONGLY_TYPED                  | STRONGLY_TYPED        |
| layers held in float32      | OBEY_PRECISION_CONSTRAINTS + precision | by the graph's types            | by the graph's types  |
| bfloat16                    | no                                     | yes                             | yes                   |
| newest opset that is safe   | 17                                     | the exporter's                  | the exporter's        |
| InstanceNorm                | a plugin or a layer, see export.weak   | native                          | native                |
| several contexts, 1 profile | PreviewFeature.PROFILE_SHARING_0806    | always                          | always                |
| cuBLAS, cuDNN               | tactic sources, on                     | tactic sources, off             | gone                  |
| context without memory      | ..._without_device_memory()            | strategy USER_MANAGED           | strategy USER_MANAGED |
| memory it needs             | device_memory_size                     | device_memory_size(_v2), shapes | ..._v2, shapes        |
| handing it over             | context.device_memory = p              | set_device_memory(p, n)         | set_device_memory     |
| parser's error              | desc(), node()                         | + node_name(), node_operator()  | as 10                 |
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

from ..arrays import require

logger = logging.getLogger(__name__)

# name in TacticSource -> library that 8.6 loads for it
_TACTIC_LIBRARIES = {"CUBLAS": "libcublas.so.12", "CUBLAS_LT": "libcublasLt.so.12", "CUDNN": "libcudnn.so.8"}
# of these layers none may compute in 16 bits on its own account
_FULL_PRECISION = ("REDUCE", "UNARY", "SOFTMAX", "SCALE")


def load() -> Any:
    """Import TensorRT.

    Raises
    ------
    BackendError
        When it is not installed or its libraries do not load.
    """
    return require("tensorrt", extra="trt")


def make_logger(trt: Any) -> Any:
    """Make a TensorRT logger that hands messages to `logging`, TensorRT's INFO as DEBUG, and keeps the errors in `errors`.

    Builder, parser and runtime keep a pointer to it: it has to live as long as they do.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)
                logger.info("TensorRT: %s", msg)  # whoever asked raises with it
            elif severity != trt.ILogger.VERBOSE:
                logger.log(logging.INFO if severity == trt.ILogger.WARNING else logging.DEBUG, "TensorRT: %s", msg)

    log = Logger()
    if not is_strongly_typed(trt):
        trt.init_libnvinfer_plugins(log, "")  # 8.6 normalises in a plugin, which a plan then needs as well
    return log


def last_errors(log: Any) -> str:
    """What TensorRT reported, for the end of a sentence; it is forgotten then."""
    reported = " | ".join(dict.fromkeys(log.errors[-3:])) or "TensorRT gives no reason"
    log.errors.clear()
    return reported


# ------------------------------------------------------------------ building
def is_strongly_typed(trt: Any) -> bool:
    """Whether the graph's types decide the precision (10 and 11) and not the builder's flags (8.6)."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def network_flags(trt: Any) -> int:
    """Flags of `create_network`."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED if is_strongly_typed(trt) else flags.EXPLICIT_BATCH)


def parser_errors(parser: Any) -> str:
    """Everything an ONNX parser complained of, with the nodes it names."""
    sentences = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        name = error.node_name() if hasattr(error, "node_name") else f"number {error.node()}"
        operator = error.node_operator() if hasattr(error, "node_operator") else ""
        sentences.append(f"node {name}{f' ({operator})' if operator else ''}: {error.desc().strip()}")
    return " | ".join(sentences) or "the parser gives no reason"


def keep_native_norms(trt: Any, parser: Any) -> None:
    """Have a strongly typed network's InstanceNormalization parsed into TensorRT's own layer, which needs no plugin library."""
    if hasattr(trt, "OnnxParserFlag") and is_strongly_typed(trt):
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)


def set_weak_precision(trt: Any, config: Any, network: Any, precision: str) -> None:
    """For a weakly typed network: allow 16 or 8 bits, and hold normalisation in float32; nothing where types are strong."""
    if is_strongly_typed(trt):
        return
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    _drop_missing_libraries(trt, config)
    if precision == "fp32":
        return
    config.set_flag(trt.BuilderFlag.FP16)
    if precision == "int8":
        config.set_flag(trt.BuilderFlag.INT8)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    network.get_output(0).dtype = trt.float16
    pinned = {getattr(trt.LayerType, name) for name in _FULL_PRECISION if hasattr(trt.LayerType, name)}
    for layer in (network.get_layer(number) for number in range(network.num_layers)):
        if layer.type in pinned:
            layer.precision = trt.float32
            for output in range(layer.num_outputs):
                layer.set_output_type(output, trt.float32)
        elif layer.type == getattr(trt.LayerType, "NORMALIZATION", None):
            layer.__class__ = trt.INormalizationLayer
            layer.compute_precision = trt.float32


def _drop_missing_libraries(trt: Any, config: Any) -> None:
    """Switch off tactics of libraries that cannot be loaded: 8.6 would end the process when it meets one."""
    sources = config.get_tactic_sources()
    for name, library in _TACTIC_LIBRARIES.items():
        if hasattr(trt.TacticSource, name) and sources >> int(getattr(trt.TacticSource, name)) & 1 and not _loads(library):
            logger.info("%s does not load: TensorRT goes without its tactics", library)
            sources &= ~(1 << int(getattr(trt.TacticSource, name)))
    config.set_tactic_sources(sources)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------ running
def new_context(trt: Any, engine: Any) -> Any:
    """Make an execution context that has no memory of its own yet; None when TensorRT cannot."""
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def workspace_bytes(engine: Any, context: Any) -> int:
    """Memory a context needs for the input shape it was given; for the largest one where TensorRT cannot tell."""
    if hasattr(context, "update_device_memory_size_for_shapes"):
        return int(context.update_device_memory_size_for_shapes())
    return largest_workspace_bytes(engine)


def largest_workspace_bytes(engine: Any) -> int:
    """Memory a context needs for the largest input of any profile."""
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)


def lend_memory(context: Any, address: int, size: int) -> None:
    """Give a context the memory it works in."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, size)
    else:
        context.device_memory = address
