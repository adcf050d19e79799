"""PREDICT, middle stage: the sliding-window loop from the working array to blended logits, whole or slab by slab."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, combinations, groupby

import numpy as np

from .arrays import Array, FloatArray, ProgressFn
from .engines import Engine
from .engines.batches import at_most, too_large
from .kernels.blend import constant_windows, gather_windows
from .spec import ModelSpec
from .windows import Accumulate, Aggregator, HalfAggregator, Planes, Slab, WindowPlan, plan_slabs, plan_windows

logger = logging.getLogger(__name__)


class Inferred:
    """The window loop of one case: it runs while its planes are iterated over; `windows` and, of these, `shared` because constant."""

    def __init__(self, planes: Iterator[Planes], loop: _Loop) -> None:
        self._planes, self._loop = planes, loop
        self.windows = len(loop.plan)

    def __iter__(self) -> Iterator[Planes]:
        """Run slab after slab; each one's logits are valid until the next is asked for."""
        return self._planes

    @property
    def shared(self) -> int:
        """Windows that were given another one's logits because both hold the same single value."""
        return self._loop.shared

    def whole(self) -> Array:
        """Run to the end and give all logits (K, Z, Y, X); only without slabs."""
        (planes,) = self._planes
        return planes.logits


def infer(
    data: FloatArray,
    engines: Sequence[Engine],
    spec: ModelSpec,
    *,
    step: float | None = None,
    accumulate: Accumulate = "float32",
    mirror_axes: Sequence[int] = (),
    batch: int | None = None,
    starts_per_slab: int | None = None,
    progress: ProgressFn | None = None,
) -> Inferred:
    """Run every engine (one per fold) over every window and average.

    Parameters
    ----------
    data : (C, Z, Y, X) float32 from `preprocess`, where the engines want their patches
    step : overrides the spec's window step, as a fraction of the patch
    accumulate : "float32" sums with weights that add up to one; "float16" repeats nnU-Net's rounding, one fold after the other
    mirror_axes : average over all flips of these axes (0 = z), as more windows in the engines' batches
    batch : windows in a call of an engine at most, for want of memory, though an engine may like more; under accumulate="float32"
    starts_per_slab : hold logits only for this many starts along z at a time; all by default
    progress : called with (windows done, windows in all)

    Returns
    -------
    Inferred
        gives logits float32, or float16 under accumulate="float16"

    Raises
    ------
    BackendError, MemoryError
        While it runs, when not even one window fits into the memory of the engines' device, or of the host.
    """
    plan = plan_windows(data.shape[1:], spec.inference, step=step)
    loop = _Loop(data, plan, len(engines), mirror_axes, progress, batch)
    if accumulate == "float16":
        planes = _run_half(loop, engines, spec, data.shape)
    else:
        planes = _run(loop, engines, spec, data, plan_slabs(plan, starts_per_slab))
    return Inferred(planes, loop)


def share_progress(progress: ProgressFn | None, totals: Sequence[int]) -> list[ProgressFn | None]:
    """Make a function for each of several loops of `totals` windows that run in turns; `progress` is told the sums."""
    if progress is None:
        return [None] * len(totals)
    told = [0] * len(totals)

    def tell(number: int, done: int, _: int) -> None:
        told[number] = done
        progress(sum(told), sum(totals))

    return [partial(tell, number) for number in range(len(totals))]


def _run(loop: _Loop, engines: Sequence[Engine], spec: ModelSpec, data: FloatArray, slabs: Sequence[Slab]) -> Iterator[Planes]:
    total = Aggregator(spec.classes, loop.plan, spec.inference.blending, slabs=slabs, like=data)
    low, depth = loop.plan.low[0], data.shape[1]
    y, x = (slice(start, start + n) for start, n in zip(loop.plan.low[1:], data.shape[2:], strict=True))
    for slab in slabs:
        total.move_to(slab)
        for entries, logits in loop.over(slab.entries, engines):
            total.add(logits, entries, loop.share)
            del logits  # as large as the network's own memory, and the next ones are made before this name gets them
        first, last = max(slab.base, low), min(slab.stop, low + depth)
        if first < last:
            yield Planes(total.logits[:, first - slab.base : last - slab.base, y, x], first - low, min(max(slab.ready - low, 0), depth))


