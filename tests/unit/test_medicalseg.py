"""What a MedicalSeg configuration becomes: the article's files, each trap a warning, each bad value a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from train_factory import write_dataset

from segrt.errors import InputError, SpecError
from segrt.train.config import TrainConfig, Transforms
from segrt.train.dataset import read_training_case
from segrt.train.medicalseg import Recipe, find_dataset, import_medicalseg, read_medicalseg

AMOS = Path(__file__).parents[1] / "medicalseg" / "configs" / "amos"


def changed(folder: Path, name: str, /, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    """A file that inherits from one of the article's; `a__b` is key b of section a."""
    root = folder / "configs"
    for path in (*AMOS.parent.rglob("*.yml"),):
        copy = root / path.relative_to(AMOS.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    values: dict[str, Any] = {}
    for key, value in changes.items():
        part = values
        *outer, last = key.split("__")
        for name_of in outer:
            part = part.setdefault(name_of, {})
        part[last] = value
    path = root / "amos" / "changed.yml"
    path.write_text(yaml.safe_dump({"_base_": f"{name}.yml", **values}))
    return path


def read(folder: Path, name: str, given: frozenset[str] = frozenset(), /, **changes: Any) -> Recipe:
    return read_medicalseg(changed(folder, name, **changes), given=given)


def warned(recipe: Recipe, key: str) -> str:
    """The one warning about a key."""
    (text,) = [warning for warning in recipe.warnings if warning.startswith(f"{key} (")]
    return text


# ------------------------------------------------------------------ the article's files
def test_the_articles_vnet() -> None:
    recipe = read_medicalseg(AMOS / "vnet.yml")
    assert (recipe.model, recipe.classes, recipe.channels) == ("vnet", 16, 1)
    assert recipe.changes == {
        "configuration": "vnet",
        "iterations": 30_000,
        "batch_size": 6,
        "patch": (128, 128, 128),
        "deep_supervision": False,
        "elu": False,
        "window": "article",
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-4,
        "lr": 1e-3,
        "schedule": "poly",
        "schedule_by_epoch": False,
        "power": 0.9,
        "end_lr": 0.0,
        "loss": "mixed",
        "coefficients": (1.0, 1.0),
        "class_weights": "none",
        "dice_activation": "sigmoid",
        "augmentation": "article",
        "transforms": {"scale": (0.8, 1.2), "ratio": (3 / 4, 4 / 3), "degrees": 90.0, "flip": 0.5},
    }
    assert recipe.npy_window == (-1200.0, 600.0)


def test_the_articles_nnunet() -> None:
    recipe = read_medicalseg(AMOS / "nnunet.yml")
    assert recipe.model == "nnunet"
    assert recipe.changes == {
        "planner": "v1",
        "configuration": "3d_lowres",
        "folds": ("4",),
        "iterations": 50_000,
        "epoch": 250,
        "validation_interval": 250,
        "validation_batches": 50,
        "optimizer": "adamw",
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "lr": 0.01,
        "schedule": "poly",
        "schedule_by_epoch": False,
        "power": 0.9,
        "end_lr": 0.0,
        "loss": "dice_ce",
        "coefficients": (1.0, 1.0),
        "batch_dice": False,
    }
    assert recipe.npy_window is None


def _leaves(values: Any, where: str = "") -> list[str]:
    if isinstance(values, dict) and values:
        return [leaf for key, value in values.items() for leaf in _leaves(value, f"{where}.{key}" if where else key)]
    if isinstance(values, list) and values and all(isinstance(item, dict) for item in values):
        return [leaf for at, item in enumerate(values) for leaf in _leaves(item, f"{where}.{at}")]
    return [where]


@pytest.mark.parametrize("name", ["vnet", "nnunet"])
def test_every_key_of_a_file_is_in_the_table(tmp_path: Path, name: str) -> None:
    recipe = read(tmp_path, name, colour="red", model__hue=3, train_dataset__shade=[1], optimizer__tint=None, loss__tone={"a": 1})
    told = {row.key for row in recipe.rows}
    ours = {leaf for leaf in _leaves(recipe.document.values) if not leaf.endswith(".type") and leaf != "loss.tone.a"}
    assert not {leaf for leaf in ours if leaf not in told and not leaf.startswith(("loss.types", "loss.coef"))}
    for key in ("colour", "model.hue", "train_dataset.shade", "optimizer.tint", "loss.tone"):
        assert "segrt does not know this key, it is left out" in warned(recipe, key)
    assert all(row.key in recipe.text and row.does in recipe.text for row in recipe.rows)


# ------------------------------------------------------------------ the traps of the article
def test_trap_1_a_vnet_is_not_the_smaller_network() -> None:
    text = "\n".join(read_medicalseg(AMOS / "vnet.yml").warnings)
    assert "45,660,256 parameters, 1.5 times nnU-Net's 31 million; the article says less than half" in text


def test_trap_2_the_header_says_50000_iterations(tmp_path: Path) -> None:
    assert "commands and curves are of 30000" in warned(read_medicalseg(AMOS / "nnunet.yml"), "iters")
    assert not any(text.startswith("iters") for text in read(tmp_path, "nnunet", iters=30_000).warnings)


def test_trap_3_a_rate_of_zero_for_half_of_the_training(tmp_path: Path) -> None:
    recipe = read_medicalseg(AMOS / "vnet.yml")
    assert "0 from iteration 15000 on and the rest of the 30000 learn nothing" in warned(recipe, "lr_scheduler.decay_steps")
    assert "decay_iterations" not in recipe.changes
    assert read(tmp_path, "vnet", lr_scheduler__end_lr=1e-5).changes["decay_iterations"] == 15_000


@pytest.mark.parametrize("kind", ["adamw", "AdamDecay"])
def test_trap_4_optimizers_that_medicalseg_does_not_take(tmp_path: Path, kind: str) -> None:
    recipe = read(tmp_path, "nnunet", optimizer__type=kind)
    assert "not this word of the article; AdamW is trained" in warned(recipe, "optimizer.type")
    assert recipe.changes["optimizer"] == "adamw"


def test_trap_5_post_processing_of_other_weights_and_folds() -> None:
    text = warned(read_medicalseg(AMOS / "nnunet.yml"), "train_dataset.fold")
    assert "folds 0, 2 and 4 and decide with iteration 2000 for iteration 30000" in text


def test_trap_6_the_headline_is_the_low_resolution_stage(tmp_path: Path) -> None:
    assert "3d_lowres, of one fold" in warned(read_medicalseg(AMOS / "nnunet.yml"), "model.stage")
    full = read(tmp_path, "nnunet", model__stage=1, train_dataset__stage=1, val_dataset__stage=1)
    assert not any(text.startswith("model.stage") for text in full.warnings)


def test_trap_7_a_dataset_that_cannot_serve_a_vnet() -> None:
    recipe = read_medicalseg(AMOS / "vnet.yml")
    assert "serves nnU-Net only" in warned(recipe, "train_dataset.type")
    assert "cases of one DATASET" in warned(recipe, "train_dataset.type and val_dataset.type")


def test_trap_8_the_batch_size_that_nobody_reads() -> None:
    recipe = read_medicalseg(AMOS / "nnunet.yml")
    assert "the plan's batch is trained" in warned(recipe, "batch_size")
    assert "batch_size" not in recipe.changes


@pytest.mark.parametrize(("name", "minutes"), [("vnet", "2"), ("nnunet", "9.5")])
def test_trap_9_times_that_were_the_cpus(name: str, minutes: str) -> None:
    text = "\n".join(read_medicalseg(AMOS / f"{name}.yml").warnings)
    assert f"{minutes} min per image were probably most of them CPU work" in text


# ------------------------------------------------------------------ what files say
CONFIGURATIONS = [
    ({"model__stage": 0, "model__cascade": True}, "3d_lowres"),
    ({"model__stage": 1, "model__cascade": True}, "3d_cascade_fullres"),
    ({"model__stage": 1, "model__cascade": False, "train_dataset__cascade": False}, "3d_fullres"),
    ({"model__stage": 0, "model__cascade": False, "train_dataset__cascade": False}, "3d_fullres"),
    ({"model__plan_path": "nnUNetPlansv2.1_plans_2D.pkl", "train_dataset__plans_name": "nnUNetPlansv2.1_plans_2D.pkl"}, "2d"),
    ({"model__plan_path": None, "train_dataset__plans_name": None, "train_dataset__plan2d": True, "train_dataset__plan3d": False}, "2d"),
]


@pytest.mark.parametrize(("changes", "name"), CONFIGURATIONS)
def test_stages_and_cascades(tmp_path: Path, changes: Mapping[str, Any], name: str) -> None:
    assert read(tmp_path, "nnunet", **changes).changes["configuration"] == name


OPTIMIZERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "sgd"}, {"optimizer": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}),
    (
        {"type": "sgd", "momentum": 0.99, "use_nesterov": True, "weight_decay": 3e-5},
        {"optimizer": "sgd", "momentum": 0.99, "nesterov": True, "weight_decay": 3e-5},
    ),
    ({"type": "SGD", "weight_decay": "1e-3"}, {"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 1e-3}),
    ({"type": "Momentum", "momentum": 0.5}, {"optimizer": "sgd", "momentum": 0.5, "nesterov": False, "weight_decay": 0.0}),
    ({"type": "adam", "beta2": 0.99}, {"optimizer": "adam", "betas": (0.9, 0.99), "weight_decay": 0.0}),
    ({"type": "AdamW"}, {"optimizer": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.01}),
    ({"type": "AdamW", "weight_decay": 2e-4}, {"optimizer": "adamw", "betas": (0.9, 0.999), "weight_decay": 2e-4}),
]


@pytest.mark.parametrize(("section", "fields"), OPTIMIZERS)
def test_optimizers_with_paddles_defaults(tmp_path: Path, section: dict[str, Any], fields: dict[str, Any]) -> None:
    changes = read(tmp_path, "vnet", optimizer={"_inherited_": False, **section}).changes
    names = {"optimizer", "momentum", "nesterov", "weight_decay", "betas"}
    assert {name: value for name, value in changes.items() if name in names} == fields


def test_what_an_optimizer_does_not_have_is_told(tmp_path: Path) -> None:
    recipe = read(tmp_path, "vnet", optimizer={"type": "adam", "momentum": 0.9, "epsilon": 1e-5})
    assert "only SGD has it, public MedicalSeg refuses it here" in warned(recipe, "optimizer.momentum")
    assert "segrt's is always 1e-08" in warned(recipe, "optimizer.epsilon")


SCHEDULES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "PolynomialDecay", "learning_rate": 0.1}, {"schedule": "poly", "lr": 0.1, "end_lr": 0.0, "power": 0.9}),
    (
        {"type": "PolynomialDecay", "learning_rate": 0.1, "decay_steps": 40_000, "end_lr": 0.01, "power": 2},
        {"schedule": "poly", "lr": 0.1, "end_lr": 0.01, "power": 2.0, "decay_iterations": 40_000},
    ),
    ({"type": "StepDecay", "learning_rate": 1, "step_size": 7}, {"schedule": "step", "lr": 1.0, "step_iterations": 7, "gamma": 0.1}),
    (
        {"type": "CosineAnnealingDecay", "learning_rate": 1, "T_max": 30_000, "eta_min": 0.1},
        {"schedule": "cosine", "lr": 1.0, "decay_iterations": 30_000, "end_lr": 0.1},
    ),
]


