"""From logits to labels: argmax, painted regions, and both fused with linear resampling; used by `restore`.

All of it also runs on a device: logits that lie there give labels there, the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, FloatArray, Shape3
from ..device import get_xp, on_device
from ..errors import InputError
from . import _labels
from ._spline import fractions
from ._views import LAUNCH, flatten
from .activation import activate, largest_below
from .resample import resize

_SLAB_BYTES = 1 << 23  # float32 copies of other dtypes are made this many bytes at a time

_Rule = tuple[bool, float, bool]  # paint regions or take the largest, the logit to exceed, round to float16 first
_Positions = tuple[Array, Array]


@dataclass(frozen=True)
class Slab:
    """The planes (along z) one call works on.

    Attributes
    ----------
    first, total : the logits given hold source planes from `first` on, of `total`
    start, stop : `out` holds planes start..stop of the result
    """

    first: int
    total: int
    start: int
    stop: int


def ready_planes(total: int, new: int, available: int, *, nearest: bool, single: bool) -> int:
    """Return how many planes of the result, from the first, can be decided when source planes 0..available-1 are final.

    Parameters
    ----------
    total, new : planes of the source and of the result
    nearest : the axis is resampled by nearest neighbour, not linearly
    single : as in `resample_argmax`
    """
    lower, fraction = _positions(total, new, nearest=nearest, single=single)
    return int(np.searchsorted(lower + (fraction > 0), available))


def argmax(logits: Array, values: Sequence[int], *, slab: Slab | None = None, out: Array | None = None) -> Array:
    """Return the label of the largest logit at every voxel; ties go to the lowest class.

    Parameters
    ----------
    logits : (K, Z, Y, X) float32 or float16, any strides, on the host or on a device
    values : label of each class
    slab : which planes the logits hold, and which ones of the result to write; `out` is needed then
    out : (Z, Y, X) uint8 or uint16 to write to, any strides, beside the logits

    Returns
    -------
    (Z, Y, X): `out`, or a new array of uint8, uint16 when a value needs it, beside the logits

    Raises
    ------
    InputError
        When `values`, `slab` or `out` do not fit the logits.
    """
    return _label(logits, values, (False, 0.0, False), slab, out)


def paint(logits: Array, values: Sequence[int], threshold: float, *, slab: Slab | None = None, out: Array | None = None) -> Array:
    """Return labels (Z, Y, X): every class k whose sigmoid(logit) exceeds `threshold` paints values[k], later ones over earlier.

    The comparison is that of float32 probabilities, done on the logits: sigmoid is monotonous in float32 too, so one largest logit does
    not pass. See `argmax` for the other parameters.
    """
    return _label(logits, values, (True, largest_below(threshold), False), slab, out)


def decide(probabilities: FloatArray, values: Sequence[int], threshold: float | None, out: Array) -> None:
    """Write to `out` the label of the largest of probabilities (K, Z, Y, X), or with a `threshold` of the last one that exceeds it."""
    _label(probabilities, values, (threshold is not None, float(np.float32(threshold or 0)), False), None, out)


def resample_argmax(
    logits: Array,
    shape: Shape3,
    values: Sequence[int],
    *,
    separate: int | None = None,
    single: bool = False,
    round16: bool = False,
    slab: Slab | None = None,
    out: Array | None = None,
) -> Array:
    """Return labels of `shape`: all classes resampled linearly, then argmax, without an array of classes x image.

    The result is that of `skimage.transform.resize(order=1)` per class in float64 followed by argmax: voxels that float32 could decide
    wrongly are decided again in float64.

    Parameters
    ----------
    logits : (K, Z, Y, X) float32 or float16, any strides, on the host or on a device
    shape : (z, y, x) of the result, the whole of it
    values : label of each class
    separate : an axis to resample by nearest neighbour instead
    single : round positions along it to float32 as torch's "nearest-exact" does
    round16 : round each interpolated value to float16 before comparing, as nnU-Net stores it; ties this makes go to the lowest class
    slab : which planes the logits hold, and which ones of the result to write; `out` is needed then
    out : (z, y, x) uint8 or uint16 to write to, any strides, beside the logits

    Returns
    -------
    (z, y, x): `out`, or a new array of uint8, uint16 when a value needs it, beside the logits

    Raises
    ------
    InputError
        When `values`, `slab` or `out` do not fit, or a size is zero.
    """
    return _label_resampled(logits, shape, values, (separate, single), (False, 0.0, round16), slab, out)


def resample_paint(
    logits: Array,
    shape: Shape3,
    values: Sequence[int],
    threshold: float,
    *,
    separate: int | None = None,
    single: bool = False,
    round16: bool = False,
    slab: Slab | None = None,
    out: Array | None = None,
) -> Array:
    """Return labels of `shape`: all classes resampled linearly, then painted as `paint` does; parameters as in `resample_argmax`."""
    return _label_resampled(logits, shape, values, (separate, single), (True, largest_below(threshold), round16), slab, out)


def resample_probabilities(
    logits: Array,
    shape: Shape3,
    *,
    activation: str,
    separate: int | None = None,
    single: bool = False,
    round16: bool = False,
    out: FloatArray | None = None,
) -> FloatArray:
    """Return probabilities (K, z, y, x) float32: logits resampled linearly, then softmax or sigmoid.

    Parameters
    ----------
    logits : (K, Z, Y, X) float32 or float16
    shape : (z, y, x) of the result
    activation : "softmax" or "sigmoid"
    separate, single, round16 : as in `resample_argmax`
    out : (K, z, y, x) float32 to write to

    Raises
    ------
    InputError
        When `activation` is unknown or `out` does not fit.
    """
    result = get_xp(logits).empty((len(logits), *shape), np.float32) if out is None else out
    if result.shape != (len(logits), *shape):
        raise InputError(f"resample_probabilities: out has shape {result.shape}, expected {(len(logits), *shape)}")
    for k in range(len(logits)):
        resize(logits[k], shape, order=1, separate=separate, single=single, out=result[k])
    activate(result, activation, round16=round16 and logits.shape[1:] != tuple(shape))
    return result


def _label(logits: Array, values: Sequence[int], rule: _Rule, slab: Slab | None, out: Array | None) -> Array:
    if slab is not None:
        _check_slab(slab, logits, slab.total, out)
        _check_needed(slab, logits, slab.start, slab.stop - 1)
        logits = logits[:, slab.start - slab.first : slab.stop - slab.first]
    labels, table = _checked(logits, logits.shape[1:], values, out)
    if on_device(logits):
        from ._cuda import labels as device

        device.label(logits, table, rule, labels)
        return _delivered(labels, out)
    rows = max(1, _SLAB_BYTES // (4 * max(1, logits[:, 0].size)))
    if logits.dtype == np.float32:
        rows = max(1, logits.shape[1])
    for z in range(0, logits.shape[1], rows):
        part = logits[:, z : z + rows].astype(np.float32, copy=False)
        flat, layout = flatten(part)
        target, out_layout = flatten(labels[z : z + rows])
        with LAUNCH:
            _labels.label_rows(flat, layout, part.shape[1:], table, rule, target, out_layout)
    return _delivered(labels, out)


def _label_resampled(
    logits: Array,
    shape: Shape3,
    values: Sequence[int],
    nearest: tuple[int | None, bool],
    rule: _Rule,
    slab: Slab | None,
    out: Array | None,
) -> Array:
    source = logits.shape[1:] if slab is None else (slab.total, *logits.shape[2:])
    if source == tuple(shape):
        return _label(logits, values, (rule[0], rule[1], False), slab, out)
    if slab is not None:
        _check_slab(slab, logits, shape[0], out)
    labels, table = _checked(logits, tuple(shape) if slab is None else (slab.stop - slab.start, *shape[1:]), values, out)
    sizes = zip(source, shape, strict=True)
    z, y, x = (_positions(n, m, nearest=a == nearest[0], single=nearest[1]) for a, (n, m) in enumerate(sizes))
    if slab is not None:
        z = z[0][slab.start : slab.stop], z[1][slab.start : slab.stop]
        _check_needed(slab, logits, int(z[0][0]), int(z[0][-1]) + int(z[1][-1] > 0))
        z = z[0] - np.uint64(slab.first), z[1]
    if on_device(logits):
        from ._cuda import labels as device

        device.label_resampled(logits, (z, y, x), table, rule, labels)
        return _delivered(labels, out)
    for start, stop, lowest, part in _parts(logits, z[0]):
        flat, layout = flatten(part)
        target, out_layout = flatten(labels[start:stop])
        here = z[0][start:stop] - lowest, z[1][start:stop]
        with LAUNCH:
            _labels.label_resampled(flat, layout, part.shape[1:], here, y, x, table, rule, target, out_layout)
    return _delivered(labels, out)


def _positions(size: int, new: int, *, nearest: bool, single: bool) -> _Positions:
    return fractions(size, new, 0, single=single) if nearest else fractions(size, new, 1)


def _parts(logits: Array, lower: Array) -> Iterator[tuple[int, int, np.uint64, Array]]:
    """Yield (start, stop) of output planes, the first source plane they need, and the float32 source planes."""
    if logits.dtype == np.float32:
        yield 0, len(lower), np.uint64(0), logits
        return
    planes = max(2, _SLAB_BYTES // (4 * max(1, logits[:, 0].size)))
    start = 0
    while start < len(lower):
        stop = start + int(np.searchsorted(lower[start:], lower[start] + np.uint64(planes - 1)))
        stop = max(stop, start + 1)
        yield start, stop, lower[start], logits[:, int(lower[start]) : int(lower[stop - 1]) + 2].astype(np.float32)
        start = stop


def _checked(logits: Array, shape: tuple[int, ...], values: Sequence[int], out: Array | None) -> tuple[Array, Array]:
    """The array to write labels to (`out` when the loops can), and the table of values."""
    if logits.ndim != 4 or len(shape) != 3 or min(*logits.shape, *shape) < 1:
        raise InputError(f"expected logits (K, Z, Y, X) without empty axes, got shape {logits.shape} -> {tuple(shape)}")
    if len(values) != len(logits):
        raise InputError(f"expected one label value per class, got {len(values)} values for {len(logits)} classes")
    if out is not None and out.shape != tuple(shape):
        raise InputError(f"out has shape {out.shape}, expected {tuple(shape)}")
    dtype = np.dtype(np.uint8 if max(values) < 256 else np.uint16)
    if min(values) < 0 or max(values) > 65535 or (out is not None and out.dtype.kind in "iu" and max(values) > np.iinfo(out.dtype).max):
        raise InputError(f"label values {min(values)}..{max(values)} do not fit {dtype if out is None else out.dtype}")
    if out is not None and on_device(out) != on_device(logits):
        raise InputError("logits and out must lie on the same device")
    writable = out is not None and out.dtype in (np.uint8, np.uint16) and all(s % out.dtype.itemsize == 0 for s in out.strides)
    labels = out if out is not None and writable else get_xp(logits).empty(shape, dtype)
    return labels, np.asarray(values, np.int32)


def _check_slab(slab: Slab, logits: Array, planes: int, out: Array | None) -> None:
    """Refuse a slab that is none: `planes` is the number of planes the whole result has."""
    if out is None:
        raise InputError("a slab needs `out` to write to")
    last = slab.first + (logits.shape[1] if logits.ndim == 4 else 0)
    if not (0 <= slab.first < last <= slab.total and 0 <= slab.start < slab.stop <= planes):
        raise InputError(
            f"slab: logits of planes {slab.first}..{last} of {slab.total}, labels of planes {slab.start}..{slab.stop} of {planes}: "
            "both must be parts, of at least one plane"
        )


def _check_needed(slab: Slab, logits: Array, lowest: int, highest: int) -> None:
    last = slab.first + logits.shape[1] - 1
    if lowest < slab.first or highest > last:
        raise InputError(
            f"slab: planes {slab.start}..{slab.stop} of the result need logits of planes {lowest} to {highest}, got {slab.first} to {last}"
        )


def _delivered(labels: Array, out: Array | None) -> Array:
    if out is None or out is labels:
        return labels
    out[...] = labels
    return out
