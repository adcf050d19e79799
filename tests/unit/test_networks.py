"""Networks against the numbers of dynamic_network_architectures 0.4.4."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_heads import headed

from segrt.errors import BuildError, SpecError
from segrt.export.importers.nnunetv2 import read_model
from segrt.export.importers.plans import model_spec
from segrt.networks import build, build_empty, count_parameters, freeze_unread, initialize, load_weights, supervision_scales
from segrt.spec import Head, NetworkSpec, OnnxNetwork, UNetPPSpec, UNetSpec, VNetSpec

SMALL: dict[str, Any] = {
    "family": "plain_unet",
    "dimensions": 3,
    "in_channels": 2,
    "out_channels": 3,
    "features": (4, 6, 6),
    "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "blocks": (1, 2, 2),
    "decoder_convs": (2, 1),
}

# Plans file and configuration -> parameters of the real network with all its heads.
COUNTS = {
    "Dataset601_AmosLike/ResEncL.json:2d": 140045360,
    "Dataset601_AmosLike/ResEncL.json:3d_fullres": 141237152,
    "Dataset601_AmosLike/ResEncM.json:3d_lowres": 102278544,
    "Dataset601_AmosLike/ResEncM.json:3d_fullres": 101692816,
    "Dataset601_AmosLike/ResEncM.json:3d_cascade_fullres": 101697136,
    "Dataset601_AmosLike/nnUNetPlans.json:2d": 46352880,
    "Dataset601_AmosLike/nnUNetPlans.json:3d_lowres": 31124368,
    "Dataset601_AmosLike/nnUNetPlans.json:3d_fullres": 30759824,
    "Dataset601_AmosLike/nnUNetPlans.json:3d_cascade_fullres": 30764144,
    "Dataset602_AmosThin/ResEncL.json:3d_lowres": 102361040,
    "Dataset602_AmosThin/ResEncL.json:3d_fullres": 102278544,
    "Dataset602_AmosThin/ResEncM.json:3d_lowres": 101951440,
    "Dataset602_AmosThin/nnUNetPlans.json:3d_lowres": 30797264,
    "Dataset602_AmosThin/nnUNetPlans.json:3d_fullres": 31124368,
    "Dataset602_AmosThin/nnUNetPlans.json:3d_cascade_fullres": 31128688,
    "Dataset603_Hippocampus/ResEncM.json:2d": 8728681,
    "Dataset603_Hippocampus/ResEncL.json:3d_fullres": 25895593,
    "Dataset603_Hippocampus/nnUNetPlans.json:2d": 1928489,
    "Dataset603_Hippocampus/nnUNetPlans.json:3d_fullres": 5603177,
    "Dataset605_CardiacAniso/ResEncM.json:2d": 71818580,
    "Dataset605_CardiacAniso/ResEncL.json:3d_fullres": 100945876,
    "Dataset605_CardiacAniso/nnUNetPlans.json:2d": 20621076,
    "Dataset605_CardiacAniso/nnUNetPlans.json:3d_fullres": 30012884,
    "Dataset606_BrainFour/ResEncM.json:3d_fullres": 102353972,
    "Dataset606_BrainFour/nnUNetPlans.json:3d_fullres": 31199796,
    "Dataset608_Png/ResEncL.json:2d": 105917388,
    "Dataset608_Png/nnUNetPlans.json:2d": 33472396,
    "Dataset609_Iso15/ResEncL.json:3d_fullres": 102443150,
    "Dataset609_Iso15/ResEncM.json:3d_fullres": 102033550,
    "Dataset609_Iso15/nnUNetPlans.json:2d": 33646980,
    "Dataset609_Iso15/nnUNetPlans.json:3d_fullres": 30879374,
}

# Trained model and fold -> what the real network answers to sin(0.37 i): mean of |logit|, then six logits evenly spread over the output.
ANSWERS = {
    "S1_hippocampus_3d/nnUNetTrainer__nnUNetPlans__3d_fullres/0": (1.82884, 2.2433, 3.649, -0.6546, -0.6645, -2.9512, -3.6787),
    "S1_hippocampus_3d/nnUNetTrainer__nnUNetPlans__3d_fullres/1": (1.26782, 3.3222, 6.0175, -1.9093, -1.7198, -0.7321, 0.838),
    "S2_organs_ct/nnUNetTrainer__nnUNetPlans__3d_fullres/0": (2.46412, 6.3903, -2.7154, 0.5783, -0.1031, 1.0172, -4.6217),
    "S3_cascade_ct/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres/0": (1.01717, 2.224, -2.1077, -0.553, -0.2114, 1.888, -0.5707),
    "S3_cascade_ct/nnUNetTrainer__nnUNetPlans__3d_lowres/0": (1.6958, 5.1232, -5.3554, -0.294, -1.3866, -1.1029, -1.9109),
    "S4_aniso_ct/nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres/0": (1.60896, 5.4275, -0.9257, 0.9038, -3.4873, -0.8489, -1.5148),
    "S5_slices_2d/nnUNetTrainer__nnUNetPlans__2d/0": (1.75439, 2.1033, -2.1898, -2.4113, -3.8663, -2.6111, -2.2464),
    "S6_png_2d/nnUNetTrainer__nnUNetPlans__2d/0": (2.04925, 9.2146, 1.3537, 0.5966, -2.8918, -2.9193, -0.7027),
    "S7_regions_mr/nnUNetTrainer__nnUNetPlans__3d_fullres/0": (4.4747, -5.0252, -6.0113, -5.6652, -4.9031, -4.0332, -2.5207),
}

# The same under deep supervision, every output finest first: its shape, mean of |logit|, four logits evenly spread.
SUPERVISED = {
    "S1_hippocampus_3d/nnUNetTrainer__nnUNetPlans__3d_fullres/0": [
        ((40, 40, 32), 1.82884, 2.2433, 3.9154, -0.3899, -3.6787),
        ((20, 20, 16), 0.5537, 0.1444, 0.3204, 0.1037, 0.3668),
    ],
    "S4_aniso_ct/nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres/0": [
        ((12, 64, 64), 1.60896, 5.4275, 0.1693, -6.7525, -1.5148),
        ((12, 32, 32), 0.83189, 3.689, 0.8205, 2.0303, -1.2198),
        ((6, 16, 16), 0.74109, 2.0268, -1.0906, 1.0119, 1.9344),
    ],
    "S6_png_2d/nnUNetTrainer__nnUNetPlans__2d/0": [
        ((128, 160), 2.04925, 9.2146, 3.3495, -2.8603, -0.7027),
        ((64, 80), 0.48781, 1.3838, 0.0762, 0.2282, -0.1251),
        ((32, 40), 0.50838, -0.1897, 0.1299, 0.2639, 0.047),
    ],
}


def spec(**changes: Any) -> UNetSpec:
    return UNetSpec(**(SMALL | changes))


def flat(**changes: Any) -> UNetSpec:
    return spec(**({"dimensions": 2, "kernels": ((3, 3),) * 3, "strides": ((1, 1), (2, 2), (1, 2))} | changes))


@pytest.mark.parametrize("key", COUNTS)
def test_parameter_counts_are_those_of_the_real_networks(golden: Path, key: str) -> None:
    file, configuration = key.split(":")
    plans, dataset = (json.loads((golden / "plans" / name).read_text()) for name in (file, f"{file.split('/')[0]}/dataset.json"))
    network = model_spec(plans, dataset, configuration, members=("0",)).network
    assert count_parameters(build_empty(network)) == COUNTS[key]


def answer(golden: Path, key: str, *, deep_supervision: bool = False) -> Any:
    """What the trained model's network makes of sin(0.37 i)."""
    dataset, folder, fold = key.split("/")
    model = read_model(golden / dataset / "model" / folder, folds=(fold,))
    network = build(model.spec.network, deep_supervision=deep_supervision)
    load_weights(network, model.weights[fold])
    shape = (1, model.spec.in_channels, *model.spec.inference.patch[3 - model.spec.dimensions :])
    patch = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.37).float().reshape(shape)
    with torch.inference_mode():
        return network(patch)