@pytest.mark.parametrize(("section", "fields"), SCHEDULES)
def test_schedules(tmp_path: Path, section: dict[str, Any], fields: dict[str, Any]) -> None:
    changes = read(tmp_path, "vnet", lr_scheduler={"_inherited_": False, **section}).changes
    assert changes["schedule_by_epoch"] is False
    assert {name: changes[name] for name in fields} == fields
    assert ("decay_iterations" in changes) == ("decay_iterations" in fields)


def _older(tmp_path: Path, value: Any) -> Recipe:
    path = changed(tmp_path, "competition", learning_rate=value, model__type="VNet")
    base = path.with_name("competition.yml")
    values = yaml.safe_load(base.read_text())
    del values["lr_scheduler"]
    base.write_text(yaml.safe_dump(values))
    return read_medicalseg(path)


def test_the_older_way_to_say_a_rate(tmp_path: Path) -> None:
    constant = _older(tmp_path, 0.5).changes
    assert (constant["lr"], constant["schedule"]) == (0.5, "constant")
    poly = _older(tmp_path, {"value": 0.5, "decay": {"type": "poly", "power": 2}}).changes
    assert (poly["lr"], poly["schedule"], poly["power"]) == (0.5, "poly", 2.0)
    assert _older(tmp_path, {"value": 0.5}).changes["schedule"] == "poly"


