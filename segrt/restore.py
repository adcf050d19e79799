"""PREDICT, last stage but one: logits on the working grid become labels or probabilities on the image's own grid.

What lies on a device stays there: labels of logits on a device are made on it.
"""

from __future__ import annotations

from math import prod
from typing import TypedDict

import numpy as np

from .arrays import Array, FloatArray, Shape3
from .device import get_xp
from .kernels.activation import activate, keep_larger, paint_over
from .kernels.argmax import Slab, argmax, paint, ready_planes, resample_argmax, resample_paint, resample_probabilities
from .kernels.mean import Box, add_probabilities
from .kernels.resample import resize
from .spec import ModelSpec, Resampling
from .volume import Placement

MEAN_BYTES = 64 * 2**20  # of a pair's mean probabilities that are held at a time


def restore(logits: Array, placement: Placement, spec: ModelSpec) -> Array:
    """Resample logits, decide the label of every voxel, and put the crop back into the image, all in one pass.

    Parameters
    ----------
    logits : (K, Z, Y, X) float32, or float16 from accumulation in float16, on the working grid, on the host or on a device
    placement : from `preprocess`

    Returns
    -------
    labels : (Z, Y, X) uint8 or uint16 on the image's own grid, beside the logits; voxels outside the crop are 0
    """
    labels: Array = get_xp(logits).zeros(placement.grid.shape, spec.label_dtype)
    out = _crop(labels, placement, spec)
    if can_restore_by_slab(placement, spec):
        _decide(logits, placement, spec, None, out)
    else:
        _restore_by_class(logits, placement, spec, out)
    return labels


def can_restore_by_slab(placement: Placement, spec: ModelSpec) -> bool:
    """Whether labels can be decided while logits still come in, slab after slab along the first working axis."""
    return not _changes_grid(placement, spec) or _is_fused(spec.resample_logits, _separate(placement, spec))


def restore_slab(logits: Array, placement: Placement, spec: ModelSpec, labels: Array, *, first: int, ready: int, done: int) -> int:
    """Decide every voxel whose logits are final; `restore` in parts, with the same result.

    Parameters
    ----------
    logits : (K, n, Y, X) as for `restore`: working planes first .. first + n
    labels : (Z, Y, X) `spec.label_dtype`, the whole image, 0 at first, beside the logits; written in place
    first : the working plane logits[:, 0] is
    ready : working planes below this one are final
    done : planes of the crop (in transposed axes) decided before: 0, then what the last call returned

    Returns
    -------
    done : planes of the crop decided now; all of them once every working plane is final

    Raises
    ------
    InputError
        When the logits no longer hold a plane that plane `done` of the crop needs.
    """
    assert can_restore_by_slab(placement, spec)
    out, stop = _crop(labels, placement, spec), _ready(placement, spec, ready)
    if stop <= done:
        return done
    _decide(logits, placement, spec, Slab(first, placement.shape[0], done, stop), out[done:stop])
    return stop


def _ready(placement: Placement, spec: ModelSpec, ready: int) -> int:
    """Planes of the crop that working planes below `ready` decide."""
    total = placement.shape[0]
    if not _changes_grid(placement, spec):
        return min(ready, total)
    nearest = _separate(placement, spec) == 0
    return ready_planes(total, placement.cropped_shape[0], ready, nearest=nearest, single=spec.resample_logits.method == "linear")


def restore_probabilities(logits: Array, placement: Placement, spec: ModelSpec) -> FloatArray:
    """Probabilities (K, Z, Y, X) float32 on the image's own grid, beside the logits; outside the crop background is certain.

    This is the one place that holds classes x full resolution: ask for it only when probabilities are wanted.
    """
    probabilities: FloatArray = get_xp(logits).zeros((spec.classes, *placement.grid.shape), np.float32)
    activation = spec.head.activation
    if activation == "softmax":
        probabilities[0] = 1
    out = probabilities.transpose(0, *(axis + 1 for axis in spec.transpose))[(slice(None), *placement.slices)]
    if can_restore_by_slab(placement, spec):
        resample_probabilities(logits, placement.cropped_shape, activation=activation, **_rule(logits, placement, spec), out=out)
        return probabilities
    for k in range(len(logits)):
        out[k] = _resized(logits[k], placement, spec)
    activate(out, activation, round16=_rule(logits, placement, spec)["round16"])
    return probabilities


def spread(logits: Array, placement: Placement, spec: ModelSpec) -> Array:
    """Whole logits (K, Z, Y, X) as `add_share` wants them: as they are, or on the crop's grid where no kernel resamples them in passing."""
    if can_restore_by_slab(placement, spec):
        return logits
    # rounded where nnU-Net stores resampled logits as float16
    dtype = np.float16 if _rule(logits, placement, spec)["round16"] else np.float32
    resized: Array = get_xp(logits).empty((len(logits), *placement.cropped_shape), dtype)
    for k in range(len(logits)):
        resized[k] = _resized(logits[k], placement, spec)
    return resized


