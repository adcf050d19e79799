"""Folders, zips and single checkpoints become bundles."""

from __future__ import annotations

import json
import logging
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_factory import DATASET, PLANS, arch, network_weights, write_checkpoint, write_model
from safetensors.torch import load_file

from segrt.bundle import Bundle
from segrt.errors import BuildError, InputError, SpecError
from segrt.export.importers import import_nnunet, sources
from segrt.export.importers.nnunetv2 import read_model
from segrt.export.onnx import load_member
from segrt.spec import KeepLargest

GOLDEN = (
    "S1_hippocampus_3d/model/nnUNetTrainer__nnUNetPlans__3d_fullres",
    "S2_organs_ct/model/nnUNetTrainer__nnUNetPlans__3d_fullres",
    "S3_cascade_ct/model/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres",
    "S3_cascade_ct/model/nnUNetTrainer__nnUNetPlans__3d_lowres",
    "S4_aniso_ct/model/nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres",
    "S5_slices_2d/model/nnUNetTrainer__nnUNetPlans__2d",
    "S6_png_2d/model/nnUNetTrainer__nnUNetPlans__2d",
    "S7_regions_mr/model/nnUNetTrainer__nnUNetPlans__3d_fullres",
)
ONE_STEP = {
    "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
    "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}],
}


