"""Losses against nnU-Net 2.8.1's own numbers, their gradients against finite differences, two processes against one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from commands import end, start
from factories import UNET_3D, make_spec
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from segrt.errors import InputError, SpecError
from segrt.networks import build, initialize
from segrt.spec import UNetSpec, VNetSpec
from segrt.train.losses import DiceCELoss, MixedLoss, RegionLoss, SupervisedLoss, build_loss, supervision_weights

# (loss, batch Dice, ignored voxels) -> what nnU-Net's DC_and_CE_loss and DC_and_BCE_loss give for `logits` and `labels`: the loss, the
# sum of the gradient's magnitudes, and of the gradient times cos(.11 i)
NNUNET = {
    ("ce", False, False): (1.023552, 1.714691, 0.04400706),
    ("ce", False, True): (1.002919, 1.707901, -0.1443717),
    ("bce", False, False): (0.6939903, 0.6136502, -0.01673154),
    ("bce", False, True): (2.995785, 1.618916, -0.03190386),
    ("ce", True, False): (1.02355, 1.714702, 0.04399734),
    ("ce", True, True): (1.002941, 1.707949, -0.1444445),
    ("bce", True, False): (0.6939968, 0.6136479, -0.01672664),
    ("bce", True, True): (2.995594, 1.618845, -0.03189934),
}
SHAPE = (2, 3, 4, 6, 5)


def logits(*shape: int) -> torch.Tensor:
    return torch.from_numpy(3 * np.sin(np.arange(math.prod(shape)) * 0.37)).reshape(shape).float().requires_grad_()


def labels(classes: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy((np.arange(math.prod(shape)) * 7 // 5 % 11 % classes).reshape(shape))


def region_targets(classes: torch.Tensor) -> torch.Tensor:
    """(N, 1, ...) -> (N, 3, ...): labels 1 and 2, 2 alone, 1 alone; -1 stays."""
    regions = torch.cat([(classes == 1) | (classes == 2), classes == 2, classes == 1], 1).int()
    return torch.where(classes == -1, -1, regions)


@pytest.mark.parametrize(("kind", "batch", "ignore"), NNUNET)
def test_losses_equal_nnunets(kind: str, batch: bool, ignore: bool) -> None:
    x, target = logits(*SHAPE), labels(4 if ignore else 3, 2, 1, *SHAPE[2:])
    target = torch.where(target == 3, -1, target)
    if kind == "ce":
        loss, parts = DiceCELoss(batch_dice=batch, ignore=ignore)(x, target)
    else:
        loss, parts = RegionLoss(batch_dice=batch, ignore=ignore)(x, region_targets(target))
    loss.backward()
    ramp = torch.cos(torch.arange(x.numel()).reshape(SHAPE) * 0.11)
    assert x.grad is not None
    found = (float(loss.detach()), float(x.grad.abs().sum()), float((x.grad * ramp).sum()))
    assert found == pytest.approx(NNUNET[kind, batch, ignore], abs=2e-6)
    assert float((parts["ce"] + parts["dice"]).detach()) == pytest.approx(found[0])


def test_deep_supervision_equals_nnunets() -> None:
    spec = UNET_3D.model_copy(update={"features": (4,) * 4})
    loss = SupervisedLoss(DiceCELoss(), supervision_weights(spec))
    sizes = [(4, 6, 5), (2, 3, 5), (1, 2, 5)]
    value, parts = loss([logits(2, 3, *size) for size in sizes], [labels(3, 2, 1, *size) for size in sizes])
    assert float(value.detach()) == pytest.approx(1.452404, abs=2e-6)
    assert float(parts["ce"] + parts["dice"]) == pytest.approx(1.452404, abs=2e-6)
    assert not parts["ce"].requires_grad


@pytest.mark.parametrize(
    ("levels", "expected"), [(1, (1.0,)), (2, (1.0, 0.0)), (3, (2 / 3, 1 / 3, 0.0)), (5, (8 / 15, 4 / 15, 2 / 15, 1 / 15, 0.0))]
)
def test_weights_of_nnunets_levels(levels: int, expected: tuple[float, ...]) -> None:
    assert supervision_weights(UNET_3D.model_copy(update={"features": (4,) * (levels + 1)})) == pytest.approx(expected)


def test_weights_of_a_vnets_outputs() -> None:
    assert supervision_weights(VNetSpec(in_channels=1, out_channels=2, deep_supervision=True)) == (0.25,) * 4
    assert supervision_weights(VNetSpec(in_channels=1, out_channels=2)) == (1.0,)


def test_one_target_serves_the_four_outputs_of_a_vnet() -> None:
    loss = SupervisedLoss(DiceCELoss(), (0.25,) * 4)
    outputs, target = [logits(1, 3, 4, 4, 4) * scale for scale in (1, 2, 3, 4)], labels(3, 1, 4, 4, 4)
    value = loss(outputs, target)[0]
    assert torch.equal(value, loss(outputs, [target] * 4)[0])
    assert float(value.detach()) == pytest.approx(sum(float(DiceCELoss()(x, target)[0].detach()) for x in outputs) / 4)


def test_outputs_and_targets_are_counted() -> None:
    loss = SupervisedLoss(DiceCELoss(), (0.5, 0.5))
    x, target = logits(1, 3, 4, 4, 4), labels(3, 1, 4, 4, 4)
    with pytest.raises(InputError, match="the loss weighs 2 outputs, the network gave 1 for 2 targets"):
        loss(x, (target, target))


def test_the_level_without_weight_is_not_computed_and_gives_ddp_its_gradient() -> None:
    outputs, targets = [logits(1, 3, 4, 4, 4), logits(1, 3, 2, 2, 2)], [labels(3, 1, 4, 4, 4), labels(3, 1, 2, 2, 2)]
    alone = SupervisedLoss(DiceCELoss(), (1.0, 0.0))(outputs, targets)[0]
    alone.backward()
    assert outputs[1].grad is None
    shared = SupervisedLoss(DiceCELoss(), (1.0, 0.0), distributed=True)(outputs, targets)[0]
    shared.backward()
    assert torch.equal(alone, shared)
    assert outputs[1].grad is not None
    assert not outputs[1].grad.any()


def test_build_loss_reads_the_spec() -> None:
    three = {"kernels": ((3, 3, 3),) * 3, "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)), "blocks": (1,) * 3, "decoder_convs": (1,) * 2}
    deep = UNET_3D.model_copy(update={"features": (4, 4, 4), **three})
    plain = build_loss(make_spec(ignore=7), batch_dice=True)
    assert isinstance(plain.loss, DiceCELoss)
    assert (plain.loss.ignore, plain.loss.batch_dice, plain.weights) == (True, True, (1.0,))
    regions = build_loss(make_spec(activation="sigmoid", network=deep), deep_supervision=True)
    assert isinstance(regions.loss, RegionLoss)
    assert (regions.loss.ignore, regions.weights) == (False, (1.0, 0.0))
    mixed = build_loss(make_spec(), kind="mixed", coefficients=(2.0, 3.0), class_weights="batch")
    assert isinstance(mixed.loss, MixedLoss)
    assert (mixed.loss.coefficients, mixed.loss.class_weights) == ((2.0, 3.0), "batch")


def test_what_cannot_be_trained_is_a_sentence() -> None:
    with pytest.raises(SpecError, match="at least one label"):
        build_loss(make_spec(values=(0,)))
    with pytest.raises(SpecError, match="has regions; use 'dice_ce'"):
        build_loss(make_spec(activation="sigmoid"), kind="mixed")


LOSSES: dict[str, Any] = {
    "labels": DiceCELoss(ignore=True),
    "labels, weighted": DiceCELoss(ignore=True, coefficients=(0.3, 2.0), class_weights=(0.2, 1.0, 3.0)),
    "batch": DiceCELoss(batch_dice=True, ignore=True),
    "regions": RegionLoss(ignore=True),
    "regions, batch": RegionLoss(batch_dice=True, ignore=True),
    "mixed": MixedLoss(3),
    "mixed, softmax": MixedLoss(3, activation="softmax", coefficients=(0.3, 2.0)),
    "mixed, weighted": MixedLoss(3, class_weights=(0.2, 1.0, 3.0)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("what", ["every class", "a class is missing", "one class", "ignored", "all ignored"])
def test_gradients_equal_finite_differences(name: str, what: str) -> None:
    x = (logits(2, 3, 2, 3, 2).detach().double() * 0.5).requires_grad_()
    target = labels(3, 2, 1, 2, 3, 2)
    target = {
        "every class": target,
        "a class is missing": torch.where(target == 2, 0, target),
        "one class": torch.ones_like(target),
        "ignored": torch.where(labels(5, 2, 1, 2, 3, 2) == 4, -1, target),
        "all ignored": torch.full_like(target, -1),
    }[what]
    target = region_targets(target) if name.startswith("regions") else target
    assert torch.autograd.gradcheck(lambda y: LOSSES[name](y, target)[0], x, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_voxels_change_nothing(name: str) -> None:
    target = torch.where(labels(5, 2, 1, 4, 4, 4) == 4, -1, labels(3, 2, 1, 4, 4, 4))
    x = logits(2, 3, 4, 4, 4)
    other = torch.where(target == -1, -5 * x.detach() + 3, x.detach())
    regions = name.startswith("regions")
    targets = region_targets(target) if regions else target
    first, second = (LOSSES[name](y, targets)[0] for y in (x, other))
    assert float(first.detach()) == pytest.approx(float(second), abs=1e-6)
    first.backward()
    assert x.grad is not None
    assert not x.grad[(target == -1).expand(x.shape)].any()


@pytest.mark.parametrize("name", LOSSES)
def test_all_ignored_is_no_nan(name: str) -> None:
    target = torch.full((1, 3 if name.startswith("regions") else 1, 2, 2, 2), -1)
    x = logits(1, 3, 2, 2, 2)
    loss, parts = LOSSES[name](x, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert float(parts["ce"].detach()) == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = logits(1, 3, 48, 48, 48).detach().to(dtype)
    target = labels(3, 1, 48, 48, 48)
    for loss, wanted in ((DiceCELoss(), target), (RegionLoss(), region_targets(target[:, None])), (MixedLoss(3), target)):
        half, full = loss(x, wanted)[0], loss(x.float(), wanted)[0]
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_class_weights_follow_each_batch_unless_they_are_to_be_frozen() -> None:
    """Defect (d) of the article's software: weights of the first batch for the whole training."""
    first, second, target = logits(1, 3, 4, 4, 4), logits(1, 3, 4, 4, 4) * 2 + 1, labels(3, 1, 4, 4, 4)
    second = second * torch.tensor([1.0, 0.2, -1.0]).view(1, 3, 1, 1, 1)
    fresh = MixedLoss(3, class_weights="batch")
    following, frozen = MixedLoss(3, class_weights="batch"), MixedLoss(3, class_weights="first_batch")
    assert torch.equal(following(first, target)[0], frozen(first, target)[0])
    assert torch.equal(following(second, target)[0], fresh(second, target)[0])
    kept = frozen(second, target)[0]
    assert not torch.equal(kept, following(second, target)[0])
    resumed = MixedLoss(3, class_weights="first_batch")
    resumed.load_state_dict(frozen.state_dict())
    assert torch.equal(resumed(second, target)[0], kept)
    assert not MixedLoss(3).state_dict()


