"""TRAIN, labels of the stage before as input: one-hot channels, disturbed as nnU-Net does, for a network that learns to mend them."""

from __future__ import annotations

from collections.abc import Sequence

import cc3d
import torch
from torch import Tensor

from ..arrays import require

_P_MORPHOLOGY, _P_REMOVAL, _P_PER_LABEL = 0.4, 0.2, 0.5
_RADIUS = (1, 8)
_LARGEST_SHARE = 0.15  # of the patch; what is larger is no mistake of the stage before


def append_labels(image: Tensor, labels: Tensor, values: Sequence[int]) -> Tensor:
    """Return `image` (C, [z,] y, x) with one channel more for each of `values`: 1 where `labels` ([z,] y, x) are it, else 0."""
    extended = image.new_empty((image.shape[0] + len(values), *image.shape[1:]))
    extended[: len(image)] = image
    for channel, value in zip(extended[len(image) :], values, strict=True):
        channel.copy_(labels == value)
    return extended


def disturb_labels(image: Tensor, count: int) -> None:
    """Change the last `count` channels of `image`, the one-hot labels, in place; draws from NumPy's and torch's global generators.

    With probability .4 half of the labels are dilated, eroded, opened or closed by a ball of radius 1 to 8 and take the voxels they gain
    from the others; with probability .2 half of the labels lose one component of less than 15 % of the patch.
    """
    require("batchgeneratorsv2", extra="train")
    from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform

    channels = list(range(-count, 0))
    if torch.rand(1).item() < _P_MORPHOLOGY:
        # made anew every time: it shuffles its list of channels, which would tie a batch to the ones before it
        ApplyRandomBinaryOperatorTransform(channels, strel_size=_RADIUS, p_per_label=_P_PER_LABEL)(image=image)
    if torch.rand(1).item() < _P_REMOVAL:
        for channel in torch.randperm(count)[torch.rand(count) < _P_PER_LABEL].tolist():
            remove_component(image[len(image) - count + channel])


def remove_component(mask: Tensor, largest_share: float = _LARGEST_SHARE) -> None:
    """Clear one component of a one-hot channel ([z,] y, x) in place, drawn from those below `largest_share` of the voxels.

    Components hold together by faces, edges and corners. Nothing is put in the place of what is cleared. The software behind the article
    swapped the two numbers and so removed nothing, at a share of 0.
    """
    found = cc3d.connected_components((mask > 0).numpy(), connectivity=26 if mask.ndim == 3 else 8)
    components = torch.from_numpy(found.astype("int64"))
    sizes = torch.bincount(components.ravel())
    small = torch.nonzero(sizes[1:] < largest_share * mask.numel()).ravel() + 1
    if len(small):
        mask[components == small[torch.randint(len(small), (1,))]] = 0
