"""Window plans and aggregators; their laws stand in property/test_windows.py."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from segrt.arrays import FloatArray
from segrt.spec import Inference
from segrt.windows import Aggregator, HalfAggregator, WindowPlan, plan_slabs, plan_windows


def test_windows_are_ordered_z_outermost() -> None:
    plan = plan_windows((12, 8, 12), Inference(patch=(8, 8, 8)))
    assert plan.starts == [(0, 0, 0), (0, 0, 4), (4, 0, 0), (4, 0, 4)]
    assert len(plan) == 4


def test_padding_is_centred_the_odd_voxel_above() -> None:
    plan = plan_windows((5, 8, 3), Inference(patch=(8, 8, 8)))
    assert plan.shape == (8, 8, 8)
    assert plan.low == (1, 0, 2)
    assert plan.starts == [(0, 0, 0)]


def test_a_2d_model_visits_every_slice_whatever_the_step() -> None:
    plan = plan_windows((5, 16, 16), Inference(patch=(1, 16, 16), step=1.0))
    assert plan.axes == ((0, 1, 2, 3, 4), (0,), (0,))


def test_the_step_can_be_overridden() -> None:
    inference = Inference(patch=(8, 8, 8), step=0.5)
    assert len(plan_windows((16, 16, 16), inference)) == 27
    assert len(plan_windows((16, 16, 16), inference, step=1.0)) == 8


def blended(plan: WindowPlan, blending: str, logits: list[FloatArray]) -> FloatArray:
    """Every window's logits (K, z, y, x) blended in one go."""
    (slab,) = slabs = plan_slabs(plan)
    slab.entries[:, 9] = range(len(logits))
    total = Aggregator(len(logits[0]), plan, blending, slabs=slabs, like=logits[0])
    total.add(np.stack(logits), slab.entries)
    return total.logits


@pytest.mark.parametrize("blending", ["gaussian", "uniform"])
def test_one_window_comes_back_as_it_is(blending: str) -> None:
    plan = plan_windows((8, 8, 8), Inference(patch=(8, 8, 8)))
    logits = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    assert np.allclose(blended(plan, blending, [logits]), logits, rtol=1e-6, atol=1e-6)


def test_uniform_blending_is_the_plain_mean() -> None:
    plan = plan_windows((1, 1, 12), Inference(patch=(1, 1, 8)))
    result = blended(plan, "uniform", [np.full((1, 1, 1, 8), value, np.float32) for value in range(2)])
    assert result.ravel().tolist() == [0] * 4 + [0.5] * 4 + [1] * 4


def test_gaussian_blending_prefers_the_window_whose_centre_is_near() -> None:
    plan = plan_windows((1, 1, 12), Inference(patch=(1, 1, 8)))
    result = blended(plan, "gaussian", [np.full((1, 1, 1, 8), value, np.float32) for value in range(2)])
    overlap = result.ravel()[4:8]
    assert overlap[0] < 0.5 < overlap[-1]
    assert (np.diff(overlap) > 0).all()


def test_half_aggregation_of_uniform_weights() -> None:
    plan = plan_windows((1, 1, 12), Inference(patch=(1, 1, 8), blending="uniform"))
    total = HalfAggregator(1, plan, "uniform")
    for value, start in enumerate(plan.starts):
        total.add(np.full((1, 1, 1, 8), value, np.float32), start)
    result = total.finish()
    assert result.dtype == np.float16
    assert result.ravel().tolist() == [0] * 4 + [0.5] * 4 + [1] * 4


@pytest.mark.parametrize("starts", [1, 2, 3])
def test_slabs_hold_every_window_once_and_overlap_by_what_is_not_ready(starts: int) -> None:
    plan = plan_windows((40, 9, 8), Inference(patch=(12, 8, 8)))
    slabs = plan_slabs(plan, starts)
    windows = [tuple(start) for slab in slabs for start in slab.entries[:, :3].tolist()]
    assert windows == plan.starts
    for slab, following in pairwise(slabs):
        assert slab.ready == following.entries[0, 0] == following.base + 1
    assert slabs[-1].ready == slabs[-1].stop == 40


def test_moving_to_the_next_slab_holds_its_planes_once() -> None:
    plan = plan_windows((96, 64, 64), Inference(patch=(32, 64, 64)))
    slabs = plan_slabs(plan, 1)
    total = Aggregator(20, plan, "uniform", slabs=slabs, like=np.empty(0))
    total.logits[...] = np.arange(33, dtype=np.float32)[:, None, None]
    tracemalloc.start()
    total.move_to(slabs[1])
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shift = slabs[1].base - slabs[0].base
    assert total.logits[:, :, 0, 0].tolist() == [[*range(shift, 33), *[0.0] * shift]] * 20
    assert taken < 0.1 * total.logits.nbytes
