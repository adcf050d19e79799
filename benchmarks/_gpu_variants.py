"""Stage of `gpu.py`, when asked for: which form of each CUDA C kernel wins on the GPU at hand, beside the thread body of the same text.

What wins belongs into the TUNING tables of `segrt.kernels._cuda`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from _gpu_kernels import KERNELS, check, close_enough, counted_launches
from _gpu_setting import Arrays, Setting, Skip

from segrt.device import give_back
from segrt.kernels._cuda import logits, native, splines

# kernels, the options that their form is made of, and what these may be
FORMS: dict[str, tuple[dict[str, int], list[str], tuple[str, ...], list[tuple[int, ...]]]] = {
    "argmax": (logits.TUNING, ["argmax, fp32", "argmax, fp16"], ("AHEAD", "GROUPS"), [(8, 1), (4, 1), (4, 2), (16, 1), (2, 2)]),
    "blend": (
        logits.TUNING,
        ["blend 4 windows, fp16", "blend 4 windows, fp32", "blend 8 windows, fp16"],
        ("CHUNK", "BLEND_BLOCKS"),
        [(8, 4), (4, 5), (16, 3), (8, 6), (2, 6)],
    ),
    "cubic": (
        splines.TUNING,
        ["resample image, cubic", "resample image, cubic, separate z", "minimum and maximum"],
        ("SPAN", "WARPS"),
        [(32, 4), (48, 4), (64, 4), (32, 8), (24, 4), (16, 8)],
    ),
    "linear": (
        splines.TUNING,
        ["resample image, linear", "resample image, nearest"],
        ("RZ", "RY"),
        [(4, 2), (2, 2), (4, 1), (4, 4), (8, 1)],
    ),
    "fused": (
        logits.TUNING,
        ["resample + argmax, fp32", "resample + argmax, fp16", "resample + argmax, fp32, separate z", "resample + paint, fp32"],
        ("RZ", "RY", "BLOCKS"),
        [(4, 2, 2), (4, 1, 4), (8, 1, 2), (4, 2, 3), (2, 2, 4), (8, 2, 2), (4, 4, 2), (1, 1, 6)],
    ),
}


def form(name: str, tuning: dict[str, int], options: dict[str, int]) -> Callable[[Setting], dict[str, Any]]:
    """A kernel in one form: equal to the CPU at small sizes, to its thread body at the full one, then timed."""

    def run(setting: Setting) -> dict[str, Any]:
        if not setting.on_gpu:
            raise Skip("needs a GPU; the tests run CUDA C as C++")
        with _set(tuning, options), counted_launches() as launches:
            error = check(KERNELS[name], setting.device)
            assert launches, "the thread body ran: there is no CUDA C of this form"
            difference = _from_the_body(name, setting)
            give_back(setting.device)
            return _timed(name, setting) | {"largest_error": error, "from_the_body": difference}

    return run


def body(name: str) -> Callable[[Setting], dict[str, Any]]:
    """The thread body, for comparison."""

    def run(setting: Setting) -> dict[str, Any]:
        if not setting.on_gpu:
            raise Skip("needs a GPU")
        with _thread_bodies():
            return _timed(name, setting)

    return run


def _timed(name: str, setting: Setting) -> dict[str, Any]:
    call, moved = KERNELS[name](Arrays(setting.device), setting.full)
    figures = setting.timed(call)
    begun = time.perf_counter()
    call()  # nothing is waited for: what the host needs to ask for it
    host = 1000 * (time.perf_counter() - begun)
    return figures | {"bytes": moved, "bytes_per_s": 1000 * moved / figures["median_ms"], "host_ms": host}


def _from_the_body(name: str, setting: Setting) -> float:
    """How far a form's result at full size is from the thread body's, on the device; labels have to be equal."""
    ours = KERNELS[name](Arrays(setting.device), setting.full)[0]()
    with _thread_bodies():
        expected = KERNELS[name](Arrays(setting.device), setting.full)[0]()
    if isinstance(ours, tuple):  # two numbers
        return close_enough(np.array(expected), np.array(ours))
    if ours.dtype.kind != "f":
        differing = int((ours != expected).sum())
        assert not differing, f"{differing} of {ours.size} values differ from the thread body's at full size"
        return 0.0
    largest = max(1.0, float(abs(expected).max()))
    ours -= expected
    return close_enough(np.zeros(1), np.array([float(abs(ours).max()) / largest]))


@contextmanager
def _set(tuning: dict[str, int], options: dict[str, int]) -> Iterator[None]:
    usual = dict(tuning)
    tuning.update(options)
    try:
        yield
    finally:
        tuning.update(usual)


@contextmanager
def _thread_bodies() -> Iterator[None]:
    native.use_cuda_c(False)
    try:
        yield
    finally:
        native.use_cuda_c(True)


def _all() -> dict[str, Callable[[Setting], dict[str, Any]]]:
    jobs = {}
    for tuning, names, options, settings in FORMS.values():
        for name in names:
            for values in settings:
                chosen = dict(zip(options, values, strict=True))
                jobs[f"{name}: {' '.join(f'{option}={value}' for option, value in chosen.items())}"] = form(name, tuning, chosen)
            jobs[f"{name}: thread body"] = body(name)
    return jobs


JOBS = _all()
