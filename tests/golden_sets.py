"""The golden sets: where nnU-Net v2's own results lie, how far float32 sums may move them, and how two folders of labels differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segrt.bundle import Bundle
from segrt.export.importers.nnunetv2 import import_nnunet
from segrt.export.onnx import export_onnx
from segrt.io import read_labels


@dataclass(frozen=True)
class GoldenSet:
    """Folders of a set, and the voxels that moved when nnU-Net's own float16 accumulators were replaced by float32 (tta, notta).

    `tta`, `notta`: golden/README.md's table; float32 mode may differ by them x 1.1 + 5.
    """

    folder: str
    configuration: str
    tta: int
    notta: int
    expected: str = "expected_{mode}"
    previous: str | None = None

    def allowed(self, mode: str) -> float:
        """Voxels float32 accumulation may move."""
        return 1.1 * {"tta": self.tta, "notta": self.notta}[mode] + 5


SETS = {
    "S1": GoldenSet("S1_hippocampus_3d", "3d_fullres", 1, 2),
    "S2": GoldenSet("S2_organs_ct", "3d_fullres", 112, 109),
    "S3_lowres": GoldenSet("S3_cascade_ct", "3d_lowres", 112, 90, "expected_lowres_{mode}"),
    "S3_cascade": GoldenSet("S3_cascade_ct", "3d_cascade_fullres", 342, 338, "expected_cascade_{mode}", "expected_lowres_{mode}"),
    "S4": GoldenSet("S4_aniso_ct", "3d_fullres", 217, 293),
    "S5": GoldenSet("S5_slices_2d", "2d", 14, 12),
    "S6": GoldenSet("S6_png_2d", "2d", 0, 0),
    "S7": GoldenSet("S7_regions_mr", "3d_fullres", 0, 0),
}
MODES = ("tta", "notta")


def golden_bundle(golden: Path, name: str, folder: Path) -> Bundle:
    """Import a set's model, with its ONNX file."""
    chosen = SETS[name]
    models = golden / chosen.folder / "model"
    bundle = import_nnunet(next(p for p in models.iterdir() if p.name.endswith(f"__{chosen.configuration}")), folder)
    export_onnx(bundle)
    return bundle


def differing(expected: Path, actual: Path) -> tuple[int, int]:
    """Voxels that differ and voxels in all, over every case; the geometry has to be the same."""
    differ = total = 0
    files = sorted(p for p in expected.iterdir() if p.name.endswith((".nii.gz", ".png")))
    assert files
    for file in files:
        a, grid_a = read_labels(file)
        b, grid_b = read_labels(actual / file.name)
        assert grid_a.mismatch(grid_b, tolerance_mm=1e-5) is None
        np.testing.assert_allclose(grid_a.affine, grid_b.affine, rtol=0, atol=1e-5)
        differ += int((a != b).sum())
        total += a.size
    return differ, total
