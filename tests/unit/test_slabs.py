"""Labels slab by slab: what is refused, and when planes are ready."""

from __future__ import annotations

import numpy as np
import pytest
from factories import make_spec

from segrt.device import to_device, to_host
from segrt.errors import InputError
from segrt.kernels.argmax import Slab, argmax, paint, ready_planes, resample_argmax, resample_paint
from segrt.restore import can_restore_by_slab, restore, restore_slab
from segrt.spec import Resampling
from segrt.volume import Grid, Placement

DEVICES = ("cpu", "simulated")


def labels_of(planes, device="cpu"):
    return to_device(np.zeros((planes, 4, 5), np.uint8), device)


@pytest.mark.parametrize(
    ("slab", "planes", "said"),
    [
        (Slab(-1, 6, 0, 1), 1, "must be parts"),
        (Slab(4, 6, 0, 1), 1, "must be parts"),  # three planes from 4 on are more than 6
        (Slab(0, 6, 2, 2), 1, "must be parts"),
        (Slab(0, 6, -1, 1), 2, "must be parts"),
        (Slab(0, 6, 11, 13), 2, "must be parts"),
        (Slab(0, 6, 0, 7), 7, r"planes 0..7 of the result need logits of planes 0 to 3, got 0 to 2"),
        (Slab(1, 6, 1, 3), 2, "need logits of planes 0 to 1, got 1 to 3"),
        (Slab(0, 6, 0, 3), 2, "out has shape"),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_impossible_slabs_are_refused(slab, planes, said, device):
    """Three planes of six, for a result of twelve."""
    logits = to_device(np.zeros((2, 3, 4, 5), np.float32), device)
    with pytest.raises(InputError, match=said):
        resample_argmax(logits, (12, 4, 5), (0, 1), slab=slab, out=labels_of(planes, device))
    with pytest.raises(InputError, match=said):
        resample_paint(logits, (12, 4, 5), (0, 1), 0.5, slab=slab, out=labels_of(planes, device))


def test_plain_planes_are_checked_too():
    logits = np.zeros((2, 3, 4, 5), np.float32)
    with pytest.raises(InputError, match="needs `out`"):
        argmax(logits, (0, 1), slab=Slab(0, 6, 0, 1))
    with pytest.raises(InputError, match="needs `out`"):
        resample_argmax(logits, (12, 4, 5), (0, 1), slab=Slab(0, 6, 0, 1))
    with pytest.raises(InputError, match="need logits of planes 1 to 2, got 2 to 4"):
        argmax(logits, (0, 1), slab=Slab(2, 6, 1, 3), out=labels_of(2))
    with pytest.raises(InputError, match="must be parts"):
        paint(logits, (0, 1), 0.5, slab=Slab(2, 6, 4, 7), out=labels_of(3))


@pytest.mark.parametrize(("available", "ready"), [(0, 0), (1, 1), (2, 3), (3, 5), (4, 8), (9, 8)])
def test_linear_planes_are_ready_with_both_neighbours(available, ready):
    """Four planes become eight: plane 2 i + 1 and 2 i + 2 lie between source planes i and i + 1, the first and last on a source plane."""
    assert ready_planes(4, 8, available, nearest=False, single=False) == ready


@pytest.mark.parametrize(("available", "ready"), [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)])
def test_nearest_planes_are_ready_with_their_own(available, ready):
    assert ready_planes(4, 8, available, nearest=True, single=True) == ready


@pytest.mark.parametrize("available", range(6))
def test_planes_that_stay_are_ready_one_by_one(available):
    assert ready_planes(5, 5, available, nearest=False, single=False) == available


def placement(working=(4, 6, 5), shape=(9, 8, 7), spacing=(1.0, 1.0, 1.0)):
    z, y, x = shape
    target = tuple(s * n / m for s, n, m in zip(spacing, shape, working, strict=True))
    return Placement(Grid(shape, spacing), (0, 1, 2), ((0, z), (0, y), (0, x)), working, target)


@pytest.mark.parametrize(
    ("how", "possible"),
    [
        (Resampling(order=1, separate=False), True),
        (Resampling(order=1, order_z=0, separate=True), True),
        (Resampling(order=1, order_z=1, separate=True), False),
        (Resampling(order=3, separate=False), False),
        (Resampling(order=0, separate=False), False),
        (Resampling(method="linear", order=1), True),
    ],
)
def test_only_linear_resampling_goes_by_slab(how, possible):
    spec = make_spec(resample_logits=how)
    assert can_restore_by_slab(placement(spacing=(4.0, 1.0, 1.0)), spec) == possible
    assert can_restore_by_slab(placement(working=(9, 8, 7)), spec), "nothing is resampled"


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_new_is_ready(device):
    labels = labels_of(9, device)
    logits = to_device(np.ones((3, 1, 6, 5), np.float32), device)
    assert restore_slab(logits, placement(), make_spec(), labels, first=0, ready=0, done=0) == 0
    assert restore_slab(logits, placement(), make_spec(), labels, first=1, ready=2, done=3) == 3
    assert not to_host(labels).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_whole_labels_on_a_device_are_those_of_the_cpu(device, activation, order, dtype):
    """Every order of resampling, class by class where the fused kernels do not reach."""
    logits = np.random.default_rng(0).normal(0, 2, (3, 4, 6, 5)).astype(dtype)
    spec = make_spec(values=(1, 7, 3), activation=activation, resample_logits=Resampling(order=order))
    expected = restore(logits, placement(), spec)
    labels = restore(to_device(logits, device), placement(), spec)
    # cubic filters round differently
    assert (to_host(labels) == expected).mean() >= (1 if order < 3 else 0.995)