def _mixed(*losses: dict[str, Any], coef: list[float], outer: list[float] | None = None) -> dict[str, Any]:
    return {"types": [{"type": "MixedLoss", "losses": list(losses), "coef": coef}], "coef": outer or [1]}


CE, DICE = {"type": "CrossEntropyLoss", "weight": [1, 2, 3]}, {"type": "DiceLoss"}
LOSSES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (_mixed(CE, DICE, coef=[0.3, 0.7]), {"coefficients": (0.3, 0.7), "class_weights": (1.0, 2.0, 3.0), "loss": "mixed"}),
    (_mixed(DICE, CE, coef=[0.25, 0.75], outer=[2]), {"coefficients": (1.5, 0.5), "class_weights": (1.0, 2.0, 3.0)}),
    (_mixed({"type": "DiceLoss", "sigmoid_norm": False}, coef=[1]), {"coefficients": (0.0, 1.0), "dice_activation": "softmax"}),
    ({"types": [CE], "coef": [1]}, {"coefficients": (1.0, 0.0), "loss": "mixed"}),
    ({"types": [DICE], "coef": [1]}, {"coefficients": (0.0, 1.0), "loss": "mixed"}),
    (
        {"types": [{"type": "DC_and_CE_loss", "do_bg": False, "batch_dice": True}], "coef": [1]},
        {"coefficients": (1.0, 1.0), "loss": "dice_ce", "batch_dice": True},
    ),
]


