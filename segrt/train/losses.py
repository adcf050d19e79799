"""Losses: nnU-Net's Dice with cross-entropy, regions by Dice with binary cross-entropy, the article's mixed loss; deep supervision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError, SpecError
from ..spec import ModelSpec, NetworkSpec, UNetPPSpec, UNetSpec, VNetSpec
from .cross_entropy import IGNORED, ClassWeights, at_least_float32, check_class_weights, class_indices, nll, one_hot
from .dice import over_processes, soft_dice_loss, soft_sums

Parts = dict[str, Tensor]
_OWN = {"bce": (1.0, 0.0), "hybrid": (0.5, 1.0)}  # coefficients of cross-entropy and Dice


def build_loss(
    spec: ModelSpec,
    *,
    kind: Literal["dice_ce", "mixed", "bce", "hybrid"] = "dice_ce",
    batch_dice: bool = False,
    deep_supervision: bool = False,
    distributed: bool = False,
    coefficients: tuple[float, float] = (1.0, 1.0),
    class_weights: ClassWeights = "none",
    dice_activation: Literal["sigmoid", "softmax"] = "sigmoid",
) -> SupervisedLoss:
    """Make the loss a model is trained with.

    Parameters
    ----------
    spec : its head decides between labels and regions, its `ignore` whether voxels may be left out, its network the number of outputs
    kind : "dice_ce" is nnU-Net's (with binary cross-entropy for regions), "mixed" the article's; "bce" is binary cross-entropy alone;
        "hybrid" is UNet++'s, half the cross-entropy minus the soft Dice of each image. (Its article's formula has but the foreground's
        half of the cross-entropy; the authors' own code has both.)
    batch_dice : Dice of the whole batch instead of each sample's
    deep_supervision : the network returns the logits of all its levels
    distributed : several processes share a batch; see `over_processes`
    coefficients : of cross-entropy and Dice; "bce" and "hybrid" have their own
    class_weights : of the cross-entropy; regions have none, and only "mixed" knows those by name, see `MixedLoss`. Each of several
        processes divides by the weights of its own share of the batch
    dice_activation : of "mixed"

    Raises
    ------
    SpecError
        When the model has no foreground, "mixed" or class weights are asked for regions, "bce" for labels that exclude each other, or
        there are not as many weights as classes.

    References
    ----------
    Zhou, Siddiquee, Tajbakhsh, Liang 2018, UNet++ (the hybrid loss), doi:10.1007/978-3-030-00889-5_1.
    """
    regions, ignore = spec.head.activation == "sigmoid", spec.ignore is not None
    coefficients = _OWN.get(kind, coefficients)
    batch_dice = batch_dice and kind != "hybrid"
    shared: dict[str, Any] = {"coefficients": coefficients, "distributed": distributed}
    if not regions and spec.classes < 2:
        raise SpecError(f"head.values: expected background and at least one label, got {spec.head.values}; there is nothing to learn")
    if regions and kind == "mixed":
        raise SpecError("loss: 'mixed' needs labels that exclude each other, this model has regions; use 'dice_ce'")
    if not regions and kind == "bce":
        raise SpecError("loss: 'bce' needs one logit per structure, this model's labels exclude each other; use 'dice_ce' or 'hybrid'")
    numbers = check_class_weights(class_weights, spec, kind)
    if kind == "mixed":
        loss: nn.Module = MixedLoss(spec.classes, class_weights=class_weights, activation=dice_activation, **shared)
    elif regions:
        loss = RegionLoss(batch_dice=batch_dice, ignore=ignore, **shared)
    else:
        loss = DiceCELoss(batch_dice=batch_dice, ignore=ignore, class_weights=numbers, **shared)
    weights = supervision_weights(spec.network) if deep_supervision else (1.0,)
    return SupervisedLoss(loss, weights, distributed=distributed)


def supervision_weights(network: NetworkSpec) -> tuple[float, ...]:
    """Weights of the outputs under deep supervision, finest first, in sum 1.

    nnU-Net halves the weight from level to level and leaves the coarsest out; the outputs of a V-Net and of a UNet++ count alike.
    """
    if isinstance(network, UNetPPSpec):
        return (1 / len(network.heads),) * len(network.heads)
    if isinstance(network, VNetSpec) and network.deep_supervision:
        return (0.25,) * 4
    levels = len(network.features) - 1 if isinstance(network, UNetSpec) else 1
    if levels == 1:
        return (1.0,)
    halves = [0.5**level for level in range(levels - 1)]
    return (*(w / sum(halves) for w in halves), 0.0)


class SupervisedLoss(nn.Module):
    """The weighted sum of one loss over the outputs of a network."""

    def __init__(self, loss: nn.Module, weights: Sequence[float], *, distributed: bool = False) -> None:
        super().__init__()
        self.loss, self.weights, self.distributed = loss, tuple(weights), distributed

    def forward(self, outputs: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> tuple[Tensor, Parts]:
        """Return the loss and its parts.

        Parameters
        ----------
        outputs : logits (N, K, ...), finest first
        targets : as many, of the outputs' sizes: class indices (N, ...) or (N, 1, ...), for regions (N, K, ...) 0 and 1; -1 is ignored
            where the model allows it. A single one serves all outputs that have its size

        Returns
        -------
        loss : ()
        parts : name -> () without gradient; what the loss is made of, weighted likewise

        Raises
        ------
        InputError
            When outputs, weights and targets are not equally many.
        """
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        targets = (targets,) if isinstance(targets, Tensor) else tuple(targets)
        targets = targets * len(outputs) if len(targets) == 1 else targets
        if not len(outputs) == len(targets) == len(self.weights):
            raise InputError(f"the loss weighs {len(self.weights)} outputs, the network gave {len(outputs)} for {len(targets)} targets")
        total, parts = outputs[0].new_zeros((), dtype=at_least_float32(outputs[0].dtype)), dict[str, Tensor]()
        for weight, logits, target in zip(self.weights, outputs, targets, strict=True):
            if weight:
                value, pieces = self.loss(logits, target)
                total = total + weight * value
                parts = {name: parts.get(name, 0) + weight * piece.detach() for name, piece in pieces.items()}
            elif self.distributed:
                # DDP waits for a gradient of every parameter
                total = total + 0 * logits.sum()
        return total, parts


class DiceCELoss(nn.Module):
    """Cross-entropy minus soft Dice of the softmax, background left out of Dice: nnU-Net's loss for labels.

    nnU-Net's coefficients are 1 and 1, and its classes count alike; the parts are given without their coefficients.
    """

    def __init__(
        self,
        *,
        batch_dice: bool = False,
        ignore: bool = False,
        distributed: bool = False,
        coefficients: tuple[float, float] = (1.0, 1.0),
        class_weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.batch_dice, self.ignore, self.distributed = batch_dice, ignore, distributed
        self.coefficients, self.class_weights = coefficients, class_weights

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """(N, K, ...) and class indices (N, ...) or (N, 1, ...) -> loss and parts."""
        target = class_indices(logits, target)
        logs = functional.log_softmax(logits.to(at_least_float32(logits.dtype)), 1)
        weights = None if self.class_weights is None else logs.new_tensor(self.class_weights)
        plain = weights is None and not self.ignore
        ce = functional.nll_loss(logs, target, ignore_index=IGNORED) if plain else nll(logs, target, weights)
        mask = (target != IGNORED)[:, None] if self.ignore else None
        sums = soft_sums(logs[:, 1:].exp(), one_hot(target, logits.shape[1])[:, 1:], mask)
        dice = soft_dice_loss(sums, batch=self.batch_dice, everywhere=self.distributed)
        return self.coefficients[0] * ce + self.coefficients[1] * dice, {"ce": ce, "dice": dice}


class RegionLoss(nn.Module):
    """Binary cross-entropy minus soft Dice of the sigmoid: nnU-Net's loss for regions, which may overlap.

    With `ignore` the cross-entropy is the sum over regions of their means over voxels, without it the mean of these, as in nnU-Net.
    """

    def __init__(
        self,
        *,
        batch_dice: bool = False,
        ignore: bool = False,
        distributed: bool = False,
        coefficients: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.batch_dice, self.ignore, self.distributed, self.coefficients = batch_dice, ignore, distributed, coefficients

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """(N, K, ...) and as many 0 and 1, -1 in all channels where ignored -> loss and parts."""
        logits, truth = logits.to(at_least_float32(logits.dtype)), target > 0
        mask = target[:, :1] != IGNORED if self.ignore else None
        ce = functional.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="mean" if mask is None else "none")
        if mask is not None:
            ce = (ce * mask).sum() / mask.sum().clamp_min(1)
        dice = soft_dice_loss(soft_sums(logits.sigmoid(), truth, mask), batch=self.batch_dice, everywhere=self.distributed)
        return self.coefficients[0] * ce + self.coefficients[1] * dice, {"ce": ce, "dice": dice}


class MixedLoss(nn.Module):
    """The article's weighted cross-entropy plus 1 - Dice, the Dice with squared terms over the whole batch and background included.

    Parameters
    ----------
    classes : number of them, background included
    coefficients : of cross-entropy and Dice
    class_weights : "none"; a number per class; "batch": (1 - p) / p of each batch's own mean probability p per class; "first_batch": those
        of the first batch for good, which is what the article's software does (they are part of `state_dict`)
    activation : what Dice makes of the logits; the article's software takes the sigmoid although its labels exclude each other

    References
    ----------
    Milletari, Navab, Ahmadi 2016, doi:10.1109/3DV.2016.79. Different from the article's software in the default of the class weights.
    """

    frozen: Tensor

    def __init__(
        self,
        classes: int,
        *,
        coefficients: tuple[float, float] = (1.0, 1.0),
        class_weights: ClassWeights = "none",
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
        distributed: bool = False,
    ) -> None:
        super().__init__()
        self.coefficients, self.class_weights, self.activation, self.distributed = coefficients, class_weights, activation, distributed
        if class_weights == "first_batch":
            self.register_buffer("frozen", torch.zeros(classes))

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """(N, K, ...) and class indices (N, ...) or (N, 1, ...) -> loss and parts."""
        target, logits = class_indices(logits, target), logits.to(at_least_float32(logits.dtype))
        mask = (target != IGNORED)[:, None]
        logs = functional.log_softmax(logits, 1)
        ce = nll(logs, target, self._weights(logs.detach().exp(), mask))
        probabilities = (logits.sigmoid() if self.activation == "sigmoid" else logs.exp()) * mask
        truth = one_hot(target, logits.shape[1])
        axes = (0, *range(2, logits.ndim))
        sums = torch.stack(((probabilities * truth).sum(axes), (probabilities**2).sum(axes), truth.sum(axes).to(logits.dtype)))
        intersection, predicted, true = over_processes(sums) if self.distributed else sums
        dice = 1 - (2 * intersection / (predicted + true).clamp_min(1e-6)).mean()
        return self.coefficients[0] * ce + self.coefficients[1] * dice, {"ce": ce, "dice": dice}

    def _weights(self, probabilities: Tensor, mask: Tensor) -> Tensor | None:
        """(K,) weights of the classes in cross-entropy."""
        if isinstance(self.class_weights, tuple):
            return probabilities.new_tensor(self.class_weights)
        if self.class_weights == "none":
            return None
        if self.class_weights == "first_batch" and bool(self.frozen.any()):
            return self.frozen.to(probabilities)
        sums = torch.cat(((probabilities * mask).sum((0, *range(2, mask.ndim))), mask.sum()[None].to(probabilities.dtype)))
        sums = over_processes(sums) if self.distributed else sums
        weights = (sums[-1] - sums[:-1]) / sums[:-1].clamp_min(1e-6)
        if self.class_weights == "first_batch":
            self.frozen = weights.float()
        return weights
