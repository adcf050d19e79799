"""Which calls TensorRT 8.6, 10 and 11 are given: stand-ins of the `tensorrt` module that have the names of each version and no others.

The names are those of the bindings 8.6.1, 10.16.1 and 11.4.0, as their libraries spell them.
"""

from __future__ import annotations

import logging
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from segrt.engines import trt_api


class Recorder:
    """An object with these methods, which give these answers; `calls` holds what was called."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        for name, answer in answers.items():
            setattr(self, name, self._method(name, answer))

    def _method(self, name: str, answer: Any) -> Any:
        def called(*args: Any) -> Any:
            self.calls.append((name, *args))
            return answer

        return called


class ILayer:
    def __init__(self, kind: IntEnum, outputs: int = 1) -> None:
        self.type, self.num_outputs, self.outputs = kind, outputs, {}

    def set_output_type(self, number: int, kind: str) -> None:
        self.outputs[number] = kind


class INormalizationLayer(ILayer):
    pass


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


LAYERS = IntEnum("LAYERS", "CONVOLUTION REDUCE UNARY SOFTMAX SCALE NORMALIZATION PLUGIN_V2", start=0)


def tensorrt(version: str) -> Any:
    """The names of one version that `trt_api` asks for."""
    common = {
        "ILogger": ILogger,
        "float16": "float16",
        "float32": "float32",
        "LayerType": LAYERS,
        "INormalizationLayer": INormalizationLayer,
    }
    sources = IntEnum("TacticSource", "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS", start=0)
    parser_flags = IntEnum("OnnxParserFlag", "NATIVE_INSTANCENORM", start=0)
    strategy = IntEnum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0)
    flags = IntEnum("BuilderFlag", "FP16 INT8 OBEY_PRECISION_CONSTRAINTS", start=0)
    if version == "8.6":
        return SimpleNamespace(
            **common,
            **Recorder(init_libnvinfer_plugins=True).__dict__,
            NetworkDefinitionCreationFlag=IntEnum("Flags", "EXPLICIT_BATCH EXPLICIT_PRECISION", start=0),
            PreviewFeature=IntEnum("PreviewFeature", "FASTER_DYNAMIC_SHAPES_0805 PROFILE_SHARING_0806", start=0),
            TacticSource=sources,
            BuilderFlag=flags,
            OnnxParserFlag=parser_flags,
        )
    if version == "10":
        return SimpleNamespace(
            **common,
            NetworkDefinitionCreationFlag=IntEnum("Flags", "EXPLICIT_BATCH STRONGLY_TYPED", start=0),
            PreviewFeature=IntEnum("PreviewFeature", "PROFILE_SHARING_0806 ALIASED_PLUGIN_IO_10_03", start=0),
            TacticSource=sources,
            BuilderFlag=flags,
            OnnxParserFlag=parser_flags,
            ExecutionContextAllocationStrategy=strategy,
        )
    return SimpleNamespace(
        **common,
        NetworkDefinitionCreationFlag=IntEnum("Flags", {"STRONGLY_TYPED": 1}),
        OnnxParserFlag=parser_flags,
        ExecutionContextAllocationStrategy=strategy,
    )


STRONG = ("10", "11")


def weak_network(trt: Any) -> Any:
    layers = [ILayer(kind, 2 if kind is LAYERS.REDUCE else 1) for kind in LAYERS]
    output = SimpleNamespace(dtype="float32")
    return SimpleNamespace(num_layers=len(layers), get_layer=lambda n: layers[n], get_output=lambda n: output, layers=layers, output=output)


def weak_config() -> Recorder:
    return Recorder(set_preview_feature=None, get_tactic_sources=0b11111, set_tactic_sources=True, set_flag=None)


# ------------------------------------------------------------------ building
def test_a_networks_flags() -> None:
    assert [trt_api.network_flags(tensorrt(version)) for version in ("8.6", "10", "11")] == [1, 2, 2]
    assert [trt_api.is_strongly_typed(tensorrt(version)) for version in ("8.6", "10", "11")] == [False, True, True]


@pytest.mark.parametrize("version", ["8.6", "10", "11"])
def test_only_strong_types_keep_native_norms(version: str) -> None:
    parser = Recorder(set_flag=None)
    trt = tensorrt(version)
    trt_api.keep_native_norms(trt, parser)
    assert parser.calls == ([("set_flag", trt.OnnxParserFlag.NATIVE_INSTANCENORM)] if version in STRONG else [])


@pytest.mark.parametrize("version", STRONG)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_strong_types_are_left_alone(version: str, precision: str) -> None:
    trt, config, network = tensorrt(version), Recorder(), SimpleNamespace()
    trt_api.set_weak_precision(trt, config, network, precision)
    assert config.calls == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_weak_types_are_allowed_16_bits_and_normalisation_is_held_in_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_api.ctypes, "CDLL", lambda library: None)  # all of them load
    trt, config = tensorrt("8.6"), weak_config()
    network = weak_network(trt)
    trt_api.set_weak_precision(trt, config, network, precision)
    shared = [
        ("set_preview_feature", trt.PreviewFeature.PROFILE_SHARING_0806, True),
        ("get_tactic_sources",),
        ("set_tactic_sources", 0b11111),
    ]
    allowed = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}[precision]
    flags = [*allowed, "OBEY_PRECISION_CONSTRAINTS"] if allowed else []
    assert config.calls == [*shared, *(("set_flag", trt.BuilderFlag[name]) for name in flags)]
    assert network.output.dtype == ("float16" if allowed else "float32")
    held = {layer.type.name for layer in network.layers if getattr(layer, "precision", None) == "float32"}
    assert held == ({"REDUCE", "UNARY", "SOFTMAX", "SCALE"} if allowed else set())
    assert all(set(layer.outputs) == set(range(layer.num_outputs)) for layer in network.layers if layer.type.name in held)
    norm = network.layers[LAYERS.NORMALIZATION]
    assert getattr(norm, "compute_precision", None) == ("float32" if allowed else None)
    assert isinstance(norm, INormalizationLayer) == bool(allowed), "8.6 gives out layers as their base class"
    assert not hasattr(network.layers[LAYERS.CONVOLUTION], "precision")


def test_tactics_of_libraries_that_do_not_load_are_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def load(library: str) -> None:
        asked.append(library)
        if library != "libcublasLt.so.12":
            raise OSError(library)

    monkeypatch.setattr(trt_api.ctypes, "CDLL", load)
    caplog.set_level(logging.INFO)
    config = weak_config()
    trt_api.set_weak_precision(tensorrt("8.6"), config, weak_network(None), "fp32")
    assert config.calls[-1] == ("set_tactic_sources", 0b11010)
    assert asked == ["libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8"]
    assert "libcudnn.so.8 does not load" in caplog.text


def test_tactics_that_are_off_stay_off_and_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(library: str) -> None:
        raise AssertionError(library)

    monkeypatch.setattr(trt_api.ctypes, "CDLL", load)
    config = Recorder(set_preview_feature=None, get_tactic_sources=0b11000, set_tactic_sources=True)
    trt_api.set_weak_precision(tensorrt("8.6"), config, weak_network(None), "fp32")
    assert config.calls[-1] == ("set_tactic_sources", 0b11000)


@pytest.mark.parametrize("version", ["8.6", "10", "11"])
def test_the_logger_keeps_errors_and_8_6_loads_its_plugins(version: str) -> None:
    trt = tensorrt(version)
    log = trt_api.make_logger(trt)
    assert [call[0] for call in getattr(trt, "calls", [])] == (["init_libnvinfer_plugins"] if version == "8.6" else [])
    for severity in (ILogger.INTERNAL_ERROR, ILogger.WARNING, ILogger.ERROR, ILogger.VERBOSE):
        log.log(severity, f"message {severity}")
    assert trt_api.last_errors(log) == "message 0 | message 1"
    assert trt_api.last_errors(log) == "TensorRT gives no reason"


def test_a_parsers_errors_with_the_nodes_that_each_version_names() -> None:
    old = Recorder(node=7, desc=" no such operator\n")
    new = Recorder(node=7, desc="no such operator", node_name="/conv", node_operator="Conv")
    parsers = [SimpleNamespace(num_errors=1, get_error=lambda number, error=error: error) for error in (old, new)]
    sentences = [trt_api.parser_errors(parser) for parser in parsers]
    assert sentences == ["node number 7: no such operator", "node /conv (Conv): no such operator"]
    assert trt_api.parser_errors(SimpleNamespace(num_errors=0)) == "the parser gives no reason"


# ------------------------------------------------------------------ running
@pytest.mark.parametrize("version", ["8.6", "10", "11"])
def test_a_context_comes_without_memory(version: str) -> None:
    trt = tensorrt(version)
    if version == "8.6":
        engine = Recorder(create_execution_context_without_device_memory="context")
        expected: tuple[Any, ...] = ("create_execution_context_without_device_memory",)
    else:
        engine = Recorder(create_execution_context="context")
        expected = ("create_execution_context", trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert trt_api.new_context(trt, engine) == "context"
    assert engine.calls == [expected]


def test_memory_is_lent_in_each_versions_way() -> None:
    old, new = SimpleNamespace(device_memory=0), Recorder(set_device_memory=None)
    for context in (old, new):
        trt_api.lend_memory(context, 4096, 512)
    assert old.device_memory == 4096
    assert new.calls == [("set_device_memory", 4096, 512)]


def test_the_memory_a_shape_needs_is_asked_for_where_it_can_be() -> None:
    old, between, new = ({"device_memory_size": 30}, {"device_memory_size": 30, "device_memory_size_v2": 40}, {"device_memory_size_v2": 40})
    sizes = [trt_api.largest_workspace_bytes(SimpleNamespace(**names)) for names in (old, between, new)]
    assert sizes == [30, 40, 40]
    context = Recorder(update_device_memory_size_for_shapes=20)
    assert trt_api.workspace_bytes(SimpleNamespace(**new), context) == 20
    assert trt_api.workspace_bytes(SimpleNamespace(**old), SimpleNamespace()) == 30
