"""Labels decided slab by slab are those decided at once, wherever the cuts lie."""

from __future__ import annotations

import numpy as np
from factories import make_spec
from hypothesis import given
from hypothesis import strategies as st

from segrt.device import get_xp, to_device, to_host
from segrt.kernels.argmax import Slab, argmax, paint, ready_planes, resample_argmax, resample_paint
from segrt.restore import can_restore_by_slab, restore, restore_slab
from segrt.spec import Resampling
from segrt.volume import Grid, Placement

shapes = st.tuples(*[st.integers(1, 9)] * 3)
turns = st.permutations((0, 1, 2)).map(tuple)
devices = st.sampled_from(("cpu", "simulated"))
dtypes = st.sampled_from((np.float32, np.float16))
axes = st.sampled_from((None, 0, 1, 2))
seeds = st.integers(0, 2**32 - 1)


def cuts(rng, total):
    """How many planes are there each time more have come in; the last time all are."""
    return sorted({*rng.integers(0, total + 1, 3).tolist(), total})


def random_logits(rng, shape, dtype):
    values = rng.normal(0, 2, (3, *shape))
    return (np.round(values) if rng.random() < 0.5 else values).astype(dtype)


def highest(total, new, plane, rule):
    """The last source plane a plane of the result needs: it is not ready with those before."""
    return max(a for a in range(total) if a == 0 or ready_planes(total, new, a, **rule) <= plane)


@given(shapes, shapes, axes, st.booleans(), st.booleans(), dtypes, devices, seeds)
def test_any_cuts_give_the_labels_of_the_whole(shape, new, separate, single, round16, dtype, device, seed):
    rng = np.random.default_rng(seed)
    logits = to_device(random_logits(rng, shape, dtype), device)
    options = {"separate": separate, "single": single, "round16": round16}
    rule = {"nearest": separate == 0, "single": single}
    for function, args in ((resample_argmax, (new, (1, 2, 3))), (resample_paint, (new, (1, 2, 3), 0.5))):
        expected = to_host(function(logits, *args, **options))
        labels, done = get_xp(logits).zeros(new, np.uint8), 0
        for available in cuts(rng, shape[0]):
            stop = ready_planes(shape[0], new[0], available, **rule)
            assert stop >= done
            if stop > done:
                # one plane before that is all that linear resampling asks for
                first = max(0, highest(shape[0], new[0], done, rule) - 1)
                part = logits[:, first:available]
                function(part, *args, **options, slab=Slab(first, shape[0], done, stop), out=labels[done:stop])
                done = stop
        assert done == new[0]
        np.testing.assert_array_equal(to_host(labels), expected)


@given(shapes, dtypes, devices, seeds)
def test_plain_planes(shape, dtype, device, seed):
    rng = np.random.default_rng(seed)
    logits = to_device(random_logits(rng, shape, dtype), device)
    for function, args in ((argmax, ((1, 2, 3),)), (paint, ((1, 2, 3), 0.5))):
        labels, start = get_xp(logits).zeros(shape, np.uint8), 0
        for stop in cuts(rng, shape[0]):
            if stop > start:
                first = int(rng.integers(0, start + 1))
                function(logits[:, first:stop], *args, slab=Slab(first, shape[0], start, stop), out=labels[start:stop])
                start = stop
        np.testing.assert_array_equal(to_host(labels), to_host(function(logits, *args)))


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans())
def test_ready_planes_grow_until_all_are(total, new, nearest, single):
    ready = [ready_planes(total, new, available, nearest=nearest, single=single) for available in range(total + 1)]
    assert ready == sorted(ready)
    assert (ready[0], ready[-1]) == (0, new)


HOW = st.sampled_from(
    (
        Resampling(order=1, separate=False),
        Resampling(order=1, separate=True),
        Resampling(order=1),
        Resampling(method="linear", order=1),
    )
)


@given(shapes, shapes, turns, HOW, st.sampled_from(("softmax", "sigmoid")), dtypes, devices, st.booleans(), seeds)
def test_restore_by_slab_is_restore(crop, working, turn, how, activation, dtype, device, same, seed):
    """For every transposition, crop and coarse axis; planes before the slab are gone, those not ready are garbage."""
    rng = np.random.default_rng(seed)
    working = crop if same else working
    low = rng.integers(0, 3, 3).tolist()
    spacing = tuple(rng.permutation([1.0, 1.5, 6.0]).tolist())
    shape = [0, 0, 0]
    for axis, (start, n) in zip(turn, zip(low, crop, strict=True), strict=True):
        shape[axis] = start + n + 1
    box = tuple((start, start + n) for start, n in zip(low, crop, strict=True))
    place = Placement(Grid(tuple(shape), spacing), turn, box, working, (1.0, 1.2, 1.4))
    spec = make_spec(values=(1, 2, 3), activation=activation, transpose=turn, resample_logits=how)
    logits = random_logits(rng, working, dtype)
    expected = to_host(restore(to_device(logits, device), place, spec))
    assert can_restore_by_slab(place, spec)

    labels, done, first = get_xp(to_device(logits, device)).zeros(expected.shape, spec.label_dtype), 0, 0
    for ready in cuts(rng, working[0]):
        last = int(rng.integers(ready, working[0] + 1))
        part = logits[:, first : max(last, first + 1)].copy()
        part[:, max(ready - first, 0) :] = 99
        done = restore_slab(to_device(part, device), place, spec, labels, first=first, ready=ready, done=done)
        first = max(ready - 1, 0)
    assert done == crop[0]
    np.testing.assert_array_equal(to_host(labels), expected)
