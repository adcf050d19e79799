"""nnU-Net v2's own predictor, stated again in PyTorch, NumPy, scipy and skimage: the rival of `gpu.py` where nnunetv2 is not installed.

It follows nnunetv2 2.8 with its defaults (no test-time mirroring), and does what that does, also where it is slow: the mask of what is not
zero with holes filled, intensities in float32, cubic resampling by skimage in float64 and of the mask as labels, all on the CPU; on the GPU
one window at a time under autocast to float16 with cuDNN's benchmark, cut by a second thread, added in float16 with a float16 Gaussian of
height 10 and divided by the sum of Gaussians; the float16 logits go to the CPU, each class is resampled by skimage in float64, stored as
float16, and the largest wins.
"""

from __future__ import annotations

import itertools
import math
import time
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.transform import resize

_THREADS = 8  # nnU-Net's default for torch on the CPU


class NnunetPredictor:
    """Labels of a CT by a torch network; `seconds` holds the stages of the last case."""

    def __init__(self, network: Any, *, patch: tuple[int, int, int], spacing: tuple[float, float, float], norm: Any, device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        self._network = network.to(self._device).eval()
        self._patch, self._spacing, self._norm = patch, spacing, norm
        self.seconds: dict[str, float] = {}

    def __call__(self, image: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
        """(Z, Y, X) int16 on the host -> labels (Z, Y, X) uint8 on the host."""
        start = time.perf_counter()
        data, box = self._preprocess(image, spacing)
        preprocessed = time.perf_counter()
        logits = self._logits(data)
        predicted = time.perf_counter()
        labels = np.zeros(image.shape, np.uint8)
        labels[box] = self._labels(logits, tuple(s.stop - s.start for s in box))
        end = time.perf_counter()
        self.seconds = {"preprocess": preprocessed - start, "network": predicted - preprocessed, "restore": end - predicted}
        return labels

    def _preprocess(self, image: np.ndarray, spacing: tuple[float, float, float]) -> tuple[np.ndarray, tuple[slice, ...]]:
        data = image.astype(np.float32)[None]
        mask = ndimage.binary_fill_holes(data[0] != 0)
        (box,) = ndimage.find_objects(mask.astype(np.uint8))
        data, outside = data[(slice(None), *box)], np.where(mask[box], np.int8(0), np.int8(-1))
        shape = [round(s / t * n) for s, t, n in zip(spacing, self._spacing, data.shape[1:], strict=True)]
        np.clip(data, self._norm.lower, self._norm.upper, out=data)
        data -= self._norm.mean
        data /= max(self._norm.std, 1e-8)
        if list(data.shape[1:]) != shape:
            data = _resized(data, shape, 3, np.float32)
            # prediction needs no labels, and nnU-Net resamples the mask all the same
            for value in np.unique(outside):
                resize((outside == value).astype(float), shape, 1, mode="edge", anti_aliasing=False)
        return data, box

    def _logits(self, image: np.ndarray) -> Any:
        """Blended float16 logits (K, Z, Y, X) on the CPU."""
        torch = self._torch
        gpu = self._device.type == "cuda"
        before = torch.backends.cudnn.benchmark, torch.get_num_threads()
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(min(_THREADS, before[1]))
        try:
            with torch.inference_mode(), torch.autocast(self._device.type, enabled=gpu):
                data, inside = _padded(torch, torch.from_numpy(image), self._patch)
                logits = self._windows(data)
                return logits[inside].to("cpu")
        finally:
            torch.backends.cudnn.benchmark = before[0]
            torch.set_num_threads(before[1])

    def _windows(self, data: Any) -> Any:
        torch = self._torch
        data = data.to(self._device)
        cuts = list(itertools.product(*(_steps(n, p) for n, p in zip(data.shape[1:], self._patch, strict=True))))
        queue: Queue[Any] = Queue(maxsize=2)

        def cut() -> None:
            for start in cuts:
                place = (slice(None), *(slice(s, s + p) for s, p in zip(start, self._patch, strict=True)))
                queue.put((data[place][None].clone(memory_format=torch.contiguous_format), place))

        producer = Thread(target=cut, daemon=True)
        producer.start()
        gaussian = _gaussian(torch, self._patch).to(self._device)
        total, count = None, torch.zeros(data.shape[1:], dtype=torch.half, device=self._device)
        for _ in cuts:
            window, place = queue.get()
            prediction = self._network(window)[0]
            if total is None:
                total = torch.zeros((len(prediction), *data.shape[1:]), dtype=torch.half, device=self._device)
            prediction *= gaussian
            total[place] += prediction
            count[place[1:]] += gaussian
        producer.join()
        torch.div(total, count, out=total)
        assert not torch.any(torch.isinf(total))
        return total

    def _labels(self, logits: Any, shape: tuple[int, ...]) -> np.ndarray:
        array = logits.numpy()
        if array.shape[1:] != shape:
            array = _resized(array, shape, 1, np.float16)
        return array.argmax(0).astype(np.uint8)


def _resized(data: np.ndarray, shape: Any, order: int, dtype: Any) -> np.ndarray:
    """Every channel in float64 by skimage, as nnU-Net resamples when the spacing is not anisotropic."""
    wide = data.astype(float)
    out = np.zeros((len(data), *shape), dtype)
    for channel, source in zip(out, wide, strict=True):
        channel[...] = resize(source, shape, order, mode="edge", anti_aliasing=False)
    return out


def _padded(torch: Any, data: Any, patch: tuple[int, int, int]) -> tuple[Any, tuple[slice, ...]]:
    """The image in the middle of at least one patch, and where it lies there."""
    lacks = [max(0, p - n) for n, p in zip(data.shape[1:], patch, strict=True)]
    lows = [lack // 2 for lack in lacks]
    pads = [side for low, lack in zip(reversed(lows), reversed(lacks), strict=True) for side in (low, lack - low)]
    inside = (slice(None), *(slice(low, low + n) for low, n in zip(lows, data.shape[1:], strict=True)))
    return torch.nn.functional.pad(data, pads), inside


def _steps(size: int, patch: int) -> list[int]:
    """First voxels of the windows along an axis: at most half a patch apart, evenly spread."""
    count = math.ceil((size - patch) / (patch * 0.5)) + 1
    return [int(np.round(i * (size - patch) / (count - 1))) for i in range(count)] if count > 1 else [0]


def _gaussian(torch: Any, patch: tuple[int, int, int]) -> Any:
    """Importance of a window's voxels: float16, 10 in the middle, nowhere zero."""
    delta = np.zeros(patch)
    delta[tuple(n // 2 for n in patch)] = 1
    weights = ndimage.gaussian_filter(delta, [n / 8 for n in patch], 0, mode="constant", cval=0)
    half = torch.from_numpy(weights / (weights.max() / 10)).to(torch.half)
    half[half == 0] = half[half != 0].min()
    return half
