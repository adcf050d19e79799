"""Windows on a device: plain slices of a padded array == CPU == the loop over threads == the CUDA simulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segrt.device import Simulated, get_xp, to_device, to_host
from segrt.errors import InputError
from segrt.kernels._cuda.launch import cuda_simulator, recording
from segrt.kernels.blend import blend_windows, constant_windows, gather_windows

triples = st.tuples(*[st.integers(1, 7)] * 3)
pads = st.tuples(*[st.integers(0, 3)] * 3)
seeds = st.integers(0, 2**32 - 1)
ROOM = 30  # more than any window here reaches


def table(rng, count, room, *, rows=1, batch=1):
    """Windows anywhere in `room`, flipped at random, some twice."""
    columns = [*(rng.integers(0, n + 1, count) for n in room), *rng.integers(0, 2, (3, count)), *rng.integers(0, rows, (3, count))]
    return np.stack([*columns, rng.integers(0, batch, count)], axis=1).astype(np.int32)


def padded(data, low):
    wide = np.zeros((len(data), *[ROOM] * 3), np.float32)
    wide[(slice(None), *(slice(a, a + n) for a, n in zip(low, data.shape[1:], strict=True)))] = data
    return wide


def window(array, entry, patch):
    """The window in the array's own order."""
    return array[(slice(None), *(slice(s, s + n) for s, n in zip(entry[:3], patch, strict=True)))]


def flipped(patch, entry):
    return np.flip(patch, [axis + 1 for axis in range(3) if entry[3 + axis]])


def turned(device, kind):
    """The same values elsewhere in memory: as they are, cropped from something larger, or with axes swapped."""
    if kind == 1:
        wide = get_xp(device).zeros((*device.shape[:-1], device.shape[-1] + 3), device.dtype)
        view = wide[..., 2:-1]
    elif kind == 2:
        view = get_xp(device).zeros(device.shape[::-1], device.dtype).transpose(*range(device.ndim)[::-1])
    else:
        return device
    view[...] = device
    return view


def check_gather(rng, shape, channels, patch, low, count):
    data = rng.normal(size=(channels, *shape)).astype(np.float32)
    entries = table(rng, count, (9, 9, 9))
    expected = [flipped(window(padded(data, low), entry, patch), entry) for entry in entries]
    np.testing.assert_array_equal(gather_windows(data, entries, patch, low), expected)
    result = gather_windows(turned(to_device(data, "simulated"), rng.integers(3)), entries, patch, low)
    assert isinstance(result, Simulated)
    np.testing.assert_array_equal(to_host(result), expected)


@given(triples, st.integers(1, 3), triples, pads, st.integers(1, 4), seeds)
def test_windows_are_cut_and_flipped_and_zero_outside(shape, channels, patch, low, count, seed):
    check_gather(np.random.default_rng(seed), shape, channels, patch, low, count)


@pytest.mark.parametrize("seed", range(3))
def test_gather_in_the_cuda_simulator(seed):
    with cuda_simulator():
        check_gather(np.random.default_rng(seed), (4, 5, 3), 2, (3, 2, 4), (1, 0, 2), 3)


def check_constant(rng, shape, channels, patch, low, spread):
    data = (rng.random((channels, *shape)) < spread).astype(np.float32) * 3
    data[-1] += rng.integers(0, 2)
    starts = np.stack([rng.integers(0, 9, 6) for _ in range(3)], axis=1).astype(np.int32)
    windows = [window(padded(data, low), start, patch) for start in starts]
    for array in (data, turned(to_device(data, "simulated"), rng.integers(3))):
        flags, corners = constant_windows(array, starts, patch, low)
        assert flags.dtype == bool
        np.testing.assert_array_equal(flags, [len(np.unique(w.reshape(len(w), -1), axis=1).T) == 1 for w in windows])
        np.testing.assert_array_equal(corners, [w[:, 0, 0, 0] for w in windows])


@given(triples, st.integers(1, 3), triples, pads, st.sampled_from([0, 0.02, 0.5, 1]), seeds)
def test_constant_windows_and_their_first_voxels(shape, channels, patch, low, spread, seed):
    check_constant(np.random.default_rng(seed), shape, channels, patch, low, spread)


@pytest.mark.parametrize("spread", [0, 0.05, 1])
def test_constant_windows_in_the_cuda_simulator(spread):
    with cuda_simulator():
        check_constant(np.random.default_rng(3), (5, 4, 6), 2, (2, 3, 2), (1, 0, 1), spread)


def test_nan_is_never_constant():
    data = np.full((1, 3, 3, 3), np.nan, np.float32)
    for array in (data, to_device(data, "simulated")):
        assert not constant_windows(array, np.zeros((1, 3), np.int32), (2, 2, 2), (0, 0, 0))[0].any()


