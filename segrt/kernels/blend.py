"""Blending of windows: weights that sum to one, and nnU-Net's float16 recipe; used by `windows`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array, FloatArray, Shape3
from ..device import on_device
from ..errors import InputError
from . import _blend
from ._views import LAUNCH, flatten

# columns of a table of windows: start, flip and row of the weight table, (z, y, x) each, then the position in the batch
START, FLIP, ROW, SOURCE, COLUMNS = slice(0, 3), slice(3, 6), slice(6, 9), 9, 10

Tables = tuple[FloatArray, FloatArray, FloatArray]


def gaussian_1d(size: int) -> Array:
    """Return nnU-Net's importance along one axis: (size,) float64, largest value 1 at size // 2.

    A delta filtered by a Gaussian with sigma = size / 8, cut off at 4 sigma, zeros outside.
    """
    weights = _filtered_delta(size)
    weights /= weights.max()
    return weights


def _filtered_delta(size: int) -> Array:
    sigma = size / 8
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    kernel /= kernel.sum()
    offsets = np.arange(size) - size // 2
    weights: Array = np.where(np.abs(offsets) <= radius, kernel[np.clip(offsets + radius, 0, 2 * radius)], 0.0)
    return weights


def axis_weights(starts: Sequence[int], size: int, image_size: int, blending: str) -> FloatArray:
    """Return the weights of every window along one axis, (n_windows, size) float32, summing to 1 over the windows at each position.

    Parameters
    ----------
    starts : first voxel of each window along this axis
    size : window length in voxels
    image_size : axis length in voxels
    blending : "gaussian" or "uniform"

    Raises
    ------
    InputError
        When a window leaves the axis, a voxel lies in no window, or `blending` is unknown.
    """
    if blending not in ("gaussian", "uniform"):
        raise InputError(f"blending: expected 'gaussian' or 'uniform', got {blending!r}")
    weight = gaussian_1d(size) if blending == "gaussian" else np.ones(size)
    total = np.zeros(image_size)
    for start in starts:
        if start < 0 or start + size > image_size:
            raise InputError(f"window {start}..{start + size} does not lie in an axis of {image_size} voxels")
        total[start : start + size] += weight
    if not total.all():
        raise InputError(f"voxel {int(np.argmin(total))} of an axis of {image_size} lies in no window (starts {list(starts)}, size {size})")
    return np.stack([weight / total[start : start + size] for start in starts]).astype(np.float32)


def add_window(acc: FloatArray, patch: Array, start: Shape3, wz: FloatArray, wy: FloatArray, wx: FloatArray, scale: float = 1.0) -> None:
    """Add patch * wz * wy * wx * scale to `acc` at `start`, in place.

    Parameters
    ----------
    acc : (K, Z, Y, X) float32, modified
    patch : (K, z, y, x) float32 or float16
    start : (z, y, x) first voxel of the window
    wz, wy, wx : (z,), (y,), (x,) float32 weights of this window
    scale : one more factor, such as 1 / members
    """
    wide = np.ascontiguousarray(patch, np.float32)
    flat, layout = _window(acc, patch.shape[1:], start)
    with LAUNCH:
        _blend.add(flat, layout, wide, wz * np.float32(scale), wy, wx)


def gather_windows(data: FloatArray, entries: Array, patch: Shape3, low: Shape3) -> FloatArray:
    """Return the windows of an image, cut and flipped: (N, C, z, y, x) float32, where the image lies.

    Parameters
    ----------
    data : (C, Z, Y, X) float32 on the host or on a device; not modified
    entries : (N, 10) int32 on the host. Columns: start z y x in the padded image | flip z y x, 0 or 1 | row of each axis' weight table |
        position in a batch of logits. The last four are not used here.
    patch : (z, y, x) of a window
    low : (z, y, x) voxels of padding before the image; every voxel outside it is 0

    Raises
    ------
    InputError
        When `data` or `entries` have another shape or dtype.
    """
    _check_entries(entries)
    if data.ndim != 4 or data.dtype != np.float32:
        raise InputError(f"gather_windows: expected data (C, Z, Y, X) float32, got {data.dtype} of shape {data.shape}")
    if on_device(data):
        from ._cuda import blend as device

        gathered: FloatArray = device.gather(data, entries, patch, low)
        return gathered
    patches = np.zeros((len(entries), len(data), *patch), np.float32)
    for entry, target in zip(entries, patches, strict=True):
        inside, part = _overlap(entry[START], patch, low, data.shape[1:])
        _flipped(target, entry[FLIP])[part] = data[inside]
    return patches


def blend_windows(acc: FloatArray, logits: Array, entries: Array, tables: Tables, scale: float) -> None:
    """Add windows times their weights to `acc`, in place: acc += scale * wz * wy * wx * logits, window after window.

    Parameters
    ----------
    acc : (K, Z, Y, X) float32 on the host or on a device, modified; starts are relative to it
    logits : (B, K, z, y, x) float32 or float16, beside `acc`; a flipped window is read backwards
    entries : (N, 10) int32 on the host, columns as in `gather_windows`; their order is the order of the sum
    tables : weights (n, z), (n, y), (n, x) float32, on the host or beside `acc`
    scale : one more factor, such as 1 / members

    Raises
    ------
    InputError
        When shapes or dtypes do not fit, or an entry points outside `acc`, `logits` or a table.
    """
    _check_blend(acc, logits, entries, tables)
    if on_device(acc):
        from ._cuda import blend as device

        device.blend(acc, logits, entries, tables, scale)
        return
    for entry in entries:
        wz, wy, wx = (table[row] for table, row in zip(tables, entry[ROW], strict=True))
        z, y, x = (int(n) for n in entry[START])
        add_window(acc, _flipped(logits[entry[SOURCE]], entry[FLIP]), (z, y, x), wz, wy, wx, scale)


def constant_windows(data: FloatArray, starts: Array, patch: Shape3, low: Shape3) -> tuple[Array, FloatArray]:
    """Return which windows have one value per channel, (W,) bool, and each window's first voxel, (W, C) float32; both on the host.

    Parameters
    ----------
    data : (C, Z, Y, X) float32 on the host or on a device; not modified
    starts : (W, 3) int32 on the host, in the padded image
    patch, low : as in `gather_windows`; zeros of the padding count as voxels

    Raises
    ------
    InputError
        When `data` or `starts` have another shape or dtype.
    """
    if data.ndim != 4 or data.dtype != np.float32 or starts.ndim != 2 or starts.shape[1] != 3:
        raise InputError(f"constant_windows: expected data (C, Z, Y, X) float32 and starts (W, 3), got {data.shape} and {starts.shape}")
    if on_device(data):
        from ._cuda import blend as device

        return device.constant(data, starts, patch, low)
    flags, corners = np.zeros(len(starts), bool), np.zeros((len(starts), len(data)), np.float32)
    for i, start in enumerate(starts):
        inside, _ = _overlap(start, patch, low, data.shape[1:])
        voxels = data[inside]
        first = start - np.asarray(low)
        if (first >= 0).all() and (first < data.shape[1:]).all():
            corners[i] = data[(slice(None), *first)]
        padded = voxels[0].size < np.prod(patch)
        flags[i] = _is_constant(voxels, corners[i]) and not (padded and corners[i].any())
    return flags, corners


def _is_constant(voxels: FloatArray, values: FloatArray) -> bool:
    expected = values[:, None, None, None]
    # most windows are told apart by their first row; only constant ones are read whole
    return bool((voxels[:, :1, :1] == expected).all() and (voxels == expected).all())


def _overlap(start: Array, patch: Shape3, low: Shape3, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a window that lies in the image: as slices into the image and as slices into the window, channels first."""
    inside, part = [slice(None)], [slice(None)]
    for s, p, before, n in zip(start.tolist(), patch, low, shape, strict=True):
        first, last = min(max(s - before, 0), n), min(max(s - before + p, 0), n)
        inside.append(slice(first, last))
        part.append(slice(first - s + before, last - s + before) if last > first else slice(0, 0))
    return tuple(inside), tuple(part)


