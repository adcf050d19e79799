"""Compile every kernel for generations of GPUs, on a machine without any: python tests/compile_kernels.py 90 120:brief

Public functions are called on simulated arrays as the pipeline calls them, and what they launch is compiled to PTX for the types it was
launched with, and assembled where there is an assembler: `ptxas`, or nvJitLink from the CUDA packages. "brief" takes the first types of
each kernel alone. Prints one JSON object, by generation. Numba has to be without its simulator here, so this is a process of its own.

What takes time is Numba: a kernel is typed and lowered once for all generations, whose NVVM takes many kernels in one program.

A new kernel needs a call in `STAGES` that reaches it, with the dtypes and layouts it meets in use.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
from cuda_sources import doubles, spills
from factories import make_spec, nearest_engine
from numba.core import types

from segrt.bundle import Bundle
from segrt.device import Simulated, to_device
from segrt.engines.compose import Hosted
from segrt.kernels import _cuda, activation, argmax, bbox, blend, components, mean, normalize, onehot, resample
from segrt.kernels._cuda.launch import Launch, ThreadKernel, recording
from segrt.predictor import Predictor
from segrt.spec import Channel, DropSmall, FillHoles, KeepLargest, PreviousStage, Resampling, ShapeTarget, SpacingTarget, ZScoreNorm
from segrt.volume import Grid, Volume

RNG = np.random.default_rng(0)
IMAGES = (np.int16, np.uint8, np.float32)  # what scanners and pictures are stored in; other dtypes become float32 where it matters
LABELS = (np.uint8, np.uint16)
TOGETHER = 24  # kernels of one program: NVVM reads CUDA's mathematics anew, and the assembler starts, for each program


# ------------------------------------------------------------------ what is called
def image(dtype: Any, channels: int = 1, *, whole: bool = True) -> Any:
    """An image as `preprocess` has it: C-contiguous, or turned and cropped."""
    array = to_device(RNG.integers(0, 90, (channels, 9, 10, 11)).astype(dtype), "simulated")
    return array if whole else array.transpose(0, 2, 1, 3)[:, 1:, 1:, 1:]


def label_map(dtype: Any, *, whole: bool = True) -> Any:
    return image(dtype, whole=whole)[0]


def boxes() -> None:
    for dtype, whole in product((np.int16, np.uint8, np.float32, np.float64), (True, False)):
        bbox.nonzero_bbox(image(dtype, whole=whole))
        bbox.nonzero_mask(image(dtype, 2, whole=whole))


def clean_up() -> None:
    for dtype in LABELS:
        labels = label_map(dtype)
        components.keep_components(labels, [components.Rule((1, 2)), components.Rule((3,), 4)])
        components.fill_holes(labels, 1)


def windows() -> None:
    patch, entries = (4, 5, 6), np.zeros((2, 10), np.int32)
    entries[1] = 1, 2, 3, 1, 1, 1, 0, 0, 0, 1
    blend.gather_windows(image(np.float32, 2), entries, patch, (1, 1, 1))
    blend.constant_windows(image(np.float32, 2), entries[:, :3], patch, (0, 0, 0))
    tables = tuple(to_device(np.ones((1, n), np.float32), "simulated") for n in patch)
    for dtype, k in product((np.float32, np.float16), (2, 5)):
        logits = to_device(np.ones((2, k, *patch), dtype), "simulated")
        sums = image(np.float32, k)
        blend.blend_windows(sums, logits, entries, tables, 0.5)
        blend.blend_windows(sums[:, 1:], logits, entries, tables, 0.5)


def label() -> None:
    for dtype, top, whole in product((np.float32, np.float16), (2, 300), (True, False)):
        values = (0, 1, top)
        logits = image(dtype, 3)[:, :, 1:, 1:]
        logits = logits if not whole else to_device(np.ones((3, 4, 5, 6), dtype), "simulated")
        argmax.argmax(logits, values)
        argmax.paint(logits, values, 0.5)
        # into the part of an image that was cropped, turned
        full = to_device(np.zeros((14, 13, 12), np.uint16 if top > 255 else np.uint8), "simulated")
        out = full[1:, 1:, 1:].transpose(1, 0, 2) if not whole else to_device(np.zeros((12, 13, 11), full.dtype), "simulated")
        for separate in (None, 0):
            argmax.resample_argmax(logits, out.shape, values, separate=separate, out=out)
            argmax.resample_paint(logits, out.shape, values, 0.5, separate=separate, out=out)


def probabilities() -> None:
    for name, dtype in product(("softmax", "sigmoid"), (np.float32, np.float16)):
        argmax.resample_probabilities(image(dtype, 2), (5, 6, 7), activation=name)
        for whole in (True, False):
            box = mean.Box(0, image(dtype, whole=whole).shape[1], (15, 16, 17), (1, 2, 3))
            mean.add_probabilities(image(np.float32, 2, whole=whole), image(dtype, 2, whole=whole), box, activation=name, share=0.5)
    best, candidate = image(np.float32, 2)
    for dtype in LABELS:
        activation.keep_larger(best, candidate, label_map(dtype), 1)
        activation.paint_over(candidate, label_map(dtype), 1, 0.5)


def resampling() -> None:
    orders = [(1, None, 0), (3, None, 0), (3, 0, 0), (3, 0, 1), (3, 0, 3), (1, 0, 1), (0, None, 0), (3, 2, 0)]
    for dtype, whole, (order, separate, order_z) in product(IMAGES, (True, False), orders):
        for shape in ((5, 12, 6), (13, 7, 14)):
            for affine in (None, (0.0, 50.0, 3.0, 2.0)):
                resample.resize(image(dtype, whole=whole)[0], shape, order=order, separate=separate, order_z=order_z, affine=affine)


def intensities() -> None:
    for dtype, whole in product((np.int32, np.float64), (True, False)):
        normalize.minmax(image(dtype, whole=whole)[0])
    for dtype, whole in product(IMAGES, (True, False)):
        channel = image(dtype, whole=whole)[0]
        normalize.clip_shift_scale(channel, 0, 50, 3, 2)
        normalize.minmax(channel)
        mask = bbox.nonzero_mask(channel[None])
        normalize.mean_std(channel)
        normalize.mean_std(channel, mask)
        normalize.standardize(channel, mask, 3.0, 2.0)


def cascade() -> None:
    for dtype, whole in product(LABELS, (True, False)):
        labels = label_map(dtype, whole=whole)
        marked = onehot.mark_outside(labels, onehot.include(bbox.nonzero_mask(image(np.int16, whole=whole)), labels))
        for order, separate, order_z in [(0, None, 0), (1, None, 0), (1, 0, 0), (1, 0, 1), (3, None, 0)]:
            resized = resample.resize_labels(marked, (6, 13, 7), order=order, separate=separate, order_z=order_z)
            onehot.one_hot(resized, (1, 2), to_device(np.zeros((2, 6, 13, 7), np.float32), "simulated"))
        resample.resize_labels_linear(marked, (6, 13, 7))


def whole_cases() -> None:
    """From an image to its labels, for models that differ in what the stages do."""
    steps = {"postprocess": (KeepLargest(values=(1,)), DropSmall(values=(2,), minimum_mm3=9.0), FillHoles(value=1))}
    finer, apart = SpacingTarget(spacing=(2.0, 0.8, 1.2)), SpacingTarget(spacing=(5.0, 0.8, 0.8))
    scored = {"channels": (Channel(name="T1", normalization=ZScoreNorm(masked=True)),)}
    linear = {"resample_image": Resampling(method="linear"), "resample_logits": Resampling(method="linear")}
    specs = [
        make_spec(target=finer, transpose=(1, 0, 2), mirror_axes=(0, 2), **steps),
        make_spec(target=apart, values=(0, 1, 300), **scored),
        make_spec(target=finer, activation="sigmoid", previous=PreviousStage(values=(1, 2)), **linear),
        make_spec(patch=(1, 8, 8), target=ShapeTarget(shape=(9, 8, 14)), transpose=(2, 1, 0), **scored),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, (spec, dtype) in enumerate(product(specs, (np.int16, np.float32))):
            array = np.pad(RNG.integers(0, 90, (1, 7, 10, 9)), ((0, 0), (0, 1), (2, 0), (1, 1))).astype(dtype)
            engine = Hosted(nearest_engine(range(spec.classes)), "simulated")
            volume = Volume(array, Grid(array.shape[1:], (3.0, 1.0, 1.0)))
            stage = None if spec.previous is None else (array[0] % 3).astype(np.uint8)
            with Predictor(Bundle.create(Path(folder) / str(number), spec), engines=[engine], previous_stage=False) as predictor:
                predictor(volume, previous=stage, probabilities=number % 2 == 0)


STAGES: tuple[Callable[[], None], ...] = (boxes, clean_up, windows, label, probabilities, resampling, intensities, cascade, whole_cases)


# ------------------------------------------------------------------ what is compiled
Launches = dict[tuple[int, tuple[Any, ...]], Launch]  # by kernel and types of its arguments


def all_kernels() -> dict[int, str]:
    """Every kernel of the package, by identity, with its module and name."""
    found = {}
    for path in sorted(Path(_cuda.__file__).parent.glob("[!_]*.py")):
        names = vars(importlib.import_module(f"{_cuda.__name__}.{path.stem}"))
        own = [v for v in names.values() if isinstance(v, ThreadKernel) and v.body.__module__ == names["__name__"]]
        found |= {id(kernel): f"{path.stem}.{kernel.name}" for kernel in own}
    return found


def launched(stages: Sequence[Callable[[], None]]) -> Launches:
    """One launch for each kernel and types of arguments."""
    found: Launches = {}
    for stage in stages:
        with recording() as launches, idle():
            stage()
        for one in launches:
            found.setdefault((id(one.kernel), tuple(_type_of(argument) for argument in one.arguments)), one)
    return found


@contextmanager
def idle() -> Iterator[None]:
    """Have launches do nothing, for their types are all that is wanted; but for what the host reads to decide what comes next."""
    loop: Any = vars(ThreadKernel)["loop"]
    read = {"grow_box", "moments", "fold_moments", "plane_extremes", "fold_extremes", "wide_extremes", "fold_wide"}
    chosen = property(lambda kernel: loop.__get__(kernel, ThreadKernel) if kernel.name in read else lambda *_: None)
    with patch.object(ThreadKernel, "loop", chosen):
        yield


def _type_of(argument: Any) -> Any:
    if not isinstance(argument, np.ndarray):
        return numba.typeof(argument)
    assert isinstance(argument, Simulated), "a kernel was given an array that lies on the host"
    found = numba.typeof(np.asarray(argument))
    return types.Array(found.dtype, found.ndim, found.layout)  # arrays on a GPU are never read-only


@dataclass(frozen=True)
class Lowered:
    """A kernel for some types, as Numba hands it to NVVM; nothing in it knows of a generation."""

    kernel: str
    types: str
    float64: bool
    entry: str
    modules: tuple[str, ...]


def lowered(launches: Launches) -> list[Lowered]:
    # functions inside kernels ask for the device in use, and there is none; lowering asks of it whether it is older than any we know of
    importlib.import_module("numba.cuda.dispatcher").get_current_device = lambda: SimpleNamespace(compute_capability=(8, 0))
    lower, names, found = importlib.import_module("numba.cuda.compiler")._compile_pyfunc_with_fixup, all_kernels(), []
    for (key, kinds), one in launches.items():
        signature = (types.int32,) * 3 + kinds
        library, _ = lower(one.kernel.source_function("cuda"), signature, device=False, abi="numba", cc=(8, 0))
        form = ", ".join(str(_short(k)) for k in kinds)
        found.append(Lowered(names[key], form, one.kernel.float64, library._entry_name, tuple(library.llvm_strs)))
    return found


def compiled(kernels: Sequence[Lowered], capability: tuple[int, int]) -> Iterator[dict[str, Any]]:
    nvvm = importlib.import_module("numba.cuda.cudadrv.nvvm")
    for first in range(0, len(kernels), TOGETHER):
        part = kernels[first : first + TOGETHER]
        # what several call is in each of them
        modules = dict.fromkeys(module for kernel in part for module in kernel.modules)
        ptx = nvvm.compile_ir(list(modules), arch="compute_{}{}".format(*capability), opt=3).decode().strip("\0")
        version = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
        assert version, "no PTX"
        double, used = doubles(ptx), assembled(ptx, capability)
        for kernel in part:
            form = {"kernel": kernel.kernel, "types": kernel.types, "float64": kernel.float64}
            yield form | {"version": version[1], "double": double[kernel.entry]} | used.get(kernel.entry, {})


def _short(kind: Any) -> str:
    return f"{kind.dtype}[{kind.ndim}{kind.layout}]" if isinstance(kind, types.Array) else str(kind)


# ------------------------------------------------------------------ what is assembled
def assembler() -> str | None:
    if shutil.which("ptxas"):
        return "ptxas"
    return "nvJitLink" if importlib.util.find_spec("cuda.bindings.nvjitlink") else None


def assembled(ptx: str, capability: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Registers of a thread, and bytes that did not fit in them, of each kernel; nothing where there is no assembler."""
    tool, arch = assembler(), "sm_{}{}".format(*capability)
    if tool is None:
        return {}
    report = _ptxas(ptx, arch) if tool == "ptxas" else _link(ptx, arch)
    return {name: {"registers": used.registers, "spilled": used.spilled} for name, used in spills(report).items()}


