"""IMPORT and BUILD in one call: what `segrt-build` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import FloatArray, require
from ..bundle import Bundle
from ..engines import Backend, Precision, check_onnx, read_build
from ..engines.compiled import check_compiled
from ..engines.function import FunctionEngine
from ..engines.openvino import cpu_name, engine_key
from ..engines.trt import this_machine
from ..engines.trt_plan import find_plan
from ..errors import BackendError, BuildError
from ..predictor import Predictor
from ..volume import Grid, Volume
from .engine import build_engine, resolve_target
from .onnx import Head, export_onnx, write_reference
from .prune import check_levels
from .tensorrt import TensorRTOptions
from .verify import can_run_reference, checked_windows

logger = logging.getLogger(__name__)

DEFAULT_BUNDLE = Path("segrt_model")


def build_model(
    source: str | Path,
    output: str | Path | None = None,
    *,
    configuration: str | None = None,
    folds: Sequence[str] | None = None,
    backend: Backend = "auto",
    device: str = "auto",
    precisions: Sequence[Precision] | None = None,
    sample: str | Path | None = None,
    calibration: str | Path | None = None,
    dynamic: bool = False,
    head: Head = "logits",
    force: bool = False,
    tensorrt: TensorRTOptions | None = None,
    prune: Sequence[str] = (),
    reuse: bool = False,
) -> tuple[Bundle, list[dict[str, Any]]]:
    """Import (when `source` is no bundle), export to ONNX, compile and verify.

    Parameters
    ----------
    source : a bundle, or what `import_nnunet` reads
    output : bundle to write when importing, ./segrt_model by default; a source that is a bundle is built in place
    configuration, folds : what to import, when there is a choice
    backend, device, tensorrt : see `build_engine`
    precisions : one engine is built for each; fp32 on the CPU and fp16 on a GPU by default
    sample : image to verify on
    calibration : folder of images that set INT8's ranges
    dynamic, head : also write onnx/<member>-<head>[-dynamic].onnx for use outside segrt
    force : replace an existing bundle, export again, and keep engines that fall short
    prune : levels of a UNet++, such as "L1", that get ONNX files and engines of their own
    reuse : take a bundle that has its engines for this machine as it is; without `force`

    Returns
    -------
    bundle : the finished bundle
    reports : one verification report per precision, and then per level and precision; none of engines that were there

    Raises
    ------
    SegrtError
        When any step does not succeed; what was finished before stays usable.
    """
    resolve_target(device, backend, tensorrt)  # an import takes minutes: what cannot be built is refused before it
    bundle = _bundle(Path(source), Path(output) if output else None, configuration, folds, force)
    levels = [bundle.at_level(name) for name in check_levels(bundle, prune)] if prune else []
    if reuse and not force and not prune and is_built(bundle, backend=backend, device=device, precisions=precisions):
        logger.info("%s has its engines for this machine", bundle.path)
        return bundle, []
    export(bundle, sample=sample, force=force)
    if dynamic or head != "logits":
        export_onnx(bundle, dynamic=dynamic, head=head)
    options: dict[str, Any] = {"sample": sample, "calibration": calibration, "force": force, "tensorrt": tensorrt}
    reports = [build_engine(bundle, backend=backend, device=device, precision=p, **options) for p in precisions or (None,)]
    for level in levels:
        if level.whole is not None:
            export(level, sample=sample, force=force)
            reports += [build_engine(level, backend=backend, device=device, precision=p, **options) for p in precisions or (None,)]
    _compile_kernels(bundle)
    return bundle, reports


def is_built(bundle: Bundle, *, backend: Backend = "auto", device: str = "auto", precisions: Sequence[Precision] | None = None) -> bool:
    """Whether a bundle, its first stage and its partner have compiled engines for this machine, of each precision.

    Backends that keep nothing compiled have nothing to show: False.
    """
    device, backend = resolve_target(device, backend, None)
    others = (other for other in (bundle.previous, bundle.partner) if other is not None)
    chosen = precisions or ("fp16" if device.startswith("cuda") and backend != "openvino" else "fp32",)
    try:
        return all(_has_engine(bundle, m, backend, device, p) for p in chosen for m in bundle.spec.members) and all(
            is_built(other, backend=backend, device=device, precisions=precisions) for other in others
        )
    except BackendError as err:  # of another machine, or of other ONNX files
        logger.info("%s is built: %s", bundle.path, err)
        return False


def _has_engine(bundle: Bundle, member: str, backend: Backend, device: str, precision: Precision) -> bool:
    check_onnx(bundle, member)
    if backend == "tensorrt":
        find_plan(bundle, member, precision, this_machine(device))
        return True
    blob = bundle.engine_path(engine_key(precision)) / f"{member}.blob"
    record = read_build(blob.with_name("build.json"))
    if backend != "openvino" or record.get("cpu") != cpu_name():
        return False
    check_compiled(bundle, member, blob, record)
    return True


def export(bundle: Bundle, *, sample: str | Path | None = None, force: bool = False) -> None:
    """Write the ONNX files and the stored reference of a bundle, its first stage and its partner where they are missing or stale."""
    for other in (bundle.previous, bundle.partner):
        if other is not None and bundle.whole is None:
            export(other, force=force)
    if _is_exported(bundle) and not (force and can_run_reference(bundle)):
        return
    if not can_run_reference(bundle):
        raise BuildError(f"{bundle.path}: exporting to ONNX needs the weights and torch; install it with: pip install 'segrt[export]'")
    export_onnx(bundle)
    write_reference(bundle, checked_windows(bundle, sample, count=1))


def _is_exported(bundle: Bundle) -> bool:
    """Whether every member's ONNX file is the one its record describes; a file that is there and changed is an error."""
    present = [bundle.onnx_path(member).is_file() for member in bundle.spec.members]
    if not any(present):
        return False
    try:
        for member in bundle.spec.members:
            check_onnx(bundle, member)
    except BackendError:
        if can_run_reference(bundle):
            logger.warning("%s: the ONNX files are not the exported ones and are made again", bundle.path)
            return False
        raise
    return True


def _bundle(source: Path, output: Path | None, configuration: str | None, folds: Sequence[str] | None, force: bool) -> Bundle:
    if (source / "model.json").is_file():
        if output is not None and output.resolve() != source.resolve():
            raise BuildError(f"{source} is a bundle already and is built in place; leave out --output {output}")
        return Bundle.open(source)
    require("torch", extra="export")
    from .importers.nnunetv2 import import_nnunet

    return import_nnunet(source, output or DEFAULT_BUNDLE, configuration=configuration, folds=folds, force=force)


def _compile_kernels(bundle: Bundle) -> None:
    """Run the pipeline once on a small image: its loops are compiled when first used and kept, so the first case need not wait."""
    spec = bundle.spec
    logger.info("compiling the kernels this model uses")
    voxels = np.random.default_rng(0).integers(0, 255, (len(spec.channels), 6, 10, 12)).astype(np.int16)
    grid = Grid((6, 10, 12), (2.7, 1.3, 1.3))

    def no_network(patches: FloatArray) -> FloatArray:
        return np.zeros((len(patches), spec.classes, *patches.shape[2:]), np.float32)

    # a pair's are one for each member, and then the partner's
    engines = [FunctionEngine(no_network)] * (1 if bundle.partner is None else len(spec.members) + 1)
    with Predictor(bundle, engines=engines, tta=False, previous_stage=False) as predictor:
        predictor(Volume(voxels, grid), previous=np.zeros(grid.shape, np.uint8) if predictor.takes_previous else None)
