"""Where an image is not zero: the crop every nnU-Net pipeline starts with; used by `preprocess`."""

from __future__ import annotations

import cc3d
import numpy as np
from numba import njit, prange

from ..arrays import Array
from ..device import get_xp, on_device, to_host
from ._views import LAUNCH, NATIVE, flatten

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def nonzero_bbox(data: Array) -> Box:
    """Return ((z0, z1), (y0, y1), (x0, x1)), half open, around every voxel that is not zero in some channel.

    The box of the hole-filled mask is the same, so no holes are filled for it. An image of zeros gives the whole image.

    Parameters
    ----------
    data : (C, Z, Y, X) any real dtype, on a device too (six numbers come back)
    """
    if on_device(data):
        return _box_on_device(data)
    if data.dtype in NATIVE:
        flat, layout = flatten(data)
    else:
        flat, layout = flatten((data if data.dtype == bool else data != 0).view(np.uint8))
    with LAUNCH:
        y0, y1, x0, x1 = _plane_boxes(flat, layout, data.shape)
    hit = np.flatnonzero(y1)
    if not hit.size:
        return (0, data.shape[1]), (0, data.shape[2]), (0, data.shape[3])
    return (int(hit[0]), int(hit[-1]) + 1), (int(y0.min()), int(y1.max())), (int(x0.min()), int(x1.max()))


def nonzero_mask(data: Array) -> Array:
    """Return the voxels that are not zero in some channel, holes filled, as (Z, Y, X) bool.

    A hole is background that no path of face neighbours joins to the outside (`scipy.ndimage.binary_fill_holes` in 3-D). Every pixel
    of a single slice touches the outside, so there nothing is filled.

    Parameters
    ----------
    data : (C, Z, Y, X) any real dtype; on a device the mask lies there too
    """
    if on_device(data):
        return _mask_on_device(data)
    mask: Array = data[0] != 0
    for channel in data[1:]:
        mask |= channel != 0
    fill_enclosed(mask)
    return mask


def fill_enclosed(mask: Array) -> None:
    """Set the voxels of `mask` (Z, Y, X) bool that are enclosed by it, in place; on a device too.

    Raises
    ------
    InputError
        When a mask on a device has 2^31 - 1 voxels or more.
    """
    if on_device(mask):
        _fill_on_device(mask)
        return
    (z0, z1), (y0, y1), (x0, x1) = nonzero_bbox(mask[None])
    # outside the box everything is background and joined, so only the box needs labels
    box = mask[z0:z1, y0:y1, x0:x1]
    if min(box.shape) < 3 or box.all():
        return
    background = cc3d.connected_components(np.ascontiguousarray(~box), connectivity=6)
    open_to_outside = np.zeros(int(background.max()) + 1, bool)
    for axis in range(3):
        for face in (0, -1):
            open_to_outside[np.unique(np.take(background, face, axis=axis))] = True
    open_to_outside[0] = True
    box |= ~open_to_outside[background]


def _box_on_device(data: Array) -> Box:
    from ._cuda import bbox as device
    from ._cuda.launch import launch

    _, deep, high, wide = data.shape
    box = get_xp(data).asarray(np.array([deep, 0, high, 0, wide, 0], np.int32))
    launch(device.grow_box, (deep, -(-high // device.ROWS), wide), *_bits(data), box)
    z0, z1, y0, y1, x0, x1 = (int(n) for n in to_host(box))
    if z1 == 0:
        return (0, deep), (0, high), (0, wide)
    return (z0, z1), (y0, y1), (x0, x1)


def _mask_on_device(data: Array) -> Array:
    from ._cuda import bbox as device
    from ._cuda.launch import launch

    mask: Array = get_xp(data).empty(data.shape[1:], bool)
    launch(device.mark_nonzero, mask.shape, *_bits(data), mask)
    _fill_on_device(mask)
    return mask


def _fill_on_device(mask: Array) -> None:
    from ._cuda import components as device

    device.check_size(mask.shape)
    if min(mask.shape) >= 3:
        device.fill_enclosed(mask.view(np.uint8), 1, 1, walled=False)


def _bits(data: Array) -> tuple[Array, np.int64]:
    """Real voxels as integers of their size, and the bits of them that are zero in a zero of either sign."""
    size = data.dtype.itemsize
    kept = 2 ** (8 * size - 1) - 1 if data.dtype.kind == "f" else -1
    return data.view(f"i{size}"), np.int64(kept)


@njit(cache=True, nogil=True, parallel=True)
def _plane_boxes(flat, layout, size):  # type: ignore[no-untyped-def]
    """(y0, y1, x0, x1), each (Z,), of what is not zero in every slice; (Y, 0, X, 0) for an empty one."""
    offset, sc, sz, sy, sx = layout
    nc, nz, ny, nx = size
    y0, y1, x0, x1 = np.full(nz, ny), np.zeros(nz, np.int64), np.full(nz, nx), np.zeros(nz, np.int64)
    for z in prange(nz):
        for c in range(nc):
            for y in range(ny):
                start = offset + c * sc + z * sz + y * sy
                first = 0
                while first < nx and flat[start + first * sx] == 0:
                    first += 1
                if first == nx:
                    continue
                last = nx
                # only what lies beyond the box so far is read
                while last > max(x1[z], first + 1) and flat[start + (last - 1) * sx] == 0:
                    last -= 1
                y0[z], y1[z] = min(y0[z], y), max(y1[z], y + 1)
                x0[z], x1[z] = min(x0[z], first), max(x1[z], last)
    return y0, y1, x0, x1
