"""SEEDS 2.12: the 20 defects of the article's software, each with the test that keeps segrt free of it.

Those whose subject has a test file of its own are tested there (`ELSEWHERE`, where the names are checked); the others here. None of them
is without a test, and three cannot come back in the form they had:

(f) a script that imports what does not exist: there are no scripts beside the package; every module of it is imported here.
(o) the wrong JSON of post-processing: no command takes such a file, the steps are a part of model.json and name the weights that decided.
(s) a TensorRT switch that nothing reads: an engine is a backend like any other, and its shapes are read from the model.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import numpy as np
import pytest
import torch
import typer
from factories import banded, make_spec, nearest_engine, write_case
from onnx_heads import headed
from train_factory import write_dataset

import segrt
from segrt import Predictor, predict_many
from segrt.bundle import Bundle
from segrt.cli import build, predict, train
from segrt.errors import SpecError
from segrt.io import find_cases, read_labels, read_volume
from segrt.spec import Label, SpacingTarget
from segrt.train.config import make_config
from segrt.train.dataset import open_dataset
from segrt.train.fingerprint import measure
from segrt.train.override import choose_configuration
from segrt.train.plan import plan_nnunet
from segrt.train.targets import label_values, make_targets

TESTS = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "a": ("unit/test_train_loader.py::test_eight_workers_draw_eight_different_things",),
    "b": ("unit/test_train_augment.py::test_rotated_labels_are_labels",),
    "c": (
        "unit/test_optim.py::test_a_rate_that_ends_early_is_a_warning",
        "unit/test_optim.py::test_the_models_own_recipes_do_not_end_early",
    ),
    "d": ("unit/test_losses.py::test_class_weights_follow_each_batch_unless_they_are_to_be_frozen",),
    "e": ("unit/test_train_loop.py::test_the_pseudo_dice_is_hard_and_without_background",),
    "g": ("unit/test_train_dataset.py::test_npy_lists", "unit/test_train_splits.py::test_order_of_the_names_does_not_matter"),
    "h": ("unit/test_train_vnet_plan.py::test_the_articles_window_as_its_numbers_are_printed",),
    "j": (
        "unit/test_train_loop.py::test_best_follows_the_moving_average_of_the_pseudo_dice",
        "unit/test_train_loop.py::test_it_learns_and_records_every_iteration",
    ),
    "k": ("unit/test_train_augment.py::test_small_components_are_removed_and_large_ones_kept",),
    "n": ("unit/test_train_validate.py::test_finished_cases_are_kept_for_the_same_weights_only",),
    "o": ("e2e/test_train.py::test_train_build_predict_give_the_dice_of_the_validation",),
    "q": (
        "unit/test_train_dataset.py::test_labels_need_not_be_consecutive",
        "unit/test_train_augment.py::test_targets_are_class_indices_whatever_the_values",
    ),
    "r": (
        "unit/test_train_loop.py::test_two_processes_train_what_one_trains",
        "unit/test_optim.py::test_clipping_says_the_norm_before_and_keeps_the_direction",
    ),
    "s": (
        "unit/test_trt.py::test_windows_are_those_of_the_model",
        "parity/test_trt_builder.py::test_every_precision_is_parsed_and_built",
    ),
    "t": ("unit/test_train_prepare.py::test_a_damaged_case_is_mended_and_no_other",),
}
HERE = "fghilmop"


def test_every_defect_has_its_test() -> None:
    assert set(ELSEWHERE) | set(HERE) == set("abcdefghijklmnopqrst")
    for name in {name for names in ELSEWHERE.values() for name in names}:
        file, _, test = name.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_f_every_module_can_be_imported() -> None:
    """prepare_msd.py imported a name that did not exist, and nobody had run it."""
    for module in pkgutil.walk_packages(segrt.__path__, "segrt."):
        if module.name.startswith(("segrt.train.", "segrt.cli.", "segrt.report.", "segrt.io.")):
            importlib.import_module(module.name)


def test_g_pairs_do_not_hang_on_the_order_of_a_listing(tmp_path: Path) -> None:
    """Images and label maps were paired by their place in an unsorted os.listdir."""
    for order, folder in (("cab", "images"), ("bca", "labels")):
        for name in order:
            write_case(tmp_path / folder / f"{name}.nii.gz", banded((4, 5, 6), seed=ord(name)))
    dataset = open_dataset(tmp_path)
    assert [case.name for case in dataset.cases] == ["a", "b", "c"]
    for case in dataset.cases:
        assert case.labels is not None
        np.testing.assert_array_equal(read_volume(case.images[0]).data[0], read_labels(case.labels)[0])


def test_h_values_that_follow_each_other_are_not_merged() -> None:
    """label_remap replaced one value after the other: of 1 -> 2 and then 2 -> 3 only 3 was left."""
    spec = make_spec(values=(0, 2, 3))
    labels = torch.tensor([[[0, 2, 3, 2]]], dtype=torch.int16)
    [classes] = make_targets(labels, spec, [(1, 1, 1)])
    assert classes.tolist() == [[[0, 1, 2, 1]]]  # 2 -> 1, 3 -> 2
    assert label_values(classes.numpy(), spec).tolist() == labels.tolist()  # 1 -> 2, 2 -> 3
    logits = torch.nn.functional.one_hot(classes.long(), 3).movedim(-1, 0)[None].float()
    assert headed(logits, spec, "argmax")[0].tolist() == labels.tolist()
    regions = make_spec(
        values=(3, 2), activation="sigmoid", labels=(Label(name="whole", values=(1, 2, 3)), Label(name="core", values=(2, 3)))
    )
    [target] = make_targets(torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int16), regions, [(1, 1, 1)])
    assert label_values(target.numpy(), regions).tolist() == [[[0, 3, 2, 2]]]


@pytest.mark.parametrize("command", [train, predict, build], ids=["segrt-train", "segrt-predict", "segrt-build"])
def test_i_every_switch_can_be_turned_off(command: ModuleType) -> None:
    """`type=bool` of argparse takes "False" for true: a switch here takes no value, and is off unless given or has a --no- beside it."""
    options = {o.name: o for o in typer.main.get_command(command.app).params if o.param_type_name == "option" and o.is_flag}
    hints = get_type_hints(getattr(command, command.__name__.rpartition(".")[2]))
    truths = {name for name, hint in hints.items() if hint in (bool, bool | None)}
    assert truths
    for name in truths:
        assert options[name].default is False or options[name].secondary_opts, name


def test_l_a_plan_of_one_stage_gives_its_configuration(tmp_path: Path) -> None:
    """Names of stages were looked up by number, which failed where there is no low resolution."""
    dataset = write_dataset(tmp_path / "data")
    plan = plan_nnunet(dataset, measure(dataset, workers=0))
    assert list(plan.configurations) == ["2d", "3d_fullres"]
    assert choose_configuration(plan, make_config("nnunet"), "3d_fullres").previous is None
    with pytest.raises(SpecError, match=r"expected one the plan has \(2d, 3d_fullres\), got '3d_lowres'"):
        choose_configuration(plan, make_config("nnunet"), "3d_lowres")


def test_m_every_image_is_saved_once_on_its_own_grid(tmp_path: Path) -> None:
    """infer.py saved the whole batch for each of its images, as arrays on the network's grid."""
    shapes = {"a": ((9, 10, 11), (3.0, 1.0, 1.0)), "b": ((6, 12, 8), (2.0, 1.5, 1.5))}
    for name, (shape, spacing) in shapes.items():
        write_case(tmp_path / "images" / f"{name}.nii.gz", banded(shape), spacing)
    bundle = Bundle(tmp_path / "model", make_spec(target=SpacingTarget(spacing=(2.0, 2.0, 2.0))))
    Bundle.create(bundle.path, bundle.spec)
    bundle.weights_path("0").parent.mkdir()
    bundle.weights_path("0").write_bytes(b"weights")
    with Predictor(bundle, engines=[nearest_engine()]) as predictor:
        predict_many(find_cases(tmp_path / "images", 1), tmp_path / "out", predictor)
        for name in shapes:
            image = read_volume(tmp_path / "images" / f"{name}.nii.gz")
            labels, grid = read_labels(tmp_path / "out" / f"{name}.nii.gz")
            assert image.grid.mismatch(grid) is None
            np.testing.assert_array_equal(labels, predictor(image).labels)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]


def test_o_no_command_takes_a_file_of_postprocessing() -> None:
    """The README gave the wrong one for a cascade."""
    for app in (predict.app, build.app):
        names = [name for parameter in typer.main.get_command(app).params for name in (*parameter.opts, *parameter.secondary_opts)]
        assert [name for name in names if "post" in name] in (["--postprocess", "--no-postprocess"], [])


def test_p_a_model_needs_no_postprocessing(tmp_path: Path) -> None:
    """The JSON of post-processing was mandatory."""
    image, spec = banded((8, 8, 8)), make_spec()
    assert spec.postprocess == ()
    with Predictor(Bundle(tmp_path, spec), engines=[nearest_engine()]) as predictor:
        assert predictor.steps == ()
        np.testing.assert_array_equal(predictor((image.astype(np.float32), (1.0, 1.0, 1.0))).labels, image)