@pytest.mark.parametrize(("section", "fields"), LOSSES)
def test_losses(tmp_path: Path, section: dict[str, Any], fields: dict[str, Any]) -> None:
    changes = read(tmp_path, "vnet", loss={"_inherited_": False, **section}).changes
    assert {name: changes[name] for name in fields} == fields


def test_weights_that_the_first_batch_decides_are_left_out() -> None:
    """Defect (d) of the software: Null there is not none."""
    text = warned(read_medicalseg(AMOS / "vnet.yml"), "loss.types.0.losses.0.weight")
    assert "classes count alike; MedicalSeg takes (1 - p) / p of the first batch" in text


def test_a_vnet_with_deep_supervision(tmp_path: Path) -> None:
    recipe = read(tmp_path, "vnet", model__type="VNetDeepSup", loss__coef=[0.25] * 4)
    assert recipe.changes["deep_supervision"] is True
    assert recipe.changes["coefficients"] == (1.0, 1.0)
    assert not any(text.startswith("loss.coef") for text in recipe.warnings)
    other = read(tmp_path, "vnet", model__type="VNetDeepSup", loss__coef=[0.4, 0.3, 0.2, 0.1])
    assert "4 outputs that count alike" in warned(other, "loss.coef")
    assert "one output" in warned(read(tmp_path, "vnet", loss__coef=[0.5, 0.5]), "loss.coef")


def _transforms(tmp_path: Path, *parts: dict[str, Any], **changes: Any) -> Recipe:
    return read(tmp_path, "vnet", train_dataset__transforms=list(parts), **changes)


def test_transforms(tmp_path: Path) -> None:
    rotated = _transforms(tmp_path, {"type": "RandomRotation3D", "degrees": [-30, 30]}, {"type": "RandomFlip3D", "prob": 0.2})
    assert rotated.changes["transforms"] == {"scale": None, "degrees": 30.0, "flip": 0.2}
    assert "no size is given, so images are resized to 128 x 128 x 128" in warned(rotated, "train_dataset.transforms")
    still = _transforms(tmp_path, {"type": "Resize3D", "size": [64, 48, 32]})
    assert (still.changes["augmentation"], still.changes["patch"]) == ("none", (64, 48, 32))
    other = _transforms(tmp_path, {"type": "RandomFlip3D"}, {"type": "RandomRotation3D", "degrees": 5}, {"type": "GaussianNoise", "p": 1})
    assert "in the order RandomResizedCrop3D, RandomRotation3D, RandomFlip3D" in "\n".join(other.warnings)
    assert "no such transform" in warned(other, "train_dataset.transforms.2.type")
    assert "belongs to that transform" in warned(other, "train_dataset.transforms.2.p")


