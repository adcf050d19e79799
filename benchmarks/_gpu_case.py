"""Stages 4 and 5 of `gpu.py`: a whole case from host array to host labels, nnU-Net's way and ours, and the same case again and again."""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _gpu_engines import open_onnxruntime, open_tensorrt, open_torch
from _gpu_nnunet import NnunetPredictor
from _gpu_setting import TARGET_SPACING, Setting, Sizes, Skip

from segrt.engines import Engine
from segrt.errors import BackendError
from segrt.phantom import make_phantom
from segrt.predictor import Predictor


def case(setting: Setting, sizes: Sizes, name: str) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A phantom CT, (Z, Y, X) int16 with its spacing; made once."""
    path = setting.work / f"{name}.npy"
    if not path.is_file():
        np.save(path, make_phantom(np.random.default_rng(3), shape=sizes.image, spacing=sizes.spacing)[0])
    return np.load(path), sizes.spacing


def predictor_of(setting: Setting, engine: Engine) -> Predictor:
    return Predictor(setting.bundle, device=setting.device, tta=False, engines=[engine])


def ours(name: str, opened: Callable[[Setting], Engine]) -> Callable[[Setting], dict[str, Any]]:
    """The whole case through one engine: three runs after a first one, medians by stage, and the GPU memory in use at most."""

    def run(setting: Setting) -> dict[str, Any]:
        image, spacing = case(setting, setting.full, "full")
        try:
            engine = opened(setting)
        except BackendError as err:
            raise Skip(str(err)) from err
        with predictor_of(setting, engine) as predictor, _Memory(setting) as memory:
            first = _wall(lambda: predictor((image, spacing)))
            runs, stages = [], []
            for _ in range(1 if setting.toy else 3):
                start = time.perf_counter()
                result = predictor((image, spacing))
                runs.append(time.perf_counter() - start)
                stages.append(result.seconds)
        np.save(setting.work / f"labels {name}.npy", result.labels)
        windows, shared = result.windows
        return {
            "engine": engine.name,
            "seconds": statistics.median(runs),
            "runs": runs,
            "first_run_seconds": first,
            "stages": {stage: statistics.median(one[stage] for one in stages) for stage in stages[0]},
            "windows": windows,
            "shared_because_constant": shared,
            "peak_device_bytes": memory.peak,
        }

    return run


def nnunet(setting: Setting) -> dict[str, Any]:
    """nnU-Net v2's way, stated again; once, after a small case that warms up cuDNN."""
    import torch
    from safetensors.torch import load_file

    from segrt.networks import build, load_weights

    if setting.on_gpu and not torch.cuda.is_available():
        raise Skip("this torch has no CUDA")
    network, norm = build(setting.bundle.spec.network), setting.bundle.spec.channels[0].normalization
    load_weights(network, load_file(str(setting.bundle.weights_path("0"))))
    device = setting.device if setting.on_gpu else "cpu"
    rival = NnunetPredictor(network, patch=setting.full.patch, spacing=TARGET_SPACING, norm=norm, device=device)
    rival(*case(setting, setting.small, "small"))
    image, spacing = case(setting, setting.full, "full")
    with _Memory(setting) as memory:
        start = time.perf_counter()
        labels = rival(image, spacing)
        seconds = time.perf_counter() - start
    np.save(setting.work / "labels nnunet.npy", labels)
    return {"seconds": seconds, "stages": rival.seconds, "peak_device_bytes": memory.peak}


def compared(setting: Setting) -> dict[str, Any]:
    """How many voxels of the whole case the runs agree on; weights are random, so many voxels lie near a tie."""
    found = {path.stem.removeprefix("labels "): np.load(path) for path in sorted(setting.work.glob("labels *.npy"))}
    names = list(found)
    return {f"{a} | {b}": float((found[a] == found[b]).mean()) for i, a in enumerate(names) for b in names[i + 1 :]}


def as_the_cpu(setting: Setting) -> dict[str, Any]:
    """A smaller case on the CPU in fp32, against the device in fp32 and fp16."""
    image, spacing = case(setting, setting.small, "small")
    with Predictor(setting.bundle, device="cpu", backend="pytorch", precision="fp32", tta=False) as predictor:
        start = time.perf_counter()
        expected = predictor((image, spacing)).labels
        seconds = time.perf_counter() - start
    agreement = {}
    for precision in ("fp32", "fp16"):
        with predictor_of(setting, open_torch(setting, precision, 4)) as predictor:
            labels = predictor((image, spacing)).labels
            agreement[precision] = float((labels == expected).mean())
    assert agreement["fp32"] > 0.999, agreement
    return {"label_agreement": agreement, "cpu_seconds": seconds, "labels_used": len(np.unique(expected))}


def repeated(opened: Callable[[Setting], Engine]) -> Callable[[Setting], dict[str, Any]]:
    """A small case a hundred times: equal bytes?"""

    def run(setting: Setting) -> dict[str, Any]:
        count = 2 if setting.toy else 100
        image, spacing = case(setting, setting.small, "small")
        try:
            engine = opened(setting)
        except BackendError as err:
            raise Skip(str(err)) from err
        with predictor_of(setting, engine) as predictor, _Memory(setting) as memory:
            hashes = [hashlib.sha256(predictor((image, spacing)).labels.tobytes()).hexdigest() for _ in range(count)]
        assert len(set(hashes)) == 1, f"{len(set(hashes))} different label maps in {count} runs"
        return {"runs": count, "different": len(set(hashes)), "sha256": hashes[0], "peak_device_bytes": memory.peak}

    return run


class _Memory:
    """Samples how much of the GPU's memory is in use, by whomever, while a block runs."""

    def __init__(self, setting: Setting) -> None:
        self._on_gpu, self._ended = setting.on_gpu, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak: int | None = None

    def __enter__(self) -> _Memory:
        if self._on_gpu:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._on_gpu:
            self._thread.join()

    def _sample(self) -> None:
        import cupy

        while not self._ended.wait(0.005):
            free, total = cupy.cuda.runtime.memGetInfo()
            self.peak = max(self.peak or 0, total - free)


def _wall(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


ENGINES: dict[str, Callable[[Setting], Engine]] = {
    "pytorch fp16": lambda setting: open_torch(setting, "fp16", 4),
    "onnxruntime fp16": lambda setting: open_onnxruntime(setting, "fp16", 4),
    "tensorrt fp16": lambda setting: open_tensorrt(setting, "fp16", 4),
}
JOBS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    **{name: ours(name, opened) for name, opened in ENGINES.items()},
    "as the CPU": as_the_cpu,
    "nnunet": nnunet,
    "agreement": compared,
    "pytorch fp16 compiled": ours("pytorch fp16 compiled", lambda setting: open_torch(setting, "fp16", 4, compiled=setting.on_gpu)),
}
REPEATS: dict[str, Callable[[Setting], dict[str, Any]]] = {name: repeated(opened) for name, opened in ENGINES.items()}