def _ptxas(ptx: str, arch: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = ["ptxas", f"-arch={arch}", "-v", "-o", f"{folder}/kernel.cubin", "-"]
        return subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr


def _link(ptx: str, arch: str) -> str:
    from cuda.bindings import nvjitlink

    handle, data = nvjitlink.create(2, [f"-arch={arch}", "-verbose"]), ptx.encode()
    nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel")
    nvjitlink.complete(handle)
    log = bytearray(nvjitlink.get_info_log_size(handle))
    nvjitlink.get_info_log(handle, log)
    nvjitlink.destroy(handle)
    return log.decode()


def report(generation: str, kernels: Sequence[Lowered]) -> dict[str, Any]:
    digits, _, how = generation.partition(":")
    if how == "brief":
        kernels = list({kernel.kernel: kernel for kernel in reversed(kernels)}.values())
    forms = list(compiled(kernels, (int(digits[:-1]), int(digits[-1]))))
    missing = sorted(set(all_kernels().values()) - {form["kernel"] for form in forms})
    return {"arch": f"sm_{digits}", "assembler": assembler(), "missing": missing, "forms": forms}


if __name__ == "__main__":
    made = lowered(launched(STAGES))
    print(json.dumps({generation: report(generation, made) for generation in sys.argv[1:]}))