def test_choices_of_planes_and_axes(tmp_path: Path) -> None:
    every = {"type": "RandomRotation3D", "degrees": 90, "rotate_planes": [[1, 2], [1, 3], [2, 3]]}
    some = {"type": "RandomFlip3D", "flip_axis": [0]}
    crop = {"type": "RandomResizedCrop3D", "size": 32, "interpolation": 3, "pre_crop": True, "nonzero_mask": False}
    recipe = _transforms(tmp_path, crop, every, some)
    keys = [text.split(" ")[0] for text in recipe.warnings if text.startswith("train_dataset.transforms")]
    assert keys == [f"train_dataset.transforms.{key}" for key in ("0.interpolation", "0.pre_crop", "2.flip_axis")]


def test_contradictions_are_told(tmp_path: Path) -> None:
    recipe = read(tmp_path, "nnunet", train_dataset__stage=1, val_dataset__fold=0, val_dataset__transforms=[{"type": "x"}])
    assert "model.stage says 0, which counts" in warned(recipe, "train_dataset.stage")
    assert "train_dataset.fold says 4, which counts" in warned(recipe, "val_dataset.fold")
    assert "nnU-Net's own transforms" in warned(recipe, "val_dataset.transforms")
    assert "num_classes says 16" in warned(read(tmp_path, "vnet", train_dataset__num_classes=3), "train_dataset.num_classes")


