"""The training loop of one fold, from its first line to its last; TRAIN, between prepared cases and a member's weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..spec import Head
from .checkpoint import Checkpoints
from .config import TrainConfig
from .divergence import MOST_SKIPPED, no_gradient, no_loss
from .epoch import EpochMeans, EpochSums, dice_of, iou_of, mean_of
from .layout import lay_out, widen_thin_convolutions
from .optim import build_optimizer, build_schedule, clip_gradients
from .processes import add_up, agree, parallel, processes, rank, synchronised, wait_for_all
from .records import Records
from .surroundings import draw_anew, gpu_settings, opened, profiler, seeded, signals

logger = logging.getLogger(__name__)

# data (B, C, (Z,) Y, X) float32, class indices per supervision scale (-1: not to be learned), names of the cases
Batch: TypeAlias = tuple[Tensor, Sequence[Tensor], Sequence[str]]
Batches: TypeAlias = Callable[[int], Iterator[Batch]]
Loss: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, dict[str, Tensor]]]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOMENTUM = 0.9  # of the pseudo Dice's moving average, as nnU-Net has it


@dataclass(frozen=True)
class Job:
    """What one fold trains.

    Attributes
    ----------
    build : makes the network with fresh weights; its forward gives logits, or several of them, finest first
    loss : (logits per scale, targets per scale) -> the loss and its parts
    batches, validation : endless batches from a given batch number on, the same ones every time
    classes : names of the foreground classes, in the network's order (without a softmax's background)
    head : what the network's channels mean
    folder : of this fold: checkpoints/, training.csv, ...
    plan : SHA-256 of what the data and the network were planned as
    weight : of this process's losses in the mean over all, where its share of a batch is larger or smaller than theirs
    """

    build: Callable[[], nn.Module]
    loss: Loss
    batches: Batches
    validation: Batches
    classes: tuple[str, ...]
    head: Head
    config: TrainConfig
    folder: Path
    plan: str = ""
    weight: float = 1.0

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this fold."""
        return Checkpoints(self.folder / "checkpoints", self.config, self.plan)


@dataclass(frozen=True)
class Step:
    """One iteration as progress shows it; times are in s.

    Attributes
    ----------
    dice : mean pseudo Dice, of the batch where every batch's is taken, else of the last validation; None until there is one
    epoch : what the epoch came to, after its last iteration
    """

    iteration: int
    iterations: int
    loss: float
    dice: float | None
    lr: float
    batch_cost: float
    reader_cost: float
    eta_s: float
    epoch: EpochMeans | None = None


ProgressStep: TypeAlias = Callable[[Step], None]


