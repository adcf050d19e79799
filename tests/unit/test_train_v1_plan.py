"""Plans by nnU-Net 1's rules, against published ones of the Medical Decathlon and those worked out for AMOS."""

from __future__ import annotations

from pathlib import Path

import pytest

from segrt.arrays import Shape3, Spacing3
from segrt.errors import SpecError
from segrt.spec import SpacingTarget, UNetSpec
from segrt.train.cases import Dataset, TrainingCase
from segrt.train.config import make_config
from segrt.train.configuration import Plan
from segrt.train.fingerprint import Fingerprint, Intensities
from segrt.train.v1_plan import plan_nnunet_v1, plan_topology_v1

ISOTROPIC = ((2, 2, 2),) * 5
FLAT_ONCE = ((1, 2, 2), *((2, 2, 2),) * 4)


def plan(spacing: Spacing3, shape: Shape3, *, classes: int = 16, cases: int = 160) -> Plan:
    every = tuple(TrainingCase(f"c{i:03d}", (Path("image"),), Path("labels")) for i in range(cases))
    labels = {"background": (0,)} | {f"organ {i}": (i,) for i in range(1, classes)}
    intensities = Intensities(**dict.fromkeys(Intensities.model_fields, 1.0))
    found = Fingerprint(spacings=(spacing,) * cases, shapes=(shape,) * cases, intensities=(intensities,), relative_size=1.0)
    return plan_nnunet_v1(Dataset("ct", Path(), ("CT",), cases=every, labels=labels), found)


def network(made: Plan, name: str) -> UNetSpec:
    found = made.configurations[name].spec.network
    assert isinstance(found, UNetSpec)
    return found


AMOS = [
    ((2.0, 0.68, 0.68), (250, 538, 538), (64, 160, 160), FLAT_ONCE, (3.26, 1.63, 1.63), (96, 160, 128)),
    ((2.0, 0.7129, 0.7129), (258, 512, 512), (80, 160, 128), FLAT_ONCE, (3.10, 1.56, 1.56), (112, 160, 128)),
    ((5.0, 0.7129, 0.7129), (103, 512, 512), (40, 224, 192), ((1, 2, 2),) * 2 + ((2, 2, 2),) * 3, (5.0, 1.46, 1.46), (64, 160, 160)),
]


@pytest.mark.parametrize(("spacing", "shape", "patch", "strides", "coarse", "low"), AMOS)
def test_amos(spacing: Spacing3, shape: Shape3, patch: Shape3, strides: tuple[Shape3, ...], coarse: Spacing3, low: Shape3) -> None:
    made = plan(spacing, shape)
    assert list(made.configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    full, lowres = made.configurations["3d_fullres"], made.configurations["3d_lowres"]
    assert (full.spec.inference.patch, full.batch_size, full.batch_dice) == (patch, 2, True)
    assert network(made, "3d_fullres").strides[1:] == strides
    assert network(made, "3d_fullres").features == (32, 64, 128, 256, 320, 320)
    assert (lowres.spec.inference.patch, lowres.batch_size, lowres.batch_dice) == (low, 2, False)
    assert isinstance(lowres.spec.target, SpacingTarget)
    assert lowres.spec.target.spacing == pytest.approx(coarse, abs=0.005)
    assert made.configurations["3d_cascade_fullres"].spec.network.in_channels == 16


def test_amos_without_a_low_resolution() -> None:
    made = plan((1.5, 1.5, 1.5), (200, 240, 240))
    assert list(made.configurations) == ["2d", "3d_fullres"]
    assert made.configurations["3d_fullres"].spec.inference.patch == (128, 128, 128)
    assert network(made, "3d_fullres").strides[1:] == ISOTROPIC


@pytest.mark.parametrize(
    ("spacing", "shape", "classes", "cases", "patch"),
    [
        ((1.24, 0.79, 0.79), (252, 512, 512), 2, 63, (80, 192, 160)),
        ((1.0, 0.77, 0.77), (482, 512, 512), 3, 131, (128, 128, 128)),
        ((1.6, 0.79, 0.79), (187, 512, 512), 2, 41, (64, 192, 160)),
    ],
    ids=["lung", "liver", "spleen"],
)
def test_published_plans_of_the_decathlon(spacing: Spacing3, shape: Shape3, classes: int, cases: int, patch: Shape3) -> None:
    made = plan(spacing, shape, classes=classes, cases=cases)
    assert (made.configurations["3d_fullres"].spec.inference.patch, made.configurations["3d_fullres"].batch_size) == (patch, 2)
    flat = made.configurations["2d"]
    assert (flat.spec.inference.patch, flat.batch_size) == ((1, 512, 512), 12)
    assert network(made, "2d").features == (32, 64, 128, 256, 480, 480, 480, 480)


def test_kernels_follow_the_largest_group_of_axes() -> None:
    thick = plan_topology_v1((5.0, 1.0, 1.0), (16, 64, 64))
    assert thick.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert thick.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert plan_topology_v1((1.0, 1.0), (60, 33)).patch == (64, 40)


def test_a_small_dataset_has_a_small_batch() -> None:
    """A batch covers five percent of all voxels at most, but two images are always."""
    few, many = plan((1.5, 1.5, 1.5), (32, 32, 32), cases=40), plan((1.5, 1.5, 1.5), (32, 32, 32), cases=200)
    assert (few.configurations["3d_fullres"].batch_size, many.configurations["3d_fullres"].batch_size) == (2, 10)
    assert plan((1.5, 1.5, 1.5), (1, 64, 64), cases=10).configurations["2d"].batch_size == 1
    assert list(plan((1.5, 1.5, 1.5), (1, 64, 64)).configurations) == ["2d"]


def test_reasons_are_those_of_the_plan() -> None:
    reasons = plan((2.0, 0.68, 0.68), (250, 538, 538)).configurations["3d_lowres"].reasons
    assert "4 patches or more" in reasons["stages"]
    assert "coarsened by 1% at a time" in reasons["spacing"]
    assert "largest group of axes" in reasons["topology"]


def test_memory_is_not_for_this_planner() -> None:
    with pytest.raises(SpecError, match="memory_gb: planner v1 plans for one size of GPU"):
        make_config("nnunet", planner="v1", memory_gb=24.0)
