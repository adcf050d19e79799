"""The sliding-window loop: what goes in comes out, batches, folds, shared windows, float16."""

from __future__ import annotations

import tracemalloc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from factories import CountingEngine, make_spec, nearest_engine
from scipy.ndimage import gaussian_filter

from segrt.arrays import Array, FloatArray, Shape3
from segrt.device import to_device, to_host
from segrt.engines.batches import smaller_batch_after_memory_error
from segrt.engines.compose import Mirrored
from segrt.engines.function import FunctionEngine
from segrt.errors import BackendError
from segrt.infer import infer
from segrt.windows import plan_windows


def noise(shape: Shape3, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


def same(patches: FloatArray) -> FloatArray:
    """Logits that are the image itself."""
    return patches


def run(*args: Any, **options: Any) -> SimpleNamespace:
    """All logits, the windows planned, and those that were shared."""
    inferred = infer(*args, **options)
    logits = inferred.whole()
    return SimpleNamespace(logits=logits, windows=inferred.windows, shared=inferred.shared)


IDENTITY = {"values": (1,)}


@pytest.mark.parametrize("shape", [(20, 17, 9), (8, 8, 8), (3, 20, 5), (1, 1, 1)])
@pytest.mark.parametrize("blending", ["gaussian", "uniform"])
@pytest.mark.parametrize("step", [0.3, 0.5, 1.0])
def test_an_identity_network_gives_the_image_back(shape: Shape3, blending: str, step: float) -> None:
    data = noise(shape)
    result = run(data, [FunctionEngine(same)], make_spec(blending=blending, **IDENTITY), step=step)
    assert result.logits.shape == data.shape
    assert np.allclose(result.logits, data, atol=1e-5)


def test_a_2d_model_runs_over_slices_in_batches() -> None:
    data = noise((7, 16, 16))
    engine = CountingEngine(same, batch=3)
    result = run(data, [engine], make_spec(patch=(1, 16, 16), **IDENTITY))
    assert engine.calls == [3, 3, 1]
    assert np.allclose(result.logits, data, atol=1e-6)


def test_the_data_is_not_modified() -> None:
    data = noise((9, 9, 9))
    before = data.copy()
    run(data, [FunctionEngine(same)], make_spec(**IDENTITY))
    assert (data == before).all()


def test_folds_are_averaged() -> None:
    data = noise((10, 9, 12))
    engines = [FunctionEngine(lambda p, k=k: k * p) for k in (1, 2, 6)]
    assert np.allclose(run(data, engines, make_spec(**IDENTITY)).logits, 3 * data, atol=1e-4)


def test_progress_counts_every_window_of_every_fold() -> None:
    seen: list[tuple[int, int]] = []
    engines = [FunctionEngine(same), FunctionEngine(same)]
    run(noise((8, 8, 16)), engines, make_spec(**IDENTITY), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 6) for k in range(1, 7)]


def test_constant_windows_share_one_call_exactly() -> None:
    data = np.full((1, 8, 8, 40), -1.5, np.float32)
    data[..., 33:] = noise((8, 8, 7))
    spec = make_spec(**IDENTITY)
    engine = CountingEngine(lambda p: p * 2)
    result = run(data, [engine], spec)
    alone = run(data, [FunctionEngine(lambda p: p * 2)], spec)
    constant = sum(start[2] + 8 <= 33 for start in plan_windows((8, 8, 40), spec.inference).starts)
    assert len(engine.calls) == result.windows - constant + 1
    assert result.shared == constant - 1
    assert (result.logits == alone.logits).all()
    assert np.allclose(result.logits, 2 * data, atol=1e-5)


def test_windows_of_different_constants_are_not_confused() -> None:
    data = np.zeros((1, 8, 8, 40), np.float32)
    data[..., 20:] = 3
    engine = CountingEngine(lambda p: p + 1)
    result = run(data, [engine], make_spec(step=1.0, **IDENTITY))
    assert np.allclose(result.logits, data + 1)
    assert sum(engine.calls) < result.windows


def test_constant_windows_are_told_apart_by_every_channel_and_fold() -> None:
    data = np.zeros((2, 8, 8, 32), np.float32)
    data[1, ..., 16:] = 2
    spec = make_spec(step=1.0, channels=make_spec().channels * 2, **IDENTITY)
    engines = [FunctionEngine(lambda p: p[:, 1:]), FunctionEngine(lambda p: p[:, 1:] * 3)]
    assert np.allclose(run(data, engines, spec).logits[0], 2 * data[1])


