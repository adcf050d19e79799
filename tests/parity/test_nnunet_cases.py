"""The same numbers as nnU-Net v2 itself on small random images that cover its plans' options; `benchmarks/make_nnunet_cases.py` made them.

Orders of 3 for label maps are not among them: their ties are decided by the last bit of scipy's splines.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segrt.arrays import FloatArray
from segrt.engines.compose import Mirrored
from segrt.engines.function import FunctionEngine
from segrt.export.importers.plans import model_spec
from segrt.infer import infer
from segrt.preprocess import preprocess
from segrt.restore import restore
from segrt.spec import ModelSpec
from segrt.volume import Grid, Placement, Volume

GAIN = 3.0  # as in make_nnunet_cases.py


@dataclass(frozen=True)
class Case:
    """One case of the archive; `arrays` are nnU-Net's, see make_nnunet_cases.py."""

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def spec(self) -> ModelSpec:
        about = self.about
        return model_spec(about["plans"], about["dataset"], about["configuration"], members=("0",), mirror_axes=about["axes"] or ())

    def preprocessed(self) -> tuple[FloatArray, Placement]:
        data = self.arrays["data"]
        volume = Volume(data, Grid(data.shape[1:], tuple(self.about["spacing"])))
        return preprocess(volume, self.spec, previous=self.arrays.get("previous"))


def _load() -> list[Case]:
    with np.load(Path(__file__).with_name("nnunet_cases.npz"), allow_pickle=False) as archive:
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key in archive.files:
            number, name = key.split("/")
            groups.setdefault(number, {})[name] = archive[key]
    return [Case(json.loads(str(arrays.pop("case"))), arrays) for _, arrays in sorted(groups.items())]


CASES = _load()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.about["name"])


def _convolution(weight: np.ndarray, bias: np.ndarray) -> Callable[[FloatArray], FloatArray]:
    """The archive's network, for patches (N, C, z, y, x); a 2-D one sees patches with z of 1."""
    torch = pytest.importorskip("torch")
    w, b = torch.from_numpy(weight), torch.from_numpy(bias)

    def run(patches: FloatArray) -> FloatArray:
        x = torch.from_numpy(np.ascontiguousarray(patches))
        with torch.inference_mode():
            if w.ndim == 4:
                logits = torch.nn.functional.conv2d(x[:, :, 0], w, b, padding=1)[:, :, None]
            else:
                logits = torch.nn.functional.conv3d(x, w, b, padding=1)
        return np.asarray(logits * GAIN)

    return run


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 24


@every_case
def test_preprocessed_data(case: Case) -> None:
    found, _ = case.preprocessed()
    expected = case.arrays["preprocessed"]
    assert found.shape == expected.shape
    channels = len(case.spec.channels)
    # both compute in float32, but sum in another order: 2e-5 of a channel's range is a few hundred of its roundings
    spread = np.ptp(expected[:channels], axis=(1, 2, 3), keepdims=True)
    assert spread.min() > 0
    assert (np.abs(found[:channels] - expected[:channels]) <= 2e-5 * spread).all()
    np.testing.assert_array_equal(found[channels:], expected[channels:], "labels of the previous stage")


@every_case
def test_labels_from_logits(case: Case) -> None:
    """No tolerance: labels are whole numbers, and no two logits of these seeds are so close that an interpolation's last bit decides."""
    _, placement = case.preprocessed()
    labels = restore(case.arrays["logits"], placement, case.spec)
    assert labels.dtype == case.arrays["labels"].dtype
    np.testing.assert_array_equal(labels, case.arrays["labels"])


@pytest.mark.parametrize("case", [c for c in CASES if "windows" in c.arrays], ids=lambda case: case.about["name"])
def test_sliding_window_logits(case: Case) -> None:
    engine = FunctionEngine(_convolution(case.arrays["weight"], case.arrays["bias"]))
    spec = case.spec
    mirrored = Mirrored(engine, spec.inference.mirror_axes) if spec.inference.mirror_axes else engine
    found = infer(case.arrays["preprocessed"], [mirrored], spec, step=case.about["step"], accumulate="float16").whole()
    expected = case.arrays["windows"]
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    # the last float32 bits of a convolution depend on the processor and on torch's version: they may move a few float16 sums by a step,
    # which the division by the summed weights can widen; steps below those of 1 are lost where windows cancel
    moved = found != expected
    assert moved.sum() <= 2 + 0.005 * moved.size
    step = np.spacing(np.maximum(np.abs(expected), np.float16(1))).astype(np.float32)
    assert (np.abs(found.astype(np.float32) - expected) <= 4 * step).all()
