"""Where arrays lie: memory that libraries keep from each other, foreign byte order, threads that launch; on a GPU where there is one."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from segrt.arrays import Array
from segrt.device import compute_on, free_bytes, open_stream, patient, to_device, to_host
from segrt.kernels._cuda.launch import cuda_simulator
from segrt.kernels.normalize import clip_shift_scale

HAS_GPU = Path("/dev/nvidia0").exists()
with_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")


class Keeping:
    """A GPU of `free` bytes, of which torch keeps `kept` until it is told to give them back."""

    def __init__(self, free: int, kept: int) -> None:
        self.free, self.kept, self.tries = free, kept, 0

    def allocate(self, size: int) -> int:
        self.tries += 1
        if size > self.free:
            raise MemoryError("out of memory")
        return size

    def empty_cache(self) -> None:
        self.free, self.kept = self.free + self.kept, 0

    def is_initialized(self) -> bool:
        return True


def test_torch_gives_back_what_it_keeps_before_memory_is_said_to_be_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Keeping(free=2, kept=6)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=gpu))
    allocate = patient(gpu.allocate)
    assert (allocate(2), gpu.kept) == (2, 6)
    assert (allocate(8), gpu.kept) == (8, 0)
    with pytest.raises(MemoryError):
        allocate(9)


def test_without_torch_on_a_gpu_memory_is_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gpu = Keeping(free=2, kept=0)
    with pytest.raises(MemoryError):
        patient(gpu.allocate)(3)
    assert gpu.tries == 1


def images() -> list[Array]:
    return [np.random.default_rng(k).integers(-9, 9, (2, 3, 40)).astype(np.int16) for k in range(4)]


def test_threads_may_launch_a_kernel_at_once() -> None:
    device: str = "cuda:0" if HAS_GPU else "simulated"
    begin = threading.Barrier(4)

    def scaled(image: Array) -> Array:
        with compute_on(device, open_stream(device)):
            there = to_device(image, device)
            begin.wait()
            return to_host(clip_shift_scale(there, -5, 5, 1, 2))

    inside: Any = nullcontext() if HAS_GPU else cuda_simulator()
    with inside, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(scaled, images()))
    for image, result in zip(images(), found, strict=True):
        np.testing.assert_array_equal(result, clip_shift_scale(image, -5, 5, 1, 2))


# on a GPU


@with_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, ">i2", np.float16, ">f4", np.float64])
def test_arrays_come_back_as_they_went(dtype: Any) -> None:
    whole = np.random.default_rng(0).integers(0, 2, (30, 41, 52)).astype(dtype)
    with compute_on("cuda:0", open_stream("cuda:0")):
        for host in (whole, whole.T, whole[::-2, :, 3:], whole[:0], whole[0, 0, 0, ...]):
            back = to_host(to_device(host, "cuda:0"))
            assert back.dtype == host.dtype.newbyteorder("=")
            np.testing.assert_array_equal(back, host)
        there = to_device(whole, "cuda:0")
        np.testing.assert_array_equal(to_host(there.transpose(2, 0, 1)[::-1, 1:]), whole.transpose(2, 0, 1)[::-1, 1:])


@with_gpu
@pytest.mark.gpu
def test_more_than_two_staging_buffers_and_more_than_2_gib() -> None:
    host = np.zeros(2**31 + 12345, np.uint8)
    host[[0, 2**24 - 1, 2**24, 2**31 - 1, 2**31, -1]] = 1, 2, 3, 4, 5, 6
    assert (to_host(to_device(host, "cuda:0")) == host).all()


@with_gpu
@pytest.mark.gpu
def test_memory_that_torch_keeps_counts_as_free_and_can_be_had() -> None:
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
    before = free_bytes("cuda:0")
    kept = torch.empty(int(before * 0.8), dtype=torch.uint8, device="cuda:0")
    del kept
    assert free_bytes("cuda:0") > 0.95 * before
    with compute_on("cuda:0", open_stream("cuda:0")):
        taken = cupy.empty(int(before * 0.5), np.uint8)
    assert taken.nbytes > 0.4 * before
