"""Connected components: keep the largest, drop small ones, fill holes; used by `postprocess`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from ..arrays import Array
from ..device import get_xp, on_device
from ..errors import InputError
from .bbox import fill_enclosed, nonzero_bbox

_MOST_RULES = 255  # of one pass on a device, whose group numbers are bytes
_MOST_NEEDED = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """Which components of the voxels in `values` stay: those of `minimum_voxels` and more, or the largest (None)."""

    values: tuple[int, ...]
    minimum_voxels: int | None = None


def keep_largest(labels: Array, values: Sequence[int]) -> Array:
    """Return a copy of `labels` where of all voxels in `values` only the largest component is left.

    The voxels of all `values` together are one mask; components tied for largest all stay; what goes becomes 0.

    Parameters
    ----------
    labels : (Z, Y, X) uint8 or uint16, on a device too; not modified
    values : the label values that make up the structure

    Returns
    -------
    (Z, Y, X) of the same dtype, where `labels` lies; neighbours share a face, an edge or a corner (26; 8 when Z is 1)

    Raises
    ------
    InputError
        When labels on a device are of another dtype, or of 2^31 - 1 voxels or more.
    """
    return keep_components(labels, [Rule(tuple(values))])


def drop_small(labels: Array, values: Sequence[int], minimum_voxels: int) -> Array:
    """Return a copy of `labels` where components of `values` with fewer than `minimum_voxels` voxels became 0.

    See `keep_largest` for the parameters, the connectivity and the errors.
    """
    return keep_components(labels, [Rule(tuple(values), minimum_voxels)])


def keep_components(labels: Array, rules: Sequence[Rule]) -> Array:
    """Return a copy of `labels` after each rule in turn; what goes becomes 0.

    On a device, rules that follow each other and share no value are one labelling. See `keep_largest` for the parameters, the
    connectivity and the errors.
    """
    if on_device(labels):
        result = _copy_on_device(labels)
        for together in _independent(rules):
            _clear_on_device(result, together)
        return result
    result = labels.copy()
    for rule in rules:
        _clear(result, rule)
    return result


def fill_holes(labels: Array, value: int) -> Array:
    """Return a copy of `labels` where background (0) enclosed by `value` became `value`; other labels stay.

    A hole is what no path of face neighbours outside `value` joins to the border of the image; in a single slice (Z = 1) the path runs
    within the slice. See `keep_largest` for the parameters and the errors.
    """
    result = _copy_on_device(labels) if on_device(labels) else labels.copy()
    if not 0 <= value <= np.iinfo(labels.dtype).max:
        return result
    if on_device(labels):
        from ._cuda import components as device

        device.fill_enclosed(result, value, value, walled=labels.shape[0] == 1)
        return result
    mask = labels == value
    if labels.shape[0] == 1:
        # walled in above and below, so that only paths within the slice count
        walled = np.concatenate([np.ones_like(mask), mask, np.ones_like(mask)])
        fill_enclosed(walled)
        mask = walled[1:2]
    else:
        fill_enclosed(mask)
    result[mask & (labels == 0)] = value
    return result


def _clear(labels: Array, rule: Rule) -> None:
    """Apply a rule to host labels, in place."""
    mask = np.isin(labels, list(rule.values))
    if not mask.any():
        return
    (z0, z1), (y0, y1), (x0, x1) = nonzero_bbox(mask[None])
    box, view = mask[z0:z1, y0:y1, x0:x1], labels[z0:z1, y0:y1, x0:x1]
    # one slice has no neighbours above and below: 26 is 8 there. cc3d expects too few labels in odd sizes and raises: an even size will do
    even = np.pad(box, [(0, n % 2) for n in box.shape])
    components = cc3d.connected_components(even, connectivity=26)
    sizes = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"][1:]
    chosen = sizes == sizes.max() if rule.minimum_voxels is None else sizes >= rule.minimum_voxels
    kept = np.concatenate([[True], chosen])
    view[~kept[components[: box.shape[0], : box.shape[1], : box.shape[2]]]] = 0


def _copy_on_device(labels: Array) -> Array:
    from ._cuda import components as device

    if labels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"components on a device: expected labels of uint8 or uint16, got {labels.dtype}")
    device.check_size(labels.shape)
    result: Array = get_xp(labels).empty(labels.shape, labels.dtype)
    result[...] = labels
    return result


def _independent(rules: Sequence[Rule]) -> Iterator[list[Rule]]:
    """Cut the rules, in their order, into runs where none sees what another of its run cleared."""
    run: list[Rule] = []
    taken: set[int] = set()
    for rule in rules:
        # cleared voxels are zeros, which a rule about 0 would see
        if run and (taken.intersection(rule.values) or 0 in rule.values or len(run) == _MOST_RULES):
            yield run
            run, taken = [], set()
        run.append(rule)
        taken.update(rule.values)
    if run:
        yield run


def _clear_on_device(labels: Array, rules: Sequence[Rule]) -> None:
    """Apply rules that share no value to labels on a device, in place."""
    from ._cuda import components as device

    groups, needed = np.zeros(np.iinfo(labels.dtype).max + 1, np.uint8), np.zeros(_MOST_RULES + 1, np.int32)
    ordered = sorted(rules, key=lambda rule: rule.minimum_voxels is not None)
    for number, rule in enumerate(ordered, start=1):
        groups[[value for value in rule.values if 0 <= value < len(groups)]] = number
        needed[number] = min(max(rule.minimum_voxels or 0, 0), _MOST_NEEDED)
    device.clear_components(labels, groups, needed, sum(rule.minimum_voxels is None for rule in rules))
