"""Components and holes on a device: scipy == CPU == the loop over threads == the CUDA simulator, in any order of threads."""

from __future__ import annotations

import functools
import random
import sys
import threading
from types import FunctionType

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scipy import ndimage

from segrt.device import Simulated, on_device, to_device, to_host
from segrt.errors import InputError
from segrt.kernels._cuda import forest, launch
from segrt.kernels._cuda.launch import ThreadKernel, cuda_simulator, recording
from segrt.kernels.components import Rule, drop_small, fill_holes, keep_components, keep_largest
from segrt.postprocess import postprocess
from segrt.spec import DropSmall, FillHoles, KeepLargest

shapes = st.tuples(*[st.integers(1, 9)] * 3)
RULES = [Rule((1, 3)), Rule((2,), 3), Rule((4,)), Rule((5, 6), 2)]


# ------------------------------------------------------------------ oracles
def expected_rules(labels, rules):
    for rule in rules:
        least = rule.minimum_voxels
        choose = (lambda sizes: sizes == sizes.max(initial=0)) if least is None else (lambda sizes, least=least: sizes >= least)
        labels = reference.keep_components(labels, rule.values, choose)
    return labels


def expected_holes(labels, value):
    mask = labels == value
    filled = ndimage.binary_fill_holes(mask if len(mask) > 1 else mask[0]).reshape(mask.shape)
    return np.where(filled & (labels == 0), value, labels).astype(labels.dtype)


def noise(shape, density, seed, values=7, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.integers(1, values, shape), 0).astype(dtype)


def assert_equal_everywhere(labels, rules, value=1):
    """CPU and device against the oracle, for rules and for holes."""
    for function, argument, expected in [
        (keep_components, rules, expected_rules(labels, rules)),
        (fill_holes, value, expected_holes(labels, value)),
    ]:
        device = to_device(labels, "simulated")
        result = function(device, argument)
        assert on_device(result)
        assert result.dtype == labels.dtype
        np.testing.assert_array_equal(to_host(result), expected)
        np.testing.assert_array_equal(function(labels, argument), expected)
        np.testing.assert_array_equal(to_host(device), labels, "the input was modified")


# ------------------------------------------------------------------ shapes that are hard to label
def snake(shape):
    """One path of one voxel's width through the whole volume, folded along y and z; its ends are far apart."""
    path = np.zeros(shape, np.uint8)
    for k, z in enumerate(range(0, shape[0], 2)):
        rows = range(0, shape[1], 2)
        path[z, ::2] = 1
        for n, y in enumerate(rows[:-1]):
            path[z, y + 1, 0 if (n + k) % 2 else -1] = 1
        if z + 2 < shape[0]:
            path[z + 1, rows[-1] if k % 2 == 0 else 0, -1 if (len(rows) + k) % 2 == 0 else 0] = 1
    return path


def spiral(size):
    """A path of one voxel's width that winds inwards."""
    path = np.zeros((1, size, size), np.uint8)
    path[0, 0, :] = path[0, :, -1] = path[0, -1, :] = 1
    path[0, 2:, 0] = 1
    y, x, dy, dx, length = 2, 0, 0, 1, size - 3
    while length > 0:
        for _ in range(length):
            y, x = y + dy, x + dx
            path[0, y, x] = 1
        dy, dx = dx, -dy
        length -= 2 if dx == 0 else 0
    return path


def comb(shape):
    """Teeth along y that only the last row joins; every second tooth is another label."""
    labels = np.zeros(shape, np.uint8)
    labels[:, :, ::4] = 1
    labels[:, :, 2::4] = 2
    labels[:, -1] = 1
    return labels


def checkers(shape):
    return (np.indices(shape).sum(0) % 2 + 1).astype(np.uint8)


def bridge(shape):
    """Two blocks that one voxel joins at their corners, and the same without it in label 2."""
    labels = np.zeros(shape, np.uint8)
    half = shape[2] // 2
    labels[:2, :2, : half - 1] = 1
    labels[2:3, 2:3, half - 1] = 1
    labels[3:, 3:, half:] = 1
    labels[:2, 3:, : half - 1] = 2
    labels[3:, :2, half:] = 2
    return labels