def _flipped(patch: Array, flips: Array) -> Array:
    """A view (C, z, y, x) that runs backwards along the flipped axes."""
    turned: Array = patch[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))]
    return turned


def _check_entries(entries: Array) -> None:
    if entries.ndim != 2 or entries.shape[1] != COLUMNS or entries.dtype != np.int32:
        raise InputError(f"windows: expected entries (N, {COLUMNS}) int32, got {entries.dtype} of shape {entries.shape}")


def _check_blend(acc: FloatArray, logits: Array, entries: Array, tables: Tables) -> None:
    _check_entries(entries)
    if acc.dtype != np.float32 or logits.dtype not in (np.float32, np.float16):
        raise InputError(f"blend_windows: expected float32 sums and float32 or float16 logits, got {acc.dtype} and {logits.dtype}")
    if on_device(acc) != on_device(logits):
        raise InputError("blend_windows: sums and logits must lie on the same device")
    widths = tuple(table.shape[1] for table in tables)
    if acc.ndim != 4 or logits.ndim != 5 or len(acc) != logits.shape[1] or logits.shape[2:] != widths:
        raise InputError(f"blend_windows: sums {acc.shape}, logits {logits.shape} and weights of {widths} voxels do not fit each other")
    if not len(entries):
        return
    start, stop = entries[:, START].min(axis=0), entries[:, START].max(axis=0) + widths
    if (start < 0).any() or (stop > acc.shape[1:]).any():
        raise InputError(f"windows of {widths} from {start} to {stop} do not lie in an array of {acc.shape[1:]}")
    used, there = entries[:, ROW.start :].max(axis=0), (*(len(table) for table in tables), len(logits))
    if entries[:, ROW.start :].min() < 0 or (used >= there).any():
        raise InputError(f"entries use rows and windows up to {used}, of {there} there are")


