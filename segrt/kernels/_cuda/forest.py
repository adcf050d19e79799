"""A union-find forest over blocks of 2 x 2 x 2 voxels: the scalar functions that the kernels of `components` are made of.

A block's eight group numbers stand in one 64-bit word, lane 4 z + 2 y + x at bit 8 lane. Inside a block, components are found in
registers; only the first voxel of each has a slot in the forest `parent` that is ever touched, so a forest of one integer per voxel
costs about a quarter of its size in traffic. Node i + 1 is the voxel of linear index i; node 0 is the outside of the image. A parent is
never larger than its child, so a component's root is its first voxel whatever the order in which threads run, and results are equal in
every run.

References
----------
- Komura (2015), doi:10.1016/j.cpc.2015.04.015, and Playne and Hawick (2018), doi:10.1109/TPDS.2018.2799216: merging without rounds, by
  an atomic minimum on the forest. Differences: any number of groups in one pass; 3-D blocks.
- Allegretti, Bolelli and Grana (2019), doi:10.1109/TPDS.2019.2934683: the block as the unit. Difference: equal voxels of a block are one
  node only under 26 neighbours; under 6 a block may hold up to four nodes of a group.
- Jaiganesh and Burtscher (2018), doi:10.1145/3208040.3208041: paths are shortened while they are walked, by plain writes.
"""

from __future__ import annotations

from .launch import atomic_min, scalar


@scalar
def lane_group(word, lane):  # type: ignore[no-untyped-def]
    return (word >> (8 * lane)) & 255


@scalar
def lanes_of(word, group):  # type: ignore[no-untyped-def]
    """Bits of the lanes that hold `group`."""
    bits = 0
    for lane in range(8):
        if (word >> (8 * lane)) & 255 == group:
            bits |= 1 << lane
    return bits


@scalar
def first_lane(bits):  # type: ignore[no-untyped-def]
    lane = 0
    while (bits >> lane) & 1 == 0:
        lane += 1
    return lane


@scalar
def count_lanes(bits):  # type: ignore[no-untyped-def]
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return (bits + (bits >> 4)) & 0x0F


@scalar
def part_of(word, lane, six):  # type: ignore[no-untyped-def]
    """Bits of the lanes that belong to the component of `lane` inside its block."""
    same = lanes_of(word, lane_group(word, lane))
    if six == 0:
        return same
    part = 1 << lane
    for _ in range(4):  # no shortest path inside a cube's corners has more steps
        along_x = ((part & 0x55) << 1) | ((part & 0xAA) >> 1)
        along_y = ((part & 0x33) << 2) | ((part & 0xCC) >> 2)
        along_z = ((part & 0x0F) << 4) | ((part & 0xF0) >> 4)
        part |= same & (along_x | along_y | along_z)
    return part


@scalar
def node_of(z, y, x, lane, high, wide):  # type: ignore[no-untyped-def]
    """Node of a lane of block (z, y, x) in an image of rows of `wide` and planes of `high` rows."""
    return ((2 * z + (lane >> 2)) * high + 2 * y + ((lane >> 1) & 1)) * wide + 2 * x + (lane & 1) + 1


@scalar
def root_of(parent, node):  # type: ignore[no-untyped-def]
    """Root of a node; on the way every node is pointed to its grandparent.

    Safe against the other threads: only nodes that are no roots are written, what they are given is an ancestor they once had, and a
    thread that takes such an ancestor away from a node (`join`) goes on to join the two.
    """
    up = parent[node]
    while up != node:
        above = parent[up]
        if above != up:
            parent[node] = above
        node = up
        up = above
    return node


@scalar
def top_of(parent, node):  # type: ignore[no-untyped-def]
    """Root of a node; writes nothing, so that other threads may write the final root of their own nodes meanwhile."""
    up = parent[node]
    while up != node:
        node = up
        up = parent[node]
    return node


@scalar
def join(parent, a, b):  # type: ignore[no-untyped-def]
    """Make one tree of the trees of two nodes; returns a node of it near its root."""
    a = root_of(parent, a)
    b = root_of(parent, b)
    while a != b:
        if a < b:
            a, b = b, a
        old = atomic_min(parent, a, b)
        if old == a:
            return b
        # another thread hung `a` elsewhere first: that tree and b's are still to be joined
        a = root_of(parent, old)
        b = root_of(parent, b)
    return a


@scalar
def facing(step, low, high):  # type: ignore[no-untyped-def]
    """Lanes that touch the block `step` further along an axis whose lower and upper lanes are `low` and `high`."""
    if step < 0:
        return low
    if step > 0:
        return high
    return 255


@scalar
def border(block, size, low, high):  # type: ignore[no-untyped-def]
    """Lanes that lie at an end of an axis of `size` voxels."""
    bits = 0
    if block == 0 or 2 * block == size - 1:
        bits |= low
    if 2 * block + 1 == size - 1:
        bits |= high
    return bits
