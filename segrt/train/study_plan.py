"""The runs of an optimizer study: models x optimizers, what each is told, and what they have to have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import InputError
from .config import Model, TrainConfig, make_config

# nnU-Net's own rate of SGD; the V-Net's is MedicalSeg's for its MRISpine models, the article's .001 being made for 30,000 iterations. With
# the weight decay of their recipes AdamW would be all but Adam, so it gets PyTorch's own
RECIPES: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "nnunet": {"sgd": {"lr": 1e-2}, "adam": {"lr": 3e-3}, "adamw": {"lr": 3e-3, "weight_decay": 1e-2}},
    "vnet": {"sgd": {"lr": 1e-1}, "adam": {"lr": 1e-3}, "adamw": {"lr": 1e-3, "weight_decay": 1e-2}},
}
_ENDLESS = 10**9  # iterations of a run that its minutes end
# what a prepared case depends on
_PREPARED = frozenset({"planner", "configuration", "memory_gb", "patch", "window", "sliding", "resampling", "cache", "storage"})


@dataclass(frozen=True)
class StudyRun:
    """One training of a study; its name is that of its bundle, such as nnunet-adamw."""

    name: str
    config: TrainConfig


def plan_runs(models: Sequence[Model], optimizers: Sequence[str], **changes: object) -> tuple[StudyRun, ...]:
    """Give every model with every optimizer its configuration.

    Parameters
    ----------
    changes : fields of `TrainConfig`. A value goes to every run; a mapping gives each run its own, by the run's name ("vnet-sgd"), by the
        optimizer ("sgd") or by the model ("vnet"), looked for in this order; other runs keep the recipe of their model, and in it
        what `RECIPES` has for the optimizer

    Raises
    ------
    SpecError
        When a value is wrong.
    InputError
        When a mapping names no run, a model or optimizer comes twice, or a configuration is a pair.
    """
    for what, names in (("model", list(models)), ("optimizer", list(optimizers))):
        if not names or len(set(names)) < len(names):
            raise InputError(f"{what}s: expected each {what} once, got {', '.join(names) or 'none'}")
    known = {*models, *optimizers, *(f"{model}-{optimizer}" for model in models for optimizer in optimizers)}
    for field, value in changes.items():
        if isinstance(value, Mapping):
            _check_keys(field, value, known, set(models))
    return tuple(StudyRun(f"{model}-{optimizer}", _config(model, optimizer, changes)) for model in models for optimizer in optimizers)


def with_same_split(run: StudyRun) -> StudyRun:
    """The run on nnU-Net's folds where its split is "auto", whose meaning differs by model: runs on other cases cannot be compared."""
    config = run.config
    return replace(run, config=config.model_copy(update={"split": "kfold"})) if config.split == "auto" else run


def _config(model: Model, optimizer: str, changes: Mapping[str, object]) -> TrainConfig:
    own = {field: _choose(value, model, optimizer) for field, value in changes.items()}
    own = {field: value for field, value in own.items() if value is not None}
    if "+" in str(own.get("configuration", "")):
        raise InputError(f"configuration: a study compares single models, not pairs, got {own['configuration']!r}; give one of its parts")
    recipe: dict[str, object] = {"iterations": _ENDLESS} if "minutes" in own else {}
    return make_config(model, **{**recipe, **RECIPES.get(model, {}).get(optimizer, {}), **own, "optimizer": optimizer})


def _choose(value: object, model: str, optimizer: str) -> object:
    if not isinstance(value, Mapping):
        return value
    return next((value[key] for key in (f"{model}-{optimizer}", optimizer, model) if key in value), None)


def _check_keys(field: str, value: Mapping[str, object], known: set[str], models: set[str]) -> None:
    if unknown := sorted(value.keys() - known):
        raise InputError(f"{field}: {unknown[0]!r} is no run, optimizer or model of this study; expected one of {', '.join(sorted(known))}")
    if field in _PREPARED and (single := sorted(value.keys() - models)):
        raise InputError(
            f"{field}: the runs of a model share their prepared cases, so this is chosen by model ({', '.join(sorted(models))}), got "
            f"{single[0]!r}"
        )
