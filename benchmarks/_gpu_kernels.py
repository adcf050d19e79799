"""Stage 2 of `gpu.py`: every kernel through its public function, checked against the CPU's result before it is timed.

A job makes its arrays, and gives what to call and the fewest bytes that it has to move: each input read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Literal

import numpy as np
from _gpu_setting import CHECKS, Arrays, Setting, Sizes, Skip

from segrt.device import to_host
from segrt.kernels import activation, argmax, bbox, blend, components, mean, normalize, onehot, resample
from segrt.kernels._cuda import native

Made = tuple[Callable[[], Any], int]
Job = Callable[[Arrays, Sizes], Made]
_Activation = Literal["softmax", "sigmoid"]

_TOLERANCE = 2e-5  # of the largest value: float32 sums and splines in another order


def measure(job: Job) -> Callable[[Setting], dict[str, Any]]:
    """A stage's job: check at an odd small size, then time at the full one."""

    def run(setting: Setting) -> dict[str, Any]:
        error = check(job, setting.device)
        call, moved = job(Arrays(setting.device), setting.full)
        figures = setting.timed(call)
        return figures | {"bytes": moved, "bytes_per_s": 1000 * moved / figures["median_ms"], "largest_error": error}

    return run


def measure_cuda_c(job: Job) -> Callable[[Setting], dict[str, Any]]:
    """The same of a kernel that is written in CUDA C too; that it is CUDA C which runs is part of the check."""

    def run(setting: Setting) -> dict[str, Any]:
        if not setting.on_gpu:
            raise Skip("needs a GPU; the tests run CUDA C as C++")
        with counted_launches() as launches:
            figures = measure(job)(setting)
        assert launches, "the thread body ran: there is no CUDA C for these arrays"
        return figures

    return run


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Yield the names of the CUDA C kernels that are launched while a block runs."""
    launches: list[str] = []
    launch = native.run

    def run(call: native.Call | None) -> bool:
        launches.extend([call.kernel] if call else [])
        return launch(call)

    native.run = run
    try:
        yield launches
    finally:
        native.run = launch


def check(job: Job, device: str) -> float:
    """Run on the CPU and on the device; labels have to be equal, floats close. The largest difference comes out."""
    return max(_difference(job, device, sizes) for sizes in CHECKS)


def _difference(job: Job, device: str, sizes: Sizes) -> float:
    expected, found = (job(Arrays(place), sizes)[0]() for place in ("cpu", device))
    worst = 0.0
    for a, b in zip(_arrays(expected), _arrays(found), strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        if a.dtype.kind in "iub":
            assert np.array_equal(a, b), f"{int((a != b).sum())} of {a.size} values differ"
            continue
        worst = max(worst, close_enough(a, b))
    return worst


def close_enough(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, as a share of the largest value when that is more than 1."""
    assert np.isfinite(found).all()
    error = float(np.abs(expected.astype(np.float64) - found).max() / max(1.0, np.abs(expected).max()))
    assert error <= _TOLERANCE, error
    return error


def _arrays(result: Any) -> list[np.ndarray]:
    if isinstance(result, tuple | list):
        return [array for part in result for array in _arrays(part)]
    return [np.asarray(to_host(result))]