@pytest.mark.parametrize("key", ANSWERS)
def test_trained_networks_answer_like_the_real_ones(golden: Path, key: str) -> None:
    logits = answer(golden, key).flatten()
    picked = logits[torch.linspace(0, len(logits) - 1, 6).long()]
    # Other CPUs sum in another order; on one machine the two networks are equal bit for bit.
    assert [float(logits.abs().mean()), *picked.tolist()] == pytest.approx(ANSWERS[key], abs=5e-4)


@pytest.mark.parametrize("key", SUPERVISED)
def test_every_level_answers_like_the_real_ones(golden: Path, key: str) -> None:
    levels = answer(golden, key, deep_supervision=True)
    assert [tuple(level.shape[2:]) for level in levels] == [expected[0] for expected in SUPERVISED[key]]
    for level, (_, *expected) in zip(levels, SUPERVISED[key], strict=True):
        picked = level.flatten()[torch.linspace(0, level.numel() - 1, 4).long()]
        assert [float(level.abs().mean()), *picked.tolist()] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    "network",
    [
        spec(),
        spec(family="residual_unet"),
        spec(norm="batch", nonlinearity="relu"),
        spec(norm="none", conv_bias=False),
        spec(norm_affine=False, dropout=0.3),
        spec(family="residual_unet", dropout=0.3),
    ],
)
def test_logits_have_the_size_of_the_input(network: UNetSpec) -> None:
    with torch.inference_mode():
        assert build(network)(torch.zeros(2, 2, 4, 8, 12)).shape == (2, 3, 4, 8, 12)


