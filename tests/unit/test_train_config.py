"""The training's configuration: recipes, JSON, sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from segrt.errors import SpecError
from segrt.train.config import FREE, TrainConfig, Transforms, load_config, make_config


def test_nnunets_recipe() -> None:
    config = make_config("nnunet")
    assert (config.optimizer, config.lr, config.momentum, config.nesterov, config.weight_decay) == ("sgd", 0.01, 0.99, True, 3e-5)
    assert (config.schedule, config.power, config.schedule_by_epoch, config.epochs, config.epoch) == ("poly", 0.9, True, 1000, 250)
    assert (config.clip, config.loss, config.oversampling, config.augmentation, config.validation_batches) == (
        12,
        "dice_ce",
        0.33,
        "nnunet",
        50,
    )


def test_the_articles_recipe() -> None:
    config = make_config("vnet")
    assert (config.optimizer, config.lr, config.momentum, config.weight_decay, config.batch_size) == ("sgd", 1e-3, 0.9, 1e-4, 6)
    assert (config.iterations, config.loss, config.augmentation, config.configuration) == (30_000, "mixed", "article", "vnet")
    # its own decay over half of the iterations left the rest without a learning rate
    assert config.decay_iterations is None


def test_changes_that_are_none_leave_the_recipe() -> None:
    assert make_config("vnet", lr=None, optimizer="adamw") == make_config("vnet", optimizer="adamw")


def test_without_mirroring_the_article_flips_nothing_either() -> None:
    assert make_config("vnet").augment == Transforms()
    assert make_config("vnet", mirroring=False).augment == Transforms(flip=0)


def test_a_short_training_changes_its_rate_every_iteration() -> None:
    assert not make_config("nnunet", iterations=1000).schedule_by_epoch
    assert make_config("nnunet", iterations=1000, schedule_by_epoch=True).schedule_by_epoch
    assert make_config("nnunet", iterations=25_000).schedule_by_epoch


@pytest.mark.parametrize("model", ["nnunet", "vnet"])
def test_json_round_trip(tmp_path: Path, model: str) -> None:
    config = make_config(model, patch=(8, 16, 32), folds=("0", "3"), profile=(10, 20), window=(-100.0, 200.0), betas=(0.8, 0.9))  # type: ignore[arg-type]
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": "rmsprop"}, "training: optimizer: expected 'sgd', 'adam' or 'adamw', got 'rmsprop'"),
        ({"lr": -1.0}, "training: lr: .*greater than 0, got -1.0"),
        ({"folds": ("0", "0")}, "folds: expected no fold twice"),
        ({"folds": ()}, "training: folds"),
        ({"profile": (20, 10)}, "profile: expected a first and a later last iteration"),
        ({"coefficients": (0.0, 0.0)}, "coefficients: expected at least one above 0"),
        ({"coefficients": (1.0, -1.0)}, r"training: coefficients: expected two numbers from 0 on"),
        ({"class_weights": (1.0, -1.0)}, "training: class_weights"),
        ({"transforms": {"scale": (1.2, 0.8)}}, "scale: expected two numbers above 0, the smaller first"),
        ({"momentum": 0.0}, "momentum: nesterov needs more than 0"),
        ({"patch": ("8", "8")}, "training: patch"),
        ({"colour": "red"}, "training: colour"),
        ({"precision": "fp8"}, "training: precision: expected 'auto', 'fp32', 'bf16' or 'fp16', got 'fp8'"),
    ],
)
def test_sentences(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        make_config("nnunet", **changes)


def test_a_model_nobody_has() -> None:
    with pytest.raises(SpecError, match="training: model: expected 'nnunet', 'vnet', 'unetpp' or 'unet', got 'segnet'"):
        make_config("segnet")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[1]", '{"lr": "fast"}'])
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"config\.json"):
        load_config(path)


def test_differences_name_what_changes_a_weight() -> None:
    assert TrainConfig.model_fields.keys() >= FREE
    one, other = make_config("nnunet"), make_config("nnunet", lr=0.1, workers=7, device="cpu")
    assert one.differences(other) == {"lr": (0.01, 0.1)}


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("betas", (1.0, 1.0), "betas: expected two numbers from 0 to below 1, got"),
        ("patch", ("1", "2"), "patch: expected three whole numbers above 0"),
        ("coefficients", ("1",), "coefficients: expected two numbers from 0 on"),
        ("class_weights", ("nan", "1"), "class_weights: expected none, batch, or a number from 0 on for each class"),
        ("window", ("nan", "2"), "window: expected auto, .* or two numbers, got"),
        ("folds", (), "folds: expected at least one, such as 0, got"),
    ],
)
def test_a_field_of_several_numbers_says_what_it_holds(field: str, value: object, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        make_config("nnunet", **{field: value})