def train(job: Job, device: torch.device, *, progress: ProgressStep | None = None) -> bool:
    """Train a fold to its end, from its newest checkpoint on; True when the end was reached, False when a signal stopped it.

    In a process group (`torchrun`) every process runs this on its own batches; the first one keeps the records.

    Raises
    ------
    InputError
        When the loss is no number any more, or so are the gradients of many iterations in a row; the sentence names the cases of the batch.
    SpecError
        When the checkpoint belongs to another plan or configuration.
    """
    config, first = job.config, rank() == 0
    with ExitStack() as stack:
        stack.enter_context(seeded(config.seed + rank(), device))
        stop = stack.enter_context(signals())
        stack.enter_context(gpu_settings(device))

        network = job.build().to(device).train()
        layout = lay_out(network, device)
        widen_thin_convolutions(network, device)
        optimizer = build_optimizer(network.parameters(), config)
        schedule = build_schedule(optimizer, config, config.iterations)
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
        start, kept = job.checkpoints.resume(parts)
        dice, average, best = kept.get("dice"), kept.get("average"), kept.get("best")
        budget, spent = 60 * config.minutes if config.minutes else math.inf, float(kept.get("seconds", 0.0))
        if start >= config.iterations or spent >= budget:
            return True
        if start:
            logger.info("%s: going on from iteration %d of %d", job.folder, start, config.iterations)
        model = parallel(network, device)
        forward = torch.compile(model) if config.compile else model
        batches = stack.enter_context(opened(job.batches, start * config.accumulation))
        validated = start // config.validation_interval * config.validation_batches
        validation = stack.enter_context(opened(job.validation, validated))
        records = stack.enter_context(Records(job.folder, job.classes, iteration=start)) if first else None
        recorder = stack.enter_context(profiler(config, start, job.folder)) if first else None
        pace, sums, skipped = _Pace(), EpochSums(kept.get("epoch"), device), 0
        overlap = None if kept.get("overlap") is None else torch.tensor(kept["overlap"], dtype=torch.float64, device=device)

        for iteration in range(start + 1, config.iterations + 1):
            began, reading, total = time.perf_counter(), 0.0, 0.0
            names: list[str] = []
            draw_anew(config.seed, rank(), iteration)
            for part in range(config.accumulation):
                asked = time.perf_counter()
                data, targets, cases = next(batches)
                reading += time.perf_counter() - asked
                data = data.to(device, non_blocking=True, memory_format=layout)
                targets = [target.to(device, non_blocking=True) for target in targets]
                with synchronised(model, last=part == config.accumulation - 1):
                    with torch.autocast(device.type, _DTYPES[config.precision], enabled=config.precision != "fp32"):
                        outputs = _levels(forward(data))
                    loss = job.weight * job.loss(outputs, targets)[0]
                    torch.autograd.backward(scaler.scale(loss / config.accumulation))
                total += loss.item() / config.accumulation
                names += cases
            mean, stopping, seconds = agree(total, bool(stop), spent + time.perf_counter() - began, device)
            last = iteration == config.iterations or seconds >= budget
            if not math.isfinite(mean):
                raise InputError(no_loss(iteration, mean, names, config))
            scaler.unscale_(optimizer)
            norm = clip_gradients(network.parameters(), config.clip or math.inf).item()
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped >= MOST_SKIPPED:
                raise InputError(no_gradient(iteration, norm, names, config))
            if not skipped or scaler.is_enabled():
                scaler.step(optimizer)
            else:  # fp16's scaler finds that itself
                logger.warning("iteration %d: a gradient is %s, so the weights stay as they are", iteration, norm)
            scaler.update()
            lr = optimizer.param_groups[0]["lr"]
            schedule.step(seconds / budget)
            optimizer.zero_grad(set_to_none=True)
            cost = time.perf_counter() - began
            spent = max(spent + cost, seconds)

            counted = iteration % (config.dice_interval or config.log_interval) == 0
            counts = _overlap(outputs[0].detach(), targets[0], job.head) if counted else None
            shown = None if counts is None else mean_of(dice_of(counts))
            sums.add(mean, counts)
            if records:
                values = {"loss": mean, "dice": shown, "lr": lr, "batch_cost": cost, "reader_cost": reading}
                records.training(iteration, values)
            if config.validation_batches and (iteration % config.validation_interval == 0 or last):
                validation_loss, overlap = _validate(network, validation, job, device, layout)
                scores = dice_of(overlap)
                dice = mean_of(scores)
                if dice is not None:
                    average = dice if average is None else _MOMENTUM * average + (1 - _MOMENTUM) * dice
                if records:
                    values = {"loss": validation_loss, "dice": dice, "average": average, "IoU": mean_of(iou_of(overlap))}
                    records.validation(iteration, values, scores)
                if average is not None and (best is None or average > best):
                    best = average
                    if first:
                        job.checkpoints.save_best(iteration, network, {"average": average})
            over = None
            if iteration % config.epoch == 0 or last:
                over = sums.end(-(-iteration // config.epoch), config.epoch, overlap, lr)
                if records:
                    records.epoch(iteration, over)
            if iteration % config.save_interval == 0 or last or stopping:
                if records:
                    looked = None if overlap is None else overlap.tolist()
                    scored = {"dice": dice, "average": average, "best": best, "overlap": looked}
                    job.checkpoints.save(iteration, parts, {**scored, "seconds": spent, "epoch": sums.state})
                    records.flush()
                wait_for_all()
            if recorder:
                recorder.step()
            if progress and first:
                left = 0 if last else pace.left(time.perf_counter() - began, config.iterations - iteration, budget - seconds)
                told = shown if config.dice_interval == 1 else dice
                progress(Step(iteration, iteration + left, mean, told, lr, cost, reading, left * pace.mean, over))
            if last:
                break
            if stopping:
                return False
    return True


def _levels(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _validate(
    network: nn.Module, batches: Iterator[Batch], job: Job, device: torch.device, layout: torch.memory_format
) -> tuple[float, Tensor]:
    """Mean loss and the overlap of each foreground class over the next validation batches, all processes together; see `_overlap`."""
    config = job.config
    counts = torch.zeros(3, len(job.classes), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    network.eval()
    with torch.no_grad():
        for _ in range(config.validation_batches):
            data, targets, _names = next(batches)
            targets = [target.to(device, non_blocking=True) for target in targets]
            with torch.autocast(device.type, _DTYPES[config.precision], enabled=config.precision != "fp32"):
                outputs = _levels(network(data.to(device, non_blocking=True, memory_format=layout)))
            total += job.weight * job.loss(outputs, targets[: len(outputs)])[0]
            counts += _overlap(outputs[0], targets[0], job.head)
    network.train()
    add_up(counts, total)
    return float(total) / config.validation_batches / processes(), counts


def _overlap(logits: Tensor, target: Tensor, head: Head) -> Tensor:
    """(3, foreground classes) float64: voxels that are true positive, false positive, false negative; target -1 counts nowhere.

    target : class indices (B, ...) or (B, 1, ...); for regions 0 and 1 per channel
    """
    axes = [0, *range(2, logits.ndim)]
    if head.activation == "sigmoid":
        known = target >= 0
        truth = target > 0
        found = (logits.sigmoid() > head.threshold) & known
    else:
        target = target if target.ndim == logits.ndim else target[:, None]
        known = target >= 0
        classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
        truth = target == classes
        found = (logits.argmax(1, keepdim=True) == classes) & known
    both = (found & truth).sum(axes)
    return torch.stack([both, found.sum(axes) - both, (truth & known).sum(axes) - both]).double()


class _Pace:
    """Seconds per iteration, averaged over about the last hundred."""

    def __init__(self) -> None:
        self.mean = 0.0

    def left(self, seconds: float, iterations: int, budget: float) -> int:
        """Iterations still to come after one that took `seconds`: at most `iterations`, and what fits into the seconds of `budget`."""
        self.mean = 0.98 * self.mean + 0.02 * seconds if self.mean else seconds
        return min(iterations, max(1, round(min(budget / self.mean, iterations))))