def shells(size):
    """Cubes in cubes, label 1, 0, 1, 0 from the outside; the innermost hole is open at one voxel."""
    edge = np.minimum(np.indices((size,) * 3).min(0), size - 1 - np.indices((size,) * 3).max(0))
    labels = (edge % 2 == 0).astype(np.uint8)
    labels[size // 2, size // 2, : size // 2 - 1] = 0
    return labels


HARD = {
    "snake": snake((5, 9, 21)),
    "snake of odd ends": snake((7, 6, 4)),
    "spiral": spiral(21),
    "spiral across planes": np.repeat(spiral(15), 3, axis=0).transpose(1, 0, 2),
    "comb": comb((3, 17, 23)),
    "checkers": checkers((5, 6, 7)),
    "checkers in a slice": checkers((1, 7, 8)),
    "bridge": bridge((6, 7, 12)),
    "shells": shells(11),
    "isolated": np.pad(np.ones((1, 1, 1), np.uint8), 1)[np.ix_(*[np.arange(9) % 2] * 3)],
    "full": np.ones((7, 5, 6), np.uint8),
    "empty": np.zeros((3, 4, 5), np.uint8),
    "one voxel": np.ones((1, 1, 1), np.uint8),
    "column": noise((17, 1, 1), 0.6, 0),
    "row": noise((1, 1, 40), 0.7, 1),
    "noise at the percolation threshold": noise((15, 16, 17), 0.1, 2, values=2),
    "dense noise": noise((15, 16, 17), 0.8, 3),
}
hard = pytest.mark.parametrize("labels", HARD.values(), ids=HARD)


@pytest.mark.parametrize("path", [HARD["snake"], HARD["spiral"]], ids=["snake", "spiral"])
def test_the_paths_are_single_and_thin(path):
    assert ndimage.label(path, np.ones((3, 3, 3)))[1] == 1
    # no two neighbours across its axes are both taken: a way round would need them
    assert not (path[:, 1:, 1:] & path[:, :-1, 1:] & path[:, 1:, :-1] & path[:, :-1, :-1]).any()


@hard
def test_hard_shapes(labels):
    assert_equal_everywhere(labels, RULES)
    assert_equal_everywhere(labels, [Rule((1,), 2), Rule((1, 2))], value=2)
    inverted = (labels == 0).astype(np.uint8)
    assert_equal_everywhere(inverted, [Rule((1,))])


@given(shapes, st.sampled_from([0.05, 0.15, 0.3, 0.6, 0.9]), st.integers(2, 8), st.sampled_from([np.uint8, np.uint16]), st.integers(0, 999))
def test_noise(shape, density, values, dtype, seed):
    assert_equal_everywhere(noise(shape, density, seed, values, dtype), RULES)


@given(shapes, st.floats(0.5, 0.95), st.integers(0, 999))
def test_holes_in_dense_labels(shape, density, seed):
    rng = np.random.default_rng(seed)
    # mostly walls, and in what they enclose other labels as well as background
    labels = np.where(rng.random(shape) < density, 1, rng.choice([0, 0, 0, 2], shape)).astype(np.uint8)
    expected = expected_holes(labels, 1)
    np.testing.assert_array_equal(to_host(fill_holes(to_device(labels, "simulated"), 1)), expected)
    np.testing.assert_array_equal(fill_holes(labels, 1), expected)


@given(shapes, st.integers(1, 6), st.integers(0, 99))
def test_every_size_is_counted(shape, minimum, seed):
    labels = noise(shape, 0.35, seed, values=3)
    expected = reference.keep_components(labels, (1,), lambda sizes: sizes >= minimum)
    np.testing.assert_array_equal(to_host(drop_small(to_device(labels, "simulated"), (1,), minimum)), expected)


@pytest.mark.parametrize("value", [1, 255, 256, 4000, 65535])
def test_large_label_values(value):
    labels = (noise((4, 5, 6), 0.4, 5, values=2).astype(np.uint16) * value).astype(np.uint16)
    assert_equal_everywhere(labels, [Rule((value,))], value=value)


def test_values_that_the_dtype_cannot_hold_are_nowhere():
    labels = noise((4, 5, 6), 0.4, 5)
    assert_equal_everywhere(labels, [Rule((300,)), Rule((1, 257), 3)])
    for value in (-1, 0, 300):
        np.testing.assert_array_equal(to_host(fill_holes(to_device(labels, "simulated"), value)), fill_holes(labels, value))


@pytest.mark.parametrize("minimum", [-1, 0, 1, 10**12])
def test_any_minimum(minimum):
    assert_equal_everywhere(noise((4, 5, 6), 0.3, 6), [Rule((1, 2), minimum)])


def test_ties_for_largest_all_stay():
    labels = np.array([[[1, 1, 0, 2, 2, 0, 1]]], np.uint8)
    kept = keep_largest(to_device(labels, "simulated"), (1, 2))
    np.testing.assert_array_equal(to_host(kept), [[[1, 1, 0, 2, 2, 0, 0]]])


@given(shapes, st.integers(0, 99))
def test_arrays_that_are_not_contiguous(shape, seed):
    labels = noise([2 * n for n in shape], 0.4, seed)
    device = to_device(labels, "simulated").transpose(2, 0, 1)[::2, :, 1::2]
    host = labels.transpose(2, 0, 1)[::2, :, 1::2]
    np.testing.assert_array_equal(to_host(keep_components(device, RULES)), expected_rules(host, RULES))
    np.testing.assert_array_equal(to_host(fill_holes(device, 2)), expected_holes(host, 2))


# ------------------------------------------------------------------ the labelling itself
@hard
def test_root_is_the_first_voxel_and_its_slot_holds_the_size(labels):
    with recording() as launches:
        keep_components(to_device(labels, "simulated"), [Rule((value,), 1) for value in range(1, 7)])
    (found,) = (dict(zip(one.kernel.parameters, one.arguments, strict=True)) for one in launches if one.kernel.name == "count_voxels")
    parent, sizes = to_host(found["parent"]), to_host(found["sizes"])
    expected = np.zeros(parent.shape, np.int64)
    for value in range(1, 7):
        components, count = ndimage.label(labels == value, np.ones((3, 3, 3)))
        for component in range(1, count + 1):
            voxels = np.flatnonzero(components == component)
            expected[voxels[0] + 1] = len(voxels)
            assert parent[voxels[0] + 1] == voxels[0] + 1
    np.testing.assert_array_equal(sizes, expected)


@pytest.mark.parametrize(("six", "neighbours"), [(0, np.ones((3, 3, 3))), (1, ndimage.generate_binary_structure(3, 1))])
def test_components_inside_every_possible_block(six, neighbours):
    part_of = plain(forest.part_of, lanes_of=plain(forest.lanes_of), lane_group=plain(forest.lane_group))
    for bits in range(1, 256):
        taken = np.array([bits >> lane & 1 for lane in range(8)])
        components, _ = ndimage.label(taken.reshape(2, 2, 2), neighbours)
        word = sum((200 << 8 * lane) * int(taken[lane]) for lane in range(8))
        for lane in np.flatnonzero(taken):
            same = components.ravel() == components.ravel()[lane]
            assert part_of(word, int(lane), six) == sum(1 << int(other) for other in np.flatnonzero(same))


def test_lanes_are_counted():
    assert [plain(forest.count_lanes)(bits) for bits in range(256)] == [bits.bit_count() for bits in range(256)]


# ------------------------------------------------------------------ passes
def passes(rules):
    with recording() as launches:
        keep_components(to_device(noise((3, 3, 3), 0.5, 0), "simulated"), rules)
    return sum(one.kernel.name == "join_corners" for one in launches)


def test_rules_without_a_common_value_share_one_labelling():
    assert passes(RULES) == 1
    assert passes([]) == 0
    assert passes([Rule((1,)), Rule((1, 2))]) == 2
    assert passes([Rule((1,)), Rule((2,)), Rule((0, 3))]) == 2  # what the first two cleared are zeros now
    assert passes([Rule((0, 3)), Rule((1,), 4)]) == 1
    assert passes([Rule((value,), 2) for value in range(1, 300)]) == 2


@given(
    shapes,
    st.lists(st.tuples(st.sets(st.integers(0, 4), min_size=1), st.one_of(st.none(), st.integers(0, 5))), max_size=4),
    st.integers(0, 99),
)
def test_any_rules_in_their_order(shape, rules, seed):
    labels = noise(shape, 0.5, seed, values=5)
    rules = [Rule(tuple(values), minimum) for values, minimum in rules]
    np.testing.assert_array_equal(to_host(keep_components(to_device(labels, "simulated"), rules)), expected_rules(labels, rules))


def test_more_groups_than_a_byte_counts():
    labels = np.arange(1, 1201, dtype=np.uint16).reshape(10, 10, 12)
    labels[::2, ::2] = 7
    rules = [Rule((value,), 2) for value in range(1, 600)]
    np.testing.assert_array_equal(to_host(keep_components(to_device(labels, "simulated"), rules)), expected_rules(labels, rules))


STEPS = [
    [],
    [KeepLargest(values=(1,)), DropSmall(values=(2, 3), minimum_mm3=4.0), FillHoles(value=1), FillHoles(value=4)],
    [FillHoles(value=2), KeepLargest(values=(1, 2)), KeepLargest(values=(2,)), DropSmall(values=(5,), minimum_mm3=2.1)],
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", [(6, 7, 8), (1, 12, 13)])
def test_steps_of_a_spec(steps, shape):
    labels = noise(shape, 0.6, 8)
    result = postprocess(to_device(labels, "simulated"), steps, voxel_mm3=1.5)
    np.testing.assert_array_equal(to_host(result), postprocess(labels, steps, voxel_mm3=1.5))


# ------------------------------------------------------------------ refusals
def test_other_dtypes_are_refused():
    with pytest.raises(InputError, match="uint8 or uint16, got int32"):
        keep_largest(to_device(np.zeros((2, 2, 2), np.int32), "simulated"), (1,))


@pytest.mark.parametrize("call", [lambda labels: keep_largest(labels, (1,)), lambda labels: fill_holes(labels, 1)])
def test_more_voxels_than_32_bits_count_are_refused_before_memory_is_taken(call):
    huge = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (2047, 1024, 1025)).view(Simulated)
    with pytest.raises(InputError, match="2148531200 voxels"):
        call(huge)


# ------------------------------------------------------------------ any order of threads
ORDERS = {"backwards": -1, "scattered": 7919}
ORDERED = """
def ordered(wanted, deep, high, wide, {parameters}):
    count = deep * high * wide
    step = wanted % count
    while gcd(step, count) > 1:
        step += 1
    thread = count // 3
    for _ in range(count):
        thread = (thread + step) % count
        body(thread // (high * wide), thread // wide % high, thread % wide, {parameters})
"""


@njit
def gcd(a, b):
    while b:
        a, b = b, a % b
    return a


@functools.cache
def ordered(kernel):
    """The kernel's threads one after the other in another order, which is told first."""
    names = {"body": njit(launch._bound(kernel.body, "loop")), "gcd": gcd}
    exec(ORDERED.format(parameters=", ".join(kernel.parameters)), names)
    return njit(names["ordered"])


@pytest.mark.parametrize("step", ORDERS.values(), ids=ORDERS)
def test_the_order_of_threads_changes_no_byte(monkeypatch, step):
    expected = [
        (labels, to_host(keep_components(to_device(labels, "simulated"), RULES)), to_host(fill_holes(to_device(labels, "simulated"), 1)))
        for labels in HARD.values()
    ]
    monkeypatch.setattr(ThreadKernel, "loop", property(lambda kernel: functools.partial(ordered(kernel), step)))
    for labels, kept, filled in expected:
        np.testing.assert_array_equal(to_host(keep_components(to_device(labels, "simulated"), RULES)), kept)
        np.testing.assert_array_equal(to_host(fill_holes(to_device(labels, "simulated"), 1)), filled)


@pytest.fixture
def eager_switches():
    """Python's threads give way after every few instructions, so that the simulator's interleave."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


SIMULATED = {
    "noise": noise((4, 16, 40), 0.3, 1),
    "full": np.ones((2, 14, 62), np.uint8),
    "snake": snake((3, 11, 33)),
    "slice": noise((1, 15, 31), 0.7, 2, values=3),
    "comb": comb((1, 16, 48)),
    "column": noise((9, 1, 1), 0.6, 0),
    "ties": np.array([[[1, 1, 0, 3, 3, 0, 1], [0] * 7, [5, 0, 5, 0, 6, 6, 0], [0] * 7, [300, 300, 300, 2, 2, 2, 300]]], np.uint16),
}


@pytest.mark.parametrize("labels", SIMULATED.values(), ids=SIMULATED)
@pytest.mark.usefixtures("eager_switches")
def test_under_the_cuda_simulator(labels):
    device = to_device(labels, "simulated")
    with cuda_simulator():
        kept, filled = keep_components(device, RULES), fill_holes(device, 1)
    np.testing.assert_array_equal(to_host(kept), expected_rules(labels, RULES))
    np.testing.assert_array_equal(to_host(filled), expected_holes(labels, 1))


@settings(max_examples=5)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from([0.3, 0.6, 0.9]), st.sampled_from([np.uint8, np.uint16]), st.integers(0, 99))
def test_any_shape_under_the_cuda_simulator(shape, density, dtype, seed):
    labels = noise([n + 1 for n in shape], density, seed, values=4, dtype=dtype)
    labels, device = (a.transpose(2, 0, 1)[1:, :-1, 1:] for a in (labels, to_device(labels, "simulated")))
    with cuda_simulator():
        kept, filled = keep_components(device, RULES), fill_holes(device, 1)
    np.testing.assert_array_equal(to_host(kept), expected_rules(labels, RULES))
    np.testing.assert_array_equal(to_host(filled), expected_holes(labels, 1))


# ------------------------------------------------------------------ the forest under any interleaving
class Turns:
    """Threads that run one at a time; which one goes on is drawn anew at every access to memory."""

    def __init__(self, rng):
        self.rng, self.ready = rng, {}

    def run(self, jobs):
        threads = [threading.Thread(target=self._run, args=(job,)) for job in jobs]
        self.changed = threading.Condition()
        self.turn, self.left = None, len(jobs)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
            assert not thread.is_alive(), "the threads do not come to an end"

    def _run(self, job):
        self.give_way()
        job()
        with self.changed:
            self.left -= 1
            self._draw()

    def give_way(self):
        me = threading.get_ident()
        with self.changed:
            self.ready[me] = True
            self._draw()
            self.changed.wait_for(lambda: self.turn == me)
            self.turn = None
            del self.ready[me]

    def _draw(self):
        if len(self.ready) == self.left and self.ready:
            self.turn = self.rng.choice(list(self.ready))
            self.changed.notify_all()


class Memory:
    """Global memory as CUDA promises it: a plain read may give any value its place had, an atomic sees the newest."""

    def __init__(self, size, turns, rng, *, stale):
        self.past = [[value] for value in range(size)]
        self.turns, self.rng, self.stale = turns, rng, stale

    def __getitem__(self, index):
        self.turns.give_way()
        return self.rng.choice(self.past[index]) if self.stale else self.past[index][-1]

    def __setitem__(self, index, value):
        self.turns.give_way()
        self.past[index].append(value)

    def minimum(self, index, value):
        self.turns.give_way()
        old = self.past[index][-1]
        self.past[index].append(min(old, value))
        return old


def plain(function, **names):
    """The Python function of a scalar, with other functions under the names it calls."""
    inner = function.functions["cuda"]
    return FunctionType(inner.__code__, {**inner.__globals__, **names})


@given(st.integers(2, 7), st.integers(1, 5), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=300)
def test_joins_that_interleave_in_any_way_with_old_reads_lose_nothing(nodes, threads, stale, seed):
    rng = random.Random(seed)
    turns = Turns(rng)
    parent = Memory(nodes, turns, rng, stale=stale)
    join = plain(forest.join, root_of=plain(forest.root_of), atomic_min=lambda memory, index, value: memory.minimum(index, value))
    edges = [[(rng.randrange(nodes), rng.randrange(nodes)) for _ in range(rng.randint(1, 3))] for _ in range(threads)]
    turns.run([functools.partial(lambda own: [join(parent, a, b) for a, b in own], own) for own in edges])
    expected = np.eye(nodes, dtype=bool)
    for a, b in (edge for own in edges for edge in own):
        expected[a, b] = expected[b, a] = True
    for _ in range(nodes):
        expected = (expected.astype(int) @ expected.astype(int)) > 0
    final = [past[-1] for past in parent.past]
    roots = [plain(forest.top_of)(final, node) for node in range(nodes)]
    assert roots == [int(np.flatnonzero(row)[0]) for row in expected]


# ------------------------------------------------------------------ the cache of compiled kernels
def test_a_kernel_is_compiled_again_when_what_it_calls_has_changed():
    def body(z, y, x, out):
        out[z, y, x] = inner(x)  # noqa: F821

    def kernel(inner):
        return ThreadKernel(FunctionType(body.__code__, {"inner": launch.scalar(inner)}, "body"), float64=False)

    names = [kernel(inner).source_function("loop").__qualname__ for inner in (lambda x: x + 1, lambda x: x + 1, lambda x: x + 2)]
    assert names[0] == names[1] != names[2]