def windows(size: Sizes, count: int) -> np.ndarray:
    """(count, 10) int32: neighbours along x, then y, every second one flipped."""
    entries = np.zeros((count, 10), np.int32)
    reach = [n - p for n, p in zip(size.working, size.patch, strict=True)]
    for i, entry in enumerate(entries):
        entry[1], entry[2] = min(i // 4 * size.patch[1] // 2, reach[1]), min(i % 4 * size.patch[2] // 2, reach[2])
        entry[3:6] = i % 2, 0, i % 2
        entry[9] = i
    return entries


def gather(arrays: Arrays, size: Sizes) -> Made:
    data, entries = arrays.floats(1, *size.working), windows(size, 16)
    return lambda: blend.gather_windows(data, entries, size.patch, (0, 0, 0)), 2 * 16 * 4 * prod(size.patch)


def gather_padded(arrays: Arrays, size: Sizes) -> Made:
    data, entries = arrays.floats(1, *size.patch), windows(size, 16)
    entries[:, :3] = 0
    return lambda: blend.gather_windows(data, entries, size.patch, (3, 5, 7)), 2 * 16 * 4 * prod(size.patch)


def _blend(arrays: Arrays, size: Sizes, count: int, dtype: Any) -> Made:
    acc, logits = arrays.zeros(size.classes, *size.working), arrays.floats(count, size.classes, *size.patch, dtype=dtype)
    entries = windows(size, count)
    tables = tuple(arrays.put(blend.gaussian_1d(n)[None].astype(np.float32)) for n in size.patch)
    spans = [int(entries[:, axis].max() - entries[:, axis].min()) + size.patch[axis] for axis in range(3)]

    def run() -> Any:
        blend.blend_windows(acc, logits, entries, tables, 0.5)
        return acc

    return run, logits.nbytes + 8 * size.classes * prod(spans)


def constant(arrays: Arrays, size: Sizes) -> Made:
    """The worst case: an image of one value, in which every voxel has to be looked at."""
    data = arrays.zeros(1, *size.working)
    starts = np.array([entry[:3] for entry in windows(size, 16)], np.int32)
    return lambda: blend.constant_windows(data, starts, size.patch, (0, 0, 0)), data.nbytes


def _resize(order: int, **rules: Any) -> Job:
    def job(arrays: Arrays, size: Sizes) -> Made:
        image = arrays.image(*size.image)
        moved = image.nbytes + 4 * prod(size.working)
        return lambda: resample.resize(image, size.working, order=order, affine=(-958.0, 326.0, 82.0, 136.0), **rules), moved

    return job


def _labels(order: int) -> Job:
    def job(arrays: Arrays, size: Sizes) -> Made:
        labels = arrays.labels(size.image, 5)
        return lambda: resample.resize_labels(labels, size.working, order=order), prod(size.image) + prod(size.working)

    return job


def labels_linear(arrays: Arrays, size: Sizes) -> Made:
    labels = arrays.labels(size.image, 5)
    return lambda: resample.resize_labels_linear(labels, size.working), prod(size.image) + prod(size.working)


def _fused(dtype: Any, *, separate: int | None = None, paint: bool = False, same: bool = False) -> Job:
    def job(arrays: Arrays, size: Sizes) -> Made:
        logits = arrays.floats(size.classes, *size.working, dtype=dtype)
        values = tuple(range(size.classes))
        shape = size.working if same else size.image
        moved = logits.nbytes + prod(shape)
        if paint and same:
            return lambda: argmax.paint(logits, values, 0.5), moved
        if paint:
            return lambda: argmax.resample_paint(logits, shape, values, 0.5, separate=separate), moved
        if same:
            return lambda: argmax.argmax(logits, values), moved
        return lambda: argmax.resample_argmax(logits, shape, values, separate=separate), moved

    return job


def _probabilities(dtype: Any, function: _Activation) -> Job:
    def job(arrays: Arrays, size: Sizes) -> Made:
        logits = arrays.floats(4, *size.working, dtype=dtype)
        moved = logits.nbytes + 16 * prod(size.image)
        return lambda: argmax.resample_probabilities(logits, size.image, activation=function), moved

    return job


def _mean(dtype: Any, function: _Activation) -> Job:
    """A share of a pair's mean, which is read and written."""

    def job(arrays: Arrays, size: Sizes) -> Made:
        logits, out = arrays.floats(4, *size.working, dtype=dtype), arrays.zeros(4, *size.image)
        whole = mean.Box(0, size.working[0], size.image, (0, 0, 0))

        def run() -> Any:
            mean.add_probabilities(out, logits, whole, activation=function, share=0.5)
            return out

        return run, logits.nbytes + 2 * out.nbytes

    return job


def _by_class(*, paint: bool) -> Job:
    """One class against a running best, or painted over what is there: what resampling of other orders ends in."""

    def job(arrays: Arrays, size: Sizes) -> Made:
        best, candidate = arrays.floats(*size.image), arrays.floats(*size.image)
        labels = arrays.put(np.zeros(size.image, np.uint8))

        def run() -> Any:
            if paint:
                activation.paint_over(candidate, labels, 3, 0.5, round16=True)
            else:
                activation.keep_larger(best, candidate, labels, 3, round16=True)
            return best, labels

        return run, (1 if paint else 3) * candidate.nbytes + labels.nbytes

    return job


def clip(arrays: Arrays, size: Sizes) -> Made:
    image = arrays.image(*size.image)
    return lambda: normalize.clip_shift_scale(image, -958, 326, 82, 136), image.nbytes + 4 * image.size


def moments(arrays: Arrays, size: Sizes) -> Made:
    image = arrays.image(*size.image)
    return lambda: normalize.mean_std(image), image.nbytes


def masked_moments(arrays: Arrays, size: Sizes) -> Made:
    image, mask = arrays.image(*size.image), arrays.mask(size.image)
    return lambda: normalize.mean_std(image, mask), image.nbytes + image.size


def standardize(arrays: Arrays, size: Sizes) -> Made:
    image, mask = arrays.image(*size.image), arrays.mask(size.image)
    return lambda: normalize.standardize(image, mask, 3.0, 250.0), image.nbytes + 5 * image.size


def minmax(arrays: Arrays, size: Sizes) -> Made:
    image = arrays.image(*size.image)
    return lambda: normalize.minmax(image), image.nbytes


def box(arrays: Arrays, size: Sizes) -> Made:
    """Mostly zeros, as images that were cut out of their surroundings are: nothing ends the search early."""
    image = np.zeros((1, *size.image), np.int16)
    image[0, size.image[0] // 2, size.image[1] // 2, size.image[2] // 2] = 1
    there = arrays.put(image)
    return lambda: bbox.nonzero_bbox(there), image.nbytes


def mask(arrays: Arrays, size: Sizes) -> Made:
    image = arrays.put(to_host(arrays.labels(size.image, 4)).astype(np.int16)[None])
    return lambda: bbox.nonzero_mask(image), 3 * prod(size.image)


def largest(arrays: Arrays, size: Sizes) -> Made:
    labels = arrays.labels(size.image, size.classes)
    rules = [components.Rule((value,)) for value in range(1, size.classes)]
    return lambda: components.keep_components(labels, rules), 2 * labels.size


def small_parts(arrays: Arrays, size: Sizes) -> Made:
    labels = arrays.labels(size.image, size.classes)
    return lambda: components.drop_small(labels, tuple(range(1, size.classes)), 600), 2 * labels.size


def holes(arrays: Arrays, size: Sizes) -> Made:
    labels = arrays.labels(size.image, 3)
    return lambda: components.fill_holes(labels, 1), 2 * labels.size


def one_hot(arrays: Arrays, size: Sizes) -> Made:
    labels, values = arrays.labels(size.working, 5), (1, 2, 3, 4)
    out = arrays.zeros(4, *size.working)

    def run() -> Any:
        onehot.one_hot(labels, values, out)
        return out

    return run, labels.size + out.nbytes


def outside(arrays: Arrays, size: Sizes) -> Made:
    labels, inside = arrays.labels(size.image, 5), arrays.mask(size.image)
    return lambda: onehot.mark_outside(labels, onehot.include(inside, labels)), 7 * labels.size


KERNELS: dict[str, Job] = {
    "gather 16 windows": gather,
    "gather 16 windows, padded": gather_padded,
    "blend 4 windows, fp16": lambda arrays, size: _blend(arrays, size, 4, np.float16),
    "blend 4 windows, fp32": lambda arrays, size: _blend(arrays, size, 4, np.float32),
    "blend 8 windows, fp16": lambda arrays, size: _blend(arrays, size, 8, np.float16),
    "constant windows": constant,
    "resample image, cubic": _resize(3),
    "resample image, cubic, separate z": _resize(3, separate=0),
    "resample image, linear": _resize(1),
    "resample image, nearest": _resize(0),
    "resample labels, linear": _labels(1),
    "resample labels, nearest": _labels(0),
    "resample labels, float16 linear": labels_linear,
    "argmax, fp32": _fused(np.float32, same=True),
    "argmax, fp16": _fused(np.float16, same=True),
    "resample + argmax, fp32": _fused(np.float32),
    "resample + argmax, fp32, separate z": _fused(np.float32, separate=0),
    "resample + paint, fp32": _fused(np.float32, paint=True),
    "resample + argmax, fp16": _fused(np.float16),
    "resample + paint, fp16": _fused(np.float16, paint=True),
    "paint, fp32": _fused(np.float32, paint=True, same=True),
    "paint, fp16": _fused(np.float16, paint=True, same=True),
    "probabilities": _probabilities(np.float32, "softmax"),
    "probabilities, fp16": _probabilities(np.float16, "softmax"),
    "probabilities of regions": _probabilities(np.float32, "sigmoid"),
    "mean of a pair, fp32": _mean(np.float32, "softmax"),
    "mean of a pair, fp16": _mean(np.float16, "softmax"),
    "mean of a pair, regions": _mean(np.float32, "sigmoid"),
    "largest of classes, one by one": _by_class(paint=False),
    "paint of classes, one by one": _by_class(paint=True),
    "clip and scale": clip,
    "mean and deviation": moments,
    "mean and deviation in a mask": masked_moments,
    "standardize in a mask": standardize,
    "minimum and maximum": minmax,
    "bounding box": box,
    "nonzero mask": mask,
    "largest component of 15 labels": largest,
    "small components": small_parts,
    "holes": holes,
    "one-hot": one_hot,
    "outside of a mask": outside,
}
# those that are written in CUDA C too
CUDA_C = [
    name for name in KERNELS if name.startswith(("blend", "resample image", "argmax", "paint,", "resample + ", "probabilities", "minimum"))
]
JOBS = {name: measure(job) for name, job in KERNELS.items()}
IN_CUDA_C = {name: measure_cuda_c(KERNELS[name]) for name in CUDA_C}
