"""Windows on a device: cut, tested for being constant, and blended; launched by `kernels.blend`, which checks what it is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import Array, FloatArray, Shape3
from ...device import get_xp, on_device, to_host
from ..blend import START, Tables
from . import native
from .launch import launch, scalar, thread_kernel
from .logits import blend_call

_MOST_WINDOWS = 32768  # per launch: each is a plane of threads
_ZERO = np.float32(0)


def gather(data: Any, entries: Array, patch: Shape3, low: Shape3) -> Any:
    """One launch: each voxel of the windows is read and written once."""
    xp, (pz, py, px) = get_xp(data), patch
    patches = xp.empty((len(entries), len(data), *patch), np.float32)
    relative = entries.copy()
    relative[:, START] -= np.asarray(low, np.int32)
    fours = -(-pz // 4)
    shape = len(entries) * len(data) * fours, py, px
    launch(gather_voxels, shape, data, xp.asarray(relative), np.int32(fours), np.int32(len(data)), patches)
    return patches


def blend(acc: Any, logits: Any, entries: Array, tables: Tables, scale: float) -> None:
    """One launch over the entries' bounding box: logits are read once; sums are read and written where any window lies, once for every
    two windows that overlap there.
    """
    if not len(entries):
        return
    xp, starts = get_xp(acc), entries[:, START]
    low = starts.min(axis=0)
    z, y, x = (int(n) for n in (starts - low).max(axis=0) + np.asarray(logits.shape[2:]))
    relative = entries.copy()
    relative[:, START] -= low
    box = acc[(slice(None), *(slice(a, a + n) for a, n in zip(low.tolist(), (z, y, x), strict=True)))]
    there = tuple(table if on_device(table) else xp.asarray(table) for table in tables)
    relative = xp.asarray(relative)
    if not (native.available(acc) and native.run(blend_call(box, logits, relative, there, scale))):
        launch(blend_voxel, (z, y, x), box, logits, relative, *there, np.float32(scale))


def constant(data: Any, starts: Array, patch: Shape3, low: Shape3) -> tuple[Array, FloatArray]:
    """One launch for every 32768 windows and one copy to the host; a window is read until one of its voxels differs from the first."""
    xp, (pz, py, px) = get_xp(data), patch
    found = xp.full((len(starts), len(data) + 1), 1, np.float32)
    relative = xp.asarray(np.ascontiguousarray(starts - np.asarray(low), np.int32))
    for first in range(0, len(starts), _MOST_WINDOWS):
        part = slice(first, first + _MOST_WINDOWS)
        launch(constant_column, (len(relative[part]), py, px), data, relative[part], np.int32(pz), found[part])
    host = to_host(found)
    return host[:, -1] > 0, np.ascontiguousarray(host[:, :-1])


@scalar
def voxel_or_zero(data, channel, z, y, x):  # type: ignore[no-untyped-def]
    """A voxel of an image, 0 outside it."""
    if 0 <= z < data.shape[1] and 0 <= y < data.shape[2] and 0 <= x < data.shape[3]:
        # Numba looks whether a signed index is negative, every time
        return data[np.uint64(channel), np.uint64(z), np.uint64(y), np.uint64(x)]
    return _ZERO


@thread_kernel()
def gather_voxels(z, y, x, data, entries, fours, channels, patches):  # type: ignore[no-untyped-def]
    """Read four neighbours along z of one channel of one window, loads before stores; entries start relative to the image."""
    size_z, size_y, size_x = patches.shape[2:]
    column, a = z // fours, 4 * (z % fours)
    window, channel = column // channels, column % channels
    step = -1 if entries[window, 3] else 1
    source_z = entries[window, 0] + (size_z - 1 - a if entries[window, 3] else a)
    source_y = entries[window, 1] + (size_y - 1 - y if entries[window, 4] else y)
    source_x = entries[window, 2] + (size_x - 1 - x if entries[window, 5] else x)
    va = voxel_or_zero(data, channel, source_z, source_y, source_x)
    vb = voxel_or_zero(data, channel, source_z + step, source_y, source_x)
    vc = voxel_or_zero(data, channel, source_z + 2 * step, source_y, source_x)
    vd = voxel_or_zero(data, channel, source_z + 3 * step, source_y, source_x)
    patches[window, channel, a, y, x] = va
    if a + 1 < size_z:
        patches[window, channel, a + 1, y, x] = vb
    if a + 2 < size_z:
        patches[window, channel, a + 2, y, x] = vc
    if a + 3 < size_z:
        patches[window, channel, a + 3, y, x] = vd


@thread_kernel()
def constant_column(z, y, x, data, starts, depths, found):  # type: ignore[no-untyped-def]
    """Compare a line along z of window `z` with the window's first voxel; found = (W, C + 1): values, and 1 while no voxel differs."""
    channels = data.shape[0]
    first_z, first_y, first_x = starts[z, 0], starts[z, 1], starts[z, 2]
    for channel in range(channels):
        first = voxel_or_zero(data, channel, first_z, first_y, first_x)
        if y == 0 and x == 0:
            found[z, channel] = first
        depth = 0
        # whoever finds a difference stores the same 0; who sees it already has nothing to add
        while depth < depths and found[z, channels] != _ZERO:
            if voxel_or_zero(data, channel, first_z + depth, first_y + y, first_x + x) != first:
                found[z, channels] = _ZERO
            depth += 1


