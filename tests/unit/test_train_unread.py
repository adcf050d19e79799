"""What was chosen and changes nothing is a slip, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from segrt.errors import InputError
from segrt.train.config import Transforms, make_config
from segrt.train.unread import refuse_unread

UNREAD: list[tuple[str, dict[str, Any], str]] = [
    ("nnunet", {"window": "zscore"}, "window: it only matters with model vnet, unetpp or unet, so nothing would read zscore; leave it out"),
    ("nnunet", {"sliding": True}, "sliding: it only matters with model vnet"),
    ("nnunet", {"resampling": "cubic"}, "resampling: it only matters with model vnet"),
    ("nnunet", {"elu": True}, "elu: it only matters with model vnet,"),
    ("unetpp", {"kernels": ((2, 2, 2),) * 4}, "kernels: it only matters with model vnet,"),
    ("nnunet", {"mode": "fast"}, "mode: it only matters with model unetpp"),
    ("unet", {"mode": "fast"}, "mode: it only matters with model unetpp"),
    ("unetpp", {"mode": "fast", "deep_supervision": False}, "mode: it only matters with model unetpp and deep supervision"),
    ("unet", {"deep_supervision": True}, "deep_supervision: it only matters with model nnunet, vnet or unetpp"),
    ("vnet", {"dropout": 0.5}, "dropout: it only matters with model unetpp or unet"),
    ("vnet", {"planner": "resenc_m"}, "planner: it only matters with model nnunet"),
    ("unetpp", {"memory_gb": 8.0}, "memory_gb: it only matters with model nnunet"),
    ("vnet", {"find_best": True}, "find_best: it only matters with model nnunet"),
    ("nnunet", {"pairs": False}, "pairs: it only matters with find_best"),
    ("nnunet", {"planner": "resenc_m", "plan": Path("plan.json")}, "planner: it only matters with a plan made here"),
    ("vnet", {"patch": (32, 32, 32), "plan": Path("plan.json")}, "patch: it only matters with a plan made here, or model nnunet"),
    ("nnunet", {"folds": ("all",), "split": "kfold"}, "split: it only matters with a fold other than all"),
    ("unetpp", {"folds": ("all",), "patients": "none"}, "patients: it only matters with a fold other than all"),
    ("nnunet", {"optimizer": "adam", "momentum": 0.9}, "momentum: it only matters with optimizer sgd"),
    ("nnunet", {"optimizer": "adamw", "nesterov": False}, "nesterov: it only matters with optimizer sgd"),
    ("nnunet", {"betas": (0.9, 0.99)}, "betas: it only matters with optimizer adam or adamw, so nothing would read 0.9,0.99"),
    ("nnunet", {"schedule": "cosine", "power": 2.0}, "power: it only matters with schedule poly"),
    ("nnunet", {"schedule": "step", "end_lr": 1e-4}, "end_lr: it only matters with schedule poly or cosine"),
    ("nnunet", {"schedule": "constant", "lrf": 0.1}, "lrf: it only matters with schedule poly or cosine"),
    ("nnunet", {"schedule": "constant", "decay_iterations": 9}, "decay_iterations: it only matters with schedule poly or cosine"),
    ("nnunet", {"step_iterations": 9}, "step_iterations: it only matters with schedule step"),
    ("nnunet", {"step_epochs": (9,)}, "step_epochs: it only matters with schedule step"),
    ("nnunet", {"gamma": 0.5}, "gamma: it only matters with schedule step"),
    ("nnunet", {"schedule": "step", "step_epochs": (9,), "step_iterations": 9}, "step_iterations: it only matters with no step_epochs"),
    ("nnunet", {"schedule": "constant", "schedule_by_epoch": True}, "schedule_by_epoch: it only matters with a schedule other"),
    ("vnet", {"batch_dice": True}, "batch_dice: it only matters with loss dice_ce"),
    ("nnunet", {"dice_activation": "softmax"}, "dice_activation: it only matters with loss mixed"),
    ("nnunet", {"transforms": Transforms(flip=0)}, "transforms: it only matters with augmentation article"),
    ("nnunet", {"augmentation": "none", "mirroring": True}, "mirroring: it only matters with augmentation nnunet or article"),
    ("vnet", {"oversampling": 0.5}, "oversampling: it only matters with sliding"),
    ("nnunet", {"validation_batches": 0, "validation_interval": 9}, "validation_interval: it only matters with validation_batches above 0"),
    ("nnunet", {"validation_batches": 0, "weights": "best"}, "weights: it only matters with validation_batches above 0"),
    ("nnunet", {"profile": (10, 20), "iterations": 5}, "profile: it only matters with more iterations than its first"),
]

READ: list[tuple[str, dict[str, Any]]] = [
    ("nnunet", {"planner": "resenc_m", "memory_gb": 8.0, "find_best": True, "pairs": False}),
    ("nnunet", {"plan": Path("plan.json"), "patch": (32, 32, 32), "width": 0.5, "deep_supervision": False}),
    ("nnunet", {"window": None, "pairs": None, "plan": None, "optimizer": "adam", "betas": (0.9, 0.99)}),
    ("vnet", {"window": "abdomen", "sliding": True, "resampling": "cubic", "elu": True, "oversampling": 0.5, "mirroring": False}),
    ("vnet", {"oversampling": 0.0, "momentum": 0.8, "patch": (32, 32, 32), "dice_activation": "softmax"}),
    ("unetpp", {"mode": "fast", "dropout": 0.5, "passes": 5, "profile": (10, 20), "lrf": 0.5}),
    ("unet", {"deep_supervision": False, "patients": "none", "schedule": "step", "step_epochs": (3,), "gamma": 0.5}),
    ("nnunet", {"schedule": "step", "step_iterations": 9, "validation_batches": 0, "weights": "last", "augmentation": "none"}),
    ("nnunet", {"folds": ("all", "0"), "split": "kfold", "mirroring": False, "augmentation": "none"}),
]


def _check(model: str, chosen: dict[str, Any]) -> None:
    own = {name: value for name, value in chosen.items() if name not in ("plan", "find_best", "pairs")}
    refuse_unread(make_config(model, **own), chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "chosen", "sentence"), UNREAD, ids=[f"{model} {' '.join(chosen)}" for model, chosen, _ in UNREAD])
def test_what_nothing_would_read_is_refused(model: str, chosen: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        _check(model, chosen)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(("model", "chosen"), READ, ids=[f"{model} {' '.join(chosen)}" for model, chosen in READ])
def test_what_is_read_is_not(model: str, chosen: dict[str, Any]) -> None:
    _check(model, chosen)