def mean_planes(spec: ModelSpec, shape: Shape3) -> int:
    """Return how many planes of a pair's mean probabilities are made at a time, for an image of `shape`."""
    plane = prod(shape) // shape[spec.transpose[0]]
    return max(1, min(shape[spec.transpose[0]], MEAN_BYTES // (4 * spec.classes * plane)))


def known_planes(placement: Placement, spec: ModelSpec, ready: int, *, axis: int) -> int:
    """How many planes of the image along `axis` working planes below `ready` decide; what lies outside the crop is known with its end."""
    if ready >= placement.shape[0]:
        return placement.grid.shape[axis]
    if axis != spec.transpose[0] or not can_restore_by_slab(placement, spec):
        return 0
    return placement.bbox[0][0] + _ready(placement, spec, ready)


def add_share(
    mean: FloatArray,
    logits: Array,
    placement: Placement,
    spec: ModelSpec,
    *,
    axis: int,
    planes: tuple[int, int],
    first: int,
    share: float,
) -> None:
    """Add `share` of a model's probabilities to a slab of the image, inside the model's crop.

    Parameters
    ----------
    mean : (K, Z, Y, X) float32 on the image's own grid, planes[0] to planes[1] along `axis`; beside the logits; written in place
    logits : (K, n, Y, X) from `spread`, working planes from `first` on
    """
    local = spec.transpose.index(axis)
    low, high = placement.bbox[local]
    bounds = max(planes[0], low), max(min(planes[1], high), low)
    start, slices = [0, 0, 0], list(placement.slices)
    start[local] = bounds[0] - low
    slices[local] = slice(max(bounds[0] - planes[0], 0), max(bounds[1] - planes[0], 0))
    total = placement.shape[0] if can_restore_by_slab(placement, spec) else placement.cropped_shape[0]
    out = mean.transpose(0, *(a + 1 for a in spec.transpose))[(slice(None), *slices)]
    box = Box(first, total, placement.cropped_shape, (start[0], start[1], start[2]))
    add_probabilities(out, logits, box, activation=spec.head.activation, share=share, **_rule(logits, placement, spec))


class _Rule(TypedDict):
    """How the fused kernels resample."""

    separate: int | None
    single: bool
    round16: bool


def _rule(logits: Array, placement: Placement, spec: ModelSpec) -> _Rule:
    linear = spec.resample_logits.method == "linear"
    # nnU-Net's spline route stores resampled logits as float16 (they come in as float16); its torch route does not
    return {"separate": _separate(placement, spec), "single": linear, "round16": logits.dtype == np.float16 and not linear}


def _separate(placement: Placement, spec: ModelSpec) -> int | None:
    return spec.resample_logits.separate_axis(placement.spacing, placement.transposed_spacing)


def _changes_grid(placement: Placement, spec: ModelSpec) -> bool:
    return placement.shape != placement.cropped_shape and spec.resample_logits.method != "none"


def _is_fused(how: Resampling, separate: int | None) -> bool:
    """Whether the kernels that never hold a whole class cover this: linear, with the nearest slice along a separate axis."""
    return how.order == 1 and (separate is None or how.order_z == 0)


def _crop(labels: Array, placement: Placement, spec: ModelSpec) -> Array:
    """The crop as a strided view: kernels write it straight into the image's own axis order."""
    return labels.transpose(spec.transpose)[placement.slices]


def _decide(logits: Array, placement: Placement, spec: ModelSpec, slab: Slab | None, out: Array) -> None:
    """Labels of the crop, or of a slab of it, in one pass."""
    values, threshold = spec.head.values, spec.head.threshold
    softmax = spec.head.activation == "softmax"
    if not _changes_grid(placement, spec):
        argmax(logits, values, slab=slab, out=out) if softmax else paint(logits, values, threshold, slab=slab, out=out)
        return
    shape, rule = placement.cropped_shape, _rule(logits, placement, spec)
    if softmax:
        resample_argmax(logits, shape, values, **rule, slab=slab, out=out)
    else:
        resample_paint(logits, shape, values, threshold, **rule, slab=slab, out=out)


def _restore_by_class(logits: Array, placement: Placement, spec: ModelSpec, out: Array) -> None:
    """Resample with other orders: one class at a time against a running best, never all of them at once."""
    round16 = _rule(logits, placement, spec)["round16"]
    values = spec.head.values
    if spec.head.activation == "sigmoid":
        for k, value in enumerate(values):
            paint_over(_resized(logits[k], placement, spec), out, value, spec.head.threshold, round16=round16)
        return
    best = _resized(logits[0], placement, spec)
    out[...] = values[0]
    for k, value in enumerate(values[1:], start=1):
        keep_larger(best, _resized(logits[k], placement, spec), out, value, round16=round16)


def _resized(channel: Array, placement: Placement, spec: ModelSpec) -> FloatArray:
    how = spec.resample_logits
    wide = channel
    if channel.dtype != np.float32:
        wide = get_xp(channel).empty(channel.shape, np.float32)
        wide[...] = channel
    return resize(wide, placement.cropped_shape, order=how.order, separate=_separate(placement, spec), order_z=how.order_z)
