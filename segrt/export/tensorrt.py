"""BUILD, for NVIDIA GPUs: a member's ONNX file becomes a TensorRT plan. What differs between versions is in `segrt.engines.trt_api`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arrays import FloatArray
from ..bundle import Bundle
from ..engines import Precision, trt_api
from ..errors import BuildError
from ..files import write_atomic
from .quantized import quantized_onnx
from .typed import typed_onnx
from .weak import fused_norms, group_norms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorRTOptions:
    """How plans are built.

    Attributes
    ----------
    batch : windows per call at most, the number the plan is tuned for; `build_engine` replaces 0 by what keeps a large GPU busy
    workspace_bytes : memory that a layer may ask for, 0 for all there is
    compatible : a plan for every GPU from Ampere on and for later versions of TensorRT, which is larger and slower
    timing_cache : file that remembers measured kernels, so that the next build takes minutes less; `build_engine` replaces None by
        engines/timing.cache in the bundle
    """

    batch: int = 0
    workspace_bytes: int = 0
    compatible: bool = False
    timing_cache: Path | None = None


def member_model(bundle: Bundle, member: str, precision: Precision, calibration: FloatArray | None) -> bytes:
    """ONNX content that the TensorRT at hand is given for a member: for 10 and 11 with the precision in the graph's types.

    Parameters
    ----------
    calibration : windows (N, C, Z, Y, X) that set the ranges of int8

    Raises
    ------
    BuildError
        When the member cannot be had in this precision.
    """
    source, strong = bundle.onnx_path(member), trt_api.is_strongly_typed(trt_api.load())
    norms_16_bit = fused_norms if bundle.spec.dimensions == 3 else group_norms
    if precision == "int8":
        assert calibration is not None, "int8 needs windows to be calibrated on"
        content = quantized_onnx(source, calibration if bundle.spec.dimensions == 3 else calibration[:, :, 0])
        return typed_onnx(content, "fp16", outputs="fp16") if strong else norms_16_bit(content)
    if precision == "fp32":
        return source.read_bytes() if strong else group_norms(source.read_bytes())
    if not strong:
        if precision == "bf16":
            raise BuildError("this TensorRT has no bf16; use --fp16, or TensorRT 10 or later")
        return norms_16_bit(source.read_bytes())
    # bf16 logits would need a kernel of their own afterwards; float16 ones are read by all of them and halve the traffic
    return typed_onnx(source, precision, outputs="fp16" if precision == "fp16" else None)


def build_plan(model: bytes, precision: Precision, options: TensorRTOptions) -> bytes:
    """Compile an ONNX model for the GPU that is CUDA's current device; takes minutes.

    Parameters
    ----------
    model : ONNX content from `member_model`; its batch is free, its window fixed
    precision : decides what a weakly typed TensorRT may use; a strongly typed one reads it in the graph
    options : with a batch set

    Returns
    -------
    bytes : the serialised plan, with one profile of 1 to `options.batch` windows

    Raises
    ------
    BuildError
        When TensorRT does not start, parse the model or find kernels for it; the sentence holds what it said.
    """
    trt = trt_api.load()
    log = trt_api.make_logger(trt)
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError) as err:  # what the binding makes of a null pointer
        raise BuildError(f"TensorRT cannot start its builder here: {trt_api.last_errors(log)}") from err
    network = builder.create_network(trt_api.network_flags(trt))
    parse(trt, network, log, model)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    trt_api.set_weak_precision(trt, config, network, precision)
    _add_profile(builder, config, network, options.batch)
    cache = _attach_timing_cache(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"TensorRT built no engine: {trt_api.last_errors(log)}")
    if cache is not None and options.timing_cache is not None:
        write_atomic(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def parse(trt: Any, network: Any, log: Any, model: bytes) -> None:
    """Fill a TensorRT network from ONNX content; a BuildError holds all that the parser complained of."""
    parser = trt.OnnxParser(network, log)
    trt_api.keep_native_norms(trt, parser)
    if not parser.parse(model):
        raise BuildError(f"TensorRT does not accept the network: {trt_api.parser_errors(parser)}")
    if (network.num_inputs, network.num_outputs) != (1, 1):
        raise BuildError(
            f"TensorRT found {network.num_inputs} inputs and {network.num_outputs} outputs in the network, expected one of each"
        )


def _configure(trt: Any, config: Any, options: TensorRTOptions) -> None:
    if options.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    # float32 means float32: TF32 keeps ten bits of it
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _add_profile(builder: Any, config: Any, network: Any, batch: int) -> None:
    """One profile for 1 to `batch` windows: with one set of kernels, logits do not depend on how many windows are in a call."""
    patches = network.get_input(0)
    window = tuple(patches.shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(patches.name, (1, *window), (batch, *window), (batch, *window))
    config.add_optimization_profile(profile)


def _attach_timing_cache(config: Any, path: Path | None) -> Any:
    """Give the builder what earlier builds measured; a cache of another GPU or TensorRT is replaced by a new one."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        logger.info("%s is not used: it belongs to another GPU or TensorRT", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