def test_what_has_no_place_in_a_training_is_told(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "vnet",
        export={"transforms": [], "inference_helper": {"type": "x"}},
        to_static_training=True,
        model__pretrained="https://x.org/model.pdparams",
        optimiser={"type": "adam"},
        lr_scheduler__endlr=3,
    )
    assert "segrt-build exports the bundle" in warned(recipe, "export")
    assert "PyTorch" in warned(recipe, "to_static_training")
    assert "training begins anew" in warned(recipe, "model.pretrained")
    assert "does not know this key (is optimizer meant?), it is left out" in warned(recipe, "optimiser")
    assert "(is end_lr meant?)" in warned(recipe, "lr_scheduler.endlr")


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "another network": ("vnet", {"model__type": "UNETR"}, r"model.type: expected a network that segrt trains \(VNet.*, got UNETR"),
    "no network": ("competition", {}, "model.type: expected a name, got nothing"),
    "no optimizer": ("vnet", {"optimizer": None}, "optimizer: expected keys with values, got Null"),
    "another optimizer": ("vnet", {"optimizer__type": "Lamb"}, r"optimizer.type: expected one of sgd, .*, got Lamb; or .*\(--optimizer\)"),
    "another schedule": ("vnet", {"lr_scheduler__type": "OneCycleLR"}, r"expected PolynomialDecay, .* got OneCycleLR; .*\(--schedule\)"),
    "another loss": ("vnet", {"loss__types": [{"type": "BCELoss"}]}, r"loss.types.0.type: expected MixedLoss, .* got BCELoss; .*--loss"),
    "a loss twice": ("vnet", {"loss": _mixed(DICE, DICE, coef=[1, 1])}, "losses: expected CrossEntropyLoss and DiceLoss once each"),
    "no coef": ("vnet", {"loss__types": [{"type": "MixedLoss", "losses": [DICE]}]}, "loss.types.0.coef: expected a list of numbers"),
    "coef of other losses": ("vnet", {"loss__types": [DICE, DICE]}, "loss.types: expected one loss, or one for each of the 1 numbers"),
    "no loss": ("vnet", {"loss__types": []}, "loss.types: expected one loss"),
    "words for numbers": ("vnet", {"lr_scheduler__learning_rate": "fast"}, "lr_scheduler.learning_rate: expected a number, got fast"),
    "endless": ("vnet", {"lr_scheduler__learning_rate": float("inf")}, "learning_rate: expected a number, got inf"),
    "a yes for a number": ("vnet", {"iters": True}, "iters: expected a number, got True"),
    "half an iteration": ("vnet", {"iters": 1.5}, "iters: expected a whole number, got 1.5"),
    "no iterations": ("vnet", {"iters": None}, "iters: expected a number, got Null"),
    "a word for yes": ("vnet", {"model__elu": "maybe"}, "model.elu: expected True or False, got maybe"),
    "kernels": ("vnet", {"model__kernel_size": [2, 2, 2]}, "model.kernel_size: expected four lists of three whole numbers"),
    "no class": ("vnet", {"model__num_classes": 0}, "model.num_classes: expected a number from 1 on, got 0"),
    "a size": (
        "vnet",
        {"train_dataset__transforms": [{"type": "Resize3D", "size": [64, 64]}]},
        r"size: expected a whole number, or three \(x, y, z\), got \[64, 64\]",
    ),
    "half a voxel": (
        "vnet",
        {"train_dataset__transforms": [{"type": "Resize3D", "size": [64, 64, 1.5]}]},
        r"size: expected a whole number, or three \(x, y, z\), got \[64, 64, 1.5\]",
    ),
    "a scale": (
        "vnet",
        {"train_dataset__transforms": [{"type": "RandomResizedCrop3D", "size": 64, "scale": [1]}]},
        "scale: expected two numbers",
    ),
    "transforms": ("vnet", {"train_dataset__transforms": ["RandomFlip3D"]}, "transforms: expected a list of keys with values"),
    "a stage": ("nnunet", {"model__stage": 2}, "model.stage: expected 0 or 1, got 2"),
    "a fold": ("nnunet", {"train_dataset__fold": -1}, "fold: expected a number from 0 on, or all, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_a_sentence(tmp_path: Path, name: str) -> None:
    file, changes, sentence = BAD[name]
    with pytest.raises(SpecError, match=sentence) as error:
        read(tmp_path, file, **changes)
    assert "changed.yml: " in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_caller_chooses_needs_no_right_value(tmp_path: Path) -> None:
    given = frozenset({"optimizer", "schedule", "loss", "iterations"})
    changes = {"optimizer__type": "Lamb", "lr_scheduler__type": "OneCycleLR", "loss__types": [{"type": "BCELoss"}]}
    recipe = read(tmp_path, "vnet", given, **changes)
    assert not {"optimizer", "schedule", "loss"} & recipe.changes.keys()
    for key in ("optimizer.type", "lr_scheduler.type", "loss.types.0.type"):
        assert "you chose another" in warned(recipe, key)


# ------------------------------------------------------------------ with a dataset
@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_dataset(folder)
    return folder


def _import(path: Path, source: Path, **chosen: Any) -> TrainConfig:
    return import_medicalseg(path, source, **chosen).config


def test_the_caller_beats_the_file(pairs: Path) -> None:
    config = _import(AMOS / "vnet.yml", pairs, iterations=7, optimizer="adamw", lr=0.5, patch=("32", "16", "16"), momentum=None)
    assert (config.iterations, config.optimizer, config.lr, config.patch) == (7, "adamw", 0.5, (32, 16, 16))
    assert (config.momentum, config.weight_decay, config.batch_size) == (0.9, 1e-4, 6)
    imported = import_medicalseg(AMOS / "nnunet.yml", pairs, batch_size=3, folds=("0",))
    assert (imported.config.batch_size, imported.config.folds) == (3, ("0",))
    assert not any(text.startswith("batch_size") for text in imported.warnings)
    assert "folds as you say instead" in imported.recipe.text
    chosen = import_medicalseg(AMOS / "vnet.yml", pairs, decay_iterations=9, class_weights="batch").warnings
    assert not any("decay_steps" in text or "losses.0.weight" in text for text in chosen)
    assert not any(text.startswith("iters") for text in import_medicalseg(AMOS / "nnunet.yml", pairs, iterations=9).warnings)
    assert import_medicalseg(AMOS / "nnunet.yml", pairs, memory_gb=4.0).config.planner == "default"


def test_a_file_of_one_model_is_not_trained_as_another(pairs: Path) -> None:
    with pytest.raises(InputError, match="describes a vnet, not a nnunet; leave --model out, or the file"):
        import_medicalseg(AMOS / "vnet.yml", pairs, model="nnunet")
    assert _import(AMOS / "vnet.yml", pairs, model="vnet").model == "vnet"


def test_the_datasets_own_classes_count(pairs: Path) -> None:
    warnings = import_medicalseg(AMOS / "vnet.yml", pairs, channels=None).warnings
    assert warnings[-1] == "num_classes (16): dataset pairs has 3 with its background, which the network gets"


def test_axes_are_turned_round_but_those_of_arrays(tmp_path: Path, pairs: Path) -> None:
    path = changed(
        tmp_path,
        "vnet",
        model__kernel_size=[[2, 2, 4], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        model__stride_size=[[2, 2, 1], [2, 2, 1], [2, 2, 2], [2, 2, 2]],
        train_dataset__transforms=[{"type": "RandomResizedCrop3D", "size": [64, 48, 12]}],
    )
    config = _import(path, pairs)
    assert config.patch == (12, 48, 64)
    assert (config.kernels or ())[0] == (4, 2, 2)
    assert (config.strides or ())[0] == (1, 2, 2)
    assert config.transforms == Transforms(degrees=0.0, flip=0.0)


def test_a_value_that_no_training_takes_names_the_file(tmp_path: Path, pairs: Path) -> None:
    with pytest.raises(SpecError, match=r"changed.yml: training: lr: .*greater than 0, got -1"):
        _import(changed(tmp_path, "vnet", lr_scheduler__learning_rate=-1), pairs)


def test_the_dataset_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "..")
    path = changed(tmp_path, "vnet")
    with pytest.raises(InputError, match=r"DATASET is missing: .*\(data/competition_phase0, competition_phase0\) is neither beside it nor"):
        find_dataset(read_medicalseg(path))
    beside = tmp_path / "data" / "competition_phase0"
    write_dataset(beside)
    assert find_dataset(read_medicalseg(path)) == beside
    assert import_medicalseg(path).dataset.folder == beside
    assert find_dataset(
        read_medicalseg(changed(tmp_path, "nnunet", data_root="data/competition_phase0", train_dataset__raw_data_dir="images"))
    )


@pytest.mark.parametrize("name", ["/", "/tmp", "../data", "C:\\data", ".", ""])
def test_a_dataset_outside_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"DATASET is missing: .*, and it names none; give the dataset's folder"):
        find_dataset(read(tmp_path, "vnet", train_dataset__dataset_root=name))


