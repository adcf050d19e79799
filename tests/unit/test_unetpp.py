"""UNet++ against the published counts and a recursive re-statement of its formula, and everything that runs networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from factories import make_spec
from torch.nn import functional as f

from segrt.bundle import Bundle
from segrt.engines import open_engine
from segrt.errors import BuildError, InputError, SpecError
from segrt.export.build import build_model
from segrt.memory import engine_bytes
from segrt.networks import build, build_empty, count_flops, count_parameters, initialize, load_weights, supervision_scales
from segrt.predictor import Predictor
from segrt.spec import UNetPPSpec, parse_spec
from segrt.train.losses import supervision_weights

KERAS: dict[str, Any] = {"norm": "none", "up": "transposed", "dropout": 0.5, "in_channels": 1}
WIDE = (35, 70, 140, 280, 560)


def spec(**changes: Any) -> UNetPPSpec:
    return UNetPPSpec(**({"family": "unetpp", "in_channels": 3, "out_channels": 1} | changes))


def small(**changes: Any) -> UNetPPSpec:
    return spec(**({"features": (4, 6, 8, 10, 12), "deep_supervision": True} | changes))


def trained(network: UNetPPSpec, seed: int = 0) -> torch.nn.Module:
    """A network whose every number differs from its start, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    made = build(network)
    initialize(made, generator=generator)
    for name, tensor in made.state_dict().items():
        if "norm" in name and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.3, generator=generator)
    return made


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        # 4uiiurz1's NestedUNet and UNet
        ({}, 9_163_329),
        ({"deep_supervision": True}, 9_163_428),
        ({"in_channels": 1}, 9_162_753),
        ({"in_channels": 1, "deep_supervision": True}, 9_162_852),
        ({"level": 1}, 103_041),
        ({"level": 2}, 519_105),
        ({"level": 3}, 2_236_161),
        ({"family": "unet"}, 7_852_545),
        ({"family": "unet", "in_channels": 1}, 7_851_969),
        # the authors' Keras code
        (KERAS, 9_041_601),
        (KERAS | {"level": 1}, 100_961),
        (KERAS | {"level": 2}, 511_105),
        (KERAS | {"level": 3}, 2_204_961),
        (KERAS | {"family": "unet"}, 7_759_521),
        (KERAS | {"family": "unet", "features": WIDE}, 9_282_246),
    ],
)
def test_parameter_counts_are_the_published_ones(changes: dict[str, Any], parameters: int) -> None:
    assert count_parameters(build_empty(spec(**changes))) == parameters


@pytest.mark.parametrize(("side", "nested", "plain"), [(96, 9.70, 3.92), (224, 52.81, 21.36), (256, 68.97, 27.90), (512, 275.88, 111.6)])
def test_operations_are_the_published_ones(side: int, nested: float, plain: float) -> None:
    assert count_flops(spec(), (1, side, side)) / 1e9 == pytest.approx(nested, abs=0.005)
    assert count_flops(spec(family="unet"), (1, side, side)) / 1e9 == pytest.approx(plain, abs=0.005)


def test_nodes_of_a_level_are_those_its_head_needs() -> None:
    assert len(spec().nodes) == 15
    assert set(spec(level=1).nodes) == {(0, 0), (1, 0), (0, 1)}
    assert set(spec(level=2).nodes) == {(i, j) for i in range(3) for j in range(3) if i + j <= 2}
    assert set(spec(family="unet").nodes) == {(i, 0) for i in range(5)} | {(i, 4 - i) for i in range(4)}


