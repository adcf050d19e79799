"""Batches per second by augmentation and workers, and what share of a small network's step waits for them.

    python benchmarks/loader.py [FOLDER] [--toy]

FOLDER holds `images` and `labels` (the hippocampus of the Medical Decathlon, say); without one, volumes of that size are made up.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from _timer import environment, write_results

from segrt.io import write_image
from segrt.networks import build, count_parameters
from segrt.spec import Channel, Head, Inference, Label, ModelSpec, SpacingTarget, UNetSpec, ZScoreNorm
from segrt.train.cache import Prepared
from segrt.train.configuration import Configuration
from segrt.train.dataset import open_dataset
from segrt.train.layout import lay_out
from segrt.train.loader import Batches
from segrt.train.losses import build_loss
from segrt.train.prepare import prepare
from segrt.volume import Grid

PATCH, BATCH = (40, 56, 40), 9  # nnU-Net's plan for the hippocampus


def make_images(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        shape = tuple(int(n) for n in rng.integers((31, 43, 30), (39, 57, 42)))
        for kind, data in (("images", rng.integers(1, 900, shape)), ("labels", rng.integers(0, 3, shape))):
            path = folder / kind / f"case_{number:03d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, data.astype(np.int16 if kind == "images" else np.uint8), Grid(shape, (1.0, 1.0, 1.0)))
    return folder


def configure(patch: tuple[int, int, int], batch: int) -> Configuration:
    """A small U-Net: 4 levels from 8 features on."""
    network = UNetSpec(
        family="plain_unet",
        dimensions=3,
        in_channels=1,
        out_channels=3,
        features=(8, 16, 32, 64),
        kernels=((3, 3, 3),) * 4,
        strides=((1, 1, 1), *((2, 2, 2),) * 3),
        blocks=(2,) * 4,
        decoder_convs=(2,) * 3,
    )
    spec = ModelSpec(
        name="hippocampus",
        channels=(Channel(name="MR", normalization=ZScoreNorm()),),
        labels=(Label(name="anterior", values=(1,)), Label(name="posterior", values=(2,))),
        head=Head(activation="softmax", values=(0, 1, 2)),
        target=SpacingTarget(spacing=(1.0, 1.0, 1.0)),
        inference=Inference(patch=patch, mirror_axes=(0, 1, 2)),
        network=network,
        members=("0",),
    )
    return Configuration(spec=spec, batch_size=batch, batch_dice=True, median_shape=(36, 50, 35), deep_supervision=True)


def pace(batches: Batches, count: int) -> dict[str, float]:
    """Seconds to the first batch and per batch after that, with nothing else to do, and to the end of the workers."""
    began = time.perf_counter()
    stream = batches()
    next(stream)
    first = time.perf_counter()
    for _ in islice(stream, count):
        pass
    last = time.perf_counter()
    stream.close()
    return {"first_s": first - began, "batch_s": (last - first) / count, "close_s": time.perf_counter() - last}


def train(batches: Batches, configuration: Configuration, steps: int) -> dict[str, float]:
    """Mean seconds of a training step, and what part of it waits for the next batch; the first steps are not counted."""
    network = build(configuration.spec.network, deep_supervision=True)
    layout = lay_out(network, torch.device("cpu"))
    loss = build_loss(configuration.spec, batch_dice=True, deep_supervision=True)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True)
    stream, waiting, whole = batches(), [], []
    for _ in range(steps + 5):
        began = time.perf_counter()
        batch = next(stream)
        waiting.append(time.perf_counter() - began)
        value, _parts = loss(network(batch.data.to(memory_format=layout)), batch.targets)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        whole.append(time.perf_counter() - began)
    stream.close()
    return {"step_s": sum(whole[5:]) / steps, "reader_share": sum(waiting[5:]) / sum(whole[5:])}


def prepared_cases(folder: Path, configuration: Configuration, cache: Path, count: int) -> tuple[Prepared, float]:
    dataset = open_dataset(folder, name="hippocampus")
    began = time.perf_counter()
    prepared = prepare(replace(dataset, cases=dataset.cases[:count]), configuration, cache, workers=1)
    return prepared, (time.perf_counter() - began) / len(prepared.cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    count = 4 if options.toy else 40
    configuration = configure((16, 24, 16), 2) if options.toy else configure(PATCH, BATCH)
    results: dict[str, Any] = {"patch": configuration.spec.inference.patch, "batch": configuration.batch_size, "pace": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or make_images(Path(scratch) / "raw", count)
        prepared, results["prepare_s_per_case"] = prepared_cases(folder, configuration, Path(scratch) / "cache", count)
        for augmentation in ("none", "nnunet", "article"):
            for workers in (0,) if options.toy else (0, 1, 2):
                batches = Batches(prepared, configuration, augmentation=augmentation, workers=workers)
                found = results["pace"][f"{augmentation}, {workers} workers"] = pace(batches, 2 if options.toy else 20)
                print(f"{augmentation:8} {workers} workers: {found['batch_s']:.3f} s a batch, first after {found['first_s']:.2f} s")
        results["parameters"] = count_parameters(build(configuration.spec.network))
        workers = 0 if options.toy else 2
        results["training"] = train(Batches(prepared, configuration, workers=workers), configuration, 2 if options.toy else 30)
    print(f"{results['training']['step_s']:.3f} s a step, {results['training']['reader_share']:.1%} of it waiting for {workers} workers")
    write_results("loader", {**results, **environment()}, toy=options.toy)


if __name__ == "__main__":
    main()