def test_a_link_to_a_dataset_outside_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    monkeypatch.chdir(inside)
    path = changed(inside, "vnet", train_dataset__dataset_root="link")
    (inside / "link").symlink_to(outside)
    with pytest.raises(InputError, match="DATASET is missing"):
        find_dataset(read_medicalseg(path))


def test_medicalsegs_own_arrays_keep_their_order_and_become_hounsfield_units(tmp_path: Path) -> None:
    folder = tmp_path / "phase0"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for name in ("a", "b"):
        np.save(folder / "images" / f"{name}.npy", np.full((64, 48, 16), 170, np.float32))
        np.save(folder / "labels" / f"{name}.npy", np.ones((64, 48, 16), np.int32))
    (folder / "train_list.txt").write_text("images/a.npy labels/a.npy\n")
    (folder / "val_list.txt").write_text("images/b.npy labels/b.npy\n")
    path = changed(tmp_path, "vnet", train_dataset__transforms=[{"type": "RandomResizedCrop3D", "size": [64, 48, 16]}])
    imported = import_medicalseg(path, folder)
    assert (imported.config.patch, imported.config.window) == ((64, 48, 16), "article")
    assert imported.dataset.split == (("a",), ("b",))
    volume, _ = read_training_case(imported.dataset.cases[0], imported.dataset)
    assert float(volume.data.max()) == pytest.approx(0, abs=1e-3)