def restated(weights: dict[str, torch.Tensor], x: torch.Tensor, i: int, j: int, *, linear: bool = True) -> torch.Tensor:
    """Node (i, j) from the formula, every node computed anew for each that reads it."""
    flat = x.ndim == 4
    if j == 0:
        read = x if i == 0 else (f.max_pool2d if flat else f.max_pool3d)(restated(weights, x, i - 1, 0, linear=linear), 2)
    else:
        below = restated(weights, x, i + 1, j - 1, linear=linear)
        if linear:
            sides = [2 * n for n in below.shape[2:]]
            below = f.interpolate(below, size=sides, mode="bilinear" if flat else "trilinear", align_corners=True)
        else:
            up = f.conv_transpose2d if flat else f.conv_transpose3d
            below = up(below, weights[f"up.{i}_{j}.weight"], weights[f"up.{i}_{j}.bias"], stride=2)
        read = torch.cat([*(restated(weights, x, i, k, linear=linear) for k in range(j)), below], 1)
    for n in (1, 2):
        name = f"nodes.{i}_{j}"
        read = (f.conv2d if flat else f.conv3d)(read, weights[f"{name}.conv{n}.weight"], weights[f"{name}.conv{n}.bias"], padding=1)
        if f"{name}.norm{n}.weight" in weights:
            keys = ("running_mean", "running_var", "weight", "bias")
            read = f.batch_norm(read, *(weights[f"{name}.norm{n}.{key}"] for key in keys))
        read = read.relu()
    return read


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (2, 3, 16, 32)),
        ({"dimensions": 3}, (1, 3, 16, 32, 16)),
        ({"norm": "none", "up": "transposed", "dropout": 0.5}, (1, 3, 16, 16)),
        ({"dimensions": 3, "norm": "none", "up": "transposed"}, (1, 3, 16, 16, 16)),
        ({"out_channels": 4}, (1, 3, 16, 16)),
    ],
)
def test_every_head_answers_what_the_formula_says(changes: dict[str, Any], shape: tuple[int, ...]) -> None:
    network, x = trained(small(**changes)), image(*shape)
    weights = network.state_dict()
    linear = changes.get("up") != "transposed"
    with torch.inference_mode():
        expected = [network.heads[str(n)](restated(weights, x, 0, n, linear=linear)) for n in (4, 3, 2, 1)]
        mean = network(x)
        network.deep_supervision = True
        answers = network(x)
    assert [tuple(a.shape) for a in answers] == [(shape[0], changes.get("out_channels", 1), *shape[2:])] * 4
    for answer, wanted in zip(answers, expected, strict=True):
        assert torch.allclose(answer, wanted, atol=1e-5)
    assert torch.allclose(mean, sum(expected) / 4, atol=1e-5)


def test_the_fast_mode_answers_with_the_last_head_alone() -> None:
    network, x = trained(small(mode="fast")), image(1, 3, 16, 16)
    with torch.inference_mode():
        fast = network(x)
        network.deep_supervision = True
        assert torch.equal(fast, network(x)[0])


def test_the_plain_unet_reads_one_node_beside_the_one_below() -> None:
    network, x = trained(small(family="unet", deep_supervision=False)), image(1, 3, 16, 16)
    with torch.inference_mode():
        down = [network.nodes["0_0"](x)]
        for i in range(1, 5):
            down.append(network.nodes[f"{i}_0"](f.max_pool2d(down[-1], 2)))
        y = down[4]
        for i in (3, 2, 1, 0):
            below = f.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
            y = network.nodes[f"{i}_{4 - i}"](torch.cat([down[i], below], 1))
        assert torch.allclose(network(x), network.heads["4"](y), atol=1e-6)


