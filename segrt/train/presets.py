"""nnU-Net 2.8.1's planner presets as numbers: the network, and the memory a patch and a batch may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Planner = Literal["default", "resenc_m", "resenc_l", "resenc_xl"]

BASE_FEATURES = 32
MOST_FEATURES = {2: 512, 3: 320}
SMALLEST_BATCH = 2


@dataclass(frozen=True)
class Preset:
    """One planner.

    Attributes
    ----------
    residual : residual instead of plain encoder
    blocks : convolutions (plain) or residual blocks of the encoder's stages; the last number stands for all deeper ones
    decoder_convs : convolutions of each decoder stage
    memory_gb : GPU memory the two budgets stand for
    budget : dimensions -> feature map elements that fit into it with the reference batch
    fits_smallest_batch : the patch shrinks until the smallest batch fits, not until the reference batch does
    coverage : largest share of all voxels of the dataset that one batch may hold
    """

    residual: bool
    blocks: tuple[int, ...]
    decoder_convs: int
    memory_gb: float
    budget: dict[int, float]
    fits_smallest_batch: bool
    coverage: float

    def encoder_blocks(self, stages: int) -> tuple[int, ...]:
        """Blocks of each of `stages` stages."""
        return tuple(self.blocks[min(stage, len(self.blocks) - 1)] for stage in range(stages))


REFERENCE_BATCH = {2: 12, 3: 2}
_RESIDUAL = (1, 3, 4, 6)
PRESETS: dict[Planner, Preset] = {
    "default": Preset(False, (2,), 2, 8, {2: 85e6, 3: 560e6}, True, 0.05),
    "resenc_m": Preset(True, _RESIDUAL, 1, 8, {2: 135e6, 3: 680e6}, False, 1.0),
    "resenc_l": Preset(True, _RESIDUAL, 1, 24, {2: 380e6, 3: 2100e6}, False, 1.0),
    "resenc_xl": Preset(True, _RESIDUAL, 1, 40, {2: 560e6, 3: 3600e6}, False, 1.0),
}


def features_per_stage(stages: int, dimensions: int) -> tuple[int, ...]:
    """Features double at every stage up to nnU-Net's cap (512 in 2-D, 320 in 3-D)."""
    return tuple(min(MOST_FEATURES[dimensions], BASE_FEATURES * 2**stage) for stage in range(stages))