def gaussian_half(patch: Shape3) -> Array:
    """Return nnU-Net's importance map (z, y, x) float16: maximum 10, zeros replaced by the smallest non-zero value."""
    z, y, x = (_filtered_delta(n) for n in patch)
    weights = z[:, None, None] * y[:, None] * x
    weights /= weights.max() / 10
    # torch goes from float64 to float16 by way of float32
    half = weights.astype(np.float32).astype(np.float16)
    half[half == 0] = half[half > 0].min()
    return half


def add_window_half(acc: Array, count: Array, patch: FloatArray, start: Shape3, gaussian: Array) -> None:
    """Add one window as nnU-Net does, each sum rounded to float16, in place.

    Parameters
    ----------
    acc : (K, Z, Y, X) float16 sums, modified
    count : (Z, Y, X) float16 summed weights, modified
    patch : (K, z, y, x) float32
    start : (z, y, x) first voxel of the window
    gaussian : (z, y, x) float16, from `gaussian_half`
    """
    size = gaussian.shape
    sums, sums_layout = _window(acc.view(np.uint16), size, start)
    counts, counts_layout = _window(count.view(np.uint16)[None], size, start)
    wide = np.ascontiguousarray(patch, np.float32)
    weight = np.ascontiguousarray(gaussian).view(np.uint16)
    with LAUNCH:
        _blend.add_half(sums, sums_layout, wide, weight)
        _blend.add_half(counts, counts_layout, np.ones((1, *size), np.float32), weight)


def divide_half(acc: Array, count: Array) -> None:
    """Divide the float16 sums (K, Z, Y, X) by the float16 counts (Z, Y, X) in float32, rounded to float16, in place."""
    flat, layout = flatten(acc.view(np.uint16))
    divisor = np.ascontiguousarray(count).view(np.uint16)
    with LAUNCH:
        _blend.divide_half(flat, layout, len(acc), divisor)


def _window(acc: Array, size: tuple[int, ...], start: Shape3) -> tuple[Array, tuple[int, ...]]:
    z, y, x = start
    window = acc[:, z : z + size[0], y : y + size[1], x : x + size[2]]
    if window.shape[1:] != tuple(size) or min(start) < 0:
        raise InputError(f"a window of {tuple(size)} at {tuple(start)} does not lie in an array of {acc.shape[1:]}")
    return flatten(window)
