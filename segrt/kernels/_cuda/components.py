"""Connected components on a device: what is too small is cleared and what is enclosed is filled, without a copy to the host.

Group numbers, blocks, words and nodes are those of `forest`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import Array, Shape3
from ...device import get_xp
from ...errors import InputError
from .forest import border, count_lanes, facing, first_lane, join, lane_group, lanes_of, node_of, part_of, root_of, top_of
from .launch import atomic_add, atomic_max, launch, thread_kernel

STRIP = 8  # blocks along y that one thread of `count_voxels` adds up before it touches memory
_MOST_VOXELS = 2**31 - 2


def check_size(shape: Shape3) -> None:
    """Refuse an image whose voxels 32-bit indices cannot count.

    Raises
    ------
    InputError
        When `shape` has 2^31 - 1 voxels or more.
    """
    voxels = shape[0] * shape[1] * shape[2]
    if voxels > _MOST_VOXELS:
        raise InputError(f"labels of {voxels} voxels: components on a device are counted in 32 bits, up to {_MOST_VOXELS}; use the CPU")


def clear_components(labels: Any, groups: Array, needed: Array, ranked: int) -> None:
    """Clear, in place, the components (26 neighbours) that are smaller than their group needs.

    Parameters
    ----------
    labels : (Z, Y, X) uint8 or uint16 on a device
    groups : (256,) or (65536,) uint8 on the host, group number 1..255 of every label value; 0 is no group
    needed : (256,) int32 on the host, fewest voxels of a component, by group
    ranked : of groups 1..ranked only the largest components stay; their `needed` is 0
    """
    xp, (_, high, wide) = get_xp(labels), labels.shape
    words, parent = _pack(labels, groups, 0)
    launch(join_corners, words.shape, high, wide, words, parent)
    sizes = xp.zeros(parent.shape, np.int32)
    deep, blocks, across = words.shape
    launch(count_voxels, (deep, -(-blocks // STRIP), across), high, wide, words, parent, sizes)
    fewest = xp.asarray(needed)
    if ranked:
        launch(find_largest, words.shape, high, wide, words, parent, sizes, ranked, fewest)
    launch(clear_small, words.shape, words, parent, sizes, fewest, labels)


def fill_enclosed(labels: Any, wall: int, value: int, *, walled: bool) -> None:
    """Give background (0) that label `wall` encloses (6 neighbours) the label `value`, in place.

    Parameters
    ----------
    labels : (Z, Y, X) uint8 or uint16 on a device
    walled : the first and the last slice are no way out
    """
    groups = np.ones(np.iinfo(labels.dtype).max + 1, np.uint8)
    groups[wall] = 0
    words, parent = _pack(labels, groups, 1)
    launch(join_faces, words.shape, *labels.shape, int(walled), words, parent)
    launch(fill_parts, words.shape, words, parent, value, labels)


def _pack(labels: Any, groups: Array, six: int) -> tuple[Any, Any]:
    """Words of all blocks, and a forest where each component of a block is a tree of its own."""
    xp = get_xp(labels)
    deep, high, wide = (-(-n // 2) for n in labels.shape)
    words = xp.empty((deep, high, wide), np.int64)
    parent = xp.empty(labels.size + 1, np.int32)
    launch(pack_blocks, words.shape, labels, xp.asarray(groups), six, words, parent)
    return words, parent


@thread_kernel()
def pack_blocks(z, y, x, labels, groups, six, words, parent):  # type: ignore[no-untyped-def]
    """Write the word of a block and make a tree of each of its components.

    Reads one label and writes one byte of the words per voxel; about one integer of the forest per block where blocks are of one group.
    """
    planes, rows, columns = labels.shape
    word = np.int64(0)
    for lane in range(8):
        i, j, k = 2 * z + (lane >> 2), 2 * y + ((lane >> 1) & 1), 2 * x + (lane & 1)
        if i < planes and j < rows and k < columns:
            word |= np.int64(groups[labels[i, j, k]]) << np.int64(8 * lane)
    words[z, y, x] = word
    if z == 0 and y == 0 and x == 0:
        parent[0] = 0
    left = 255 & ~lanes_of(word, 0)
    while left != 0:
        lane = first_lane(left)
        left &= ~part_of(word, lane, six)
        node = node_of(z, y, x, lane, rows, columns)
        parent[node] = node


@thread_kernel()
def join_corners(z, y, x, rows, columns, words, parent):  # type: ignore[no-untyped-def]
    """Join a block's groups with the same groups in the 13 blocks before it (26 neighbours).

    All voxels of one block that face another touch all of that one's that face it, so one join for each group and pair is enough.
    Reads the words once from memory, the neighbours' from caches.
    """
    word = words[z, y, x]
    left = 255 & ~lanes_of(word, 0)
    while left != 0:
        lane = first_lane(left)
        group = lane_group(word, lane)
        part = lanes_of(word, group)
        left &= ~part
        node = node_of(z, y, x, lane, rows, columns)
        for step in range(13):
            dz, dy, dx = step // 9 - 1, step // 3 % 3 - 1, step % 3 - 1
            i, j, k = z + dz, y + dy, x + dx
            if i < 0 or j < 0 or k < 0 or j >= words.shape[1] or k >= words.shape[2]:
                continue
            if part & facing(dz, 0x0F, 0xF0) & facing(dy, 0x33, 0xCC) & facing(dx, 0x55, 0xAA) == 0:
                continue
            others = lanes_of(words[i, j, k], group)
            if others & facing(-dz, 0x0F, 0xF0) & facing(-dy, 0x33, 0xCC) & facing(-dx, 0x55, 0xAA) != 0:
                node = join(parent, node, node_of(i, j, k, first_lane(others), rows, columns))


@thread_kernel()
def join_faces(z, y, x, planes, rows, columns, walled, words, parent):  # type: ignore[no-untyped-def]
    """Join a block's components with those of the three blocks before it (6 neighbours), and with the outside at the image's border.

    `walled` says that the first and the last slice are no border. Traffic as `join_corners`.
    """
    word = words[z, y, x]
    outside = border(y, rows, 0x33, 0xCC) | border(x, columns, 0x55, 0xAA)
    if walled == 0:
        outside |= border(z, planes, 0x0F, 0xF0)
    left = 255 & ~lanes_of(word, 0)
    while left != 0:
        lane = first_lane(left)
        group = lane_group(word, lane)
        part = part_of(word, lane, 1)
        left &= ~part
        node = node_of(z, y, x, lane, rows, columns)
        if part & outside != 0:
            node = join(parent, node, 0)
        for axis in range(3):
            # lanes with a neighbour in the block before lie on the low side; the neighbour's number is higher by `span`
            span = 4 >> axis
            i, j, k = z - (axis == 0), y - (axis == 1), x - (axis == 2)
            if i < 0 or j < 0 or k < 0:
                continue
            other = words[i, j, k]
            low = 0x0F if axis == 0 else (0x33 if axis == 1 else 0x55)
            touching = part & low & (lanes_of(other, group) >> span)
            while touching != 0:
                theirs = part_of(other, first_lane(touching) + span, 1)
                touching &= ~(theirs >> span)
                node = join(parent, node, node_of(i, j, k, first_lane(theirs), rows, columns))


@thread_kernel()
def count_voxels(z, y, x, rows, columns, words, parent, sizes):  # type: ignore[no-untyped-def]
    """Point every node to its root and add the voxels of `STRIP` blocks along y to `sizes` at their roots (26 neighbours).

    Reads the words and the touched part of the forest once; one atomic per component that a strip meets.
    """
    root, total = 0, 0
    for row in range(y * STRIP, min((y + 1) * STRIP, words.shape[1])):
        word = words[z, row, x]
        left = 255 & ~lanes_of(word, 0)
        while left != 0:
            lane = first_lane(left)
            part = lanes_of(word, lane_group(word, lane))
            left &= ~part
            node = node_of(z, row, x, lane, rows, columns)
            top = top_of(parent, node)
            parent[node] = top
            if top != root and total != 0:
                atomic_add(sizes, root, total)
                total = 0
            root = top
            total += count_lanes(part)
    if total != 0:
        atomic_add(sizes, root, total)


@thread_kernel()
def find_largest(z, y, x, rows, columns, words, parent, sizes, ranked, needed):  # type: ignore[no-untyped-def]
    """Raise `needed` of the groups 1 to `ranked` to the size of their largest component; reads the words and the forest."""
    word = words[z, y, x]
    left = 255 & ~lanes_of(word, 0)
    while left != 0:
        lane = first_lane(left)
        group = lane_group(word, lane)
        left &= ~lanes_of(word, group)
        node = node_of(z, y, x, lane, rows, columns)
        # `needed` only grows: an old value costs an atomic and changes nothing
        if group <= ranked and parent[node] == node and sizes[node] > needed[group]:
            atomic_max(needed, group, sizes[node])


@thread_kernel()
def clear_small(z, y, x, words, parent, sizes, needed, labels):  # type: ignore[no-untyped-def]
    """Clear a block's voxels whose components are smaller than their group needs; writes nothing else."""
    word = words[z, y, x]
    left = 255 & ~lanes_of(word, 0)
    while left != 0:
        lane = first_lane(left)
        group = lane_group(word, lane)
        part = lanes_of(word, group)
        left &= ~part
        if sizes[parent[node_of(z, y, x, lane, labels.shape[1], labels.shape[2])]] < needed[group]:
            for other in range(lane, 8):
                if (part >> other) & 1 != 0:
                    labels[2 * z + (other >> 2), 2 * y + ((other >> 1) & 1), 2 * x + (other & 1)] = 0


@thread_kernel()
def fill_parts(z, y, x, words, parent, value, labels):  # type: ignore[no-untyped-def]
    """Give a block's background (0) that is not joined to the outside the label `value`; writes nothing else (6 neighbours)."""
    word = words[z, y, x]
    left = 255 & ~lanes_of(word, 0)
    while left != 0:
        lane = first_lane(left)
        part = part_of(word, lane, 1)
        left &= ~part
        if root_of(parent, node_of(z, y, x, lane, labels.shape[1], labels.shape[2])) != 0:
            for other in range(lane, 8):
                i, j, k = 2 * z + (other >> 2), 2 * y + ((other >> 1) & 1), 2 * x + (other & 1)
                if (part >> other) & 1 != 0 and labels[i, j, k] == 0:
                    labels[i, j, k] = value