def test_2d() -> None:
    for family in ("plain_unet", "residual_unet"):
        assert build(flat(family=family))(torch.zeros(1, 2, 4, 8)).shape == (1, 3, 4, 8)


def test_deep_supervision_returns_every_level_finest_first() -> None:
    network = build(spec(), deep_supervision=True)
    patch = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = network(patch)
    assert isinstance(levels, tuple)
    assert network.training
    assert [tuple(level.shape[2:]) for level in levels] == [(4, 8, 8), (4, 4, 4)]
    assert supervision_scales(spec()) == ((1, 1, 1), (1, 1 / 2, 1 / 2))
    assert supervision_scales(flat()) == ((1, 1), (1 / 2, 1 / 2))
    network.deep_supervision = False
    assert torch.equal(network(patch), levels[0])


def test_every_parameter_learns_under_deep_supervision() -> None:
    network = build(spec(family="residual_unet"), deep_supervision=True)
    sum(level.square().mean() for level in network(torch.randn(2, 2, 4, 8, 8))).backward()
    # A bias before instance normalisation cancels out; its gradient is there and about zero.
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


PP: dict[str, Any] = {"family": "unetpp", "in_channels": 2, "out_channels": 3, "features": (2, 2, 2, 2, 2), "deep_supervision": True}


@pytest.mark.parametrize(
    ("network", "unread"),
    [
        (spec(), {"heads.0"}),
        (VNetSpec(in_channels=2, out_channels=3, width=1 / 16, deep_supervision=True), {"heads.0", "heads.1", "heads.2"}),
        (UNetPPSpec(**PP, mode="fast"), {"heads.1", "heads.2", "heads.3"}),
        (UNetPPSpec(**PP), set()),
    ],
    ids=lambda value: getattr(value, "family", ""),
)
def test_without_deep_supervision_heads_that_nobody_reads_learn_nothing(network: NetworkSpec, unread: set[str]) -> None:
    patch = torch.randn(2, 2, *(32,) * network.dimensions, generator=torch.Generator().manual_seed(0))
    for supervised in (True, False):
        made = build(network, deep_supervision=supervised).train()
        freeze_unread(made)
        outputs = made(patch)
        sum(level.square().mean() for level in (outputs if supervised else (outputs,))).backward()
        without = {name for name, p in made.named_parameters() if p.grad is None}
        assert without == {name for name, p in made.named_parameters() if not p.requires_grad}
        assert {name.rpartition(".")[0] for name in without} == (set() if supervised else unread)


def test_dropout_works_in_training_only() -> None:
    network = build(flat(dropout=0.5))
    patch = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(patch), network(patch))
    network.train()
    assert not torch.equal(network(patch), network(patch))


