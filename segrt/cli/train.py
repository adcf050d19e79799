"""`segrt-train`: a folder of images with labels becomes a bundle."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .common import comma_list, configure_logging, run, triples

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    dataset: Annotated[
        Path | None,
        typer.Argument(
            help="nnU-Net or Decathlon folder, folders images and labels, or npy lists. With --from-medicalseg the file's own by default.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle to write.")] = Path("segrt_model"),
    model: Annotated[str | None, typer.Option("--model", help="nnunet (default), vnet, unetpp, or unet.")] = None,
    from_medicalseg: Annotated[
        Path | None,
        typer.Option("--from-medicalseg", help="Train as this MedicalSeg YAML says; other options beat it. See --plan-only."),
    ] = None,
    medicalseg_root: Annotated[
        Path | None, typer.Option(help="Folder its _base_ files lie in; the nearest above named configs, or the one above, by default.")
    ] = None,
    configuration: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres, or a pair such as 2d+3d_fullres. With --find-best several.",
        ),
    ] = None,
    fold: Annotated[str | None, typer.Option("--fold", "-f", help="Such as 0, or 0,1,2,3,4, or all: every case.")] = None,
    split: Annotated[str | None, typer.Option(help="kfold, shuffled:0.75, sorted:0.8, or a JSON file of folds.")] = None,
    patients: Annotated[
        str | None,
        typer.Option(
            help="Pattern that finds the patient in a case's name (its first group, or all it matches), such as '(.+)_\\d+': the images of "
            "one lie on one side of the split. UNet++ and U-Net take what comes before a last number by default; none for no patients."
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Train by this plan.json instead of planning.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write and show the plan with its reasons, and stop.")] = False,
    find_best: Annotated[
        bool, typer.Option("--find-best", help="Train every configuration, or those of --config; keep the best, or the best pair.")
    ] = False,
    pairs: Annotated[
        bool | None, typer.Option("--pairs/--no-pairs", help="With --find-best, whether pairs are tried; they are.", show_default=False)
    ] = None,
    planner: Annotated[str | None, typer.Option(help="default, resenc_m, resenc_l, resenc_xl, or v1: nnU-Net 1's.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="GPU memory to plan for.")] = None,
    iters: Annotated[int | None, typer.Option(help="Iterations.")] = None,
    minutes: Annotated[float | None, typer.Option(help="End after this time, where --iters is not reached before.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Instead of --iters: of 250 iterations; of a UNet++ or U-Net, passes over the training cases.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Patches per step, over all processes; the plan's by default.")] = None,
    patch: Annotated[
        str | None, typer.Option(help="z,y,x in voxels; the plan's by default. Without --sliding what a V-Net's or UNet++'s images become.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of pictures, instead of --patch: 256, or height,width such as 192,256.")] = None,
    width: Annotated[float | None, typer.Option(help="Factor on the network's features.")] = None,
    deep_supervision: Annotated[
        bool | None, typer.Option("--deep-supervision/--no-deep-supervision", help="A loss at every resolution.", show_default=False)
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, adam or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD.")] = None,
    nesterov: Annotated[bool | None, typer.Option("--nesterov/--no-nesterov", help="Of SGD.", show_default=False)] = None,
    betas: Annotated[str | None, typer.Option(help="Of Adam and AdamW, such as 0.9,0.999.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="L2 regularisation.")] = None,
    l1: Annotated[float | None, typer.Option("--l1", help="L1 regularisation.")] = None,
    schedule: Annotated[str | None, typer.Option(help="poly, constant, step or cosine.")] = None,
    schedule_by_epoch: Annotated[
        bool | None, typer.Option("--schedule-by-epoch/--schedule-by-iteration", help="When the rate changes.", show_default=False)
    ] = None,
    power: Annotated[float | None, typer.Option(help="Of poly.")] = None,
    end_lr: Annotated[float | None, typer.Option(help="Of poly and cosine.")] = None,
    lrf: Annotated[float | None, typer.Option(help="Instead of --end-lr: the same as a share of --lr.")] = None,
    decay_iters: Annotated[int | None, typer.Option(help="Of poly and cosine; the whole training by default.")] = None,
    step_iters: Annotated[int | None, typer.Option(help="Of step.")] = None,
    step_epochs: Annotated[str | None, typer.Option(help="Of step: the epochs after which the rate falls, such as 10,20.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Of step.")] = None,
    loss: Annotated[str | None, typer.Option(help="dice_ce, mixed, bce or hybrid.")] = None,
    coefficients: Annotated[str | None, typer.Option(help="Of cross-entropy and Dice in the loss, such as 1,1.")] = None,
    class_weights: Annotated[
        str | None, typer.Option(help="Of the cross-entropy: a number per class, background first, or none, or batch (loss mixed).")
    ] = None,
    dice_activation: Annotated[str | None, typer.Option(help="Of loss mixed: sigmoid or softmax.")] = None,
    batch_dice: Annotated[
        bool | None, typer.Option("--batch-dice/--image-dice", help="What dice_ce sums over; the plan's by default.", show_default=False)
    ] = None,
    augmentation: Annotated[str | None, typer.Option(help="nnunet, article or none.")] = None,
    mirroring: Annotated[
        bool | None, typer.Option("--mirroring/--no-mirroring", help="No: left and right have labels of their own.", show_default=False)
    ] = None,
    grey: Annotated[
        float | None, typer.Option(help="Share of samples whose channels all become one of theirs: for pictures that may come grey.")
    ] = None,
    grey_channel: Annotated[str | None, typer.Option(help="The channel they become; any of them by default.", show_default=False)] = None,
    oversampling: Annotated[float | None, typer.Option(help="Share of a batch that has to hold foreground.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp16 on a GPU and fp32 on a CPU by default.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient; 0 for none.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Batches per step.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Let torch.compile make one program of the network.")] = False,  # noqa: A002
    seed: Annotated[int | None, typer.Option(help="Of weights and patches.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare cases and patches.")] = None,
    validation_interval: Annotated[int | None, typer.Option(help="Iterations between two looks at the validation patches.")] = None,
    validation_batches: Annotated[int | None, typer.Option(help="Batches of such a look.")] = None,
    save_interval: Annotated[int | None, typer.Option(help="Iterations between two checkpoints.")] = None,
    log_interval: Annotated[int | None, typer.Option(help="Iterations between two lines and two Dice of a training batch.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints that stay.")] = None,
    weights: Annotated[str | None, typer.Option(help="last or best: what becomes the model.")] = None,
    window: Annotated[
        str | None, typer.Option(help="All but nnunet: auto, article, abdomen, percentile, zscore, none, or two numbers such as -160,240.")
    ] = None,
    sliding: Annotated[bool, typer.Option("--sliding", help="All but nnunet: slide a window instead of resizing the image.")] = False,
    resampling: Annotated[str | None, typer.Option(help="All but nnunet: linear or cubic.")] = None,
    elu: Annotated[bool, typer.Option("--elu", help="V-Net: ELU instead of PReLU.")] = False,
    kernels: Annotated[str | None, typer.Option(help="V-Net: z,y,x of its four steps down, such as 2,2,2/2,2,2/2,2,2/2,2,2.")] = None,
    strides: Annotated[str | None, typer.Option(help="V-Net: likewise, such as 1,2,2/2,2,2/2,2,2/2,2,2.")] = None,
    mode: Annotated[str | None, typer.Option(help="UNet++: accurate (the mean of its heads) or fast (the last one).")] = None,
    dropout: Annotated[float | None, typer.Option(help="UNet++ and U-Net: share of features left out in training.")] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="float32 or float16: prepared cases on disk.")] = None,
    cache_storage: Annotated[str | None, typer.Option(help="blosc2 (compressed) or npy: how they lie there.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Trace iterations 10 to 20 with torch's profiler.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    work: Annotated[Path | None, typer.Option(help="Folder for prepared cases and checkpoints; OUTPUT.train by default.")] = None,
    channels: Annotated[str | None, typer.Option(help="Names of the channels, such as CT or T1,T2.")] = None,
    image_suffix: Annotated[
        str | None, typer.Option(help="How image names end, such as _t1,_t2 (or _t1.png,_t2.png), when the layout is none of the known.")
    ] = None,
    label_suffix: Annotated[str | None, typer.Option("--label-suffix", "--mask-suffix", help="How names of label maps end.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help='What values of label maps mean, as in a dataset.json: a file with {"liver": 1, "tumour": [2, 3], "ignore": 255}.'
        ),
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of the label maps, when DATASET holds images only.")] = None,
    mask_threshold: Annotated[
        float | None, typer.Option(help="Label maps are grey: above is the one structure, the rest is background.")
    ] = None,
    npy_window: Annotated[
        str | None,
        typer.Option(help="Intensities .npy images hold as 0 and 255: article (-1200,600 HU), abdomen, two numbers; none: as they are."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at OUTPUT.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each step.")] = False,
) -> None:
    """Check, plan, prepare, train, validate, and write a bundle for segrt-build and segrt-predict.

    The same command goes on where an earlier run stopped. Several GPUs: torchrun --nproc-per-node 2 --no-python segrt-train DATASET ...

    Exit codes: 0 done, 2 not, 130 stopped by a signal and saved.
    """
    from ..train.config import PICTURES
    from ..train.dataset_json import read_labels
    from ..train.npy import parse_npy_window
    from .training import STOPPED, STOPPED_TEXT, TrainBars, describe_training, ending_on_signals, is_first, join_processes, picture_size

    configure_logging(verbose=verbose)
    if iters is not None and epochs is not None:
        raise InputError("--iters and --epochs say the same thing; give one of them")
    candidates = comma_list(configuration) or ()
    if configuration is not None and not candidates:
        raise InputError("--config: expected a configuration such as 3d_fullres, got none; leave it out for the model's own")
    if len(candidates) > 1 and not find_best:
        raise InputError("--config: several configurations are only trained to find the best one; add --find-best, or give one")
    changes = {
        "configuration": candidates[0] if candidates else None,
        "folds": comma_list(fold),
        "split": split,
        "patients": patients,
        "planner": planner,
        "memory_gb": memory_gb,
        "iterations": iters if epochs is None or model in PICTURES else 250 * epochs,
        "passes": epochs if model in PICTURES else None,
        "minutes": minutes,
        "batch_size": batch_size,
        "patch": comma_list(patch) if size is None else picture_size(size, patch),
        "width": width,
        "deep_supervision": deep_supervision,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov,
        "betas": comma_list(betas),
        "weight_decay": weight_decay,
        "l1": l1,
        "schedule": schedule,
        "schedule_by_epoch": schedule_by_epoch,
        "power": power,
        "end_lr": end_lr,
        "lrf": lrf,
        "decay_iterations": decay_iters,
        "step_iterations": step_iters,
        "step_epochs": comma_list(step_epochs),
        "gamma": gamma,
        "loss": loss,
        "coefficients": comma_list(coefficients),
        "class_weights": class_weights if class_weights in ("none", "batch") else comma_list(class_weights),
        "dice_activation": dice_activation,
        "batch_dice": batch_dice,
        "augmentation": augmentation,
        "mirroring": mirroring,
        "grey": grey,
        "grey_channel": grey_channel,
        "oversampling": oversampling,
        "precision": precision,
        "clip": clip,
        "accumulation": accumulation,
        "compile": compile or None,
        "seed": seed,
        "workers": workers,
        "validation_interval": validation_interval,
        "validation_batches": validation_batches,
        "save_interval": save_interval,
        "log_interval": log_interval,
        "keep": keep,
        "weights": weights,
        "window": comma_list(window) if window and "," in window else window,
        "sliding": sliding or None,
        "resampling": resampling,
        "elu": elu or None,
        "kernels": triples(kernels),
        "strides": triples(strides),
        "mode": mode,
        "dropout": dropout,
        "cache": cache_dtype,
        "storage": cache_storage,
        "profile": (10, 20) if profile else None,
    }
    options: dict[str, Any] = {
        "channels": comma_list(channels),
        "image_suffix": comma_list(image_suffix),
        "label_suffix": label_suffix,
        "masks": masks,
        "mask_threshold": mask_threshold,
        **({} if labels is None else read_labels(labels)),
        "npy_window": None if npy_window is None else parse_npy_window(npy_window),
    }
    from ..train.run import train_model
    from ..train.unread import refuse_unread

    source, config, reports = describe_training(dataset, from_medicalseg, medicalseg_root, options, {"model": model, **changes})
    refuse_unread(config, {**changes, "plan": plan, "find_best": find_best or None, "pairs": pairs})
    if plan_only and is_first(os.environ):
        for text in reports.values():
            typer.echo(text)
    with ExitStack() as stack:
        stack.enter_context(ending_on_signals(os.environ))
        device = stack.enter_context(join_processes(os.environ, device))
        bars = stack.enter_context(TrainBars(config.log_interval, quiet=not is_first(os.environ)))
        bundle = train_model(
            source,
            output,
            config.model_copy(update={"device": device}),
            work=work,
            plan=plan,
            plan_only=plan_only,
            candidates=candidates if find_best else None,
            pairs=pairs is not False,
            force=force,
            dataset_options=options,
            reports=reports,
            show=bars.show,
        )
    if bundle is None and not plan_only and is_first(os.environ):
        typer.echo(STOPPED_TEXT, err=True)
        raise typer.Exit(STOPPED)


def main() -> None:
    """Run the command."""
    run(app)
