"""Windows on a device: cut, tested for being constant, and blended; launched by `kernels.blend`, which checks what it is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import Array, FloatArray, Shape3
from ...device import get_xp, on_device, to_host
from ..blend import START, Tables
from .launch import launch, thread_kernel


def gather(data: Any, entries: Array, patch: Shape3, low: Shape3) -> Any:
    """One launch: each voxel of the windows is read and written once."""
    xp, (pz, py, px) = get_xp(data), patch
    patches = xp.empty((len(entries), len(data), *patch), np.float32)
    relative = entries.copy()
    relative[:, START] -= np.asarray(low, np.int32)
    launch(gather_voxel, (len(entries) * len(data) * pz, py, px), data, xp.asarray(relative), patches)
    return patches


def blend(acc: Any, logits: Any, entries: Array, tables: Tables, scale: float) -> None:
    """One launch over the entries' bounding box: sums are read and written once where any window lies, logits read once."""
    if not len(entries):
        return
    xp, starts = get_xp(acc), entries[:, START]
    low = starts.min(axis=0)
    deep, high, wide = (int(n) for n in (starts - low).max(axis=0) + np.asarray(logits.shape[2:]))
    relative = entries.copy()
    relative[:, START] -= low
    box = acc[(slice(None), *(slice(a, a + n) for a, n in zip(low.tolist(), (deep, high, wide), strict=True)))]
    there = (table if on_device(table) else xp.asarray(table) for table in tables)
    groups = -(-len(acc) // 4)
    launch(blend_voxel, (groups * deep, high, wide), box, logits, xp.asarray(relative), *there, np.float32(scale))


def constant(data: Any, starts: Array, patch: Shape3, low: Shape3) -> tuple[Array, FloatArray]:
    """One launch and one copy to the host; a window is read until one of its voxels differs from the first."""
    xp, (pz, py, px) = get_xp(data), patch
    found = xp.full((len(starts), len(data) + 1), 1, np.float32)
    relative = np.ascontiguousarray(starts - np.asarray(low), np.int32)
    launch(constant_voxel, (len(starts) * len(data) * pz, py, px), data, xp.asarray(relative), np.int32(pz), found)
    host = to_host(found)
    return host[:, -1] > 0, np.ascontiguousarray(host[:, :-1])


@thread_kernel()
def gather_voxel(z, y, x, data, entries, patches):  # type: ignore[no-untyped-def]
    """Read one voxel of one channel of one window; entries start relative to the image."""
    channels, deep, high, wide = patches.shape[1:]
    plane, depth = z // deep, z % deep
    window, channel = plane // channels, plane % channels
    source_z = entries[window, 0] + (deep - 1 - depth if entries[window, 3] else depth)
    source_y = entries[window, 1] + (high - 1 - y if entries[window, 4] else y)
    source_x = entries[window, 2] + (wide - 1 - x if entries[window, 5] else x)
    value = np.float32(0)
    if 0 <= source_z < data.shape[1] and 0 <= source_y < data.shape[2] and 0 <= source_x < data.shape[3]:
        value = data[channel, source_z, source_y, source_x]
    patches[window, channel, depth, y, x] = value


@thread_kernel()
def constant_voxel(z, y, x, data, starts, depths, found):  # type: ignore[no-untyped-def]
    """Compare one voxel of one channel of one window with the window's first; found = (W, C + 1): values, and 1 while none differs."""
    channels = found.shape[1] - 1
    plane, depth = z // depths, z % depths
    window, channel = plane // channels, plane % channels
    first_z, first_y, first_x = starts[window, 0], starts[window, 1], starts[window, 2]
    writes = depth == 0 and y == 0 and x == 0
    # whoever finds a difference stores the same 0, and who sees it already can only agree
    if found[window, channels] == np.float32(0) and not writes:
        return
    first = value = np.float32(0)
    if 0 <= first_z < data.shape[1] and 0 <= first_y < data.shape[2] and 0 <= first_x < data.shape[3]:
        first = data[channel, first_z, first_y, first_x]
    if writes:
        found[window, channel] = first
    source_z, source_y, source_x = first_z + depth, first_y + y, first_x + x
    if 0 <= source_z < data.shape[1] and 0 <= source_y < data.shape[2] and 0 <= source_x < data.shape[3]:
        value = data[channel, source_z, source_y, source_x]
    if value != first:
        found[window, channels] = np.float32(0)


@thread_kernel()
def blend_voxel(z, y, x, acc, logits, entries, weights_z, weights_y, weights_x, scale):  # type: ignore[no-untyped-def]
    """Add every window to one voxel of up to four classes, which share the search for windows and the weight."""
    classes, deep = acc.shape[0], acc.shape[1]
    size_z, size_y, size_x = logits.shape[2], logits.shape[3], logits.shape[4]
    a, z = 4 * (z // deep), z % deep
    # past the last class: read it again, store nothing
    b, c, d = min(a + 1, classes - 1), min(a + 2, classes - 1), min(a + 3, classes - 1)
    va = vb = vc = vd = np.float32(0)
    found = False
    for i in range(entries.shape[0]):
        iz, iy, ix = z - entries[i, 0], y - entries[i, 1], x - entries[i, 2]
        if 0 <= iz < size_z and 0 <= iy < size_y and 0 <= ix < size_x:
            if not found:
                found = True
                va, vb, vc, vd = acc[a, z, y, x], acc[b, z, y, x], acc[c, z, y, x], acc[d, z, y, x]
            weight = weights_z[entries[i, 6], iz] * scale * weights_y[entries[i, 7], iy] * weights_x[entries[i, 8], ix]
            iz = size_z - 1 - iz if entries[i, 3] else iz
            iy = size_y - 1 - iy if entries[i, 4] else iy
            ix = size_x - 1 - ix if entries[i, 5] else ix
            source = entries[i, 9]
            va += np.float32(logits[source, a, iz, iy, ix]) * weight
            vb += np.float32(logits[source, b, iz, iy, ix]) * weight
            vc += np.float32(logits[source, c, iz, iy, ix]) * weight
            vd += np.float32(logits[source, d, iz, iy, ix]) * weight
    if found:
        acc[a, z, y, x] = va
        if a + 1 < classes:
            acc[b, z, y, x] = vb
        if a + 2 < classes:
            acc[c, z, y, x] = vc
        if a + 3 < classes:
            acc[d, z, y, x] = vd
