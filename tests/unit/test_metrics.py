"""Dice against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from segrt.errors import InputError
from segrt.metrics import dice, mean_dice, overlaps

MAPS = arrays.array_shapes(min_dims=3, max_dims=3, max_side=5).flatmap(
    lambda shape: st.tuples(*(arrays.arrays(np.uint8, shape, elements=st.integers(0, 4)) for _ in range(2)))
)


@given(MAPS)
def test_dice_is_its_definition_and_symmetric(maps: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = maps
    values = [1, 2, 3, 4, 9]
    for value, score in dice(a, b, values).items():
        x, y = a == value, b == value
        if x.any() or y.any():
            assert score == pytest.approx(2 * (x & y).sum() / (x.sum() + y.sum()), abs=1e-12)
        else:
            assert math.isnan(score)
    np.testing.assert_equal(dice(a, b, values), dice(b, a, values))


def test_perfect_and_disjoint() -> None:
    a = np.array([[[0, 1, 2]]], np.uint16)
    assert dice(a, a, [1, 2]) == {1: 1.0, 2: 1.0}
    assert dice(a, np.array([[[1, 0, 0]]], np.uint16), [1, 2]) == {1: 0.0, 2: 0.0}


def test_absent_labels_do_not_count_in_the_mean() -> None:
    assert mean_dice({1: 0.5, 2: float("nan"), 3: 1.0}) == 0.75
    assert math.isnan(mean_dice({1: float("nan")}))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="bring both onto one grid"):
        dice(np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8), [1])


@given(MAPS)
def test_overlaps_count_what_they_say(maps: tuple[np.ndarray, np.ndarray]) -> None:
    """Structures of several labels may overlap; 4 is ignored in the truth."""
    a, b = maps
    structures = {"one": (1,), "both": (1, 3), "none": (9,)}
    known = a != 4
    for name, found in overlaps(a.astype(np.int16), b, structures, ignore=4).items():
        x, y = np.isin(a, structures[name]) & known, np.isin(b, structures[name]) & known
        assert (found.tp, found.fp, found.fn) == ((x & y).sum(), (y & ~x).sum(), (x & ~y).sum())
        assert found.tp + found.fp + found.fn + found.tn == known.sum()
        if x.any() or y.any():
            assert found.dice == pytest.approx(2 * (x & y).sum() / (x.sum() + y.sum()), abs=1e-12)
            assert found.iou == pytest.approx((x & y).sum() / (x | y).sum(), abs=1e-12)
        else:
            assert math.isnan(found.dice)
            assert math.isnan(found.iou)


def test_overlaps_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="bring both onto one grid"):
        overlaps(np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8), {"one": (1,)})
