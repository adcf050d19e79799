"""Engines made of engines: an engine of the host for a device, and one batch over several engines."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from factories import CountingEngine, nearest, nearest_engine
from hypothesis import given
from hypothesis import strategies as st

from segrt.arrays import FloatArray
from segrt.device import Simulated, to_device, to_host
from segrt.engines.batches import at_most
from segrt.engines.compose import Hosted, Spread
from segrt.engines.function import FunctionEngine
from segrt.errors import BackendError


def patches_of(count: int) -> FloatArray:
    return np.random.default_rng(count).normal(size=(count, 1, 2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_function_runs_on_host_memory_wherever_the_pipeline_is(device: str) -> None:
    seen = []

    def function(patches: FloatArray) -> FloatArray:
        seen.append(type(patches))
        return nearest((0, 1))(patches)

    engine = FunctionEngine(function, device=device)
    logits = engine(to_device(patches_of(3), device))
    assert engine.device == device
    assert isinstance(logits, Simulated) == (device == "simulated")
    assert seen == [np.ndarray]
    assert (to_host(logits) == nearest((0, 1))(patches_of(3))).all()


def test_an_engine_of_the_host_serves_a_device() -> None:
    inner = CountingEngine(nearest((0, 1)), batch=4)
    inner.held_bytes = 9
    engine = Hosted(inner, "simulated")
    patches = to_device(patches_of(2), "simulated")
    logits = engine(patches)
    assert isinstance(logits, Simulated)
    assert (to_host(logits) == inner(patches_of(2))).all()
    assert (engine.name, engine.batch, engine.held_bytes, engine.device) == ("function, for simulated", 4, 9, "simulated")
    engine.close()
    assert inner.closed == 1


@given(
    count=st.integers(1, 12),
    engines=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["cpu", "simulated"])), min_size=1, max_size=4),
)
def test_several_engines_give_the_bytes_of_one(count: int, engines: list[tuple[int, str]]) -> None:
    counting = [CountingEngine(nearest((0, 1, 2)), batch=batch, device=device) for batch, device in engines]
    spread = Spread(counting)
    logits = spread(to_device(patches_of(count), spread.device))
    assert isinstance(logits, Simulated) == (engines[0][1] == "simulated")
    assert to_host(logits).tobytes() == nearest_engine((0, 1, 2))(patches_of(count)).tobytes()
    assert spread.batch == sum(batch for batch, _ in engines)
    assert all(max(engine.calls, default=0) <= engine.batch for engine in counting)
    spread.close()


def test_a_batch_is_shared_out_and_the_patches_stay_as_they_are() -> None:
    engines = [CountingEngine(nearest((0, 1)), batch=batch) for batch in (2, 3)]
    spread = Spread(engines)
    patches = patches_of(12)
    before = patches.copy()
    spread(patches)
    assert [engine.calls for engine in engines] == [[2, 2, 2], [3, 3]]
    assert (patches == before).all()
    spread.close()
    assert [engine.closed for engine in engines] == [1, 1]


def test_engines_run_at_the_same_time_each_in_a_thread_of_its_own() -> None:
    together = threading.Barrier(2, timeout=10)
    threads: list[set[int]] = [set(), set()]

    def waits_for_the_other(number: int) -> FunctionEngine:
        def function(patches: FloatArray) -> FloatArray:
            threads[number].add(threading.get_ident())
            together.wait()
            return patches

        return FunctionEngine(function)

    spread = Spread([waits_for_the_other(0), waits_for_the_other(1)])
    for _ in range(3):
        spread(patches_of(4))
    assert [len(found) for found in threads] == [1, 1]
    assert threads[0] != threads[1]
    spread.close()


@pytest.mark.parametrize("error", [MemoryError("no room"), BackendError("broken")])
def test_an_error_of_one_engine_reaches_the_caller_when_all_have_stopped(error: Exception) -> None:
    def fails(patches: FloatArray) -> FloatArray:
        raise error

    good = CountingEngine(nearest((0, 1)))
    spread = Spread([good, FunctionEngine(fails)])
    with pytest.raises(type(error), match=str(error)):
        spread(patches_of(4))
    assert good.calls == [1, 1]
    spread.close()


def test_a_batch_that_an_engine_halved_is_known() -> None:
    class Shrinking(FunctionEngine):
        def __call__(self, patches: FloatArray) -> FloatArray:
            if len(patches) > 2:
                self.batch = 2
                raise MemoryError
            return super().__call__(patches)

    spread = Spread([Shrinking(nearest((0, 1)), batch=4), nearest_engine((0, 1), batch=4)])
    assert spread.batch == 8
    with pytest.raises(MemoryError):
        spread(patches_of(8))
    assert spread.batch == 6
    assert (spread(patches_of(6)) == nearest_engine((0, 1))(patches_of(6))).all()
    spread.close()


def test_memory_is_the_sum_or_unknown() -> None:
    engines = [nearest_engine(), nearest_engine()]
    engines[0].held_bytes = 3
    assert Spread(engines).held_bytes == 0
    engines[1].held_bytes = 4
    spread = Spread(engines)
    assert (spread.held_bytes, spread.name) == (7, "function + function")


def test_a_limit_over_unequal_engines_leaves_each_its_own_batch() -> None:
    engines = [nearest_engine((0, 1), batch=8), nearest_engine((0, 1), batch=4)]
    spread = Spread(engines)
    with at_most(spread, 1):
        assert [engine.batch for engine in engines] == [1, 1]
    assert [engine.batch for engine in engines] == [8, 4]
    spread.close()


def test_limits_of_calls_that_overlap_hold_until_the_last_is_over() -> None:
    """Calls of several threads end in any order."""
    engine = nearest_engine((0, 1), batch=4)
    first, second = at_most(engine, 2), at_most(engine, 1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert engine.batch == 1
    second.__exit__(None, None, None)
    assert engine.batch == 4


def test_a_batch_that_did_not_fit_stays_smaller_after_a_limit() -> None:
    engine = nearest_engine((0, 1), batch=8)
    with at_most(engine, 4):
        engine.batch = 2
    assert engine.batch == 2
