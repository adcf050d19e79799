"""Plans equal those nnU-Net 2.8.1's own planners wrote for the same fingerprints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from segrt.export.importers.plans import model_spec, resolve_configuration
from segrt.spec import UNetSpec
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.configuration import Configuration, load_plan
from segrt.train.dataset_json import read_dataset_json
from segrt.train.fingerprint import Fingerprint
from segrt.train.plan import Plan, plan_nnunet
from segrt.train.presets import Planner

DATASETS = (
    "Dataset601_AmosLike",
    "Dataset602_AmosThin",
    "Dataset603_Hippocampus",
    "Dataset605_CardiacAniso",
    "Dataset606_BrainFour",
    "Dataset608_Png",
    "Dataset609_Iso15",
)
FILES: dict[str, Planner] = {"nnUNetPlans": "default", "ResEncM": "resenc_m", "ResEncL": "resenc_l"}
CHOICES = {"spacing", "transpose", "patch", "topology", "network", "batch_size", "batch_dice", "normalization", "resampling"}
# (dataset, planner, GB): configuration -> (patch, batch); what nnU-Net 2.8.1 gave for the golden fingerprints
OTHERS: dict[tuple[str, Planner, float | None], dict[str, tuple[tuple[int, ...], int]]] = {
    ("Dataset601_AmosLike", "resenc_xl", None): {"2d": ((512, 512), 50), "3d_fullres": ((64, 320, 320), 2)},
    ("Dataset602_AmosThin", "resenc_xl", None): {"2d": ((640, 640), 32), "3d_fullres": ((128, 256, 256), 2)},
    ("Dataset603_Hippocampus", "resenc_xl", None): {"2d": ((56, 40), 5733), "3d_fullres": ((40, 56, 40), 143)},
    ("Dataset605_CardiacAniso", "resenc_xl", None): {"2d": ((256, 224), 238), "3d_fullres": ((10, 256, 224), 29)},
    ("Dataset606_BrainFour", "resenc_xl", None): {"2d": ((192, 160), 444), "3d_fullres": ((160, 192, 160), 5)},
    ("Dataset608_Png", "resenc_xl", None): {"2d": ((448, 576), 53)},
    ("Dataset609_Iso15", "resenc_xl", None): {"2d": ((256, 256), 168), "3d_fullres": ((160, 224, 224), 2)},
    ("Dataset601_AmosLike", "default", 4): {"2d": ((512, 512), 6), "3d_lowres": ((80, 128, 112), 2), "3d_fullres": ((32, 160, 160), 2)},
    ("Dataset602_AmosThin", "default", 24): {
        "2d": ((640, 640), 23),
        "3d_lowres": ((128, 224, 224), 2),
        "3d_fullres": ((112, 224, 224), 2),
    },
    ("Dataset605_CardiacAniso", "default", 4): {"2d": ((256, 224), 28), "3d_fullres": ((10, 256, 224), 3)},
    ("Dataset609_Iso15", "default", 4): {"2d": ((256, 256), 18), "3d_lowres": ((80, 96, 96), 2), "3d_fullres": ((80, 96, 96), 2)},
    ("Dataset602_AmosThin", "resenc_l", 11): {
        "2d": ((640, 512), 13),
        "3d_lowres": ((112, 192, 160), 2),
        "3d_fullres": ((80, 192, 160), 2),
    },
}


def read(folder: Path) -> tuple[Dataset, Fingerprint]:
    """The planner's two inputs; the cases are names without files."""
    declared = read_dataset_json(folder / "dataset.json")
    cases = tuple(TrainingCase(f"case_{k:04d}", (Path("image"),), Path("labels")) for k in range(declared.values["numTraining"]))
    dataset = Dataset(folder.name, folder, declared.channels, declared.labels, cases, class_order=declared.class_order)
    values = json.loads((folder / "dataset_fingerprint.json").read_text())
    table = values["foreground_intensity_properties_per_channel"]
    fingerprint = Fingerprint(
        spacings=values["spacings"],
        shapes=values["shapes_after_crop"],
        intensities=tuple(table[key] for key in sorted(table, key=int)),
        relative_size=values["median_relative_size_after_cropping"],
    )
    return dataset, fingerprint


