"""MedicalSeg's optimizer, schedule and loss as fields of a `TrainConfig`; part of the import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .medicalseg_section import Section

# type in the file -> (segrt's optimizer, momentum when the file says none)
_OPTIMIZERS = {
    "sgd": ("sgd", 0.9),
    "Momentum": ("sgd", 0.9),
    "SGD": ("sgd", 0.0),
    "adam": ("adam", 0.0),
    "Adam": ("adam", 0.0),
    "AdamW": ("adamw", 0.0),
}
_FOREIGN = {"adamw": "adamw", "AdamDecay": "adamw"}  # the article's words, which public MedicalSeg does not take
_DECAY = {"sgd": 0.0, "adam": 0.0, "adamw": 0.01}  # Paddle's own where the file says none
_EPSILON = 1e-8
_LOSSES = "MixedLoss, CrossEntropyLoss, DiceLoss, DC_and_CE_loss or MultipleLoss of one of these"


def read_optimizer(section: Section) -> None:
    """Take `optimizer`; what the file leaves out is Paddle's default, not segrt's."""
    notes, kind = section.notes, section.text("type")
    if kind in _FOREIGN:
        name, momentum = _FOREIGN[kind], 0.0
        notes.warn(
            section.name("type"),
            kind,
            "public MedicalSeg takes sgd, adam or the exact name of a paddle.optimizer class such as AdamW, not this word of the article; "
            "AdamW is trained",
        )
        notes.changes["optimizer"] = name
    elif kind in _OPTIMIZERS:
        name, momentum = _OPTIMIZERS[kind]
        notes.use(section.name("type"), kind, name, optimizer=name)
    else:
        notes.refuse(section.name("type"), kind, f"one of {', '.join([*_OPTIMIZERS, *_FOREIGN])}", "optimizer", flag="--optimizer")
        section.drop(dict.fromkeys(["momentum", "use_nesterov", "weight_decay", "beta1", "beta2", "epsilon"], "belongs to that optimizer"))
        section.close()
        return
    if name == "sgd":
        _read_momentum(section, momentum)
    else:
        _read_betas(section)
    decay = section.number("weight_decay", _DECAY[name]) if section.take("weight_decay") is not None else _DECAY[name]
    how = "decoupled, as Paddle's" if name == "adamw" else "L2"
    left_out = "" if "weight_decay" in section else ", Paddle's default"
    notes.use(section.name("weight_decay"), decay, f"{how}{left_out}", weight_decay=decay)
    section.close(("use_nesterov", "beta1", "beta2"))


def _read_momentum(section: Section, default: float) -> None:
    momentum, nesterov = section.number("momentum", default), section.yes("use_nesterov", False)
    section.notes.use(section.name("momentum"), momentum, f"SGD's{'' if 'momentum' in section else ', as by default'}", momentum=momentum)
    section.notes.use(section.name("use_nesterov"), nesterov, "the same", nesterov=nesterov and momentum > 0)
    section.drop(dict.fromkeys(["beta1", "beta2", "epsilon"], "only Adam and AdamW have it"))


def _read_betas(section: Section) -> None:
    betas = section.number("beta1", 0.9), section.number("beta2", 0.999)
    for key, beta in zip(("beta1", "beta2"), betas, strict=True):
        section.notes.use(section.name(key), beta, "the same", betas=betas)
    if section.number("epsilon", _EPSILON) != _EPSILON:
        section.notes.warn(section.name("epsilon"), section.take("epsilon"), f"segrt's is always {_EPSILON:g}")
    section.drop(dict.fromkeys(["momentum", "use_nesterov"], "only SGD has it, public MedicalSeg refuses it here; it is left out"))


def read_schedule(top: Section, iterations: int) -> None:
    """Take `lr_scheduler`, or the older `learning_rate`; the rate changes with every iteration, as MedicalSeg's does."""
    notes = top.notes
    notes.changes["schedule_by_epoch"] = False
    if "lr_scheduler" in top:
        section = top.section("lr_scheduler")
        top.drop({"learning_rate": "lr_scheduler counts"})
        _read_kind(section, section.text("type"), section.number("learning_rate"), iterations)
        section.drop({"last_epoch": "a training begins with its first iteration, or where its checkpoint ended", "verbose": "not needed"})
        section.close(("decay_steps", "end_lr", "power"))
        return
    if not isinstance(top.take("learning_rate"), dict):
        lr = top.number("learning_rate")
        notes.use("learning_rate", lr, "constant", lr=lr, schedule="constant")
        return
    older = top.section("learning_rate")
    decay = older.section("decay") if "decay" in older else Section({"type": "poly"}, notes, older.name("decay"))
    _read_kind(decay, decay.text("type"), older.number("value"), iterations)
    decay.close()
    older.close()


def _read_kind(section: Section, kind: str, lr: float, iterations: int) -> None:
    notes = section.notes
    notes.use(section.name("learning_rate"), lr, "the first iteration's", lr=lr)
    key = section.name("type")
    match kind:
        case "PolynomialDecay" | "poly":
            notes.use(key, kind, "poly, per iteration", schedule="poly")
            _read_poly(section, iterations)
        case "StepDecay" | "stepdecay":
            every, gamma = section.whole("step_size"), section.number("gamma", 0.1)
            notes.use(key, kind, f"step: times {gamma:g} every {every} iterations", schedule="step", step_iterations=every, gamma=gamma)
        case "CosineAnnealingDecay":
            period, end = section.whole("T_max"), section.number("eta_min", 0.0)
            notes.use(
                key, kind, f"cosine: down to {end:g} over {period} iterations", schedule="cosine", end_lr=end, decay_iterations=period
            )
            if period < iterations:
                notes.warn(section.name("T_max"), period, f"Paddle's rate rises again after it, segrt's stays {end:g} up to {iterations}")
        case _:
            notes.refuse(key, kind, "PolynomialDecay, StepDecay or CosineAnnealingDecay", "schedule", flag="--schedule")
            section.drop(dict.fromkeys(list(section.left()), "belongs to that schedule"))


def _read_poly(section: Section, iterations: int) -> None:
    notes, key = section.notes, section.name("decay_steps")
    steps, end, power = section.whole("decay_steps", iterations), section.number("end_lr", 0.0), section.number("power", 0.9)
    notes.use(section.name("end_lr"), end, "the same", end_lr=end)
    notes.use(section.name("power"), power, "the same", power=power)
    if steps < iterations and end == 0:
        notes.warn(
            key,
            steps,
            f"the rate would be 0 from iteration {steps} on and the rest of the {iterations} learn nothing; it falls over all of them "
            "(--decay-iters for another length)",
        )
    elif steps != iterations:
        notes.use(key, steps, f"the rate falls over {steps} of {iterations} iterations", decay_iterations=steps)
    else:
        notes.use(key, steps, "the rate falls over the whole training")
    if section.yes("cycle", False):
        notes.warn(section.name("cycle"), True, "segrt's rate does not rise again")


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
    if weights is not None:
        notes.use(key, list(weights), "the classes' weights in the cross-entropy")
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
