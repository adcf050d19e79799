"""The CUDA C of blending and labels, run thread by thread on the host == CPU == the thread bodies that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segrt.device import to_device, to_host
from segrt.kernels import argmax
from segrt.kernels._cuda import logits
from segrt.kernels._spline import fractions
from segrt.kernels.activation import largest_below
from segrt.kernels.blend import blend_windows
from tests.cuda_sources import GENERATIONS, Compiled, compiled
from tests.host_kernels import compiler, cuda_c_on_host, run_on_host

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
halves = st.booleans()
seeds = st.integers(0, 2**32 - 1)


def stack(classes, shape, seed, half, *, integers=False):
    values = np.random.default_rng(seed).normal(0, 2, (classes, *shape))
    return (np.round(values) if integers else values).astype(np.float16 if half else np.float32)


def device(array):
    return to_device(array, "simulated")


def labels_of(call_of, shape, wide):
    """Run a call whose `out` is poisoned first."""
    out = device(np.full(shape, 77, np.uint16 if wide else np.uint8))
    call = call_of(out)
    assert call is not None
    run_on_host(call)
    return to_host(out)


@settings(deadline=None)
@given(st.integers(1, 9), sizes, halves, st.booleans(), st.booleans(), seeds)
def test_labels(classes, shape, half, integers, regions, seed):
    host = stack(classes, shape, seed, half, integers=integers)
    values = tuple(range(classes, 0, -1))
    table = device(np.asarray(values, np.int32))
    found = labels_of(lambda out: logits.label_call(device(host), table, regions, float(largest_below(0.6)), out), shape, seed % 2)
    function, rest = (argmax.paint, (values, 0.6)) if regions else (argmax.argmax, (values,))
    np.testing.assert_array_equal(found, function(host, *rest))
    with cuda_c_on_host() as ran:
        np.testing.assert_array_equal(to_host(function(device(host), *rest)), found)
    assert ran == ["painted" if regions else "largest"]


def test_labels_of_part_of_the_planes():
    host = stack(3, (6, 5, 8), 0, half=False)
    part, table = device(host)[:, 2:5], device(np.arange(3, dtype=np.int32))
    found = labels_of(lambda out: logits.label_call(part, table, False, 0.0, out), (3, 5, 8), False)
    np.testing.assert_array_equal(found, host[:, 2:5].argmax(0))


@settings(deadline=None)
@given(st.integers(1, 7), sizes, sizes, st.sampled_from((None, 0, 1, 2)), halves, st.booleans(), st.booleans(), st.booleans(), seeds)
def test_labels_of_another_grid(classes, shape, new, separate, half, round16, integers, regions, seed):
    host = stack(classes, shape, seed, half, integers=integers)
    if shape == new:
        return
    positions = [fractions(n, m, 0 if axis == separate else 1) for axis, (n, m) in enumerate(zip(shape, new, strict=True))]
    lower = device(np.concatenate([p[0].astype(np.int32) for p in positions]))
    fraction = device(np.concatenate([p[1] for p in positions]))
    values = tuple(range(classes, 0, -1))
    rule = regions, float(largest_below(0.6)), round16
    table = device(np.asarray(values, np.int32))
    if shape[2] == 1:
        # it reads pairs of neighbours along x
        assert logits.resampled_call(device(host), lower, fraction, table, rule, device(np.zeros(new, np.uint8))) is None
        return
    found = labels_of(lambda out: logits.resampled_call(device(host), lower, fraction, table, rule, out), new, seed % 2)
    options = {"separate": separate, "round16": round16}
    function, rest = (argmax.resample_paint, (values, 0.6)) if regions else (argmax.resample_argmax, (values,))
    np.testing.assert_array_equal(found, function(host, new, *rest, **options))
    with cuda_c_on_host() as ran:
        np.testing.assert_array_equal(to_host(function(device(host), new, *rest, **options)), found)
    assert ran == ["painted_resampled" if regions else "largest_resampled"]


def blended(acc, batch, entries, tables):
    call = logits.blend_call(acc, device(batch), device(entries), tuple(device(t) for t in tables), 0.25)
    assert call is not None
    run_on_host(call)


@settings(deadline=None)
@given(sizes, st.tuples(*[st.integers(0, 3)] * 3), st.integers(1, 19), halves, st.integers(1, 5), seeds)
def test_blend(patch, room, classes, half, count, seed):
    rng = np.random.default_rng(seed)
    batch = stack(3 * classes, patch, seed, half).reshape(3, classes, *patch)
    tables = tuple(rng.random((2, n)).astype(np.float32) for n in patch)
    columns = [*(rng.integers(0, n + 1, count) for n in room), *rng.integers(0, 2, (6, count)), rng.integers(0, 3, count)]
    entries = np.stack(columns, axis=1).astype(np.int32)
    shape = [p + n for p, n in zip(patch, room, strict=True)]
    start = rng.normal(size=(classes, *shape)).astype(np.float32)
    expected, whole, parts = start.copy(), device(start.copy()), device(start.copy())
    blend_windows(expected, batch, entries, tables, 0.25)
    # inside a wider array, as the box of a batch of windows is
    wide = device(np.pad(start, ((0, 0), (1, 2), (2, 1), (1, 3))))
    blended(wide[:, 1:-2, 2:-1, 1:-3], batch, entries, tables)
    blended(whole, batch, entries, tables)
    for entry in entries:
        blended(parts, batch, entry[None], tables)
    through = device(start)
    with cuda_c_on_host() as ran:
        blend_windows(through, device(batch), entries, tables, 0.25)
    assert ran == ["blend"]
    np.testing.assert_array_equal(to_host(through), to_host(whole))
    # float32 sums of a few numbers near one, in the same order
    np.testing.assert_allclose(to_host(whole), expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(to_host(parts), to_host(whole))
    np.testing.assert_array_equal(to_host(wide), np.pad(to_host(whole), ((0, 0), (1, 2), (2, 1), (1, 3))))


def test_arrays_with_gaps_are_left_to_the_thread_bodies():
    host, table = stack(2, (4, 5, 6), 0, half=False), device(np.arange(2, dtype=np.int32))
    out, turned = device(np.zeros((4, 5, 6), np.uint8)), device(np.zeros((6, 5, 4), np.uint8)).transpose()
    gaps = device(host)[..., 1:]
    lower, fraction = device(np.zeros(14, np.int32)), device(np.zeros(14))
    assert logits.label_call(gaps, table, False, 0.0, out[..., 1:]) is None
    assert logits.label_call(device(host), table, False, 0.0, turned) is None
    assert logits.resampled_call(gaps, lower, fraction, table, (False, 0.0, False), out) is None
    entries, tables = device(np.zeros((1, 10), np.int32)), tuple(device(np.ones((1, n), np.float32)) for n in (4, 5, 6))
    assert logits.blend_call(device(host)[..., ::-1], device(host)[None], entries, tables, 1.0) is None


def test_labels_are_written_wherever_they_belong():
    host, image = stack(3, (4, 5, 6), 3, half=False), device(np.zeros((9, 8, 7), np.uint8))
    out = image.transpose(2, 1, 0)[1:6, 1:7, 2:9]
    positions = [fractions(n, m, 1) for n, m in zip((4, 5, 6), (5, 6, 7), strict=True)]
    lower, fraction = (device(np.concatenate([p[i].astype(t) for p in positions])) for i, t in ((0, np.int32), (1, np.float64)))
    call = logits.resampled_call(device(host), lower, fraction, device(np.array([5, 6, 7], np.int32)), (False, 0.0, False), out)
    run_on_host(call)
    expected = argmax.resample_argmax(host, (5, 6, 7), (5, 6, 7))
    np.testing.assert_array_equal(to_host(out), expected)
    assert to_host(image).astype(int).sum() == expected.astype(int).sum()


CLEAN_LABELS = dict.fromkeys(("largest", "painted"), Compiled(0, False))


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("half", [0, 1])
def test_the_source_compiles_without_spilling(generation, half):
    common = {**logits.TUNING, "HALF": half, "WIDE": 0}
    assert compiled("logits", {**common, "VEC": 4 * (1 + half)}, generation, kernel="largest") == CLEAN_LABELS
    assert compiled("logits", common, generation, kernel="blend") == {"blend": Compiled(0, False)}
    for wide in (0, 1) if generation == 90 else (0,):
        for regions, kernel in ((False, "largest_resampled"), (True, "painted_resampled")):
            found = compiled("logits", {**common, "WIDE": wide, "RY": logits.rows(regions)}, generation, kernel=kernel)
            # where two classes are nearly equal they are interpolated again, as the CPU does it
            assert found[kernel] == Compiled(0, True)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize(("half", "vector"), [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 4), (1, 8)])
def test_labels_compile_without_spilling_however_wide_their_loads(half, wide, vector):
    # as many voxels as one load brings, and no fewer
    host, out = np.zeros((2, 1, 1, vector), np.float16 if half else np.float32), np.zeros((1, 1, vector), np.uint16 if wide else np.uint8)
    options = dict(logits.label_call(device(host), device(np.zeros(2, np.int32)), False, 0.0, device(out)).options)
    assert (options["HALF"], options["WIDE"], options["VEC"]) == (half, wide, vector)
    assert compiled("logits", options, 90, kernel="largest") == CLEAN_LABELS