@pytest.mark.parametrize("mode", ["accurate", "fast"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_pruned_network_answers_like_those_heads_of_the_whole_one(level: int, mode: str) -> None:
    whole_spec = small(mode=mode)
    whole, x = trained(whole_spec), image(1, 3, 16, 16)
    pruned = build(whole_spec.pruned(level))
    load_weights(pruned, whole.state_dict(), whole=whole_spec)
    assert set(pruned.state_dict()) < set(whole.state_dict())
    with torch.inference_mode():
        answer = pruned(x)
        whole.deep_supervision = True
        heads = whole(x)[::-1]  # the first level's first
    assert torch.allclose(answer, heads[level - 1] if mode == "fast" else sum(heads[:level]) / level, atol=1e-5)
    assert len(pruned.heads) == (1 if mode == "fast" else level)


def test_weights_of_a_level_are_checked_like_the_whole_networks() -> None:
    whole_spec = small()
    weights = dict(trained(whole_spec).state_dict())
    pruned = build(whole_spec.pruned(1))
    with pytest.raises(BuildError, match=r"tensor nodes.4_0.conv1.weight is missing"):
        load_weights(pruned, {k: v for k, v in weights.items() if k != "nodes.4_0.conv1.weight"}, whole=whole_spec)
    with pytest.raises(BuildError, match=r"tensor extra has no place"):
        load_weights(pruned, weights | {"extra": torch.zeros(1)}, whole=whole_spec)


def test_what_no_network_can_be_is_refused() -> None:
    with pytest.raises(SpecError, match="has one head only; plan a UNet\\+\\+ with deep_supervision=True"):
        build(spec(), deep_supervision=True)
    with pytest.raises(SpecError, match=r"network.level: expected one of L4 \(those with a head\), got L2"):
        spec().pruned(2)
    with pytest.raises(InputError, match="the input of this unetpp: expected multiples of 16 on axis y, got 24"):
        build(small())(torch.zeros(1, 3, 24, 16))
    values = make_spec(values=(1,), activation="sigmoid", patch=(1, 16, 16), network=small(in_channels=1)).model_dump(mode="json")
    values["network"] |= {"family": "unet"}
    with pytest.raises(SpecError, match="a plain U-Net has one head only"):
        parse_spec(values)
    values["network"] |= {"family": "unetpp"}
    values["inference"]["patch"] = [1, 16, 40]
    with pytest.raises(SpecError, match=r"inference.patch: expected multiples of 16 on axis x, got 40"):
        parse_spec(values)


def test_deep_supervision_gives_equal_outputs_of_full_size_in_training() -> None:
    network = build(small(), deep_supervision=True)
    assert network.training
    assert len(network(image(2, 3, 16, 16))) == 4
    assert supervision_scales(small()) == ((1.0, 1.0, 1.0),) * 4
    assert supervision_weights(small()) == (0.25,) * 4
    assert supervision_scales(small(deep_supervision=False)) == ((1.0, 1.0, 1.0),)


def bundle_of(path: Path, network: UNetPPSpec, **changes: Any) -> Bundle:
    binary = network.out_channels == 1
    patch = (1, 32, 32) if network.dimensions == 2 else (16, 16, 16)
    options: dict[str, Any] = {"values": (1,), "activation": "sigmoid"} if binary else {"values": tuple(range(network.out_channels))}
    model = make_spec(patch=patch, network=network, **(options | changes))
    return Bundle.create(path, model, weights={"0": trained(network).state_dict()})


@pytest.mark.parametrize("changes", [{}, {"dimensions": 3}, {"out_channels": 3, "mode": "fast"}, {"up": "transposed", "norm": "none"}])
def test_every_engine_of_the_cpu_gives_the_same_labels(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = small(in_channels=1, **changes)
    bundle, (report,) = build_model(bundle_of(tmp_path / "bundle", network).path, device="cpu")
    assert report["members"]["0"]["passed"]
    patches = image(2, 1, *bundle.spec.inference.patch).numpy()
    wanted = open_engine(bundle, "0", backend="pytorch")(patches)
    assert wanted.shape == (2, network.out_channels, *bundle.spec.inference.patch)
    for backend in ("openvino", "onnxruntime"):
        assert np.allclose(open_engine(bundle, "0", backend=backend)(patches), wanted, atol=1e-4), backend


def test_the_onnx_file_of_the_fast_mode_has_no_unused_head(tmp_path: Path) -> None:
    for mode, heads in (("fast", 1), ("accurate", 4)):
        bundle, _ = build_model(bundle_of(tmp_path / mode, small(in_channels=1, mode=mode)).path, device="cpu", backend="onnxruntime")
        graph = onnx.load(bundle.onnx_path("0")).graph
        assert sum(node.op_type == "Conv" for node in graph.node) == 2 * 15 + heads


def test_a_binary_model_paints_where_its_logit_is_positive(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", small(in_channels=1))
    pixels = image(1, 32, 32).numpy()
    with Predictor(bundle, backend="pytorch", device="cpu") as predictor:
        labels = predictor((pixels, (1.0, 1.0, 1.0))).labels
    logits = open_engine(bundle, "0", backend="pytorch")(pixels[None, None])
    assert 0 < labels.sum() < labels.size
    assert np.array_equal(labels, (logits[0, 0] > 0).astype(np.uint8))


def test_memory_is_estimated_from_above() -> None:
    model = make_spec(values=(1,), activation="sigmoid", patch=(1, 256, 256), network=spec(in_channels=1, deep_supervision=True))
    one = model.network.pruned(1)
    assert engine_bytes(model.model_copy(update={"network": one}), 1) < engine_bytes(model, 1) < 2**31
