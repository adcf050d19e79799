"""`segrt-predict`: images in, labels out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import PARTLY_FAILED, check_choices, comma_list, configure_logging, run
from .remote import RemoteOptions

if TYPE_CHECKING:
    from ..io import Case
    from ..pipeline import Segmenter

_SERVER = "A model on a Triton server"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def predict(
    images: Annotated[Path, typer.Argument(help="Folder of images, one image, or a DICOM series folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for the labels; made when missing.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Bundle made by segrt-build or segrt-train.")] = Path("segrt_model"),
    folds: Annotated[str | None, typer.Option("--folds", "-f", help="Members to average, such as 0,1,2 or all.")] = None,
    level: Annotated[
        str | None, typer.Option(help="Pruned UNet++ to run, such as L2, made by segrt-build --prune.", show_default=False)
    ] = None,
    step: Annotated[float | None, typer.Option(help="Window step as a fraction of the patch; the model's own by default.")] = None,
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="Average over the model's mirrored axes.")] = True,
    postprocess: Annotated[bool, typer.Option("--postprocess/--no-postprocess", help="Apply the model's post-processing.")] = True,
    previous: Annotated[Path | None, typer.Option(help="Folder with first-stage labels of a cascade, made elsewhere.")] = None,
    backend: Annotated[str, typer.Option(help="auto, openvino, onnxruntime, pytorch, tensorrt or tensorrt-rtx.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16 or int8; fp32 on a CPU and fp16 on a GPU by default.", show_default=False)
    ] = None,
    accumulate: Annotated[str, typer.Option(help="float32, or float16 to repeat nnU-Net's rounding.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, or several such as cuda:0,cuda:1.")] = "auto",
    across: Annotated[str, typer.Option(help="What several GPUs share: cases, or the windows of each case.")] = "cases",
    save_probabilities: Annotated[bool, typer.Option("--save-probabilities", help="Also write <case>.npz.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished cases again.")] = False,
    overview: Annotated[
        bool | None,
        typer.Option("--overview/--no-overview", help="Write overview.png, a page of cases under their labels; of pictures by default."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 means all.")] = 0,
    format: Annotated[str | None, typer.Option(help="Suffix of the label files, such as .nii.gz; the input's own by default.")] = None,  # noqa: A002
    benchmark: Annotated[bool, typer.Option("--benchmark", help="Time the first case: stages, windows/s, memory, as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is chosen and why.")] = False,
    triton: Annotated[
        str | None,
        typer.Option(
            help="Ask this server, HOST:PORT (gRPC) or http://HOST:PORT; --model is the model's name there. Several share the cases.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds a case may take there.", rich_help_panel=_SERVER)] = None,
    send_files: Annotated[
        bool, typer.Option("--send-files", help="Send image files as they are, not their voxels.", rich_help_panel=_SERVER)
    ] = False,
    shared_memory: Annotated[
        str, typer.Option(help="auto, system, cuda or off: pass images through memory when the server is here.", rich_help_panel=_SERVER)
    ] = "auto",
    compression: Annotated[str | None, typer.Option(help="gzip or deflate what is sent.", rich_help_panel=_SERVER)] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(help="PEM file to check the server's certificate against.", rich_help_panel=_SERVER)
    ] = None,
    client_key: Annotated[Path | None, typer.Option(help="PEM file with the client's own key.", rich_help_panel=_SERVER)] = None,
    client_certificate: Annotated[Path | None, typer.Option(help="PEM file with its certificate.", rich_help_panel=_SERVER)] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Do not check the certificate (https).", rich_help_panel=_SERVER)] = False,
) -> None:
    """Segment every image of a folder with a bundle; finished cases are skipped, failed ones named.

    Exit codes: 0 all done, 2 nothing could start, 3 some cases failed and the rest is done.
    """
    from ..io import find_cases

    configure_logging(verbose=verbose)
    check_choices(backend=backend, accumulate=accumulate, across=across, **({"precision": precision} if precision else {}))
    check_folder(previous)
    server = RemoteOptions(
        triton, timeout, compression, shared_memory, send_files, root_certificates, client_key, client_certificate, insecure
    )
    engines = {
        "backend": backend != "auto",
        "precision": precision is not None,
        "accumulate": accumulate != "float32",
        "benchmark": benchmark,
    }
    machine = {"device": device != "auto", "across": across != "cases", "threads": threads != 0}
    server.check(folds=folds is not None, **engines, **machine)
    shared: dict[str, Any] = {"level": level, "step": step, "postprocess": postprocess}
    wanted = {"format": format, "overwrite": overwrite, "probabilities": save_probabilities, "previous": previous}
    with ExitStack() as opened:
        if triton is not None:
            servers = [opened.enter_context(predictor) for predictor in server.open(model, {**shared, "tta": tta})]
            cases = find_cases(images, len(servers[0].spec.channels))
            check_output(images, output)
            # a server tells of windows by a model that is slower for it, so only where somebody looks
            segment(cases, output, servers, wanted, overview=overview, told=False)
            return
        from ..bundle import Bundle
        from ..memory import resident_bytes
        from ..predictor import Predictor
        from .show import print_estimate

        options: dict[str, Any] = {
            **shared,
            "folds": comma_list(folds),
            "backend": backend,
            "precision": precision,
            "accumulate": accumulate,
            "threads": threads,
            "previous_stage": previous is None,
        }
        base = resident_bytes()
        bundle = Bundle.open(model)
        cases = find_cases(images, len(bundle.spec.channels))
        check_output(images, output)
        if benchmark:
            from .benchmark import time_case

            time_case(bundle, cases[0], output, tta=tta, previous=previous, options={**options, "device": device})
            return
        places = device.split(",") if across == "cases" else [device]
        predictors = [opened.enter_context(Predictor(bundle, tta=tta, device=place, **options)) for place in places]
        print_estimate(predictors[0], cases, base, probabilities=save_probabilities)
        segment(cases, output, predictors, wanted, overview=overview)


def segment(
    cases: Sequence[Case],
    output: Path,
    predictors: Sequence[Segmenter],
    wanted: dict[str, Any],
    *,
    overview: bool | None,
    told: bool = True,
) -> None:
    """Segment cases under two bars, print what became of them, and leave with code 3 when some failed.

    `wanted` are options of `predict_many`; `told` of windows even where no terminal shows the bars.
    """
    from ..pipeline import predict_many
    from .show import Bars, print_summary, show_overview

    with Bars(len(cases)) as bars:
        progress = bars.windows if told or bars.is_seen else None
        results = predict_many(cases, output, predictors, progress=progress, done=bars.case, **wanted)
    print_summary(results, output)
    show_overview(cases, results, output, predictors[0].spec, wanted=overview)
    if any(result.status == "failed" for result in results):
        raise typer.Exit(PARTLY_FAILED)


def check_folder(previous: Path | None) -> None:
    """Raise an InputError unless the folder of first-stage labels exists."""
    if previous is not None and not previous.is_dir():
        from ..errors import InputError

        raise InputError(f"{previous}: no such folder; --previous expects one with a label file per case")


def check_output(images: Path, output: Path) -> None:
    """Raise an InputError when labels would lie among the images, where the next run takes them for images."""
    if images.is_dir() and output.is_dir() and output.samefile(images):
        from ..errors import InputError

        raise InputError(f"{output} is the folder of the images, whose next run would take the labels for images; choose another")


def main() -> None:
    """Run the command."""
    run(app)