def as_nnunet(configuration: Configuration) -> dict[str, Any]:
    """What of a configuration stands in nnU-Net's plans, under its names."""
    spec, network = configuration.spec, configuration.spec.network
    assert isinstance(network, UNetSpec)
    kinds = {"ct": "CTNormalization", "zscore": "ZScoreNormalization"}
    residual = network.family == "residual_unet"
    return {
        "batch_size": configuration.batch_size,
        "batch_dice": configuration.batch_dice,
        "patch_size": list(spec.inference.patch[-network.dimensions :]),
        "median_image_size_in_voxels": list(configuration.median_shape[-network.dimensions :]),
        "spacing": list(spec.target.spacing[-network.dimensions :]),
        "normalization_schemes": [kinds[c.normalization.kind] for c in spec.channels],
        "use_mask_for_norm": [getattr(c.normalization, "masked", False) for c in spec.channels],
        "order": (spec.resample_image.order, spec.resample_labels.order, spec.resample_logits.order),
        "order_z": (spec.resample_image.order_z, spec.resample_labels.order_z, spec.resample_logits.order_z),
        "force_separate_z": (spec.resample_image.separate, spec.resample_labels.separate, spec.resample_logits.separate),
        "network_class_name": "ResidualEncoderUNet" if residual else "PlainConvUNet",
        "n_stages": len(network.features),
        "features_per_stage": list(network.features),
        "kernel_sizes": [list(k) for k in network.kernels],
        "strides": [list(s) for s in network.strides],
        "blocks": list(network.blocks),
        "n_conv_per_stage_decoder": list(network.decoder_convs),
        "conv_bias": network.conv_bias,
        "norm_op_kwargs": {"eps": network.norm_eps, "affine": network.norm_affine},
        "previous_stage": configuration.previous,
    }


def theirs(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """The same fields of nnU-Net's own plans."""
    values = resolve_configuration(plans, name)
    network = values["architecture"]["arch_kwargs"]
    kinds = ("data", "seg", "probabilities")
    same = ("batch_size", "batch_dice", "patch_size", "median_image_size_in_voxels", "spacing", "normalization_schemes")
    return {
        **{key: values[key] for key in same},
        "use_mask_for_norm": values["use_mask_for_norm"],
        **{k: tuple(values[f"resampling_fn_{kind}_kwargs"][k] for kind in kinds) for k in ("order", "order_z", "force_separate_z")},
        "network_class_name": values["architecture"]["network_class_name"].rsplit(".", 1)[-1],
        **{k: network[k] for k in ("n_stages", "features_per_stage", "kernel_sizes", "strides", "conv_bias", "norm_op_kwargs")},
        "n_conv_per_stage_decoder": network["n_conv_per_stage_decoder"],
        "blocks": network.get("n_conv_per_stage") or network["n_blocks_per_stage"],
        "previous_stage": values.get("previous_stage"),
    }


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", DATASETS)
def test_a_plan_equals_nnunets_field_by_field(golden: Path, name: str, file: str) -> None:
    dataset, fingerprint = read(golden / "plans" / name)
    expected = json.loads((golden / "plans" / name / f"{file}.json").read_text())
    plan = plan_nnunet(dataset, fingerprint, planner=FILES[file])
    assert list(plan.configurations) == list(expected["configurations"])
    for configuration, planned in plan.configurations.items():
        assert as_nnunet(planned) == theirs(expected, configuration), configuration
    assert plan.dataset == expected["dataset_name"]
    assert list(plan.transpose) == expected["transpose_forward"]
    assert list(plan.median_spacing) == expected["original_median_spacing_after_transp"]
    assert list(plan.median_shape) == expected["original_median_shape_after_transp"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", DATASETS)
def test_a_planned_spec_equals_the_imported_one(golden: Path, name: str, file: str) -> None:
    """A network trained here and one imported from nnU-Net are surrounded by the same pipeline."""
    folder = golden / "plans" / name
    dataset, fingerprint = read(folder)
    plans, declared = json.loads((folder / f"{file}.json").read_text()), json.loads((folder / "dataset.json").read_text())
    for configuration, planned in plan_nnunet(dataset, fingerprint, planner=FILES[file]).configurations.items():
        axes = (0, 1) if configuration == "2d" else (0, 1, 2)
        spec = planned.spec
        assert spec == model_spec(plans, declared, configuration, members=spec.members, mirror_axes=axes, source=spec.source)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: "-".join(str(part) for part in case))
def test_xl_and_other_memory_equal_nnunet(golden: Path, case: tuple[str, Planner, float | None]) -> None:
    name, planner, memory = case
    plan = plan_nnunet(*read(golden / "plans" / name), planner=planner, memory_gb=memory)
    planned = {k: c for k, c in plan.configurations.items() if k != "3d_cascade_fullres"}
    assert {k: (c.spec.inference.patch[-len(OTHERS[case][k][0]) :], c.batch_size) for k, c in planned.items()} == OTHERS[case]


def test_every_choice_has_its_reason(golden: Path) -> None:
    plan = plan_nnunet(*read(golden / "plans" / "Dataset601_AmosLike"))
    for name, planned in plan.configurations.items():
        assert set(planned.reasons) >= CHOICES, name
        assert all(reason.endswith(".") and "  " not in reason for reason in planned.reasons.values()), name
    assert "previous" in plan.configurations["3d_cascade_fullres"].reasons
    assert "10th percentile" in plan.configurations["3d_fullres"].reasons["spacing"]
    assert "until a patch holds 25%" in plan.configurations["3d_lowres"].reasons["spacing"]


def test_a_plan_survives_its_file(golden: Path, tmp_path: Path) -> None:
    plan = plan_nnunet(*read(golden / "plans" / "Dataset601_AmosLike"), planner="resenc_m")
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "plan.json") == plan
    assert Plan.model_validate_json(plan.to_json()).configurations["3d_lowres"] == plan.configurations["3d_lowres"]
