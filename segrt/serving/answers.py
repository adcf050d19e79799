"""What one request is answered: labels, and what else it asked for, as arrays by their names on the wire."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..arrays import Array
from ..errors import BackendError
from ..io.write import write_labels
from ..protocol import DIRECTION, LABEL_FILE, LABELS, ORIGIN, PROBABILITIES, REPORT, SPACING, Report, RequestOptions, geometry_of
from ..spec import ModelSpec
from ..volume import Segmentation


def answer(
    segmentation: Segmentation, options: RequestOptions, spec: ModelSpec, wanted: Collection[str], *, bundle_sha: str, version: str
) -> dict[str, Array]:
    """Give name -> array of all that is wanted and was asked for; see `segrt.protocol.outputs_of`.

    Parameters
    ----------
    wanted : the outputs that the request names
    bundle_sha, version : of what made the labels

    Raises
    ------
    InputError
        When the labels cannot be written in the format asked for.
    """
    arrays, seconds = dict[str, Array](), dict(segmentation.seconds)
    if LABELS in wanted:
        arrays[LABELS] = segmentation.labels.astype(spec.label_dtype, copy=False)
    if PROBABILITIES in wanted and segmentation.probabilities is not None:
        arrays[PROBABILITIES] = segmentation.probabilities
    if LABEL_FILE in wanted and options.format is not None:
        start = time.perf_counter()
        arrays[LABEL_FILE] = _file(segmentation, options.format)
        seconds["write"] = time.perf_counter() - start
    if REPORT in wanted:
        arrays[REPORT] = _bytes(_report(segmentation, seconds, bundle_sha, version).model_dump_json().encode())
    return arrays


def _report(segmentation: Segmentation, seconds: dict[str, float], bundle_sha: str, version: str) -> Report:
    place = geometry_of(segmentation.grid)
    return Report(
        bundle_sha=bundle_sha,
        version=version,
        windows=segmentation.windows,
        seconds=seconds,
        voxels=segmentation.voxels(),
        spacing=place[SPACING],
        origin=place[ORIGIN],
        direction=place[DIRECTION],
        dimensions=segmentation.grid.dimensions,
    )


def _file(segmentation: Segmentation, suffix: str) -> Array:
    try:
        with tempfile.TemporaryDirectory(prefix="segrt-answer-") as folder:
            path = Path(folder) / f"labels{suffix}"
            write_labels(path, segmentation.labels, segmentation.grid)
            return _bytes(path.read_bytes())
    except OSError as err:
        raise BackendError(f"the server cannot write the label file ({err.strerror or err}); try again later") from err


def _bytes(content: bytes) -> Array:
    return np.frombuffer(content, np.uint8).copy()
