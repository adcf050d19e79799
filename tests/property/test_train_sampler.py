"""Laws of cutting patches."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from segrt.train.sampler import Sampling, _start, cut, enlarge, wants_foreground

sizes = st.tuples(*[st.integers(1, 12)] * 3)


@given(shape=sizes, size=sizes, start=st.tuples(*[st.integers(-14, 14)] * 3), fill=st.sampled_from([0, -1]))
def test_a_cut_is_a_slice_of_the_endlessly_padded_image(shape, size, start, fill: int) -> None:
    array = np.random.default_rng(0).integers(1, 99, (2, *shape)).astype(np.int16)
    padded = np.pad(array, ((0, 0), *[(14, 28)] * 3), constant_values=fill)
    expected = padded[(slice(None), *(slice(s + 14, s + 14 + n) for s, n in zip(start, size, strict=True)))]
    found = cut(array, start, size, fill)
    np.testing.assert_array_equal(found, expected)
    assert not np.shares_memory(found, array)


@given(shape=sizes, final=sizes, more=st.tuples(*[st.integers(0, 6)] * 3), seed=st.integers(0, 99), data=st.data())
def test_patches_reach_every_voxel_and_hold_the_one_they_were_drawn_for(shape, final, more, seed: int, data) -> None:
    patch = tuple(f + m for f, m in zip(final, more, strict=True))
    sampling, rng = Sampling(final, patch), np.random.default_rng(seed)
    starts = np.array([_start(shape, sampling, None, rng) for _ in range(20)])
    for axis, (n, p, f) in enumerate(zip(shape, patch, final, strict=True)):
        pad = max(p - f, p - n)
        assert starts[:, axis].min() >= -((pad + 1) // 2)
        assert starts[:, axis].max() + p <= n + (pad + 1) // 2
        if p >= n + (p - f):  # an image that fits is always wholly inside what the network will see, or the patch is as large
            assert (starts[:, axis] <= 0).all()
            assert (starts[:, axis] + p >= n).all()
    voxel = np.array([data.draw(st.integers(0, n - 1)) for n in shape])
    start = np.array(_start(shape, sampling, voxel, rng))
    assert (start <= voxel).all()
    assert (voxel < start + patch).all()


@given(batch=st.integers(1, 40), share=st.floats(0, 1), processes=st.integers(1, 8))
def test_the_forced_share_is_the_rounded_one_however_a_batch_is_divided(batch: int, share: float, processes: int) -> None:
    sampling, rng = Sampling((1, 1, 1), (1, 1, 1), share), np.random.default_rng(0)
    forced = sum(wants_foreground(position, batch, sampling, rng) for position in range(batch))
    assert forced == batch - round(batch * (1 - share))


@given(patch=st.one_of(sizes, st.tuples(st.integers(1, 12), st.integers(1, 12))), degrees=st.floats(0, 360))
def test_enlarging_never_shrinks(patch, degrees: float) -> None:
    assert all(new >= int(old / 0.85) for new, old in zip(enlarge(patch, degrees), patch, strict=True))
