"""BUILD, for INT8: post-training quantisation of a member's ONNX file on prepared windows, by NNCF."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import FloatArray, require
from ..bundle import Bundle
from ..errors import BuildError, InputError
from ..io import find_cases
from .verify import first_stage, sample_windows

logger = logging.getLogger(__name__)

WINDOWS = 32
_PER_CASE = 8
_GOLDEN = (5**0.5 - 1) / 2  # its multiples, without their whole part, are spread evenly, however many there are


def calibration_windows(bundle: Bundle, folder: str | Path | None) -> FloatArray:
    """Cut windows (N, C, z, y, x) float32 from the images of a folder, or from a phantom without one.

    Half of them are those with the most contrast and half are spread evenly: ranges come from all that a network meets. A cascade's second
    stage sees the labels that its first one finds in the images.

    Raises
    ------
    InputError
        When the folder holds no usable images.
    """
    if folder is None:
        logger.warning("INT8 is calibrated on a phantom; pass images of your own with --calibration for ranges that fit them")
        return sample_windows(bundle.spec, count=WINDOWS, contrast=WINDOWS // 2)
    cases = find_cases(folder, len(bundle.spec.channels))
    if not cases:
        raise InputError(f"{folder}: no images to calibrate on")
    share = max(1, min(_PER_CASE, WINDOWS // len(cases)))
    images = [case.files if len(case.files) > 1 else case.files[0] for case in cases[:WINDOWS]]
    with first_stage(bundle) as first:
        cut = partial(sample_windows, bundle.spec, count=share, first=first)
        # of an odd number the middle one goes to either kind in turn, and few of many images do not all come from one place
        return np.concatenate([cut(image, contrast=(share + n % 2) // 2, phase=n * _GOLDEN % 1) for n, image in enumerate(images, 1)])


def quantize(bundle: Bundle, member: str, windows: FloatArray, target: Path) -> Path:
    """Write the quantised OpenVINO model of a member to `target` (.xml beside its .bin).

    NNCF runs in a process of its own: it reports its use to its maker unless its environment says otherwise, and prints.

    Raises
    ------
    BuildError
        When NNCF is not installed or fails.
    """
    with tempfile.TemporaryDirectory(prefix="segrt-") as temporary:
        inputs = Path(temporary) / "windows.npy"
        np.save(inputs, windows if bundle.spec.dimensions == 3 else windows[:, :, 0])
        command = [sys.executable, "-m", "segrt.export.calibrate", str(bundle.onnx_path(member)), str(inputs), str(target)]
        quiet = {**os.environ, "NNCF_CI": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BuildError(f"{bundle.onnx_path(member)} could not be quantised: {reason}")
    return target


def _quantize(onnx: str, inputs: str, target: str) -> None:
    nncf, openvino = require("nncf", extra="int8"), require("openvino", extra="int8")
    windows = np.load(inputs, allow_pickle=False)
    model: Any = openvino.Core().read_model(onnx)
    model.reshape([1, *windows.shape[1:]])
    samples = nncf.Dataset([window[None] for window in windows])
    quantised = nncf.quantize(model, samples, preset=nncf.QuantizationPreset.MIXED, subset_size=len(windows))
    openvino.save_model(quantised, target, compress_to_fp16=False)


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