def test_frozen_class_weights_are_those_of_medicalseg() -> None:
    p = logits(1, 3, 4, 4, 4).detach().double().softmax(1).transpose(0, 1).flatten(1).numpy()
    loss = MixedLoss(3, class_weights="first_batch")
    loss(logits(1, 3, 4, 4, 4), labels(3, 1, 4, 4, 4))
    assert loss.frozen.numpy() == pytest.approx((1 - p).sum(1) / p.sum(1), rel=1e-5)


def learn(rank: int, world: int, folder: str) -> None:
    """Four steps of one process of `world`; the first writes the common losses to losses<world>.json."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world)
    three: dict[str, Any] = {"kernels": ((3, 3, 3),) * 3, "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)), "blocks": (1,) * 3}
    spec = UNetSpec(family="plain_unet", dimensions=3, in_channels=1, out_channels=3, features=(4, 6, 8), decoder_convs=(1,) * 2, **three)
    network = build(spec, deep_supervision=True)
    initialize(network, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(4, 1, 8, 8, 8, generator=generator)
    targets = [torch.randint(0, 3, (4, 1, n, n, n), generator=generator) for n in (8, 4)]
    loss = SupervisedLoss(DiceCELoss(batch_dice=True, distributed=world > 1), supervision_weights(spec), distributed=world > 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    model = DistributedDataParallel(network) if world > 1 else network
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        value, _ = loss(model(data[share]), [target[share] for target in targets])
        value.backward()
        optimizer.step()
        value = value.detach() / world
        distributed.all_reduce(value)
        values.append(float(value))
    if rank == 0:
        Path(folder, f"losses{world}.json").write_text(json.dumps(values))
    distributed.destroy_process_group()


def test_two_processes_learn_as_one_does(tmp_path: Path) -> None:
    """Batch Dice over both processes, DDP's mean of the gradients: the losses of four steps are those of one process."""
    for world in (1, 2):
        assert end([start(learn, rank, world, str(tmp_path)) for rank in range(world)]) == [0] * world
    one, two = (json.loads((tmp_path / f"losses{world}.json").read_text()) for world in (1, 2))
    assert one == pytest.approx(two, abs=2e-6)
    assert one[-1] < one[0]