class _Loop:
    """Cut windows in their order, run them in batches, and give back their logits."""

    def __init__(
        self,
        data: FloatArray,
        plan: WindowPlan,
        engines: int,
        mirror_axes: Sequence[int],
        progress: ProgressFn | None,
        batch: int | None,
    ) -> None:
        self._data, self.plan, self._progress, self._batch = data, plan, progress, batch
        self._flips = _flips(mirror_axes)
        self._total, self._done = len(plan) * engines, 0
        self._most: dict[int, int] = {}  # engine -> the largest batch that fitted
        self.share = 1 / (engines * len(self._flips))
        self.shared = 0
        starts = np.array(plan.starts, np.int32)
        flags, corners = constant_windows(data, starts, plan.patch, plan.low)
        self._constant = {tuple(start): corner.tobytes() for start, corner in zip(starts[flags].tolist(), corners[flags], strict=True)}
        # engine -> the last constant window's value and logits; one each, for they are as large as a window
        self._known: dict[int, tuple[bytes, Array]] = {}

    def over(self, entries: Array, engines: Sequence[Engine], *, ordered: bool = False) -> Iterator[tuple[Array, Array]]:
        """Yield (entries, logits (N, K, z, y, x) that their sources point into) until every window met every engine.

        Windows of one constant value (air after clipping) share the network's answer, which is exact; unless `ordered`, they come last.
        """
        batch = self._batch or max(engine.batch for engine in engines)
        for constant, group in self._grouped(entries, ordered):
            flipped = self._flip(group)
            for first in range(0, len(flipped), len(flipped) if constant else batch):
                part = flipped[first : first + len(flipped) if constant else first + batch]
                for engine in engines:
                    if constant:
                        yield self._shared(engine, constant, part, count=engine is engines[0])
                    else:
                        yield from self._run(engine, part)
                    self._report(len(part))

    def _grouped(self, entries: Array, ordered: bool) -> Iterator[tuple[bytes, Array]]:
        """Windows of the same constant value, or of none (b""), together."""
        keys = [self._constant.get(tuple(start), b"") for start in entries[:, :3].tolist()]
        order = range(len(keys)) if ordered else sorted(range(len(keys)), key=keys.__getitem__)
        for key, members in groupby(order, key=keys.__getitem__):
            yield key, entries[list(members)]

    def _flip(self, entries: Array) -> Array:
        """Each window with all its flips, next to each other."""
        flipped = np.repeat(entries, len(self._flips), axis=0)
        flipped[:, 3:6] = np.tile(self._flips, (len(entries), 1))
        return flipped

    def _run(self, engine: Engine, entries: Array) -> Iterator[tuple[Array, Array]]:
        """Run a batch; in smaller ones when the device's memory does not hold it."""
        most = self._most.get(id(engine), len(entries))
        first = 0
        while first < len(entries):
            part = entries[first : first + most].copy()
            part[:, 9] = np.arange(len(part))
            batch = engine.batch
            try:
                with at_most(engine, self._batch):
                    logits = engine(gather_windows(self._data, part, self.plan.patch, self.plan.low))
            except MemoryError as err:
                if len(part) == 1 and engine.batch < batch:
                    continue  # it fills a call up to its batch, which is smaller now
                most = self._most[id(engine)] = _fewer(engine, len(part), err)
                continue
            yield part, logits
            del logits
            first += len(part)

    def _shared(self, engine: Engine, value: bytes, entries: Array, *, count: bool) -> tuple[Array, Array]:
        """Logits of windows that hold nothing but `value`: from the last such window, or from the first of these."""
        new = self._known.get(id(engine), (b"",))[0] != value
        if new:
            ((_, made),) = self._run(engine, entries[:1])
            self._known[id(engine)] = value, made
        logits = self._known[id(engine)][1]
        self.shared += (len(entries) // len(self._flips) - new) if count else 0
        return entries, logits

    def _report(self, passes: int) -> None:
        self._done += passes
        if self._progress:
            self._progress(self._done // len(self._flips), self._total)


def _fewer(engine: Engine, count: int, err: MemoryError) -> int:
    """Half as many windows as did not fit."""
    if count == 1 and engine.device == "cpu":
        raise err
    if count == 1:
        raise too_large(engine, err) from err
    logger.warning(
        "%s: %d windows at once do not fit into the memory of %s; going on with %d", engine.name, count, engine.device, count // 2
    )
    return count // 2


def _flips(axes: Sequence[int]) -> Array:
    """(M, 3) int32 of 0 and 1: no flip, single axes, pairs, all; nnU-Net's order."""
    chosen = chain.from_iterable(combinations(sorted(axes), n) for n in range(len(axes) + 1))
    return np.array([[axis in flip for axis in range(3)] for flip in chosen], np.int32)


def _run_half(loop: _Loop, engines: Sequence[Engine], spec: ModelSpec, shape: tuple[int, ...]) -> Iterator[Planes]:
    (slab,) = plan_slabs(loop.plan)
    logits = _average_half((_fold_half(loop, engine, spec, slab) for engine in engines), len(engines))
    z, y, x = (slice(low, low + n) for low, n in zip(loop.plan.low, shape[1:], strict=True))
    yield Planes(logits[:, z, y, x], 0, shape[1])


def _fold_half(loop: _Loop, engine: Engine, spec: ModelSpec, slab: Slab) -> Array:
    total = HalfAggregator(spec.classes, loop.plan, spec.inference.blending)
    # rounding depends on the order of the windows
    for entries, logits in loop.over(slab.entries, [engine], ordered=True):
        for entry in entries:
            total.add(logits[entry[9]], tuple(entry[:3].tolist()))
    return total.finish()


def _average_half(folds: Iterator[Array], count: int) -> Array:
    """nnU-Net's mean over folds: float16 after each sum and after the division; two folds and one class in float32 are held at a time."""
    total = next(folds)
    for fold in folds:
        _add_half(total, fold)
        del fold  # before the next one is made
    if count > 1:
        for channel in total:
            channel[...] = channel.astype(np.float32) / count
    return total


def _add_half(total: Array, fold: Array) -> None:
    for channel, more in zip(total, fold, strict=True):
        channel[...] = channel.astype(np.float32) + more.astype(np.float32)