@pytest.mark.parametrize("folder", GOLDEN)
def test_real_models_become_bundles_that_open(golden: Path, tmp_path: Path, folder: str) -> None:
    import_nnunet(golden / folder, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    assert (bundle.previous is not None) == ("cascade_fullres" in folder)
    for member in bundle.spec.members:
        load_member(bundle, member)


def test_a_real_model_in_detail(golden: Path, tmp_path: Path) -> None:
    bundle = import_nnunet(golden / GOLDEN[0], tmp_path / "b")
    assert bundle.spec.members == ("0", "1")
    assert [step.values for step in bundle.spec.postprocess if isinstance(step, KeepLargest)] == [(1, 2), (1,), (2,)]
    assert json.loads((bundle.path / "reports/nnunet_dataset.json").read_text())["labels"]["Anterior"] == 1


# ------------------------------------------------------------------ which folder
def test_a_configuration_folder(tmp_path: Path) -> None:
    bundle = import_nnunet(write_model(tmp_path), tmp_path / "out" / "b")
    assert bundle.spec.source == "nnU-Net v2, nnUNetTrainer, nnUNetPlans, 3d_fullres"
    weights = load_file(bundle.weights_path("0"))
    assert all(t.dtype == torch.float32 for t in weights.values())


def test_a_renamed_folder(tmp_path: Path) -> None:
    renamed = write_model(tmp_path).rename(tmp_path / "my best model")
    assert import_nnunet(renamed, tmp_path / "b").spec.members == ("0",)


def test_the_full_resolution_is_taken_by_default_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for configuration in ("3d_fullres", "3d_lowres"):
        write_model(tmp_path / "Dataset900_Tiny", configuration=configuration)
    assert import_nnunet(tmp_path / "Dataset900_Tiny", tmp_path / "a").spec.target.spacing == (3, 1, 1)
    assert "taking 3d_fullres" in caplog.text
    lowres = import_nnunet(tmp_path, tmp_path / "b", configuration="3d_lowres")
    assert lowres.spec.target.spacing == (6, 2, 2)


def test_a_choice_that_is_left_open(tmp_path: Path) -> None:
    for trainer in ("nnUNetTrainer", "nnUNetTrainerDA5"):
        write_model(tmp_path, trainer=trainer)
    with pytest.raises(InputError, match=r"several models fit \(nnUNetTrainerDA5__nnUNetPlans__3d_fullres, nnUNetTrainer__"):
        import_nnunet(tmp_path, tmp_path / "b")
    assert "nnUNetTrainerDA5" in import_nnunet(tmp_path, tmp_path / "b", trainer="nnUNetTrainerDA5").spec.source
    with pytest.raises(InputError, match=r"no model with configuration 2d; there are nnUNet"):
        import_nnunet(tmp_path, tmp_path / "c", configuration="2d")


@pytest.mark.parametrize("name", ["nothing", "empty", "file.txt"])
def test_places_without_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InputError, match=name):
        import_nnunet(tmp_path / name, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_existing_bundle_is_kept_unless_forced(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    import_nnunet(folder, tmp_path / "b")
    with pytest.raises(InputError, match="already there"):
        import_nnunet(folder, tmp_path / "b")
    import_nnunet(folder, tmp_path / "b", force=True)


def test_plans_that_are_no_json(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    for content in ("{", "[1]"):
        (folder / "plans.json").write_text(content)
        with pytest.raises(InputError, match=r"plans\.json: (not readable as JSON|expected a JSON object)"):
            import_nnunet(folder, tmp_path / "b")


# ------------------------------------------------------------------ folds and checkpoints
def test_folds(tmp_path: Path) -> None:
    folder = write_model(tmp_path, folds=("10", "2", "all"))
    assert read_model(folder).spec.members == ("2", "10")
    assert read_model(folder, folds=("all",)).spec.members == ("all",)
    with pytest.raises(InputError, match=r"no fold_3/checkpoint_final\.pth; folds that have one: fold_10, fold_2, fold_all"):
        read_model(folder, folds=("3",))
    with pytest.raises(InputError, match="counts once"):
        read_model(folder, folds=("2", "2"))
    with pytest.raises(InputError, match=r"folds: none was chosen; .* has "):
        read_model(folder, folds=())


def test_all_means_every_fold_where_none_is_named_so(tmp_path: Path) -> None:
    assert read_model(write_model(tmp_path, folds=("0", "1")), folds=("all",)).spec.members == ("0", "1")


def test_fold_all_serves_where_it_is_alone(tmp_path: Path) -> None:
    assert read_model(write_model(tmp_path, folds=("all",))).spec.members == ("all",)


def test_no_fold_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the training has not finished"):
        read_model(write_model(tmp_path, folds=()))


def test_the_best_checkpoint_replaces_a_missing_final_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path, checkpoint="checkpoint_best.pth")
    assert read_model(folder).spec.members == ("0",)
    assert "taking checkpoint_best.pth" in caplog.text
    with pytest.raises(InputError, match=r"checkpoint_latest\.pth"):
        read_model(folder, checkpoint="checkpoint_latest.pth")


def test_folds_of_different_configurations(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    write_checkpoint(folder / "fold_1" / "checkpoint_final.pth", PLANS, DATASET, "3d_lowres")
    with pytest.raises(InputError, match="different configurations"):
        read_model(folder)


def test_one_checkpoint_is_enough(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "fold_3" / "checkpoint_final.pth", PLANS, DATASET)
    assert import_nnunet(path, tmp_path / "b").spec.members == ("3",)
    with pytest.raises(InputError, match="was trained as configuration 3d_fullres, not 2d"):
        import_nnunet(path, tmp_path / "c", configuration="2d")
    bare = write_checkpoint(tmp_path / "fold_4" / "c.pth", PLANS, DATASET, init_args={"configuration": "3d_fullres"})
    with pytest.raises(BuildError, match="holds no plans"):
        import_nnunet(bare, tmp_path / "c")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, network_weights=network_weights(arch(n_conv_per_stage=[1, 1, 2]), DATASET, "3d_fullres"))
    with pytest.raises(BuildError, match=r"checkpoint_final\.pth: tensor encoder\.0\.1\.conv\.weight is missing"):
        read_model(folder)
    two = {"channel_names": {"0": "CT", "1": "PET"}}
    values = json.loads(
        json.dumps(PLANS).replace('["CTNormalization"]', '["NoNormalization", "NoNormalization"]').replace("[false]", "[false, false]")
    )
    folder = write_model(
        tmp_path / "two", network_weights=network_weights(PLANS, DATASET, "3d_fullres"), values=values, dataset=DATASET | two
    )
    with pytest.raises(
        BuildError, match=r"tensor encoder\.0\.0\.conv\.weight has shape \(4, 1, 1, 3, 3\), the plans ask for \(4, 2, 1, 3, 3\)"
    ):
        read_model(folder)


# ------------------------------------------------------------------ trainers
def test_batch_normalization_shows_in_the_weights(tmp_path: Path) -> None:
    weights = network_weights(PLANS, DATASET, "3d_fullres", batch_norm=True)
    bundle = import_nnunet(write_model(tmp_path, trainer="nnUNetTrainerBN", network_weights=weights), tmp_path / "b")
    assert bundle.spec.network.norm == "batch"
    load_member(bundle, "0")


def test_trainers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SpecError, match="nnUNet_Primus_M_Trainer"):
        read_model(write_model(tmp_path / "a", trainer="nnUNet_Primus_M_Trainer"))
    read_model(write_model(tmp_path / "b", trainer="MyTrainer"))
    assert "trainer MyTrainer is not known" in caplog.text
    still = read_model(write_model(tmp_path / "c", trainer="nnUNetTrainerNoMirroring", inference_allowed_mirroring_axes=None))
    assert still.spec.inference.mirror_axes == ()


# ------------------------------------------------------------------ post-processing
def postprocessed(folder: Path, folds: str, content: dict[str, Any]) -> Path:
    path = folder / f"crossval_results_folds_{folds}" / "postprocessing.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return folder


def test_postprocessing_belongs_to_its_folds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = postprocessed(write_model(tmp_path, folds=("0", "1")), "0_1", ONE_STEP)
    assert read_model(folder).spec.postprocess == (KeepLargest(values=(1, 2)),)
    assert read_model(folder, folds=("1", "0")).spec.postprocess == (KeepLargest(values=(1, 2)),)
    assert not caplog.text
    assert read_model(folder, folds=("1",)).spec.postprocess == ()
    assert "is for folds 0,1 and is not used with folds 1" in caplog.text


# ------------------------------------------------------------------ cascades
def test_a_cascade_brings_its_first_stage(tmp_path: Path) -> None:
    write_model(tmp_path, configuration="3d_lowres", folds=("0", "1"))
    cascade = write_model(tmp_path, configuration="3d_cascade_fullres", folds=("1", "2"))
    bundle = import_nnunet(cascade, tmp_path / "b", folds=("1",))
    assert bundle.previous is not None
    assert bundle.previous.spec.members == ("1",)
    both = import_nnunet(cascade, tmp_path / "c", folds=("1", "2")).previous
    assert both is not None
    assert both.spec.members == ("0", "1")


def test_a_cascade_without_its_first_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = import_nnunet(write_model(tmp_path, configuration="3d_cascade_fullres"), tmp_path / "b")
    assert bundle.previous is None
    assert bundle.spec.previous is not None
    assert "first stage 3d_lowres is not beside this model" in caplog.text


# ------------------------------------------------------------------ zips
def zipped(root: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as target:
        for file in root.rglob("*"):
            target.write(file, file.relative_to(root))
    return archive


def test_a_zip_without_a_model_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as zipped:
        zipped.writestr("readme.txt", "x")
    with pytest.raises(InputError, match=r"export\.zip: no trained nnU-Net v2 in it"):
        import_nnunet(tmp_path / "export.zip", tmp_path / "bundle")


def test_a_zip_of_a_whole_dataset(tmp_path: Path) -> None:
    root = tmp_path / "results"
    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        write_model(root / "Dataset900_Tiny", configuration=configuration)
    archive = zipped(root, tmp_path / "model.zip")
    bundle = import_nnunet(archive, tmp_path / "b", configuration="3d_cascade_fullres")
    assert bundle.previous is not None


def member(name: str, mode: int = 0o644 | stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (member("../plans.json"), "leads outside"),
        (member("a/../../plans.json"), "leads outside"),
        (member("/plans.json"), "leads outside"),
        (member("C:/plans.json"), "leads outside"),
        (member("..\\plans.json"), "leads outside"),
        (member("plans.json", 0o777 | stat.S_IFLNK), "is a link"),
        (member("link", 0o777 | stat.S_IFLNK), "is a link"),
    ],
)
def test_zips_that_lead_elsewhere(tmp_path: Path, bad: zipfile.ZipInfo, words: str) -> None:
    archive = tmp_path / "inner" / "model.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr(bad, "/etc/passwd")
    with pytest.raises(BuildError, match=words):
        import_nnunet(archive, tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inner"]


def test_a_zip_that_would_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ZIP_BYTES", 1000)
    archive = zipped(write_model(tmp_path / "results").parent, tmp_path / "model.zip")
    with pytest.raises(BuildError, match="would unpack to"):
        import_nnunet(archive, tmp_path / "b")


def test_zips_that_lie_about_their_size(tmp_path: Path) -> None:
    """zipfile reads no more than the size in the directory, so a lie gives damage, never a full disk."""
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("plans.json", b" " * 1_000_000)
    content = archive.read_bytes()
    archive.write_bytes(content.replace((1_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(BuildError, match="not a readable zip"):
        import_nnunet(archive, tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06"])
def test_files_that_are_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(BuildError, match="not a readable zip"):
        import_nnunet(tmp_path / "model.zip", tmp_path / "b")


def test_only_what_an_import_reads_is_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for name in ("A/plans.json", "A/fold_0/checkpoint_final.pth", "A/progress.png", "A/postprocessing.pkl", "A/validation/case.nii.gz"):
            target.writestr(name, "x")
    with sources.unpacked(archive) as folder:
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["checkpoint_final.pth", "plans.json"]
    assert not folder.exists()


def test_nothing_is_logged_about_a_plain_import(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    import_nnunet(write_model(tmp_path), tmp_path / "b")
    assert caplog.records == []
