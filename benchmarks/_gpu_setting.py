"""What the stages of `gpu.py` share: sizes, the model, memory on the device, and the timer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from segrt.bundle import Bundle
from segrt.device import get_xp, to_device, to_host
from segrt.spec import Channel, CTNorm, Head, Inference, KeepLargest, Label, ModelSpec, SpacingTarget, UNetSpec

CLASSES = 16


class Skip(Exception):  # noqa: N818 - no error
    """Why a measurement is left out here."""


@dataclass(frozen=True)
class Sizes:
    """A case: (z, y, x) of the image, its spacing in mm, and of the grid the network works on."""

    image: tuple[int, int, int]
    spacing: tuple[float, float, float]
    working: tuple[int, int, int]
    patch: tuple[int, int, int]
    classes: int = CLASSES


# an AMOS-like CT and a full-resolution plan for it: 216 windows of 1.12 TFLOP
FULL = Sizes((200, 512, 512), (2.1, 0.72, 0.72), (210, 542, 542), (64, 160, 160))
SMALL = Sizes((70, 160, 140), (2.1, 0.72, 0.72), (74, 169, 148), (64, 160, 160))
# for checks against the CPU: every axis odd somewhere, and rows that can be read eight voxels at a time
CHECKS = (
    Sizes((21, 45, 51), (2.1, 0.72, 0.72), (23, 47, 55), (8, 12, 16), 5),
    Sizes((10, 21, 48), (2.1, 0.72, 0.72), (12, 24, 64), (8, 12, 16), 5),
)
TOY = Sizes((9, 17, 20), (2.1, 0.72, 0.72), (9, 18, 21), (8, 16, 16))
TARGET_SPACING = (2.0, 0.68, 0.68)


@dataclass(frozen=True)
class Setting:
    """Where a stage runs: device, size, and a folder that all stages see."""

    device: str
    toy: bool
    work: Path

    @property
    def full(self) -> Sizes:
        return TOY if self.toy else FULL

    @property
    def small(self) -> Sizes:
        return TOY if self.toy else SMALL

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @cached_property
    def bundle(self) -> Bundle:
        """The default-size network (31.2 M parameters) with random weights, made by the first stage that asks for it."""
        path = self.work / "bundle"
        return Bundle.open(path) if (path / "model.json").is_file() else make_bundle(path, self.full.patch, toy=self.toy)

    def timed(self, function: Callable[[], Any], *, runs: int = 7, warmup: int = 2) -> dict[str, float]:
        """Milliseconds of `function` on the device: median, fastest and slowest of `runs`; a toy run only shows that it runs."""
        if self.toy:
            runs, warmup = 1, 0
        for _ in range(warmup):
            function()
        times = [self._event_ms(function) if self.on_gpu else _wall_ms(function) for _ in range(runs)]
        return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "runs": runs}

    def _event_ms(self, function: Callable[[], Any]) -> float:
        once = self._between(1, function)
        # several in a row, so that a short kernel's launch hides behind the one before, as it does in a case
        return self._between(max(1, min(20, int(4 / once))), function)

    def _between(self, count: int, function: Callable[[], Any]) -> float:
        import cupy

        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record()
        for _ in range(count):
            function()
        last.record()
        last.synchronize()
        return float(cupy.cuda.get_elapsed_time(first, last)) / count


def _wall_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def make_spec(patch: tuple[int, int, int], *, toy: bool) -> ModelSpec:
    """A full-resolution plan for AMOS with nnU-Net v2's defaults."""
    features = (8, 16) if toy else (32, 64, 128, 256, 320, 320)
    stages = len(features)
    network = UNetSpec(
        family="plain_unet",
        dimensions=3,
        in_channels=1,
        out_channels=CLASSES,
        features=features,
        # nnU-Net's planner would take (1, 3, 3) first for this spacing, and 877 GFLOP a window instead of 1121
        kernels=((3, 3, 3),) * stages,
        strides=((1, 1, 1), (1, 2, 2), *((2, 2, 2),) * (stages - 2)),
        blocks=(2,) * stages,
        decoder_convs=(2,) * (stages - 1),
    )
    return ModelSpec(
        name="random",
        channels=(Channel(name="CT", normalization=CTNorm(lower=-958, upper=326, mean=82, std=136)),),
        members=("0",),
        network=network,
        labels=tuple(Label(name=f"l{k}", values=(k,)) for k in range(CLASSES)),
        head=Head(activation="softmax", values=tuple(range(CLASSES))),
        target=SpacingTarget(spacing=TARGET_SPACING),
        inference=Inference(patch=patch),
        postprocess=(KeepLargest(values=(1,)), KeepLargest(values=(2,))),
    )


def make_bundle(path: Path, patch: tuple[int, int, int], *, toy: bool, **changes: Any) -> Bundle:
    """A bundle of random weights; `changes` are to its spec."""
    import torch

    from segrt.networks import build

    spec = make_spec(patch, toy=toy).model_copy(update=changes)
    torch.manual_seed(0)
    network = build(spec.network)
    return Bundle.create(path, spec, weights={"0": network.state_dict()})


class Arrays:
    """Random arrays where they are asked for: the same seed gives the same ones on every device."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self._device, self._rng = device, np.random.default_rng(seed)
        self._xp = get_xp(to_device(np.zeros(1, np.float32), device))

    def floats(self, *shape: int, dtype: Any = np.float32) -> Any:
        return self._filled(shape, lambda n: self._rng.standard_normal(n, np.float32).astype(dtype))

    def image(self, *shape: int) -> Any:
        return self._filled(shape, lambda n: self._rng.integers(-1000, 1000, n).astype(np.int16))

    def labels(self, shape: tuple[int, int, int], classes: int) -> Any:
        """Boxes of 8 voxels: regions as large as organs' details."""
        labels = self._rng.integers(0, classes, [-(-n // 8) for n in shape]).astype(np.uint8)
        for axis in range(3):
            labels = labels.repeat(8, axis)
        return self.put(np.ascontiguousarray(labels[tuple(slice(n) for n in shape)]))

    def mask(self, shape: tuple[int, int, int]) -> Any:
        return self.put(to_host(self.labels(shape, 4)) > 0)

    def zeros(self, *shape: int) -> Any:
        return self._xp.zeros(shape, np.float32)

    def put(self, array: np.ndarray) -> Any:
        return to_device(array, self._device)

    def _filled(self, shape: tuple[int, ...], draw: Callable[[int], np.ndarray]) -> Any:
        """A block of 16 million numbers, repeated: drawing gigabytes would take longer than the measurement."""
        size = prod(shape)
        block = self.put(draw(min(size, 2**24)))
        if len(block) == size:
            return block.reshape(shape)
        flat = self._xp.empty(size, block.dtype)
        for first in range(0, size, len(block)):
            flat[first : first + len(block)] = block[: size - first]
        return flat.reshape(shape)
