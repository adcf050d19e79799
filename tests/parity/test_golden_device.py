"""The GPU's path, run thread by thread on the CPU, gives nnU-Net's labels on every golden set.

Only the network itself runs on the host; crop, normalisation, resampling, window gather and blend, fused resampling + argmax and components
are the bodies of the CUDA kernels, compiled with every index checked.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden_sets import SETS, differing, golden_bundle

from segrt.io import find_cases, read_labels, write_labels
from segrt.io.peek import find_labels
from segrt.kernels._cuda.launch import recording
from segrt.predictor import Predictor
from tests.host_kernels import compiler, cuda_c_on_host


@pytest.fixture(scope="module")
def bundles(golden: Path, tmp_path_factory: pytest.TempPathFactory):
    """Import each set's model once, with its ONNX file."""
    return cache(lambda name: golden_bundle(golden, name, tmp_path_factory.mktemp("bundles") / name))


# S1 also with its flips, which are entries of a device's batches
RUNS = [*((name, "notta") for name in SETS), ("S1", "tta"), ("S6", "tta")]


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_the_gpus_path_gives_nnunets_labels(golden: Path, bundles, tmp_path: Path, name: str, mode: str) -> None:
    chosen, bundle = SETS[name], bundles(name)
    allowed = chosen.allowed(mode)
    with (
        Predictor(bundle, device="simulated", tta=mode == "tta", postprocess=False, previous_stage=False) as device,
        Predictor(bundle, device="cpu", tta=mode == "tta", postprocess=False, previous_stage=False) as host,
    ):
        moved = 0
        for case in find_cases(golden / chosen.folder / "imagesTs", len(bundle.spec.channels)):
            stage = None
            if chosen.previous:
                stage = find_labels(golden / chosen.folder / chosen.previous.format(mode=mode), case.name)
            files = case.files if len(case.files) > 1 else case.files[0]
            with recording() as launches:
                found = device(files, previous=stage)
            # it did take the device's path: windows and labels came from its kernels
            stages = {launch.kernel.body.__module__.rpartition(".")[2] for launch in launches}
            assert {"blend", "labels"} <= stages
            moved += int((found.labels != host(files, previous=stage).labels).sum())
            target = find_labels(golden / chosen.folder / chosen.expected.format(mode=mode), case.name)
            write_labels(tmp_path / target.name, found.labels, found.grid)
    differ, total = differing(golden / chosen.folder / chosen.expected.format(mode=mode), tmp_path)
    assert differ <= allowed
    # sums in another order than the CPU's, and cubic splines by taps instead of a recursion: a few ties
    assert moved <= 1e-5 * total


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("S1", {"largest"}),
        ("S4", {"along_lines", "along_rows", "extremes", "fold_extremes", "largest_resampled"}),  # slice by slice
        ("S6", {"extremes", "fold_extremes"}),  # its labels are cropped, which is left to the thread bodies
        ("S7", {"along_lines", "painted_resampled"}),
    ],
)
def test_cuda_c_gives_nnunets_labels(golden: Path, bundles, name: str, kernels: set[str]) -> None:
    """As `SEGRT_CUDA_C=1` has it on a GPU, but that the C runs on the host."""
    chosen, bundle, differ = SETS[name], bundles(name), 0
    with Predictor(bundle, device="simulated", tta=False, postprocess=False) as device:
        for case in find_cases(golden / chosen.folder / "imagesTs", len(bundle.spec.channels)):
            with cuda_c_on_host() as ran, recording() as launches:
                found = device(case.files if len(case.files) > 1 else case.files[0])
            assert kernels | {"blend"} <= set(ran)
            assert "blend_voxel" not in {launch.kernel.name for launch in launches}
            expected, _ = read_labels(find_labels(golden / chosen.folder / chosen.expected.format(mode="notta"), case.name))
            differ += int((found.labels != expected).sum())
    assert differ <= chosen.allowed("notta")


@pytest.mark.parametrize("name", ["S1"])
def test_post_processing_on_the_gpus_path(golden: Path, bundles, name: str) -> None:
    bundle = bundles(name)
    assert bundle.spec.postprocess
    with Predictor(bundle, device="simulated", tta=False) as device, Predictor(bundle, device="cpu", tta=False) as host:
        for case in find_cases(golden / SETS[name].folder / "imagesTs", 1):
            assert np.array_equal(device(case.files[0]).labels, host(case.files[0]).labels)


def test_probabilities_on_the_gpus_path(golden: Path, bundles) -> None:
    bundle = bundles("S1")
    case = find_cases(golden / SETS["S1"].folder / "imagesTs", 1)[0]
    with Predictor(bundle, device="simulated", tta=False) as device, Predictor(bundle, device="cpu", tta=False) as host:
        found, expected = (p(case.files[0], probabilities=True).probabilities for p in (device, host))
    assert found is not None
    assert expected is not None
    assert np.allclose(found, expected, atol=1e-5)