@scalar
def next_window(entries, i, z, y, x, size_z, size_y, size_x):  # type: ignore[no-untyped-def]
    """The first window from `i` on that covers a voxel, else how many there are."""
    while i < entries.shape[0]:
        iz, iy, ix = np.int32(z - entries[i, 0]), np.int32(y - entries[i, 1]), np.int32(x - entries[i, 2])
        if 0 <= iz < size_z and 0 <= iy < size_y and 0 <= ix < size_x:
            break
        i += 1
    return i


@scalar
def window_voxel(entries, i, z, y, x, size_z, size_y, size_x, weights_z, weights_y, weights_x):  # type: ignore[no-untyped-def]
    """A voxel's weight in window `i`, and where its logits are: the position in the batch, z, y, x."""
    iz, iy, ix = z - entries[i, 0], y - entries[i, 1], x - entries[i, 2]
    weight = weights_z[entries[i, 6], iz] * weights_y[entries[i, 7], iy] * weights_x[entries[i, 8], ix]
    iz = size_z - 1 - iz if entries[i, 3] else iz
    iy = size_y - 1 - iy if entries[i, 4] else iy
    ix = size_x - 1 - ix if entries[i, 5] else ix
    return weight, np.uint64(entries[i, 9]), np.uint64(iz), np.uint64(iy), np.uint64(ix)


@thread_kernel()
def blend_voxel(z, y, x, acc, logits, entries, weights_z, weights_y, weights_x, scale):  # type: ignore[no-untyped-def]
    """Add every window to all classes of one voxel: two windows at a time, in their order, and four classes, loads before stores."""
    classes, count = acc.shape[0], entries.shape[0]
    size_z, size_y, size_x = np.int32(logits.shape[2]), np.int32(logits.shape[3]), np.int32(logits.shape[4])
    oz, oy, ox = np.uint64(z), np.uint64(y), np.uint64(x)
    i = next_window(entries, 0, z, y, x, size_z, size_y, size_x)
    while i < count:
        j = next_window(entries, i + 1, z, y, x, size_z, size_y, size_x)
        two = j < count
        w, n, iz, iy, ix = window_voxel(entries, i, z, y, x, size_z, size_y, size_x, weights_z, weights_y, weights_x)
        u, m, jz, jy, jx = window_voxel(entries, j if two else i, z, y, x, size_z, size_y, size_x, weights_z, weights_y, weights_x)
        w, u = w * scale, u * scale
        for k in range(0, classes, 4):
            # past the last class: read it again, store nothing
            a, b = np.uint64(k), np.uint64(min(k + 1, classes - 1))
            c, d = np.uint64(min(k + 2, classes - 1)), np.uint64(min(k + 3, classes - 1))
            va, vb, vc, vd = acc[a, oz, oy, ox], acc[b, oz, oy, ox], acc[c, oz, oy, ox], acc[d, oz, oy, ox]
            va += np.float32(logits[n, a, iz, iy, ix]) * w
            vb += np.float32(logits[n, b, iz, iy, ix]) * w
            vc += np.float32(logits[n, c, iz, iy, ix]) * w
            vd += np.float32(logits[n, d, iz, iy, ix]) * w
            if two:
                va += np.float32(logits[m, a, jz, jy, jx]) * u
                vb += np.float32(logits[m, b, jz, jy, jx]) * u
                vc += np.float32(logits[m, c, jz, jy, jx]) * u
                vd += np.float32(logits[m, d, jz, jy, jx]) * u
            acc[a, oz, oy, ox] = va
            if k + 1 < classes:
                acc[b, oz, oy, ox] = vb
            if k + 2 < classes:
                acc[c, oz, oy, ox] = vc
            if k + 3 < classes:
                acc[d, oz, oy, ox] = vd
        i = next_window(entries, j + 1, z, y, x, size_z, size_y, size_x) if two else count
