"""What a configuration's own settings change of the plan."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from train_factory import write_dataset

from segrt.errors import SpecError
from segrt.train.config import make_config
from segrt.train.configuration import Plan
from segrt.train.fingerprint import measure
from segrt.train.override import choose_configuration
from segrt.train.plan import plan_nnunet, plan_vnet


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    dataset = write_dataset(tmp_path_factory.mktemp("data"))
    return plan_nnunet(dataset, measure(dataset, workers=0))


def test_without_changes_it_is_the_plans(plan: Plan) -> None:
    assert choose_configuration(plan, make_config("nnunet")) == plan.configurations["3d_fullres"]


def test_sides_with_labels_of_their_own_are_not_mirrored(plan: Plan) -> None:
    """Neither while it learns (augmentation reads the axes of the spec) nor when it predicts."""
    assert plan.configurations["3d_fullres"].spec.inference.mirror_axes == (0, 1, 2)
    for changes in ({"mirroring": False}, {"augmentation": "none"}):
        assert choose_configuration(plan, make_config("nnunet", **changes)).spec.inference.mirror_axes == ()


def test_batch_width_and_heads(plan: Plan) -> None:
    planned = plan.configurations["3d_fullres"]
    chosen = choose_configuration(plan, make_config("nnunet", batch_size=3, width=0.5, deep_supervision=False))
    assert (chosen.batch_size, chosen.deep_supervision) == (3, False)
    assert chosen.spec.network.features == tuple(n // 2 for n in planned.spec.network.features)


def test_a_patch_the_network_cannot_halve_is_refused(plan: Plan) -> None:
    with pytest.raises(SpecError, match=r"patch: the planned network halves axis x to 1/\d+, so its side is a multiple of \d+, got 17"):
        choose_configuration(plan, make_config("nnunet", patch=(32, 32, 17)))


def test_a_patch_that_shrinks_to_one_voxel_is_refused(plan: Plan) -> None:
    """An instance normalisation has nothing to normalise then; a V-Net's counts the whole batch."""
    strides = plan.configurations["3d_fullres"].spec.network.strides
    smallest = tuple(prod(stride[axis] for stride in strides) for axis in range(3))
    with pytest.raises(SpecError, match=r"patch: .* leaves one voxel at the coarsest level of the network, .* choose a larger patch$"):
        choose_configuration(plan, make_config("nnunet", patch=smallest))
    choose_configuration(plan, make_config("nnunet", patch=(2 * smallest[0], *smallest[1:])))


def test_a_vnets_batch_counts_too(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    plan = plan_vnet(dataset, measure(dataset, workers=0), shape=(16, 16, 16))
    with pytest.raises(SpecError, match=r"choose a larger patch or batch$"):
        choose_configuration(plan, make_config("vnet", patch=(16, 16, 16), batch_size=1))
    choose_configuration(plan, make_config("vnet", patch=(16, 16, 16), batch_size=2))
