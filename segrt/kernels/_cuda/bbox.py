"""What is not zero, on a device: the box around it and the mask of it.

Both kernels test the bits of a voxel, so that one text serves every dtype of a size: `bits` keeps all of an integer and drops the sign
of a float, for which -0.0 is zero too.
"""

from __future__ import annotations

from .launch import atomic_max, atomic_min, thread_kernel

ROWS = 8  # rows of a thread of `grow_box`


@thread_kernel()
def grow_box(z, y, x, data, bits, box):  # type: ignore[no-untyped-def]
    """Widen box (z0, z1, y0, y1, x0, x1) to what is not zero in `ROWS` rows at one x.

    The box only ever grows, so a voxel that lies inside what this thread can see of it, however old, need not be read: at most one read
    of the image, and next to none of one that is not zero anywhere.
    """
    for row in range(y * ROWS, min((y + 1) * ROWS, data.shape[2])):
        inside = box[0] <= z and z < box[1] and box[2] <= row and row < box[3] and box[4] <= x and x < box[5]
        channel = 0
        while not inside and channel < data.shape[0]:
            if data[channel, z, row, x] & bits != 0:
                # most threads find five of the six bounds as they need them; few atomics are left
                if z < box[0]:
                    atomic_min(box, 0, z)
                if z >= box[1]:
                    atomic_max(box, 1, z + 1)
                if row < box[2]:
                    atomic_min(box, 2, row)
                if row >= box[3]:
                    atomic_max(box, 3, row + 1)
                if x < box[4]:
                    atomic_min(box, 4, x)
                if x >= box[5]:
                    atomic_max(box, 5, x + 1)
                inside = True
            channel += 1


@thread_kernel()
def mark_nonzero(z, y, x, data, bits, mask):  # type: ignore[no-untyped-def]
    """Set one voxel of `mask` when some channel of it is not zero: one read of the image, one byte written per voxel."""
    found = False
    for channel in range(data.shape[0]):
        if data[channel, z, y, x] & bits != 0:
            found = True
    mask[z, y, x] = found