# ------------------------------------------------------------------ coefficients and class weights against their definition
def _by_definition(name: str, x: np.ndarray, target: np.ndarray, weights: tuple[float, ...]) -> tuple[float, float]:
    """Cross-entropy and Dice part in float64, voxel by voxel; x (N, K, V), target (N, V) with -1 left out."""
    samples, classes, voxels = x.shape
    probabilities = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    total = share = 0.0
    for n in range(samples):
        for v in range(voxels):
            if (k := int(target[n, v])) >= 0:
                total -= weights[k] * math.log(probabilities[n, k, v])
                share += weights[k]
    known = target >= 0
    truth = np.stack([target == k for k in range(classes)], 1).astype(float)
    if name == "mixed":
        p = 1 / (1 + np.exp(-x)) * known[:, None]
        dice = 2 * (p * truth).sum((0, 2)) / (p**2 + truth).sum((0, 2))
        return total / share, 1 - dice.mean()
    p = (probabilities * known[:, None])[:, 1:]
    dice = (2 * (p * truth[:, 1:]).sum(2) + 1e-5) / (p.sum(2) + truth[:, 1:].sum(2) + 1e-5)
    return total / share, -dice.mean()


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 1.0, 3.0), (0.0, 2.0, 1.0)])
@pytest.mark.parametrize("coefficients", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (2.5, 0.0)])
@pytest.mark.parametrize("kind", ["dice_ce", "mixed"])
def test_coefficients_and_weights_equal_their_definition(
    kind: Literal["dice_ce", "mixed"], coefficients: tuple[float, float], weights: tuple[float, ...], ignore: bool
) -> None:
    x, target = logits(2, 3, 2, 3, 4).detach().double(), labels(4 if ignore else 3, 2, 1, 2, 3, 4)
    target = torch.where(target == 3, -1, target)
    spec = make_spec(ignore=7 if ignore else None)
    loss, parts = build_loss(spec, kind=kind, coefficients=coefficients, class_weights=weights)(x, target)
    ce, dice = _by_definition(kind, x.reshape(2, 3, -1).numpy(), target.reshape(2, -1).numpy(), weights)
    assert float(parts["ce"]) == pytest.approx(ce, rel=1e-12)
    assert float(parts["dice"]) == pytest.approx(dice, rel=1e-12)
    assert float(loss) == pytest.approx(coefficients[0] * ce + coefficients[1] * dice, rel=1e-12)


