"""A training step of segrt against nnU-Net v2's: the same network, weights, patch, batch, loss and optimizer on a CPU, steps in turn.

    python benchmarks/step_time.py --rival .venv-rival/bin --shared ../shared [--plans Dataset603_Hippocampus] [--batch 2]

Ours is what `segrt.train.loop.train` does from one iteration to the next, records included; theirs is nnUNetTrainer.train_step alone.
Before anything is timed the losses of the first steps, and so those of the updated weights, are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from _timer import environment, write_results

from segrt.export.importers.checkpoint import rename_weights
from segrt.export.importers.plans import model_spec
from segrt.networks import build, count_parameters, supervision_scales
from segrt.spec import ModelSpec
from segrt.train.config import make_config
from segrt.train.folds import class_names
from segrt.train.loop import Job, Step, train
from segrt.train.losses import build_loss

COMPARED, WARMUP, TOLERANCE = 3, 3, 2e-3


class Rival:
    """nnU-Net in a process of its own, which makes a step when it is asked to."""

    def __init__(self, python: Path, *arguments: str | Path) -> None:
        script = Path(__file__).with_name("_nnunet_step.py")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([str(python), str(script), *map(str, arguments)], **pipes)
        self._answer("ready")

    def step(self) -> tuple[float, float]:
        """Seconds and loss."""
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        _, seconds, loss = self._answer("step").split()
        return float(seconds), float(loss)

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line
        raise SystemExit("nnU-Net's process ended; what it said is above")

    def close(self) -> None:
        """End its process."""
        self._process.communicate()


def make_batch(spec: ModelSpec, batch: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Noise, and boxes of every label; the coarser targets take every second voxel of the finer."""
    rng = np.random.default_rng(0)
    patch = spec.inference.patch[3 - spec.dimensions :]
    data = rng.normal(size=(batch, spec.in_channels, *patch)).astype(np.float32)
    labels = np.zeros((batch, 1, *patch), np.int16)
    for number, value in enumerate(range(1, spec.classes)):
        corner = [n * number // spec.classes for n in patch]
        labels[(..., *(slice(c, c + n // 3) for c, n in zip(corner, patch, strict=True)))] = value
    targets = []
    for scale in supervision_scales(spec.network):
        every = tuple(slice(None, None, round(1 / share)) for share in scale[3 - spec.dimensions :])
        targets.append(torch.from_numpy(np.ascontiguousarray(labels[(..., *every)])))
    return torch.from_numpy(data), tuple(targets)


def make_job(spec: ModelSpec, weights: dict[str, torch.Tensor], batch: Any, folder: Path, *, batch_dice: bool, iterations: int) -> Job:
    """nnU-Net's recipe; no validation and no checkpoint before the end."""

    def network() -> torch.nn.Module:
        made = build(spec.network, deep_supervision=True)
        made.load_state_dict(weights)
        return made

    def batches(_first: int) -> Iterator[Any]:
        return repeat((*batch, ("case",) * len(batch[0])))

    config = make_config("nnunet", iterations=iterations, schedule="constant", precision="fp32", validation_batches=0, log_interval=10**6)
    loss = build_loss(spec, batch_dice=batch_dice, deep_supervision=True)
    return Job(network, loss, batches, batches, class_names(spec), spec.head, config, folder)


def compare(job: Job, rival: Rival, runs: int) -> dict[str, Any]:
    """Steps in turn; those before the last `runs` warm up."""
    ours, theirs, losses = list[float](), list[float](), list[tuple[float, float]]()
    left = time.perf_counter()

    def between(step: Step) -> None:
        nonlocal left
        ours.append(time.perf_counter() - left)
        seconds, loss = rival.step()
        theirs.append(seconds)
        losses.append((step.loss, loss))
        if len(losses) <= COMPARED:
            assert abs(step.loss - loss) <= TOLERANCE * abs(loss), f"the losses of step {len(losses)} differ: {losses}"
        left = time.perf_counter()

    train(job, torch.device("cpu"), progress=between)
    # the last iteration writes a checkpoint
    ours, theirs = ours[WARMUP : WARMUP + runs], theirs[WARMUP : WARMUP + runs]
    medians = {"segrt": statistics.median(ours), "nnunetv2": statistics.median(theirs)}
    return {
        "ratio": medians["segrt"] / medians["nnunetv2"],
        "median_s": medians,
        "runs_s": {"segrt": ours, "nnunetv2": theirs},
        "losses": {"segrt": [a for a, _ in losses[:COMPARED]], "nnunetv2": [b for _, b in losses[:COMPARED]]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", type=Path, required=True, help="bin folder of an environment with nnunetv2==2.8.1")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--plans", default="Dataset603_Hippocampus")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--features", help="Of every stage, such as 4,8,16,32, for a run that only shows that it works.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    golden = options.shared / "golden" / "plans" / options.plans
    plans, dataset = (json.loads((golden / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    dataset.setdefault("file_ending", ".nii.gz")
    chosen = plans["configurations"][options.configuration]
    if options.features:
        chosen["architecture"]["arch_kwargs"]["features_per_stage"] = [int(n) for n in options.features.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name, values in (("plans.json", plans), ("dataset.json", dataset)):
            (place / name).write_text(json.dumps(values))
        rival = Rival(
            options.rival / "python", place / "plans.json", place / "dataset.json", options.configuration, place, str(options.threads)
        )
        spec = model_spec(plans, dataset, options.configuration, members=("0",))
        data, targets = make_batch(spec, options.batch)
        np.savez(place / "batch.npz", data=data.numpy(), **{f"target_{i}": target.numpy() for i, target in enumerate(targets)})
        weights = rename_weights({k: torch.from_numpy(v) for k, v in np.load(place / "weights.npz").items()}, where="nnU-Net")
        job = make_job(
            spec, weights, (data, targets), place / "ours", batch_dice=chosen["batch_dice"], iterations=WARMUP + options.runs + 1
        )
        found = compare(job, rival, options.runs)
        rival.close()
    found |= {
        "plan": options.plans,
        "patch": spec.inference.patch,
        "batch": options.batch,
        "threads": options.threads,
        "parameters": count_parameters(build(spec.network)),
        "rival": "nnunetv2 2.8.1, nnUNetTrainer.train_step, torch " + torch.__version__,
    }
    print(json.dumps({name: found[name] for name in ("ratio", "median_s", "losses")}, indent=1))
    write_results("step_time", {**found, **environment()}, toy=bool(options.features))


if __name__ == "__main__":
    main()
