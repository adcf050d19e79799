"""An ensemble that nnU-Net's find_best_configuration chose becomes a pair."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from nnunet_factory import PLANS, write_model

from segrt.bundle import Bundle
from segrt.errors import InputError
from segrt.export.importers import import_nnunet
from segrt.predictor import Predictor
from segrt.spec import KeepLargest

NAMES = ("nnUNetTrainer__nnUNetPlans__3d_lowres", "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres")
STEP = {
    "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
    "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}],
}


def write_ensemble(root: Path, *, names: tuple[str, ...] = NAMES, folds: str = "0_1", steps: bool = True) -> Path:
    """A results folder as nnU-Net leaves it, but for the predictions; the ensemble's folder comes out."""
    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        write_model(root, configuration=configuration, folds=("0", "1", "2"), values=copy.deepcopy(PLANS))
    folder = root / "ensembles" / "___".join(("ensemble", *names, folds))
    folder.mkdir(parents=True)
    if steps:
        (folder / "postprocessing.json").write_text(json.dumps(STEP))
    return folder


def test_both_models_their_folds_and_the_ensembles_own_postprocessing(tmp_path: Path) -> None:
    source = write_ensemble(tmp_path / "Dataset900_Tiny")
    # what was chosen for one of them alone does not count
    alone = source.parents[1] / NAMES[0] / "crossval_results_folds_0_1"
    alone.mkdir()
    (alone / "postprocessing.json").write_text(json.dumps({"postprocessing_fns": [], "postprocessing_kwargs": []}))
    bundle = import_nnunet(source, tmp_path / "b")
    assert bundle.partner is not None
    assert bundle.spec.members == bundle.partner.spec.members == ("0", "1")
    assert bundle.spec.postprocess == (KeepLargest(values=(1, 2)),)
    assert bundle.spec.source.endswith("3d_lowres")
    assert bundle.partner.spec.source.endswith("3d_cascade_fullres")
    assert bundle.partner.previous is not None
    assert Bundle.open(tmp_path / "b").fingerprint == bundle.fingerprint
    with Predictor(bundle, backend="pytorch", device="cpu") as predictor:
        assert len(predictor.all_engines) == 4


def test_other_folds_have_no_postprocessing_yet(tmp_path: Path) -> None:
    bundle = import_nnunet(write_ensemble(tmp_path / "d"), tmp_path / "b", folds=("2",))
    assert bundle.spec.members == ("2",)
    assert bundle.spec.postprocess == ()


def test_an_ensemble_that_was_not_postprocessed(tmp_path: Path) -> None:
    assert import_nnunet(write_ensemble(tmp_path / "d", steps=False), tmp_path / "b").spec.postprocess == ()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    gone = write_ensemble(tmp_path / "a", names=(NAMES[0], "nnUNetTrainer__nnUNetPlans__2d"))
    with pytest.raises(InputError, match=r"its model nnUNetTrainer__nnUNetPlans__2d is not in .*; the ensemble itself holds no weights"):
        import_nnunet(gone, tmp_path / "b")
    three = write_ensemble(tmp_path / "c", names=(*NAMES, NAMES[0]))
    with pytest.raises(InputError, match="expected ensemble___<model>___<model>___<folds>"):
        import_nnunet(three, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_bundle_that_is_there_is_kept(tmp_path: Path) -> None:
    source = write_ensemble(tmp_path / "d")
    first = import_nnunet(source, tmp_path / "b")
    with pytest.raises(InputError, match="already there"):
        import_nnunet(source, tmp_path / "b")
    assert import_nnunet(source, tmp_path / "b", force=True).fingerprint == first.fingerprint