@pytest.mark.parametrize("coefficients", [(0.3, 2.0), (1.0, 0.0)])
def test_coefficients_of_regions(coefficients: tuple[float, float]) -> None:
    x, target = logits(2, 3, 2, 3, 4).detach().double(), region_targets(labels(3, 2, 1, 2, 3, 4))
    loss, parts = build_loss(make_spec(activation="sigmoid"), coefficients=coefficients)(x, target)
    p, y = x.sigmoid(), (target > 0).double()
    ce = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dice = -((2 * (p * y).sum((2, 3, 4)) + 1e-5) / (p.sum((2, 3, 4)) + y.sum((2, 3, 4)) + 1e-5)).mean()
    assert float(parts["ce"]) == pytest.approx(float(ce), rel=1e-12)
    assert float(loss) == pytest.approx(float(coefficients[0] * ce + coefficients[1] * dice), rel=1e-12)


def test_dice_of_the_softmax_where_it_is_asked_for() -> None:
    loss = build_loss(make_spec(), kind="mixed", dice_activation="softmax").loss
    assert isinstance(loss, MixedLoss)
    assert loss.activation == "softmax"


def test_class_weights_that_do_not_fit_are_a_sentence() -> None:
    with pytest.raises(SpecError, match=r"expected one number for each of the 3 classes \(background first\), not all 0, got \(1.0, 2.0\)"):
        build_loss(make_spec(), class_weights=(1.0, 2.0))
    with pytest.raises(SpecError, match="not all 0"):
        build_loss(make_spec(), class_weights=(0.0, 0.0, 0.0))
    with pytest.raises(SpecError, match="'batch' belongs to loss 'mixed'"):
        build_loss(make_spec(), class_weights="batch")
    with pytest.raises(SpecError, match="this model has regions, which are learned one by one"):
        build_loss(make_spec(activation="sigmoid"), class_weights=(1.0, 2.0, 3.0))
