"""A plan in words."""

from __future__ import annotations

from train_factory import configure

from segrt.networks import build_empty, count_parameters
from segrt.spec import ShapeTarget, SpacingTarget
from segrt.train.configuration import Plan
from segrt.train.tell import tell_plan


def test_numbers_and_reasons_of_every_configuration() -> None:
    reasons = {"patch": "It fits.", "batch_size": "Two fit."}
    flat = configure(target=SpacingTarget(spacing=(None, 0.5, 0.75)))
    planned = configure(target=SpacingTarget(spacing=(2.5, 0.5, 0.5))).model_copy(update={"reasons": reasons})
    whole = configure(target=ShapeTarget(shape=(8, 8, 8)))
    plan = Plan(
        dataset="tiny",
        planner="default",
        memory_gb=8,
        transpose=(0, 1, 2),
        median_spacing=(2.5, 0.5, 0.5),
        median_shape=(9, 16, 16),
        configurations={"flat": flat, "full": planned, "whole": whole},
    )
    parameters = f"plain_unet of {count_parameters(build_empty(planned.spec.network)):,} parameters"
    assert list(tell_plan(plan, {"full": planned.model_copy(update={"batch_size": 5})})) == [
        "planner default for 8 GB; median image 9 x 16 x 16 voxels of 2.5 x 0.5 x 0.5 mm; axes transposed as 0, 1, 2",
        f"flat, not chosen: patch 8 x 8 x 8, batch 2, spacing its own x 0.5 x 0.75 mm, median image 8 x 8 x 8 voxels, {parameters}",
        f"full, to be trained: patch 8 x 8 x 8, batch 5, spacing 2.5 x 0.5 x 0.5 mm, median image 8 x 8 x 8 voxels, {parameters}",
        "    patch: It fits.",
        "    batch_size: Two fit.",
        f"whole, not chosen: patch 8 x 8 x 8, batch 2, every image resized to 8 x 8 x 8 voxels, {parameters}",
    ]
