"""Tiny trainings: a small U-Net that learns to find bright voxels in batches made on the spot, and datasets of a few bright balls."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import UNET_3D, write_case
from torch import Tensor, distributed

from segrt.networks import build
from segrt.spec import Head, NetworkSpec
from segrt.train.config import TrainConfig, make_config
from segrt.train.loader import share
from segrt.train.loop import Batch, Job, Step, train

CPU = torch.device("cpu")
SIDE = 8


def tiny_config(**changes: Any) -> TrainConfig:
    """A training of a few iterations that validates and saves as it goes."""
    fields = {
        "iterations": 6,
        "epoch": 2,
        "validation_interval": 3,
        "validation_batches": 2,
        "save_interval": 2,
        "log_interval": 2,
        "seed": 1,
        "precision": "fp32",
    }
    return make_config("nnunet", **{**fields, **changes})


def make_batches(seed: int, *, size: int = 2, spoil: int | None = None) -> Callable[[int], Iterator[Batch]]:
    """Endless batches of noise whose bright and very bright voxels are classes 1 and 2; batch `spoil` holds a NaN.

    In a process group every process gets its share of each batch.
    """
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    part = share(size, rank, processes)
    own = slice(part.first, part.last)

    def batches(first: int) -> Iterator[Batch]:
        number = first
        while True:
            data = np.random.default_rng((seed, number)).normal(size=(size, 1, SIDE, SIDE, SIDE)).astype(np.float32)
            target = (data[:, 0] > 0.5).astype(np.int64) + (data[:, 0] > 1)
            if number == spoil:
                data[0] = np.nan
            names = [f"case_{number}_{i}" for i in range(size)]
            yield torch.from_numpy(data[own]), (torch.from_numpy(target[own]),), names[own]
            number += 1

    return batches


def cross_entropy(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the tiny trainings; a group of processes waits for a gradient of every head."""
    loss = torch.nn.functional.cross_entropy(outputs[0].float(), targets[0], ignore_index=-1) + 0 * sum(o.sum() for o in outputs[1:])
    return loss, {"ce": loss}


def tiny_job(folder: Path, config: TrainConfig | None = None, **changes: Any) -> Job:
    """A job of `config` whose batches need no dataset."""
    fields: dict[str, Any] = {
        "build": lambda: build(UNET_3D, deep_supervision=True),
        "loss": cross_entropy,
        "batches": make_batches(10),
        "validation": make_batches(20),
        "classes": ("bright", "very bright"),
        "head": Head(activation="softmax", values=(0, 1, 2)),
        "config": config or tiny_config(),
        "folder": folder,
        "plan": "plan",
    }
    return Job(**{**fields, **changes})


def run(job: Job) -> list[Step]:
    """Train and give every step."""
    steps: list[Step] = []
    assert train(job, CPU, progress=steps.append)
    return steps


def train_in_group(
    rank: int,
    processes: int,
    folder: str,
    port: int,
    dropout: float = 0.0,
    stop: int | None = None,
    network: NetworkSpec | None = None,
    size: int = 2,
) -> None:
    """One process of a gloo group, as torchrun would start it; the first asks to stop in iteration `stop`.

    network : trained without deep supervision, instead of the tiny one with it
    size : of a common batch
    """

    def progress(step: Step) -> None:
        if step.iteration == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    supervised = network is None
    network = network or UNET_3D.model_copy(update={"dropout": dropout})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        part = share(size, rank, processes)
        data = {"batches": make_batches(10, size=size), "validation": make_batches(20, size=size), "weight": part.weight(processes)}
        train(tiny_job(Path(folder), build=lambda: build(network, deep_supervision=supervised), **data), CPU, progress=progress)
    finally:
        distributed.destroy_process_group()


def write_dataset(folder: Path, *, cases: int = 5, shape: tuple[int, int, int] = (16, 20, 24), spacing: float = 2.0) -> Path:
    """A dataset of nnU-Net's layout: noise with a bright ball (value 2) and a brighter one (value 5) in each image."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)
    for number in range(cases):
        rng = np.random.default_rng(number)
        image, labels = rng.normal(100, 10, shape), np.zeros(shape, np.uint8)
        for value, brightness, middle in ((2, 200, 0.3), (5, 320, 0.7)):
            centre = np.array([middle * n for n in shape]) + rng.uniform(-1, 1, 3)
            ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < (0.2 * min(shape) + 1) ** 2
            image[ball], labels[ball] = rng.normal(brightness, 10, int(ball.sum())), value
        write_case(folder / "imagesTr" / f"ball_{number:03d}_0000.nii.gz", image.astype(np.int16), (spacing,) * 3)
        write_case(folder / "labelsTr" / f"ball_{number:03d}.nii.gz", labels, (spacing,) * 3)
    described = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "ball": 2, "bright ball": 5},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder
