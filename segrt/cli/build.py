"""`segrt-build`: a trained model becomes a bundle with a compiled, verified engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .common import check_choices, comma_list, configure_logging, run
from .pruning import PruneOptions, show_levels
from .repository import RepositoryOptions

if TYPE_CHECKING:
    from ..engines import Backend, Precision
    from ..export.onnx import Head

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def build(
    source: Annotated[
        Path, typer.Argument(help="Bundle, nnU-Net configuration or ensemble folder, dataset results folder, exported zip, or checkpoint.")
    ] = Path("segrt_model"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Bundle to write when importing; ./segrt_model by default.")] = None,
    configuration: Annotated[str | None, typer.Option("--configuration", "-c", help="Such as 3d_fullres, when there are several.")] = None,
    folds: Annotated[str | None, typer.Option("--folds", "-f", help="Folds to import, such as 0,1,2 or all (those there are).")] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Single precision; the default on a CPU.")] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Half precision; the default on a GPU. CPUs without it keep 16-bit weights and compute in fp32.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16, where the CPU has it.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="8 bits by post-training quantisation; needs extra int8, on a GPU ort.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="Folder of images that set INT8's ranges; a phantom by default.")] = None,
    backend: Annotated[str, typer.Option(help="openvino, tensorrt, onnxruntime or pytorch.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1: what the engine is built for and verified on.")] = "auto",
    batch: Annotated[int, typer.Option(min=0, help="TensorRT: windows per call; 0 means as many as keep a large GPU busy.")] = 0,
    workspace_gb: Annotated[float, typer.Option(min=0, max=1e6, help="TensorRT: memory a layer may ask for; 0 means all.")] = 0,
    compatible: Annotated[bool, typer.Option("--compatible", help="TensorRT: for other GPUs from Ampere on and later versions.")] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="TensorRT: file that remembers measured kernels; engines/timing.cache in the bundle by default."),
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="Image to verify on; a phantom by default.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Export ONNX with free spatial shape.")] = False,
    head: Annotated[str, typer.Option(help="What the ONNX file gives: logits, softmax or argmax.")] = "logits",
    prune: Annotated[
        str | None, typer.Option(help="Levels of a UNet++ to build, time and score, such as L1,L2,L3,L4.", show_default=False)
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Dice the recommended level may lose; 0.005 by default.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to score levels on; those the training held back by default.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Folder of their label maps or masks.")] = None,
    mask_suffix: Annotated[
        str | None, typer.Option(help="End of a mask's file name, such as _mask.png; the image's own by default.", show_default=False)
    ] = None,
    mask_threshold: Annotated[
        float | None, typer.Option(help="Grey values above it are foreground in masks; by default they hold labels.", show_default=False)
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(help="Triton model repository to write the model into; what is built already is not built again."),
    ] = None,
    triton_name: Annotated[str | None, typer.Option(help="What the model is called there; the bundle folder's name by default.")] = None,
    instances: Annotated[int | None, typer.Option(min=1, max=256, help="Requests that run there at once, each with an engine; 1.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle; keep an engine that falls short, marked.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each step.")] = False,
) -> None:
    """Import, export to ONNX, compile for this machine, and verify.

    Exit codes: 0 built and verified, 2 not.
    """
    from ..export.build import DEFAULT_BUNDLE, build_model
    from ..export.tensorrt import TensorRTOptions
    from .show import print_build

    configure_logging(verbose=verbose)
    repository = RepositoryOptions(triton, triton_name, instances)
    repository.check(source if (source / "model.json").is_file() else output or DEFAULT_BUNDLE)
    check_choices(backend=backend, head=head)
    wanted = PruneOptions(prune, max_drop, images, labels, mask_suffix, mask_threshold)
    wanted.check()
    validation = None if prune is None else wanted.validation(source)
    precisions = tuple(name for name, wanted in (("fp32", fp32), ("fp16", fp16), ("bf16", bf16), ("int8", int8)) if wanted)
    bundle, reports = build_model(
        source,
        output,
        configuration=configuration,
        folds=comma_list(folds),
        backend=cast("Backend", backend),
        device=device,
        precisions=cast("tuple[Precision, ...]", precisions),
        sample=sample,
        calibration=calibration,
        dynamic=dynamic,
        head=cast("Head", head),
        force=force,
        tensorrt=TensorRTOptions(batch=batch, workspace_bytes=int(workspace_gb * 1e9), compatible=compatible, timing_cache=timing_cache),
        prune=wanted.levels,
        reuse=triton is not None and not dynamic and head == "logits",
    )
    print_build(bundle, reports)
    if prune is not None:
        options = {"backend": backend, "device": device, "precision": precisions[0] if precisions else None}
        show_levels(bundle, wanted, validation, sample=sample, options=options)
    repository.write(bundle, backend=cast("Backend", backend), device=device, precisions=cast("tuple[Precision, ...]", precisions))


def main() -> None:
    """Run the command."""
    run(app)