@pytest.mark.parametrize("family", ["plain_unet", "residual_unet"])
def test_a_training_starts_as_nnunet_starts_it(family: str) -> None:
    network = build(spec(family=family, features=(32, 64, 64)))
    for tensor in network.parameters():
        torch.nn.init.constant_(tensor, 7)
    initialize(network, generator=torch.Generator().manual_seed(0))
    deep, up = network.encoder[2][0], network.up[0]
    convolution = deep.conv if family == "plain_unet" else deep.conv1.conv
    assert float(convolution.weight.detach().std()) == pytest.approx((2 / (1 + 0.01**2) / (27 * 64)) ** 0.5, rel=0.02)
    # torch counts what a transposed convolution writes: 64 features through 2x2x2
    assert float(up.weight.detach().std()) == pytest.approx((2 / (1 + 0.01**2) / (8 * 64)) ** 0.5, rel=0.03)
    assert {float(t.sum()) for name, t in network.state_dict().items() if name.endswith("bias")} == {0.0}
    norms = {name: float(t.mean()) for name, t in network.state_dict().items() if name.endswith("norm.weight")}
    zero = {name for name, value in norms.items() if value == 0}
    assert {value for value in norms.values() if value} == {1.0}
    assert zero == ({name for name in norms if ".conv2." in name} if family == "residual_unet" else set())


def test_a_start_is_the_same_again_from_the_same_numbers() -> None:
    networks = [build(spec()) for _ in range(2)]
    for network in networks:
        initialize(network, generator=torch.Generator().manual_seed(3))
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("changes", [{"norm": "none"}, {"norm_affine": False}, {"norm": "batch"}])
def test_every_kind_of_normalisation_starts(changes: dict[str, Any]) -> None:
    network = build(spec(family="residual_unet", **changes))
    initialize(network)
    assert torch.isfinite(network(torch.ones(1, 2, 4, 8, 8))).all()


def test_a_shared_tensor_counts_once() -> None:
    network = build(flat())
    before = count_parameters(network)
    network.again = network.heads[0]
    assert count_parameters(network) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2))}, "first stage"),
        ({"features": (4, 0, 6)}, "from 1 to 65536"),
        ({"blocks": (0, 1, 1)}, "1 to 1000 blocks"),
        ({"kernels": ((2, 3, 3),) * 3}, "odd sizes"),
        ({"features": (4,), "kernels": ((3, 3, 3),), "strides": ((1, 1, 1),), "blocks": (1,), "decoder_convs": ()}, "two stages"),
    ],
)
def test_impossible_numbers(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        build(spec(**changes))


def test_a_network_known_only_as_onnx_is_not_built() -> None:
    with pytest.raises(SpecError, match="'onnx'"):
        build(OnnxNetwork(in_channels=1, out_channels=2))


def test_weights_that_do_not_fit_are_named() -> None:
    network = build(flat())
    weights = dict(network.state_dict())
    load_weights(network, weights)
    with pytest.raises(BuildError, match=r"w.pth: tensor heads.1.bias has shape \(5,\), the plans ask for \(3,\)"):
        load_weights(network, weights | {"heads.1.bias": torch.zeros(5)}, where="w.pth")
    with pytest.raises(BuildError, match="tensor extra has no place"):
        load_weights(network, weights | {"extra": torch.zeros(1)})
    del weights["up.0.weight"]
    with pytest.raises(BuildError, match=r"up\.0\.weight is missing"):
        load_weights(network, weights)


def test_heads_give_probabilities_and_labels(golden: Path) -> None:
    model = read_model(golden / "S7_regions_mr/model/nnUNetTrainer__nnUNetPlans__3d_fullres")
    logits = torch.tensor([[2.0, -1.0, 2.0, -3.0], [-1.0, 1.0, 3.0, -3.0]])[None]
    painted = headed(logits, model.spec, "argmax")
    assert painted.tolist() == [[1, 2, 2, 0]]
    assert headed(logits, model.spec, "softmax") == pytest.approx(torch.sigmoid(logits).numpy())
    gaps = model.spec.model_copy(update={"head": Head(activation="softmax", values=(0, 7))})
    assert headed(logits, gaps, "argmax").tolist() == [[0, 7, 7, 0]]
    assert float(headed(logits, gaps, "softmax").sum()) == pytest.approx(4)
