"""Stage of `gpu.py`: ways through a case that have to end in the same labels, several engines, slab by slab, with half the batch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from _gpu_case import case, predictor_of
from _gpu_engines import open_torch
from _gpu_setting import CLASSES, TOY, Setting, Skip, make_bundle

from segrt.assemble import Flow, assemble
from segrt.device import compute_on, device_number, open_stream, to_device, to_host
from segrt.engines import Engine, open_engine
from segrt.engines.compose import Spread
from segrt.infer import infer
from segrt.kernels.normalize import clip_shift_scale
from segrt.predictor import Predictor
from segrt.preprocess import preprocess
from segrt.spec import Inference, UNetPPSpec, VNetSpec
from segrt.volume import Grid, Volume

_BATCH = 4
_NARROW = (8, 16, 32, 64, 128)


class Cramped:
    """An engine that says that memory ran out when it is given more than half of its batch."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.device, self.batch, self.held_bytes = f"{engine.name}, cramped", engine.device, engine.batch, engine.held_bytes

    def __call__(self, patches: Any) -> Any:
        if len(patches) > self._engine.batch // 2:
            raise MemoryError("no room for these windows")
        return self._engine(patches)

    def close(self) -> None:
        self._engine.close()


def labels_by(setting: Setting, engine: Engine) -> np.ndarray:
    with predictor_of(setting, engine) as predictor:
        return predictor(case(setting, setting.small, "small")).labels


def several(count: int) -> Callable[[Setting], dict[str, Any]]:
    """The windows of a case over several copies of the network, each in a thread and a stream of its own."""

    def run(setting: Setting) -> dict[str, Any]:
        expected = labels_by(setting, open_torch(setting, "fp16", 1))
        found = labels_by(setting, Spread([open_torch(setting, "fp16", 1) for _ in range(count)]))
        return _equal(expected, found) | {"engines": count}

    return run


def by_slab(setting: Setting) -> dict[str, Any]:
    """Logits of one start along z at a time, as for an image whose logits do not fit, against all at once."""
    image, spacing = case(setting, setting.small, "small")
    spec, engine = setting.bundle.spec, open_torch(setting, "fp16", _BATCH)
    volume = Volume(to_device(image[None], setting.device), Grid(image.shape, spacing))
    labels, counts = [], []
    for starts in (None, 1):
        data, placement = preprocess(volume, spec)
        planes = list_counted(infer(data, [engine], spec, starts_per_slab=starts), counts)
        labels.append(to_host(assemble([Flow(planes, placement, spec)], probabilities=False)[0]))
    assert counts[0] == 1 < counts[1], counts
    engine.close()
    return _equal(*labels) | {"slabs": counts[1]}


def list_counted(planes: Any, counts: list[int]) -> Any:
    """Give the planes on, and note how many slabs they came in."""
    counts.append(0)
    for part in planes:
        counts[-1] += 1
        yield part


def told(setting: Setting) -> dict[str, Any]:
    """An engine that refuses its own batch, against one of half the batch."""
    expected = labels_by(setting, open_torch(setting, "fp16", _BATCH))
    return _equal(expected, labels_by(setting, Cramped(open_torch(setting, "fp16", _BATCH))))


def out_of_memory(setting: Setting) -> dict[str, Any]:
    """PyTorch with less memory than its batch takes, against the batch that it came down to."""
    if not setting.on_gpu:
        raise Skip("the memory of a host is not capped")
    import torch

    largest = 4 * _BATCH
    labels_by(setting, open_torch(setting, "fp16", largest))
    gpu = device_number(setting.device)
    peak, total = torch.cuda.max_memory_reserved(gpu), torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.6 * peak / total, gpu)
        engine = open_torch(setting, "fp16", largest)
        found = labels_by(setting, engine)
        assert engine.batch < largest, "memory did not run out"
        expected = labels_by(setting, open_torch(setting, "fp16", engine.batch))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    return _equal(expected, found) | {"batch": largest, "came_down_to": engine.batch}


def family(network: Any) -> Callable[[Setting], dict[str, Any]]:
    """A network without a kernel of ours between its convolutions, in float32 and float16 against the CPU in float32."""

    def run(setting: Setting) -> dict[str, Any]:
        path = setting.work / network.family
        path.mkdir(exist_ok=True)
        inference = Inference(patch=(1 if network.dimensions == 2 else 16, 32, 32))
        bundle = make_bundle(path / "bundle", inference.patch, toy=True, network=network, inference=inference)
        image, spacing = case(replace(setting, work=path), TOY, "case")
        with Predictor(bundle, device="cpu", backend="pytorch", precision="fp32") as predictor:
            expected = predictor((image, spacing)).labels
        agreement = {}
        for precision in ("fp32",) if setting.toy else ("fp32", "fp16"):  # which a CPU takes long for
            how: dict[str, Any] = {"device": setting.device, "precision": precision}
            engine = open_engine(bundle, "0", backend="pytorch", **how)
            with Predictor(bundle, device=setting.device, engines=[engine]) as predictor:
                agreement[precision] = float((predictor((image, spacing)).labels == expected).mean())
        assert agreement["fp32"] > 0.999, agreement
        assert min(agreement.values()) > 0.98, agreement
        return {"label_agreement": agreement, "labels_used": len(np.unique(expected))}

    return run


def several_threads(setting: Setting) -> dict[str, Any]:
    """Arrays that go up, through a kernel and down again in four threads with a stream each, against the CPU."""

    def there_and_back(seed: int) -> bool:
        image = np.random.default_rng(seed).integers(-1000, 1000, setting.small.image).astype(np.int16)
        with compute_on(setting.device, open_stream(setting.device)):
            found = to_host(clip_shift_scale(to_device(image, setting.device), -958, 326, 82, 136))
        return np.array_equal(found, clip_shift_scale(image, -958, 326, 82, 136))

    with ThreadPoolExecutor(4) as pool:
        equal = list(pool.map(there_and_back, range(24)))
    assert all(equal), f"{equal.count(False)} of {len(equal)} arrays differ"
    return {"arrays": len(equal)}


def _equal(expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    differing = int((expected != found).sum())
    assert not differing, f"{differing} of {found.size} labels differ"
    return {"labels_that_differ": differing, "labels_used": len(np.unique(found))}


JOBS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "two engines": several(2),
    "three engines": several(3),
    "by slab": by_slab,
    "half the batch, told": told,
    "half the batch, out of memory": out_of_memory,
    "several threads": several_threads,
    # mirrored, as the default is
    "V-Net, as the CPU": family(VNetSpec(in_channels=1, out_channels=CLASSES, width=0.5, dropout=0)),
    "UNet++, as the CPU": family(UNetPPSpec(family="unetpp", dimensions=3, in_channels=1, out_channels=CLASSES, features=_NARROW, level=3)),
    "U-Net of slices, as the CPU": family(UNetPPSpec(family="unet", in_channels=1, out_channels=CLASSES, features=_NARROW)),
}
