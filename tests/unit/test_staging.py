"""Copies between host and GPU through pinned buffers, and what Numba is told of CuPy's arrays; see `gpu_stand_in`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_stand_in import Gpu, instead_of_cupy, running_ahead
from numba import cuda

from segrt import device
from segrt.device import compute_on, open_stream, to_device, to_host
from segrt.errors import InputError
from segrt.kernels._cuda import launch as launching
from segrt.kernels._cuda.launch import cuda_simulator, launch
from segrt.kernels.normalize import clip_shift_scale

needs_simulator = pytest.mark.skipif(not launching.config.ENABLE_CUDASIM, reason="Numba's CUDA simulator is off")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setattr(device, "_STAGE_BYTES", 64)
    return instead_of_cupy(monkeypatch)


# ------------------------------------------------------------------ copies
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, ">i2", np.float16, ">f4", np.float64])
def test_arrays_come_back_as_they_went(gpu: Gpu, dtype: Any, ahead: bool) -> None:
    """Of several stages, of half a stage at the end, of none."""
    whole = np.random.default_rng(0).integers(0, 2, (3, 11, 13)).astype(dtype)
    stream = open_stream("cuda:0")
    with compute_on("cuda:0", stream), running_ahead(*([stream] if ahead else [])):
        for host in (whole, whole.T, whole[::-2, :, 3:], whole[:0], whole[0, 0, 0, ...]):
            there = to_device(host, "cuda:0")
            assert type(there).__module__ == "cupy"
            back = to_host(there)
            assert back.dtype == host.dtype.newbyteorder("=")
            np.testing.assert_array_equal(back, host)
        there = to_device(whole, "cuda:0")
        np.testing.assert_array_equal(to_host(there.transpose(2, 0, 1)[::-1, 1:]), whole.transpose(2, 0, 1)[::-1, 1:])


def test_a_pinned_buffer_goes_back_to_its_pool_when_nothing_reads_it_any_more(gpu: Gpu) -> None:
    host = np.arange(1000, dtype=np.float32)
    stream = open_stream("cuda:0")
    with compute_on("cuda:0", stream):
        there = to_device(host, "cuda:0")
        assert (len(stream.waiting), stream.added) == (0, -(-host.nbytes // 64))
        assert to_host(there) is not None
        assert not stream.waiting
    assert gpu.pinned == [64] * 4, "two buffers each way, whatever the size"


def test_the_device_copies_while_the_host_fills_the_other_buffer(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream("cuda:0")
    behind: list[int] = []
    add = stream.add

    def counted(work: Any) -> None:
        add(work)
        behind.append(len(stream.waiting))

    monkeypatch.setattr(stream, "add", counted)
    with compute_on("cuda:0", stream):
        there = to_device(np.zeros(64 * 6, np.uint8), "cuda:0")
        assert behind == [1, 2, 2, 2, 2, 2]
        behind.clear()
        to_host(there)
        assert behind == [1, 2, 2, 2, 2, 2]


# ------------------------------------------------------------------ kernels
def _doubled(z: int, y: int, x: int, source: Any, more: Any, out: Any) -> None:
    """Twice the value and `more`."""
    out[z, y, x] = source[z, y, x] + source[z, y, x] + more


DOUBLED = launching.thread_kernel()(_doubled)


@pytest.fixture
def numba_sees(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Numba's simulator, which knows no foreign arrays and streams, is shown them; what it was told comes out."""
    told: list[dict[str, Any]] = []

    def seen(described: dict[str, Any], sync: bool) -> Any:
        assert not sync
        told.append(described)
        shape, dtype = described["shape"], np.dtype(described["typestr"])
        strides = described["strides"] or tuple(np.empty(shape, dtype).strides)
        memory = SimpleNamespace(__array_interface__={**described, "strides": strides})
        return cuda.devicearray.FakeCUDAArray(np.asarray(memory))

    monkeypatch.setattr(launching.cuda, "from_cuda_array_interface", seen, raising=False)
    monkeypatch.setattr(launching.cuda, "external_stream", lambda address: address)
    launching._view.cache_clear()
    launching._stream.cache_clear()
    yield told
    launching._view.cache_clear()
    launching._stream.cache_clear()


@needs_simulator
@pytest.mark.parametrize("turned", ["whole", "transposed", "flipped", "every other", "one plane"])
def test_kernels_read_and_write_cupys_arrays_where_and_how_they_lie(gpu: Gpu, numba_sees: list[dict[str, Any]], turned: str) -> None:
    whole = np.random.default_rng(0).integers(-9, 9, (2, 3, 4, 5)).astype(np.int16)
    cut: Any = {
        "whole": lambda a: a,
        "transposed": lambda a: a.transpose(0, 3, 1, 2),
        "flipped": lambda a: a[:, ::-1, :, ::-1],
        "every other": lambda a: a[:, :, ::2, 1::3],
        "one plane": lambda a: a[:, 1:2],
    }[turned]
    with compute_on("cuda:0", open_stream("cuda:0")), cuda_simulator():
        there = cut(to_device(whole, "cuda:0"))[1]
        out = to_device(np.zeros(cut(whole).shape, np.float32), "cuda:0")
        written = out[::-1][0]
        launch(DOUBLED, there.shape, there, np.int32(1), written)
        found = to_host(out)
    np.testing.assert_array_equal(found[-1], 2 * cut(whole)[1] + 1)
    assert not found[:-1].any()
    assert [described["strides"] is None for described in numba_sees] == [there.flags.c_contiguous, True]


@needs_simulator
def test_a_stage_of_the_gpu_gives_what_it_gives_on_the_cpu(gpu: Gpu, numba_sees: list[dict[str, Any]]) -> None:
    image = np.random.default_rng(0).integers(-9, 9, (2, 3, 4, 5)).astype(np.int16)
    with compute_on("cuda:0", open_stream("cuda:0")), cuda_simulator():
        found = to_host(clip_shift_scale(to_device(image, "cuda:0"), -5, 5, 1, 2))
    np.testing.assert_array_equal(found, clip_shift_scale(image, -5, 5, 1, 2))


@needs_simulator
def test_equal_views_are_made_once_and_others_anew(gpu: Gpu, numba_sees: list[dict[str, Any]]) -> None:
    made = np.random.default_rng(0).integers(-9, 9, (1, 3, 4, 4)).astype(np.int16)
    with compute_on("cuda:0", open_stream("cuda:0")), cuda_simulator():
        there = to_device(made, "cuda:0")
        out = to_device(made.astype(np.float32), "cuda:0")
        for number, same in enumerate((there, there, there.transpose(0, 1, 3, 2), there[:, :2], there.view(np.uint16)), 1):
            view = launching._view(same.data.ptr, same.shape, launching._strides(same), same.dtype)
            assert len(numba_sees) == max(1, number - 1)
            np.testing.assert_array_equal(np.asarray(view._ary), same.plain)
        assert out.data.ptr not in {described["data"][0] for described in numba_sees}
    assert launching._strides(made[:, :1, :1].transpose(1, 0, 2, 3)) is None, "C-contiguous, whatever the strides of single elements"


@needs_simulator
@pytest.mark.parametrize("shape", [(65536, 1, 1), (1, 65536 * 256 + 1, 1)])
def test_more_planes_or_rows_than_a_launch_can_have_are_a_sentence(shape: tuple[int, int, int]) -> None:
    one = to_device(np.zeros((1, 1, 1), np.float32), "simulated")
    with cuda_simulator(), pytest.raises(InputError, match=r"an array of .* has too many planes or rows for one launch on a GPU"):
        launch(DOUBLED, shape, one, np.int32(1), one)