def test_a_batch_may_mix_constant_and_other_windows() -> None:
    data = noise((6, 16, 16))
    data[:, 1] = data[:, 4] = 0.25
    engine = CountingEngine(same, batch=4)
    result = run(data, [engine], make_spec(patch=(1, 16, 16), **IDENTITY))
    assert np.allclose(result.logits, data, atol=1e-6)
    assert sum(engine.calls) == 5
    assert result.shared == 1


def _gaussian16(patch: Shape3) -> Array:
    """golden/README.md 2: the delta at patch // 2, sigma an eighth, scaled to 10, float16, zeros -> the smallest other value."""
    weights = np.zeros(patch)
    weights[tuple(n // 2 for n in patch)] = 1
    weights = gaussian_filter(weights, [n / 8 for n in patch], 0, mode="constant", cval=0)
    half = (weights / (weights.max() / 10)).astype(np.float32).astype(np.float16)
    half[half == 0] = half[half != 0].min()
    return half


def _nnunet_half(data: FloatArray, functions: list[object], patch: Shape3, starts: list[Shape3]) -> Array:
    """golden/README.md 2, one line after the other."""
    folds = []
    g = _gaussian16(patch)
    for function in functions:
        acc, n = np.zeros(data.shape, np.float16), np.zeros(data.shape[1:], np.float16)
        for start in starts:
            box = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
            pred = function(data[None, :, *box])[0]  # type: ignore[operator]
            acc[:, *box] = (acc[:, *box].astype(np.float32) + pred * g.astype(np.float32)).astype(np.float16)
            n[box] = (n[box].astype(np.float32) + g.astype(np.float32)).astype(np.float16)
        folds.append((acc.astype(np.float32) / n.astype(np.float32)).astype(np.float16))
    total = folds[0]
    for fold in folds[1:]:
        total = (total.astype(np.float32) + fold.astype(np.float32)).astype(np.float16)
    return total if len(folds) == 1 else (total.astype(np.float32) / len(folds)).astype(np.float16)


@pytest.mark.parametrize("folds", [1, 2, 3])
@pytest.mark.parametrize(("shape", "patch"), [((21, 18, 30), (12, 8, 16)), ((4, 20, 33), (1, 16, 16))])
def test_float16_accumulation_is_nnunets_bit_by_bit(folds: int, shape: Shape3, patch: Shape3) -> None:
    data = noise(shape) * 7
    functions = [lambda p, k=k: np.sin(p * (k + 1)).astype(np.float32) * 9 for k in range(folds)]
    spec = make_spec(patch=patch, **IDENTITY)
    found = run(data, [FunctionEngine(f) for f in functions], spec, accumulate="float16").logits
    expected = _nnunet_half(data, functions, patch, plan_windows(shape, spec.inference).starts)
    assert found.dtype == np.float16
    assert (found.view(np.uint16) == expected.view(np.uint16)).all()


def test_float16_accumulation_of_a_padded_image() -> None:
    data = noise((5, 20, 6))
    result = run(data, [nearest_engine((0, 1))], make_spec(values=(0, 1)), accumulate="float16")
    assert result.logits.shape == (2, 5, 20, 6)


def test_float16_folds_are_summed_as_they_come() -> None:
    """Two folds' sums at a time, whatever their number: the memory estimate counts on it."""
    spec = make_spec(values=range(16), patch=(8, 32, 32), step=1)
    data = np.random.default_rng(0).normal(size=(1, 32, 64, 64)).astype(np.float32)
    one_fold = 16 * data.size * 2
    tracemalloc.start()
    try:
        run(data, [nearest_engine(range(16))] * 5, spec, accumulate="float16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.9 * one_fold


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("starts", [1, 2, 5])
@pytest.mark.parametrize(
    ("shape", "patch"), [((37, 9, 12), (8, 8, 8)), ((5, 20, 6), (8, 8, 8)), ((11, 16, 20), (1, 16, 16)), ((9, 4, 4), (8, 8, 8))]
)
def test_slabs_together_are_the_whole(shape: Shape3, patch: Shape3, starts: int, device: str) -> None:
    data = noise(shape)
    data[:, : shape[0] // 3] = 0.5  # constant windows too
    spec = make_spec(patch=patch, **IDENTITY)
    whole = run(data, [FunctionEngine(np.sin)], spec).logits
    seen = np.full(shape, np.nan, np.float32)
    ready = 0
    for planes in infer(to_device(data, device), [FunctionEngine(np.sin, device=device)], spec, starts_per_slab=starts):
        logits = to_host(planes.logits)[0]
        assert planes.first <= max(ready - 1, 0), "the plane before the first that is not final is still there"
        seen[ready : planes.ready] = logits[ready - planes.first : planes.ready - planes.first]
        assert (logits[max(ready - 1, 0) - planes.first] == seen[max(ready - 1, 0)]).all()
        ready = planes.ready
    assert ready == shape[0]
    # windows of one value may come in another place of the sum
    assert np.allclose(seen, whole[0], atol=1e-6)


@pytest.mark.parametrize("axes", [(), (2,), (0, 1), (0, 1, 2)])
def test_flips_in_a_devices_batch_are_the_mirrored_engine(axes: tuple[int, ...]) -> None:
    def ramp(patches: FloatArray) -> FloatArray:
        return patches * np.arange(patches.size // len(patches), dtype=np.float32).reshape(patches.shape[1:])

    data, spec = noise((12, 9, 20)), make_spec(**IDENTITY)
    data[..., :9] = 2
    expected = run(data, [Mirrored(FunctionEngine(ramp), axes)] if axes else [FunctionEngine(ramp)], spec)
    engine = FunctionEngine(ramp, batch=3, device="simulated")
    seen: list[tuple[int, int]] = []
    found = run(to_device(data, "simulated"), [engine], spec, mirror_axes=axes, progress=lambda done, total: seen.append((done, total)))
    assert np.allclose(to_host(found.logits), expected.logits, rtol=1e-5, atol=1e-4)
    assert (found.windows, found.shared) == (expected.windows, expected.shared)
    assert seen[-1] == (expected.windows, expected.windows)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_batch_that_does_not_fit_is_divided(device: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def small(patches: FloatArray) -> FloatArray:
        calls.append(len(patches))
        if len(patches) > 2:
            raise MemoryError("out of memory")
        return patches * 2

    data, spec = noise((8, 16, 24)), make_spec(**IDENTITY)
    engines = [FunctionEngine(small, batch=8, device=device), FunctionEngine(lambda p: p * 4, batch=8, device=device)]
    found = run(to_device(data, device), engines, spec)
    assert np.allclose(to_host(found.logits), 3 * data, atol=1e-5)
    assert calls[:3] == [8, 4, 2]
    assert set(calls[3:]) <= {1, 2}, "what did not fit once is not tried again"
    assert "do not fit" in caplog.text


def test_a_window_that_does_not_fit_is_a_sentence() -> None:
    def never(patches: FloatArray) -> FloatArray:
        raise MemoryError("CUDA out of memory")

    with pytest.raises(BackendError, match="memory of simulated does not hold one window"):
        run(to_device(noise((8, 8, 8)), "simulated"), [FunctionEngine(never, batch=4, device="simulated")], make_spec(**IDENTITY))
    with pytest.raises(MemoryError):
        run(noise((8, 8, 8)), [FunctionEngine(never, batch=4)], make_spec(**IDENTITY))


class FillsUp(FunctionEngine):
    """Computes its batch whatever the call holds, as engines of a GPU do; more than `most` windows at once do not fit."""

    def __init__(self, most: int, batch: int) -> None:
        super().__init__(same, batch=batch, device="simulated")
        self.most = most

    def __call__(self, patches: FloatArray) -> FloatArray:
        with smaller_batch_after_memory_error(self):
            if self.batch > self.most:
                raise MemoryError("out of memory")
            return super().__call__(patches)


@pytest.mark.parametrize("batch", [None, 8, 1])
@pytest.mark.parametrize("windows", [1, 2, 3])
def test_fewer_windows_than_the_engines_batch_are_no_reason_to_give_up(batch: int | None, windows: int) -> None:
    data, spec = noise((8, 8, 8 + 4 * (windows - 1))), make_spec(**IDENTITY)
    engine = FillsUp(most=1, batch=16)
    found = run(to_device(data, "simulated"), [engine], spec, batch=batch)
    assert found.windows == windows
    assert np.allclose(to_host(found.logits), data, atol=1e-5)
    with pytest.raises(BackendError, match="memory of simulated does not hold one window"):
        run(to_device(data, "simulated"), [FillsUp(most=0, batch=16)], spec, batch=batch)


def test_logits_of_a_batch_are_gone_before_the_next_are_made() -> None:
    made: list[weakref.ref[Array]] = []
    alive: list[int] = []

    class Watched(FunctionEngine):
        def __call__(self, patches: FloatArray) -> FloatArray:
            alive.append(sum(logits() is not None for logits in made))
            logits = super().__call__(patches)
            made.append(weakref.ref(logits))
            return logits

    infer(noise((24, 8, 8)), [Watched(np.sin)], make_spec(**IDENTITY)).whole()
    assert alive == [0] * 5
