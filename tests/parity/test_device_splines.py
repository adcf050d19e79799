"""The CUDA C of cubic resampling, run on the host == CPU, over lines that are shorter and longer than a thread's span."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segrt.device import to_device, to_host
from segrt.kernels import _spline, resample
from segrt.kernels._cuda import splines
from segrt.kernels._cuda.normalize import PLAIN
from tests.cuda_sources import GENERATIONS, Compiled, compiled
from tests.host_kernels import compiler, cuda_c_on_host, run_on_host

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

AFFINE = (np.float32(-900), np.float32(700), np.float32(82), np.float32(1 / 136))
lengths = st.sampled_from([1, 2, 3, 7, 30, 31, 32, 33, 63, 64, 65, 100, 150, 300])
triples = st.tuples(*[st.integers(1, 11)] * 3)
TOLERANCE = 3e-6  # of the range: a recursion of float32 numbers, begun elsewhere


def device(array):
    return to_device(array, "simulated")


def laid_out(array, layout):
    """On the device: whole, with gaps between rows and planes, or with these two turned, as a pass along z has them."""
    if layout == "turned":
        return device(array.transpose(1, 0, 2)).transpose(1, 0, 2)
    return device(np.pad(array, 1))[1:-1, 1:-1, 1:-1] if layout == "gaps" else device(array)


@settings(deadline=None, max_examples=60)
@given(
    lengths,
    lengths,
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["whole", "gaps", "turned"]),
    st.integers(0, 99),
)
def test_one_axis(size, new, other, planes, axis, integers, scaled, layout, seed):
    rng = np.random.default_rng(seed)
    shape = [planes, size, other] if axis == 1 else [planes, other, size]
    host = rng.integers(-1000, 1000, shape).astype(np.int16 if integers else np.float32)
    shape[axis] = new
    there, out = laid_out(host, layout), laid_out(np.full(shape, np.nan, np.float32), layout)
    rows = np.stack([np.arange(planes), np.zeros(planes)], axis=1)
    bounds = device(np.array([[-np.inf], [np.inf]], np.float32))
    call = splines.cubic_call(there, out, axis, bounds, (0, *AFFINE) if scaled else PLAIN, rows)
    if call is None:
        assert new / size > 2
        return
    run_on_host(call)
    read = (np.clip(host.astype(np.float32), *AFFINE[:2]) - AFFINE[2]) * AFFINE[3] if scaled else host.astype(np.float32)
    expected = resample.resize(read, tuple(shape), order=3, clip=False) if size != new else read
    np.testing.assert_allclose(to_host(out), expected, rtol=0, atol=TOLERANCE * max(1, np.abs(read).max()) * 2)


orders = st.sampled_from([0, 1, 3])


@settings(max_examples=60)
@given(
    triples,
    triples,
    orders,
    st.sampled_from([None, 0, 1, 2]),
    orders,
    st.sampled_from([np.int16, np.float32, np.uint8]),
    st.sampled_from(["whole", "gaps", "turned"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_images_as_the_pipeline_resamples_them(shape, new, order, separate, order_z, dtype, layout, scaled, seed):
    host = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    rule = {"order": order, "separate": separate, "order_z": order_z, "affine": (10.0, 200.0, 82.0, 1.0) if scaled else None}
    with cuda_c_on_host() as ran:
        found = resample.resize(laid_out(host, layout), new, **rule)
    assert ran or shape == new
    np.testing.assert_allclose(to_host(found), resample.resize(host, new, **rule), rtol=0, atol=TOLERANCE * 256 * 2)


def test_planes_are_picked_and_clipped_to_their_own_bounds():
    host = np.random.default_rng(0).normal(size=(4, 20, 33)).astype(np.float32)
    bounds = np.array([[-1, -0.5, -0.1], [1, 0.5, 0.1]], np.float32)
    rows = np.array([[3, 0], [1, 2], [0, 1], [1, 0], [2, 2]])
    for axis, shape in ((1, (5, 31, 33)), (2, (5, 20, 50))):
        out = device(np.full(shape, np.nan, np.float32))
        run_on_host(splines.cubic_call(device(host), out, axis, device(bounds), PLAIN, rows))
        for found, (plane, slot) in zip(to_host(out), rows, strict=True):
            expected = resample.resize(host[plane][None], (1, *shape[1:]), order=3, clip=False)[0]
            np.testing.assert_allclose(found, np.clip(expected, *bounds[:, slot]), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(triples, triples, st.tuples(*[st.sampled_from([0, 1])] * 3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_linear_and_nearest(shape, new, orders, integers, scaled, seed):
    host = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16 if integers else np.float32)
    tables = [_spline.fractions(n, m, order) for n, m, order in zip(shape, new, orders, strict=True)]
    lower, fraction = (device(np.concatenate([t[i].astype(kind) for t in tables])) for i, kind in ((0, np.int32), (1, np.float32)))
    out = device(np.full(new, np.nan, np.float32))
    # with gaps between rows and planes
    wide = device(np.pad(host, 1))[1:-1, 1:-1, 1:-1]
    call = splines.linear_call(wide, out, lower, fraction, (0, *AFFINE) if scaled else PLAIN)
    assert call is not None
    run_on_host(call)
    expected = (np.clip(host.astype(np.float32), *AFFINE[:2]) - AFFINE[2]) * AFFINE[3] if scaled else host.astype(np.float32)
    for axis, (low, t) in enumerate(tables):
        high = np.minimum(low + (t > 0), shape[axis] - 1)
        weights = t.reshape([-1 if a == axis else 1 for a in range(3)])
        expected = np.take(expected, low, axis) * (1 - weights) + np.take(expected, high, axis) * weights
    np.testing.assert_allclose(to_host(out), expected, rtol=0, atol=1e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 70, 40), (1, 1, 1)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", ["whole", "gaps", "turned"])
def test_extremes(shape, dtype, scaled, layout):
    host = np.random.default_rng(1).integers(-1000, 1000, shape).astype(dtype)
    if dtype == np.float32:
        host[0, 0, -1] = np.nan
    found = splines.extremes_call(laid_out(host, layout), (0, *AFFINE) if scaled else PLAIN)
    assert found is not None
    call, partial = found
    run_on_host(call)
    folded = device(np.empty((2, shape[0]), np.float32))
    run_on_host(splines.fold_call(partial, folded))
    planes = host.reshape(shape[0], -1).astype(np.float32)
    planes = (np.clip(planes, *AFFINE[:2]) - AFFINE[2]) * AFFINE[3] if scaled else planes
    np.testing.assert_array_equal(to_host(folded), [planes.min(axis=1), planes.max(axis=1)])


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("integers", [0, 1])
def test_the_source_compiles_without_spilling_or_doubles(generation, integers):
    kernels = compiled("spline", {**splines.TUNING, "INTEGER": integers}, generation)
    assert kernels == dict.fromkeys(("along_lines", "along_rows", "extremes", "fold_extremes", "linear"), Compiled(0, False))