def check_blend(rng, shape, classes, patch, dtype, count, batch):
    logits = rng.normal(size=(batch, classes, *patch)).astype(dtype)
    weights = tuple(rng.random((3, n)).astype(np.float32) for n in patch)
    start = rng.normal(size=(classes, *shape)).astype(np.float32)
    entries = table(rng, count, [n - p for n, p in zip(shape, patch, strict=True)], rows=3, batch=batch)
    expected = start.astype(np.float64)
    for entry in entries:
        wz, wy, wx = (w[row] for w, row in zip(weights, entry[6:9], strict=True))
        window(expected, entry, patch)[...] += 0.25 * wz[:, None, None] * wy[:, None] * wx * flipped(logits[entry[9]], entry).astype(float)
    host, device = start.copy(), turned(to_device(start, "simulated"), rng.integers(3))
    blend_windows(host, logits, entries, weights, 0.25)
    on_device = tuple(to_device(w, "simulated") for w in weights) if count % 2 else weights
    with recording() as launches:
        blend_windows(device, turned(to_device(logits, "simulated"), rng.integers(3)), entries, on_device, 0.25)
    assert len(launches) == 1
    # float32 sums of a few numbers near one
    np.testing.assert_allclose(host, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(to_host(device), expected, rtol=0, atol=2e-6)


@given(triples, pads, st.integers(1, 9), st.sampled_from([np.float32, np.float16]), st.integers(1, 5), st.integers(1, 3), seeds)
def test_windows_are_blended(patch, room, classes, dtype, count, batch, seed):
    shape = [p + n for p, n in zip(patch, room, strict=True)]
    check_blend(np.random.default_rng(seed), shape, classes, patch, dtype, count, batch)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blend_in_the_cuda_simulator(dtype):
    with cuda_simulator():
        check_blend(np.random.default_rng(1), (5, 6, 7), 5, (3, 2, 4), dtype, 3, 2)


tiny = st.tuples(*[st.integers(1, 3)] * 3)


@settings(max_examples=5)
@given(tiny, tiny, tiny, st.sampled_from([np.float32, np.float16]), st.sampled_from([0, 0.1, 1]), seeds)
def test_any_shape_in_the_cuda_simulator(patch, room, low, dtype, spread, seed):
    rng = np.random.default_rng(seed)
    with cuda_simulator():
        check_gather(rng, room, 2, patch, low, 2)
        check_constant(rng, room, 2, patch, low, spread)
        check_blend(rng, [p + n for p, n in zip(patch, room, strict=True)], 2, patch, dtype, 2, 2)


def test_sums_do_not_depend_on_how_windows_are_batched():
    """A smaller batch after memory ran out gives the same bytes; what no window covers is not touched."""
    rng = np.random.default_rng(0)
    logits = to_device(rng.normal(size=(4, 3, 5, 4, 6)).astype(np.float32), "simulated")
    weights = tuple(rng.random((1, n)).astype(np.float32) for n in (5, 4, 6))
    entries = table(rng, 4, (3, 3, 3), batch=4)
    acc = rng.normal(size=(3, 10, 9, 11)).astype(np.float32)
    whole, parts = to_device(acc, "simulated"), to_device(acc, "simulated")
    blend_windows(whole, logits, entries, weights, 0.5)
    for entry in entries:
        blend_windows(parts, logits, entry[None], weights, 0.5)
    np.testing.assert_array_equal(to_host(whole), to_host(parts))
    covered = np.zeros((1, *acc.shape[1:]), bool)
    for entry in entries:
        window(covered, entry, (5, 4, 6))[...] = True
    np.testing.assert_array_equal(np.where(covered, 0, to_host(whole)), np.where(covered, 0, acc))


def test_no_windows_are_no_work():
    empty = np.zeros((0, 10), np.int32)
    for device in ("cpu", "simulated"):
        data = to_device(np.ones((2, 3, 3, 3), np.float32), device)
        assert gather_windows(data, empty, (2, 2, 2), (0, 0, 0)).shape == (0, 2, 2, 2, 2)
        blend_windows(data, to_device(np.ones((1, 2, 2, 2, 2), np.float32), device), empty, (np.ones((1, 2), np.float32),) * 3, 1.0)
        assert (to_host(data) == 1).all()
        assert constant_windows(data, empty[:, :3], (2, 2, 2), (0, 0, 0))[0].shape == (0,)


def blend_args(**changes):
    ones = np.ones((1, 2), np.float32)
    fields = {
        "acc": np.zeros((2, 4, 4, 4), np.float32),
        "logits": np.zeros((1, 2, 2, 2, 2), np.float32),
        "entries": np.zeros((1, 10), np.int32),
        "tables": (ones, ones, ones),
        "scale": 1.0,
    }
    return fields | changes


def entry(column, value):
    return np.where(np.arange(10) == column, value, 0)[None].astype(np.int32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"entries": np.zeros((1, 9), np.int32)}, "expected entries"),
        ({"entries": np.zeros((1, 10))}, "expected entries"),
        ({"acc": np.zeros((2, 4, 4, 4))}, "float32 sums"),
        ({"logits": np.zeros((1, 2, 2, 2, 2))}, "float32 or float16 logits"),
        ({"logits": np.zeros((1, 3, 2, 2, 2), np.float32)}, "do not fit each other"),
        ({"logits": to_device(np.zeros((1, 2, 2, 2, 2), np.float32), "simulated")}, "same device"),
        ({"entries": entry(0, 3)}, "do not lie in an array"),
        ({"entries": entry(2, -1)}, "do not lie in an array"),
        ({"entries": entry(7, 1)}, "rows and windows"),
        ({"entries": entry(9, 1)}, "rows and windows"),
        ({"entries": entry(9, -1)}, "rows and windows"),
    ],
)
def test_blend_says_what_is_wrong(changes, said):
    with pytest.raises(InputError, match=said):
        blend_windows(**blend_args(**changes))


def test_cutting_says_what_is_wrong():
    with pytest.raises(InputError, match="expected data"):
        gather_windows(np.zeros((1, 2, 2, 2)), np.zeros((1, 10), np.int32), (1, 1, 1), (0, 0, 0))
    with pytest.raises(InputError, match="starts"):
        constant_windows(np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2), np.int32), (1, 1, 1), (0, 0, 0))
