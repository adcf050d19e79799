"""Laws of the sliding window: every voxel is covered, weights sum to one, and positions are nnU-Net's."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from segrt.arrays import Shape3
from segrt.spec import Inference
from segrt.windows import Aggregator, HalfAggregator, WindowPlan, plan_slabs, plan_windows

sizes = st.tuples(*[st.integers(1, 40)] * 3)
patches = st.tuples(*[st.integers(1, 16)] * 3)
steps = st.floats(0.05, 1.0)
blendings = st.sampled_from(["gaussian", "uniform"])


def plan_of(shape: Shape3, patch: Shape3, step: float, blending: str = "gaussian") -> WindowPlan:
    return plan_windows(shape, Inference(patch=patch, step=step, blending=blending))


def nnunet_starts(size: int, patch: int, step: float) -> list[int]:
    """NNUNET.md 1.8: n = ceil((image - patch) / (patch * step)) + 1, start = round(i * (image - patch) / (n - 1))."""
    n = math.ceil((size - patch) / (patch * step)) + 1
    if n == 1:
        return [0]
    return [int(np.round((size - patch) / (n - 1) * i)) for i in range(n)]


@given(sizes, patches, steps)
def test_windows_lie_inside_and_cover_every_voxel(shape: Shape3, patch: Shape3, step: float) -> None:
    plan = plan_of(shape, patch, step)
    for size, length, starts in zip(plan.shape, patch, plan.axes, strict=True):
        covered = np.zeros(size, bool)
        for start in starts:
            assert 0 <= start <= size - length
            covered[start : start + length] = True
        assert covered.all()


@given(sizes, patches, steps)
def test_starts_ascend_by_at_most_the_step(shape: Shape3, patch: Shape3, step: float) -> None:
    plan = plan_of(shape, patch, step)
    for length, starts in zip(patch, plan.axes, strict=True):
        gaps = np.diff(starts)
        # rounding to whole voxels may add one; a step below one voxel visits a position twice, as nnU-Net does
        assert (gaps >= 0).all()
        assert (gaps <= math.ceil(length * step) if length > 1 else gaps == 1).all()


@given(sizes, patches, steps)
def test_starts_are_nnunets(shape: Shape3, patch: Shape3, step: float) -> None:
    plan = plan_of(shape, patch, step)
    for size, length, starts in zip(plan.shape, patch, plan.axes, strict=True):
        assert list(starts) == (list(range(size)) if length == 1 else nnunet_starts(size, length, step))


@given(sizes, patches, steps)
def test_padding_reaches_the_patch_and_is_centred(shape: Shape3, patch: Shape3, step: float) -> None:
    plan = plan_of(shape, patch, step)
    for n, p, padded, low in zip(shape, patch, plan.shape, plan.low, strict=True):
        assert padded == max(n, p)
        assert low == (padded - n) // 2


@given(st.tuples(*[st.integers(1, 14)] * 3), st.tuples(*[st.integers(1, 7)] * 3), st.floats(0.2, 1.0), blendings)
def test_weights_of_all_windows_sum_to_one(shape: Shape3, patch: Shape3, step: float, blending: str) -> None:
    plan = plan_of(shape, patch, step, blending)
    (slab,) = slabs = plan_slabs(plan)
    ones = np.ones((1, 1, *patch), np.float32)
    total = Aggregator(1, plan, blending, slabs=slabs, like=ones)
    total.add(ones, slab.entries)
    # float32: each weight is rounded once, and a voxel has at most some dozens of them
    assert np.allclose(total.logits, 1, atol=2e-5)


@given(st.tuples(*[st.integers(1, 14)] * 3), st.tuples(*[st.integers(2, 7)] * 3), st.floats(0.4, 1.0), blendings)
def test_float16_sums_divide_back_to_one(shape: Shape3, patch: Shape3, step: float, blending: str) -> None:
    plan = plan_of(shape, patch, step, blending)
    total = HalfAggregator(1, plan, blending)
    for start in plan.starts:
        total.add(np.ones((1, *patch), np.float32), start)
    # sums and counts are rounded alike, so the quotient is exact
    assert (total.finish() == 1).all()
