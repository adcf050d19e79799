"""Every kernel against its slow reference, over shapes with single voxels, odd sizes and arrays that are not contiguous."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from segrt.kernels import _blend, argmax, bbox, blend, components, draws, normalize, resample
from tests import reference

SIZES = st.integers(1, 11)
SHAPES = st.tuples(SIZES, SIZES, SIZES)
ORDERS = st.sampled_from((0, 1, 3))
AXES = st.sampled_from((None, 0, 1, 2))
SEEDS = st.integers(0, 2**32 - 1)


def strided(array, seed):
    """The same values in other memory: cropped from something larger, axes swapped, an axis reversed."""
    kind = seed % 4
    if kind == 1:
        wide = np.zeros([n + 2 for n in array.shape], array.dtype)
        view = wide[tuple(slice(1, -1) for _ in array.shape)]
    elif kind == 2:
        view = np.zeros(array.shape[::-1], array.dtype).T
    elif kind == 3:
        view = np.zeros(array.shape, array.dtype)[..., ::-1]
    else:
        view = np.zeros(array.shape, array.dtype)
    view[...] = array
    return view


def image(shape, seed, dtype=np.float32):
    values = np.random.default_rng(seed).normal(0, 300, shape)
    return strided(np.abs(values).astype(dtype) if np.dtype(dtype).kind == "u" else values.astype(dtype), seed)


def logits(classes, shape, seed, *, integers=False):
    values = np.random.default_rng(seed).normal(0, 2, (classes, *shape)).astype(np.float32)
    return strided(np.round(values) if integers else values, seed)


def label_map(shape, seed, dtype=np.uint8):
    return strided(np.random.default_rng(seed).integers(0, 4, shape).astype(dtype), seed)


@given(SHAPES, SHAPES, ORDERS, AXES, ORDERS, SEEDS)
def test_resize_is_skimage(shape, new, order, separate, order_z, seed):
    array = image(shape, seed, (np.float32, np.int16)[seed // 4 % 2])
    expected = reference.resize(array, new, order=order, separate=separate, order_z=order_z)
    result = resample.resize(array, new, order=order, separate=separate, order_z=order_z)
    assert result.shape == new
    assert result.dtype == np.float32
    # float32 arithmetic against float64; cubic filters amplify rounding by up to 3 per axis
    np.testing.assert_allclose(result, expected, rtol=0, atol=4e-6 * np.abs(array).max())


@given(SHAPES, SHAPES, st.sampled_from((0, 1)), AXES, SEEDS)
def test_labels_are_resized_as_nnunet_does(shape, new, order, separate, seed):
    labels = label_map(shape, seed, (np.uint8, np.int16, np.uint16, np.int32)[seed // 4 % 4])
    result = resample.resize_labels(labels, new, order=order, separate=separate)
    assert result.dtype == labels.dtype
    np.testing.assert_array_equal(result, reference.resize_labels(labels, new, order=order, separate=separate))


@given(SHAPES, SHAPES, SEEDS)
def test_labels_of_the_torch_route(shape, new, seed):
    labels = label_map(shape, seed, np.int16) - 1
    expected = labels if shape == new else reference.resize_labels_linear(labels, new)
    np.testing.assert_array_equal(resample.resize_labels_linear(labels, new), expected)


@given(st.integers(1, 9), SHAPES, SHAPES, AXES, st.booleans(), SEEDS)
def test_fused_argmax_is_resize_then_argmax(classes, shape, new, separate, round16, seed):
    assume(shape != new)
    # integers make many ties, and float16 makes them exact
    stack = logits(classes, shape, seed, integers=round16)
    stack = stack.astype(np.float16) if seed // 4 % 2 else stack
    values = tuple(range(3, 3 + classes))
    expected = reference.resample_logits(stack, new, separate=separate, round16=round16)
    result = argmax.resample_argmax(stack, new, values, separate=separate, round16=round16)
    decided = np.ones(new, bool)
    if classes > 1 and not round16:
        # which of two equal classes wins is left to the last bit of float64 there
        best = np.sort(expected, axis=0)
        decided = best[-1] - best[-2] > 1e-12
    np.testing.assert_array_equal(result[decided], (expected.argmax(0) + 3)[decided])


@given(st.integers(1, 5), SHAPES, SHAPES, AXES, st.booleans(), st.sampled_from((0.5, 0.3, 0.9)), SEEDS)
def test_fused_paint_is_resize_then_threshold(classes, shape, new, separate, round16, threshold, seed):
    assume(shape != new)
    stack = logits(classes, shape, seed, integers=round16)
    values = tuple(range(classes, 0, -1))
    expected = reference.paint(reference.resample_logits(stack, new, separate=separate, round16=round16), values, threshold)
    result = argmax.resample_paint(stack, new, values, threshold, separate=separate, round16=round16)
    np.testing.assert_array_equal(result, expected)


@given(st.integers(1, 6), SHAPES, SEEDS, st.sampled_from((np.float32, np.float16)))
def test_argmax_and_paint_without_resampling(classes, shape, seed, dtype):
    stack = logits(classes, shape, seed, integers=seed % 3 == 0).astype(dtype)
    values = tuple(range(classes, 0, -1))
    np.testing.assert_array_equal(argmax.argmax(stack, values), np.array(values)[stack.argmax(0)])
    np.testing.assert_array_equal(argmax.paint(stack, values, 0.5), reference.paint(stack, values, 0.5))


@given(st.integers(1, 4), SHAPES, SHAPES, st.sampled_from(("softmax", "sigmoid")), st.booleans(), SEEDS)
def test_probabilities(classes, shape, new, activation, round16, seed):
    assume(shape != new)
    stack = logits(classes, shape, seed)
    resampled = reference.resample_logits(stack, new, round16=round16).astype(np.float64)
    expected = reference.softmax(resampled) if activation == "softmax" else 1 / (1 + np.exp(-resampled))
    result = argmax.resample_probabilities(stack, new, activation=activation, round16=round16)
    # one float16 step of a logit where float32 rounds the other way, else float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-3 if round16 else 1e-6)


@given(SHAPES, st.integers(1, 3), st.floats(0, 0.4), SEEDS)
def test_nonzero_box_and_mask(shape, channels, density, seed):
    rng = np.random.default_rng(seed)
    filled = rng.random((channels, *shape)) < density
    data = strided((filled * rng.normal(size=filled.shape)).astype((np.float32, np.int16, np.uint8, np.float64)[seed // 4 % 4]), seed)
    mask = (data != 0).any(axis=0)
    expected = reference.ndimage.binary_fill_holes(mask)
    np.testing.assert_array_equal(bbox.nonzero_mask(data), expected)
    hit = np.argwhere(expected)
    box = tuple(zip(hit.min(0), hit.max(0) + 1, strict=True)) if len(hit) else tuple((0, n) for n in shape)
    assert bbox.nonzero_bbox(data) == box


@given(SHAPES, st.floats(0.05, 0.9), st.integers(1, 6), SEEDS)
def test_components(shape, density, minimum, seed):
    rng = np.random.default_rng(seed)
    labels = (rng.integers(1, 4, shape) * (rng.random(shape) < density)).astype((np.uint8, np.uint16)[seed % 2])
    before = labels.copy()
    largest = reference.keep_components(labels, (1, 3), lambda sizes: sizes == sizes.max(initial=0))
    np.testing.assert_array_equal(components.keep_largest(labels, (1, 3)), largest)
    large = reference.keep_components(labels, (2,), lambda sizes: sizes >= minimum)
    np.testing.assert_array_equal(components.drop_small(labels, (2,), minimum), large)
    mask = labels == 1
    holes = reference.ndimage.binary_fill_holes(mask if shape[0] > 1 else mask[0]).reshape(shape)
    np.testing.assert_array_equal(components.fill_holes(labels, 1), np.where(holes & (labels == 0), 1, labels))
    np.testing.assert_array_equal(labels, before)


@given(SHAPES, SEEDS)
def test_intensities(shape, seed):
    array = image(shape, seed, (np.float32, np.int16, np.uint8, np.float64)[seed // 4 % 4])
    wide = array.astype(np.float64)
    mask = strided(wide > np.median(wide), seed + 1)
    np.testing.assert_allclose(normalize.clip_shift_scale(array, -50, 80, 3, 7), (np.clip(wide, -50, 80) - 3) / 7, atol=1e-5)
    np.testing.assert_allclose(normalize.mean_std(array), (wide.mean(), wide.std()), rtol=1e-6, atol=1e-4)
    if mask.any():
        np.testing.assert_allclose(normalize.mean_std(array, mask), (wide[mask].mean(), wide[mask].std()), rtol=1e-6, atol=1e-4)
    assert normalize.minmax(array) == (array.min(), array.max())


@given(SHAPES)
def test_half_gaussian_is_the_filtered_delta(patch):
    # torch goes from float64 to float16 by way of float32
    expected = reference.gaussian(patch).astype(np.float32).astype(np.float16)
    expected[expected == 0] = expected[expected > 0].min()
    result = blend.gaussian_half(patch)
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_allclose(blend.gaussian_1d(patch[0]), reference.gaussian((patch[0], 1, 1))[:, 0, 0] / 10, rtol=1e-12)


@given(st.integers(1, 12), st.integers(0, 12), st.sampled_from(("gaussian", "uniform")))
def test_axis_weights_sum_to_one(size, extra, blending):
    length = size + extra
    starts = sorted({*range(0, extra + 1, max(1, size // 2)), extra})
    weights = blend.axis_weights(starts, size, length, blending)
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-6)


@given(st.integers(1, 3), SHAPES, SEEDS)
def test_windows_are_added(classes, patch, seed):
    rng = np.random.default_rng(seed)
    acc = strided(rng.normal(size=(classes, *(n + 3 for n in patch))).astype(np.float32), seed)
    values = logits(classes, patch, seed)
    z, y, x = (rng.random(n).astype(np.float32) for n in patch)
    expected = acc.copy()
    expected[:, 1 : 1 + patch[0], 2 : 2 + patch[1], 3 : 3 + patch[2]] += values * z[:, None, None] * y[:, None] * x * 0.25
    blend.add_window(acc, values, (1, 2, 3), z, y, x, 0.25)
    np.testing.assert_allclose(acc, expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 3), SHAPES, st.floats(1e-9, 2e3), SEEDS)
def test_float16_recipe_bit_for_bit(classes, patch, scale, seed):
    shape = [n + 2 for n in patch]
    acc, count = np.zeros((classes, *shape), np.float16), np.zeros(shape, np.float16)
    slow_acc, slow_count = acc.copy(), count.copy()
    weight = blend.gaussian_half(patch)
    for start in ((0, 0, 0), (1, 2, 0), (2, 2, 2)):
        values = logits(classes, patch, seed + sum(start)) * np.float32(scale)
        blend.add_window_half(acc, count, values, start, weight)
        reference.add_window_half(slow_acc, slow_count, values, start, weight)
    np.testing.assert_array_equal(acc.view(np.uint16), slow_acc.view(np.uint16))
    np.testing.assert_array_equal(count.view(np.uint16), slow_count.view(np.uint16))
    count[count == 0] = slow_count[slow_count == 0] = 1
    blend.divide_half(acc, count)
    with np.errstate(over="ignore"):
        slow_acc[...] = slow_acc.astype(np.float32) / slow_count.astype(np.float32)
    np.testing.assert_array_equal(acc.view(np.uint16), slow_acc.view(np.uint16))


def test_every_float16_survives_the_bit_tricks():
    bits = np.arange(0, 0x7C01, dtype=np.uint16)
    halves = bits.view(np.float16)
    wide = np.array([_blend.widen(b) for b in bits], np.float32)
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    # halfway to the next one, and a float32 step to both sides of it
    middle = ((wide[:-1].astype(np.float64) + np.minimum(wide[1:], 65536)) / 2).astype(np.float32)
    for value in (wide, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(np.array([_blend.narrow(v) for v in value], np.uint16), value.astype(np.float16).view(np.uint16))


@given(size=st.integers(1, 5000), samples=st.integers(0, 3000), before=st.integers(0, 700), seed=SEEDS)
def test_draws_are_counted_as_numpy_draws_them(size, samples, before, seed):
    ours, numpys = np.random.RandomState(seed), np.random.RandomState(seed)
    for rng in (ours, numpys):
        rng.randint(0, 2**31, before)  # so that the state is at any place
    assert np.array_equal(draws.count_draws(ours, size, samples), np.bincount(numpys.randint(0, size, samples), minlength=size))
    assert ours.randint(0, 2**31) == numpys.randint(0, 2**31), "the next draw is the same one"
