"""Settings that were chosen and that nothing of the training would read: a slip, said before anything is opened; TRAIN, its first check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from .config import PICTURES, TrainConfig

Chosen = Mapping[str, Any]


class _Rule(NamedTuple):
    """Fields, separated by spaces, that matter only with something else, and whether this training has that."""

    fields: str
    needed: str
    met: Callable[[TrainConfig, Chosen], bool]


_RULES = (
    _Rule("planner memory_gb find_best", "model nnunet", lambda config, _: config.model == "nnunet"),
    _Rule("window sliding resampling", "model vnet, unetpp or unet", lambda config, _: config.model != "nnunet"),
    _Rule("elu kernels strides", "model vnet", lambda config, _: config.model == "vnet"),
    _Rule("mode", "model unetpp and deep supervision", lambda config, _: config.model == "unetpp" and config.deep_supervision),
    _Rule("dropout", "model unetpp or unet", lambda config, _: config.model in PICTURES),
    _Rule("deep_supervision", "model nnunet, vnet or unetpp", lambda config, _: config.model != "unet" or not config.deep_supervision),
    # a plan that is given has all of it
    _Rule(
        "planner memory_gb window sliding resampling elu kernels strides mode dropout",
        "a plan made here, not one that is given",
        lambda _, has: "plan" not in has,
    ),
    _Rule("patch width", "a plan made here, or model nnunet", lambda config, has: config.model == "nnunet" or "plan" not in has),
    _Rule("pairs", "find_best", lambda _, has: "find_best" in has),
    _Rule("split patients", "a fold other than all", lambda config, _: config.folds != ("all",)),
    _Rule("momentum nesterov", "optimizer sgd", lambda config, _: config.optimizer == "sgd"),
    _Rule("betas", "optimizer adam or adamw", lambda config, _: config.optimizer != "sgd"),
    _Rule("power", "schedule poly", lambda config, _: config.schedule == "poly"),
    _Rule("end_lr lrf decay_iterations", "schedule poly or cosine", lambda config, _: config.schedule in ("poly", "cosine")),
    _Rule("step_iterations step_epochs gamma", "schedule step", lambda config, _: config.schedule == "step"),
    _Rule("step_iterations", "no step_epochs", lambda config, _: not config.step_epochs),
    _Rule("schedule_by_epoch", "a schedule other than constant", lambda config, _: config.schedule != "constant"),
    _Rule("batch_dice", "loss dice_ce", lambda config, _: config.loss == "dice_ce"),
    _Rule("dice_activation", "loss mixed", lambda config, _: config.loss == "mixed"),
    _Rule("transforms", "augmentation article", lambda config, _: config.augmentation == "article"),
    _Rule("mirroring", "augmentation nnunet or article", lambda config, _: config.augmentation != "none" or not config.mirroring),
    _Rule("grey", "augmentation nnunet", lambda config, _: config.augmentation == "nnunet" or not config.grey),
    _Rule("grey_channel", "grey above 0", lambda config, _: config.grey > 0),
    # a whole image that was resized is the same patch wherever its foreground lies
    _Rule("oversampling", "sliding", lambda config, _: config.model != "vnet" or config.sliding or not config.oversampling),
    _Rule("validation_interval", "validation_batches above 0", lambda config, _: config.validation_batches > 0),
    _Rule("weights", "validation_batches above 0", lambda config, _: config.validation_batches > 0 or config.weights == "last"),
    _Rule(
        "profile",
        "more iterations than its first",
        lambda config, _: bool(config.passes) or config.iterations > (config.profile or (0,))[0],
    ),
)


def refuse_unread(config: TrainConfig, chosen: Chosen) -> None:
    """Refuse what was chosen and changes nothing of this training.

    Parameters
    ----------
    config : that the choices made
    chosen : fields of `config`, and of `train_model` "plan", "find_best" and "pairs", as they were chosen; None was not

    Raises
    ------
    InputError
        When a choice would be read by nothing; the sentence says what it matters with.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    for fields, needed, met in _RULES:
        for name in fields.split():
            if name in given and not met(config, given):
                raise InputError(f"{name}: it only matters with {needed}, so nothing would read {_told(given[name])}; leave it out")


def _told(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
