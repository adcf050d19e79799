"""`segrt-study`: models x optimizers under one budget, compared in a picture and in tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import InputError
from .common import FAILED, PARTLY_FAILED, comma_list, configure_logging, run

if TYPE_CHECKING:
    from ..train.config import Model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    dataset: Annotated[Path, typer.Argument(help="As segrt-train takes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the study.")] = Path("study"),
    models: Annotated[str, typer.Option(help="nnunet, vnet, or both.")] = "nnunet,vnet",
    optimizers: Annotated[str, typer.Option(help="Of sgd, adam and adamw.")] = "sgd,adam,adamw",
    minutes: Annotated[float | None, typer.Option(help="Training time of each run; preparing and validating do not count.")] = None,
    iters: Annotated[int | None, typer.Option(help="Iterations of each run, instead of --minutes.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, each on its own cores.")] = 1,
    cores: Annotated[int | None, typer.Option(help="Of each run; an equal share by default.")] = None,
    configuration: Annotated[str | None, typer.Option("--config", "-c", help="Such as 3d_fullres; of nnunet.")] = None,
    fold: Annotated[str, typer.Option("--fold", "-f", help="Such as 0, or 0,1,2,3,4, or all.")] = "0",
    split: Annotated[
        str | None,
        typer.Option(help="kfold, shuffled:0.75, sorted:0.8, or a JSON file of folds; the dataset's own by default, else kfold."),
    ] = None,
    planner: Annotated[str | None, typer.Option(help="default, resenc_m, resenc_l or resenc_xl.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="GPU memory to plan for.")] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", "--batch", help="Patches per step.")] = None,
    patch: Annotated[str | None, typer.Option(help="z,y,x in voxels, such as nnunet=40,56,40,vnet=48,64,48.")] = None,
    width: Annotated[str | None, typer.Option(help="Factor on the networks' features.")] = None,
    deep_supervision: Annotated[
        bool | None, typer.Option("--deep-supervision/--no-deep-supervision", help="A loss at every resolution.", show_default=False)
    ] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate, such as sgd=0.01,adamw=0.003,vnet-adam=0.001.")] = None,
    momentum: Annotated[str | None, typer.Option(help="Of SGD.")] = None,
    nesterov: Annotated[bool | None, typer.Option("--nesterov/--no-nesterov", help="Of SGD.", show_default=False)] = None,
    weight_decay: Annotated[str | None, typer.Option(help="L2 regularisation.")] = None,
    l1: Annotated[str | None, typer.Option("--l1", help="L1 regularisation.")] = None,
    schedule: Annotated[str | None, typer.Option(help="poly, constant, step or cosine.")] = None,
    loss: Annotated[str | None, typer.Option(help="dice_ce or mixed.")] = None,
    augmentation: Annotated[str | None, typer.Option(help="nnunet, article or none.")] = None,
    mirroring: Annotated[
        bool | None, typer.Option("--mirroring/--no-mirroring", help="No: left and right have labels of their own.", show_default=False)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    clip: Annotated[str | None, typer.Option(help="Largest norm of the gradient; 0 for none.")] = None,
    seed: Annotated[str | None, typer.Option(help="Of weights and patches.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes of each run that make patches.")] = None,
    validation_interval: Annotated[
        int | None, typer.Option(help="Iterations between two points of the Dice curve; about 20 of --iters, else 50.")
    ] = None,
    validation_batches: Annotated[int, typer.Option(help="Batches of such a point.")] = 5,
    save_interval: Annotated[int, typer.Option(help="Iterations between two checkpoints.")] = 100,
    weights: Annotated[str | None, typer.Option(help="last or best: what becomes the model.")] = None,
    window: Annotated[str | None, typer.Option(help="V-Net: auto, article, abdomen, percentile, zscore, none, or two numbers.")] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="float32 or float16: prepared cases on disk.")] = None,
    cache_storage: Annotated[str | None, typer.Option(help="blosc2 (compressed) or npy: how they lie there.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    channels: Annotated[str | None, typer.Option(help="Names of the channels, such as CT or T1,T2.")] = None,
    image_suffix: Annotated[
        str | None, typer.Option(help="How image names end before .nii.gz, when the layout is none of the known.")
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
    force: Annotated[bool, typer.Option("--force", help="Begin again: remove these runs from OUTPUT.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each step.")] = False,
) -> None:
    """Train models x optimizers under one budget and compare them: study.json, curves.png, Dice tables, and a bundle per run.

    A value goes to every run, or to some: --width vnet=0.25 or --lr sgd=0.01,vnet-sgd=0.1, by run, then optimizer, then model. The same
    command goes on where an earlier one stopped.

    Exit codes: 0 done, 2 not, 3 some runs failed, 130 stopped by a signal and saved.
    """
    from ..train.dataset_json import read_labels
    from ..train.npy import parse_npy_window
    from ..train.study import run_study
    from ..train.study_plan import plan_runs
    from .studying import StudyBars, per_run, print_study
    from .training import STOPPED, STOPPED_TEXT, ending_on_signals

    configure_logging(verbose=verbose)
    if (minutes is None) == (iters is None):
        raise InputError("a study needs one budget for all runs: --minutes or --iters")
    changes = {
        "iterations": iters,
        "minutes": minutes,
        "configuration": per_run(configuration, model="nnunet"),
        "folds": comma_list(fold),
        "split": split,
        "planner": planner,
        "memory_gb": memory_gb,
        "batch_size": per_run(batch_size),
        "patch": per_run(patch),
        "width": per_run(width),
        "deep_supervision": deep_supervision,
        "lr": per_run(lr),
        "momentum": per_run(momentum),
        "nesterov": nesterov,
        "weight_decay": per_run(weight_decay),
        "l1": per_run(l1),
        "schedule": per_run(schedule),
        "loss": per_run(loss),
        "augmentation": per_run(augmentation),
        "mirroring": mirroring,
        "precision": per_run(precision),
        "clip": per_run(clip),
        "seed": per_run(seed),
        "workers": workers,
        "validation_interval": validation_interval if validation_interval is not None else (50 if iters is None else max(1, iters // 20)),
        "validation_batches": validation_batches,
        "save_interval": save_interval,
        "weights": per_run(weights),
        "window": per_run(window, model="vnet"),
        "cache": cache_dtype,
        "storage": cache_storage,
        "device": device,
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
    runs = plan_runs(cast("list[Model]", list(comma_list(models) or ())), comma_list(optimizers) or (), **changes)
    with ending_on_signals({}), StudyBars() as bars:
        result = run_study(dataset, output, runs, jobs=jobs, cores=cores, force=force, dataset_options=options, show=bars.show)
    print_study(result, output)
    statuses = [record.status for record in result.runs]
    if "stopped" in statuses or "waiting" in statuses:
        typer.echo(STOPPED_TEXT, err=True)
        raise typer.Exit(STOPPED)
    if "failed" in statuses:
        raise typer.Exit(PARTLY_FAILED if "finished" in statuses else FAILED)


def main() -> None:
    """Run the command."""
    run(app)
