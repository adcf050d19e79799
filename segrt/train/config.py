"""`TrainConfig`: every hyper-parameter of a training, once; stored beside the checkpoints and in the bundle's reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..errors import SpecError
from ..spec import Part, Size, Triple

Model = Literal["nnunet", "vnet", "unetpp", "unet"]
PICTURES = ("unetpp", "unet")  # models whose recipe is one for pictures: lengths in passes over them, patients kept together
WINDOWS = {"article": (-1200.0, 600.0), "abdomen": (-160.0, 240.0)}  # HU
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]

# what may differ between the run that wrote a checkpoint and the one that goes on from it: none of these changes a weight
FREE = frozenset({"schema_version", "folds", "split", "patients", "workers", "keep", "save_interval", "log_interval", "dice_interval"})
FREE |= {"weights", "profile", "device"}


class Transforms(Part):
    """The article's three transforms in numbers, in their order.

    Attributes
    ----------
    scale : smallest and largest share of the volume that is cut out and resized to the patch; None cuts nothing
    ratio : smallest and largest ratio of two of its sides
    degrees : largest rotation to either side about one axis; 0 for none
    flip : chance of a flip along one axis
    """

    scale: tuple[float, float] | None = (0.8, 1.2)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    degrees: Annotated[float, Field(ge=0, le=180)] = 90.0
    flip: Fraction = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Transforms:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if pair is not None and not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name}: expected two numbers above 0, the smaller first, got {pair}")
        return self


class TrainConfig(Part):
    """How a model is trained. Lengths are in iterations; `epoch` is what nnU-Net calls one (250 iterations).

    Attributes
    ----------
    model, planner, configuration : what is trained; planner and configuration are nnU-Net's names ("3d_fullres", "resenc_m", ...), and
        "v1" plans by the rules of nnU-Net 1; "unetpp" and "unet" are UNet++ and the plain U-Net beside it
    folds : "0" .. "4" of `split`, or "all" to train on every case
    split : "kfold" (nnU-Net's five), "shuffled:0.75" or "sorted:0.8" (one fold with that share in training), or the path of a JSON file;
        "auto" is the dataset's own where it has one, else kfold, for a V-Net shuffled:0.75
    patients : whose images stay on one side of the split: a pattern that gives the patient of a case's name (its first group, or all it
        matches), "none", or "auto", see `segrt.train.patients`
    passes : how long, in passes over the training cases; makes `iterations` when the split is known
    epoch : iterations; 0 is one pass over the training cases
    iterations, minutes : how long; with `minutes` the training ends after that time where `iterations` is not reached before, and poly and
        cosine fall over whichever comes first; only the iterations' own time counts, not that of validations and checkpoints
    memory_gb : GPU memory nnU-Net's planner plans for, instead of the preset's
    batch_size, patch, width : override the plan; width is a factor on the network's features
    window, sliding, resampling, elu, kernels, strides : of a V-Net, see `plan_vnet`; `patch` is the shape its images are resized to
    mode, dropout : of a UNet++, see `plan_unetpp`, which takes window, sliding, resampling and `patch` too
    cache, storage : dtype of prepared cases on disk, and how they lie there: compressed (blosc2), or plainly (npy)
    momentum, nesterov : of SGD
    betas : of Adam and AdamW
    weight_decay : L2 regularisation as the optimizer defines it (AdamW: decoupled); `l1` adds l1 * sum |w| to the gradient's loss
    schedule : per iteration, or per epoch under `schedule_by_epoch` (nnU-Net). poly falls to `end_lr` over `decay_iterations` (None: the
        whole training) by `power`; step multiplies by `gamma` every `step_iterations`, or after each of `step_epochs`; cosine falls to
        `end_lr`. `lrf` gives that end as a share of `lr` instead
    loss : dice_ce (nnU-Net; Dice + BCE where the model has regions), mixed (the article's CE + Dice), bce (BCE with logits alone, of
        models with one logit per structure), or hybrid (of UNet++: half the CE and the Dice of each image)
    coefficients : of cross-entropy and Dice
    class_weights : of the cross-entropy, background first: none, numbers, or batch (mixed only: (1 - p) / p of each batch's mean p)
    batch_dice : whether the Dice of dice_ce sums over the whole batch, instead of the plan's choice
    dice_activation : what the Dice of mixed makes of the logits
    transforms : of augmentation article
    mirroring : whether patches and predictions are mirrored where the plan says so; not, when sides have labels of their own
    grey, grey_channel : share of the samples whose channels all become one of theirs, and which: any by default (augmentation "nnunet")
    oversampling : share of a batch whose patches are made to hold foreground
    precision : of the forward pass; weights and optimizer stay float32. "auto" is nnU-Net's choice: fp16 on a GPU, fp32 on a CPU
    clip : largest norm of the gradient; 0 leaves it as it is
    accumulation : batches per optimizer step
    compile : let torch.compile make one program of the network first
    validation_interval, validation_batches : how often (0: once per epoch), and on how many batches, the pseudo Dice is taken; 0 batches
        for never
    save_interval : iterations between two checkpoints; 0: once per epoch
    log_interval, dice_interval : iterations between two lines, and two Dice of a training batch (0: the former)
    weights : which checkpoint becomes the member: the last, or the best by the moving average of the pseudo Dice
    profile : iterations (first, last) that torch's profiler records
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    model: Model = "nnunet"
    planner: Literal["default", "resenc_m", "resenc_l", "resenc_xl", "v1"] = "default"
    configuration: str = "3d_fullres"
    folds: tuple[str, ...] = Field(("0",), min_length=1)
    split: str = "auto"
    patients: str = "auto"
    memory_gb: float | None = Field(None, gt=0)
    iterations: Positive = 250_000
    passes: Positive | None = None
    minutes: float | None = Field(None, gt=0)
    epoch: Natural = 250
    batch_size: Positive | None = None
    patch: tuple[Size, Size, Size] | None = None
    width: float = Field(1.0, gt=0)
    window: Literal["auto", "article", "abdomen", "percentile", "zscore", "none"] | tuple[float, float] = "auto"
    sliding: bool = False
    resampling: Literal["linear", "cubic"] = "linear"
    elu: bool = False
    kernels: tuple[Triple, Triple, Triple, Triple] | None = None
    strides: tuple[Triple, Triple, Triple, Triple] | None = None
    mode: Literal["accurate", "fast"] = "accurate"
    dropout: float = Field(0.0, ge=0, lt=1)
    cache: Literal["float32", "float16"] = "float32"
    storage: Literal["blosc2", "npy"] = "blosc2"
    deep_supervision: bool = True
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(1e-2, gt=0)
    momentum: float = Field(0.99, ge=0, lt=1)
    nesterov: bool = True
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(3e-5, ge=0)
    l1: float = Field(0.0, ge=0)
    schedule: Literal["poly", "constant", "step", "cosine"] = "poly"
    schedule_by_epoch: bool = True
    power: float = Field(0.9, gt=0)
    end_lr: float = Field(0.0, ge=0)
    lrf: Fraction | None = None
    decay_iterations: Positive | None = None
    step_iterations: Positive = 10_000
    step_epochs: tuple[Positive, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    loss: Literal["dice_ce", "mixed", "bce", "hybrid"] = "dice_ce"
    coefficients: tuple[Weight, Weight] = (1.0, 1.0)
    class_weights: Literal["none", "batch"] | tuple[Weight, ...] = "none"
    batch_dice: bool | None = None
    dice_activation: Literal["sigmoid", "softmax"] = "sigmoid"
    augmentation: Literal["nnunet", "article", "none"] = "nnunet"
    transforms: Transforms = Transforms()
    mirroring: bool = True
    grey: Fraction = 0.0
    grey_channel: str | None = None
    oversampling: Fraction = 0.33
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    clip: float = Field(12.0, ge=0)
    accumulation: Positive = 1
    compile: bool = False
    seed: int = Field(12345, ge=0)
    workers: int = Field(2, ge=0)
    validation_interval: Natural = 250
    validation_batches: int = Field(50, ge=0)
    save_interval: Natural = 2500
    log_interval: Positive = 20
    dice_interval: Natural = 0
    keep: Positive = 1
    weights: Literal["last", "best"] = "last"
    profile: tuple[int, int] | None = None
    device: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.profile and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"profile: expected a first and a later last iteration, got {self.profile}")
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("momentum: nesterov needs more than 0")
        if len(set(self.folds)) != len(self.folds):
            raise ValueError(f"folds: expected no fold twice, got {self.folds}")
        if self.planner == "v1" and self.memory_gb is not None:
            raise ValueError("memory_gb: planner v1 plans for one size of GPU; leave it out, or take another planner")
        if not any(self.coefficients):
            raise ValueError("coefficients: expected at least one above 0, or there is no loss")
        if self.loss in ("bce", "hybrid") and self.coefficients != (1.0, 1.0):
            raise ValueError(f"coefficients: loss {self.loss} has its own; take dice_ce to choose them")
        if self.lrf is not None and self.end_lr:
            raise ValueError("lrf: it and end_lr say the same thing; give one of them")
        if list(self.step_epochs) != sorted(set(self.step_epochs)):
            raise ValueError(f"step_epochs: expected rising numbers, got {self.step_epochs}")
        return self

    @property
    def augment(self) -> Literal["nnunet", "none"] | Transforms:
        """The augmentation with its numbers."""
        if self.augmentation != "article":
            return self.augmentation
        return self.transforms if self.mirroring else self.transforms.model_copy(update={"flip": 0.0})

    @property
    def epochs(self) -> int:
        """Epochs begun by the end of the training."""
        if self.passes is not None:
            return self.passes
        return -(-self.iterations // (self.epoch or 1))

    @property
    def final_lr(self) -> float:
        """What poly and cosine fall to."""
        return self.end_lr if self.lrf is None else self.lr * self.lrf

    @property
    def length(self) -> str:
        """How long it is, in words."""
        if self.minutes:
            return f"{self.minutes:g} minutes"
        return f"{self.passes} epochs of {self.epoch} iterations" if self.passes else f"{self.iterations} iterations"

    def with_epoch(self, cases: int, batch: int) -> TrainConfig:
        """What is counted in passes over the training cases, in iterations; see `passes` and `epoch`."""
        epoch = self.epoch or -(-cases // batch)
        changes: dict[str, object] = {
            "epoch": epoch,
            "validation_interval": self.validation_interval or epoch,
            "save_interval": self.save_interval or epoch,
        }
        if self.passes:
            changes["iterations"] = self.passes * epoch
        return self.model_copy(update=changes)

    def to_json(self) -> str:
        """The text of config.json."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"

    def differences(self, other: TrainConfig) -> dict[str, tuple[object, object]]:
        """Fields that change the trained weights and differ: name -> (here, there)."""
        fields = (name for name in type(self).model_fields if name not in FREE)
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in fields}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# the article's V-Net (SEEDS 1.3); its decay over 15000 of 30000 iterations left the second half without learning, so ours covers all
# Adam at 3e-4 and the hybrid loss are UNet++'s own; the choice of decays is the second article's
_PICTURES: dict[str, Any] = {
    "passes": 100,
    "epoch": 0,
    "optimizer": "adam",
    "lr": 3e-4,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "lrf": 0.01,
    "step_epochs": (10, 20),
    "loss": "hybrid",
    "oversampling": 0.0,
    "validation_interval": 0,
    "validation_batches": 10,
    "save_interval": 0,
    "log_interval": 10,
    "dice_interval": 1,
    "weights": "best",
}
_FEW_EPOCHS = 100  # below it a learning rate that changes once per epoch would fall in coarse steps
_DEFAULTS: dict[str, dict[str, Any]] = {
    "nnunet": {},
    "vnet": {
        "configuration": "vnet",
        "iterations": 30_000,
        "batch_size": 6,
        "deep_supervision": False,
        "lr": 1e-3,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-4,
        "schedule_by_epoch": False,
        "loss": "mixed",
        "augmentation": "article",
        "oversampling": 0.0,
        "clip": 0.0,
        "save_interval": 1000,
    },
    "unetpp": {"configuration": "unetpp", **_PICTURES},
    "unet": {"configuration": "unet", "deep_supervision": False, **_PICTURES},
}


def make_config(model: Model = "nnunet", **changes: object) -> TrainConfig:
    """Give the model's own recipe with `changes`; those that are None leave the default.

    The learning rate of nnU-Net changes per epoch; in a training of less than 100 of them, or one that ends by the clock, it changes with
    every iteration unless told.

    Raises
    ------
    SpecError
        When a value is wrong; the sentence names the field.
    """
    chosen = {name: value for name, value in changes.items() if value is not None}
    recipe = {name: value for name, value in _DEFAULTS.get(model, {}).items() if name not in _replaced(chosen)}
    config = _parse({**recipe, "model": model, **chosen}, where="training")
    if (config.epochs < _FEW_EPOCHS or config.minutes) and "schedule_by_epoch" not in chosen:
        return config.model_copy(update={"schedule_by_epoch": False})
    return config


def _replaced(chosen: Mapping[str, object]) -> set[str]:
    """Fields of a recipe that what was chosen takes the place of."""
    rules = {"iterations": "passes", "minutes": "passes", "end_lr": "lrf", "step_iterations": "step_epochs"}
    replaced = {rules[name] for name in chosen if name in rules}
    # windows of a large picture may well hold nothing; whole pictures are what they are
    return replaced | ({"oversampling"} if chosen.get("sliding") else set())


def load_config(path: Path) -> TrainConfig:
    """Read a config.json.

    Raises
    ------
    SpecError
        When the file is not JSON or a value is wrong.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SpecError(f"{path}: not a readable training configuration ({err})") from err
    return _parse(values, where=str(path))


# of fields that hold several numbers, where pydantic would tell of one of them
_EXPECTED = {
    "folds": "at least one, such as 0",
    "patch": "three whole numbers above 0 (z, y, x)",
    "kernels": "three whole numbers above 0 (z, y, x) for each of four steps down, such as 2,2,2/2,2,2/2,2,2/2,2,2",
    "strides": "three whole numbers above 0 (z, y, x) for each of four steps down, such as 1,2,2/2,2,2/2,2,2/2,2,2",
    "betas": "two numbers from 0 to below 1",
    "coefficients": "two numbers from 0 on, of cross-entropy and Dice",
    "class_weights": "none, batch, or a number from 0 on for each class, background first",
    "window": "auto, article, abdomen, percentile, zscore, none, or two numbers",
}


def _parse(values: Any, *, where: str) -> TrainConfig:
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as err:
        first = err.errors()[0]
        name, value = ".".join(str(part) for part in first["loc"]), first["input"]
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        field = str(first["loc"][0]) if first["loc"] else ""
        if field in _EXPECTED:
            name, message, value = field, f"expected {_EXPECTED[field]}", values[field]
        got = "" if isinstance(value, dict) else f", got {value!r}"
        raise SpecError(": ".join(part for part in (where, name, message + got) if part)) from err
