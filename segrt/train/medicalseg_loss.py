"""MedicalSeg's loss as fields of a `TrainConfig`; part of the import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .medicalseg_section import Section

_LOSSES = "MixedLoss, CrossEntropyLoss, DiceLoss, DC_and_CE_loss or MultipleLoss of one of these"


class _Loss(NamedTuple):
    """What one loss of the file is: its type there, segrt's kind, the coefficients of cross-entropy and Dice, further fields."""

    named: str
    kind: str
    coefficients: tuple[float, float]
    fields: Mapping[str, Any]


def read_loss(section: Section, *, heads: int) -> None:
    """Take `loss` of a network with so many outputs."""
    notes, coefficients = section.notes, section.numbers("coef")
    losses = [_read_one(part) for part in section.sections("types")]
    section.close()
    name = section.name("types")
    if not losses or not coefficients or len(losses) not in (1, len(coefficients)):
        expected = f"one loss, or one for each of the {len(coefficients)} numbers in coef"
        notes.refuse(name, f"{len(losses)} losses", expected, "loss", flag="--loss")
        return
    if any(part is None for part in losses):
        return  # refused and told
    first = losses[0]
    assert first is not None
    if any(part != first for part in losses):
        notes.warn(name, [part.named for part in losses if part], f"every output has the first loss, {first.named}")
    factor = _outer(section, coefficients, heads)
    both = (first.coefficients[0] * factor, first.coefficients[1] * factor)
    told = f"{first.kind}: {both[0]:g} x cross-entropy + {both[1]:g} x Dice"
    notes.use(name, first.named, told, loss=first.kind, coefficients=both, **first.fields)


def _outer(section: Section, coefficients: tuple[float, ...], heads: int) -> float:
    """The factor that `coef` puts on the loss; of several outputs segrt chooses the weights."""
    if len(coefficients) == 1:
        return coefficients[0]
    key = section.name("coef")
    if heads > 1 and set(coefficients) == {1 / heads} and len(coefficients) == heads:
        section.notes.use(key, list(coefficients), f"the {heads} outputs count alike")
        return 1.0
    weights = f"{heads} outputs that count alike" if heads > 1 else "one output, and its coefficient is 1"
    section.notes.warn(key, list(coefficients), f"segrt's network has {weights}")
    return 1.0


def _read_one(section: Section) -> _Loss | None:
    """One entry of `types`."""
    match section.text("type"):
        case "MultipleLoss":
            return _of_levels(section)
        case "DC_and_CE_loss":
            return _of_nnunet(section)
        case "MixedLoss":
            return _mixed(section)
        case "CrossEntropyLoss":
            return _Loss("CrossEntropyLoss", "mixed", (1.0, 0.0), _cross_entropy(section))
        case "DiceLoss":
            return _Loss("DiceLoss", "mixed", (0.0, 1.0), _dice(section))
        case kind:
            section.notes.refuse(section.name("type"), kind, _LOSSES, "loss", flag="--loss")
            section.drop(dict.fromkeys(list(section.left()), "belongs to that loss"))
            return None


def _of_levels(section: Section) -> _Loss | None:
    """nnU-Net's loss at all levels of the network; their weights are nnU-Net's in both programs."""
    losses, coefficients = section.sections("losses"), section.numbers("coef", (1.0,))
    section.drop({"plan_path": "a pickle, which is never opened; the levels are those of segrt's plan"})
    section.take("stage")
    section.close()
    if len(losses) != 1 or len(coefficients) != 1:
        section.notes.refuse(
            section.name("losses"), [shown.take("type") for shown in losses], "one loss and one coef", "loss", flag="--loss"
        )
        return None
    inner = _read_one(losses[0])
    if inner is None:
        return None
    ce, dice = inner.coefficients
    return _Loss(f"MultipleLoss, {inner.named}", inner.kind, (ce * coefficients[0], dice * coefficients[0]), inner.fields)


def _of_nnunet(section: Section) -> _Loss:
    notes = section.notes
    batch_dice = section.yes("batch_dice", False)
    notes.use(section.name("batch_dice"), batch_dice, "the Dice of the whole batch" if batch_dice else "the Dice of each image")
    if section.yes("do_bg", True):
        notes.warn(section.name("do_bg"), True, "segrt's Dice leaves the background out, as every MedicalSeg file for nnU-Net does")
    else:
        notes.use(section.name("do_bg"), False, "the Dice leaves the background out")
    section.drop({"ignore_index": "dataset.json's label 'ignore' is what segrt leaves out"})
    section.close()
    return _Loss("DC_and_CE_loss", "dice_ce", (1.0, 1.0), {"batch_dice": batch_dice})


def _mixed(section: Section) -> _Loss | None:
    parts, coefficients = section.sections("losses"), section.numbers("coef")
    kinds = [part.text("type") for part in parts]
    section.close()
    if sorted(kinds) != sorted(set(kinds) & {"CrossEntropyLoss", "DiceLoss"}) or len(coefficients) != len(kinds):
        section.notes.refuse(
            section.name("losses"), kinds, "CrossEntropyLoss and DiceLoss once each, and a coef for each", "loss", flag="--loss"
        )
        return None
    of, fields = dict(zip(kinds, coefficients, strict=True)), dict[str, Any]()
    for kind, part in zip(kinds, parts, strict=True):
        fields |= _cross_entropy(part) if kind == "CrossEntropyLoss" else _dice(part)
    return _Loss("MixedLoss", "mixed", (of.get("CrossEntropyLoss", 0.0), of.get("DiceLoss", 0.0)), fields)


def _cross_entropy(section: Section) -> dict[str, Any]:
    notes, key = section.notes, section.name("weight")
    weights = None if section.take("weight") is None else section.numbers("weight")
    section.take("type")
    _drop_ignored(section)
    section.close()
    if weights is not None or notes.beaten("class_weights"):
        notes.use(key, weights and list(weights), "the classes' weights in the cross-entropy", class_weights=weights)
        return {"class_weights": weights}
    notes.warn(
        key,
        None,
        "classes count alike; MedicalSeg takes (1 - p) / p of the first batch's predictions for good, which depends on the untrained "
        "network (--class-weights batch: of each batch)",
    )
    return {"class_weights": "none"}


def _dice(section: Section) -> dict[str, Any]:
    section.take("type")
    sigmoid = section.yes("sigmoid_norm", True)
    activation = "sigmoid" if sigmoid else "softmax"
    section.notes.use(section.name("sigmoid_norm"), sigmoid, f"Dice of the {activation}, background included, over the whole batch")
    if section.take("weight") is not None:
        section.notes.warn(section.name("weight"), section.take("weight"), "classes count alike in segrt's Dice")
    _drop_ignored(section)
    section.close()
    return {"dice_activation": activation}


def _drop_ignored(section: Section) -> None:
    section.drop({"ignore_index": "dataset.json's label 'ignore' is what segrt leaves out"})
