"""TRAIN, what is done to a patch before the network sees it: nnU-Net 2.8.1's transforms, the article's three, or none; then its targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..arrays import Shape3, require
from ..errors import SpecError
from ..spec import ModelSpec, ZScoreNorm
from . import article
from .cascade import append_labels, disturb_labels
from .config import Transforms
from .sampler import Sample, enlarge
from .targets import make_targets

Augmentation = Literal["nnunet", "article", "none"] | Transforms

_FLAT = 3.0  # a patch this much longer than deep is rotated in its slices only


@dataclass(frozen=True)
class Rotation:
    """By how many degrees patches are rotated, to either side, and whether only within their slices."""

    degrees: float
    in_plane: bool


def plan_rotation(patch: Sequence[int]) -> Rotation:
    """Give nnU-Net's rotation for a patch of two or three axes (slices: z left out)."""
    if len(patch) == 2:
        return Rotation(15.0 if max(patch) / min(patch) > 1.5 else 180.0, in_plane=False)
    flat = max(patch) / patch[0] > _FLAT
    return Rotation(180.0 if flat else 30.0, in_plane=flat)


def initial_patch(spec: ModelSpec, kind: Augmentation) -> Shape3:
    """Give the shape (z, y, x) that has to be cut from a case so that augmentation fills the model's patch."""
    patch = spec.inference.patch
    if kind != "nnunet":
        return patch
    if spec.dimensions == 2:
        y, x = enlarge(patch[1:], plan_rotation(patch[1:]).degrees)
        return 1, y, x
    rotation = plan_rotation(patch)
    z, y, x = enlarge(patch, rotation.degrees)
    return (patch[0] if rotation.in_plane else z), y, x


class Augment:
    """Makes input and targets of a sample.

    Parameters
    ----------
    kind : "nnunet", "article" or its numbers (3-D only), or "none", as a validation's patches are made
    scales : size of every target as shares of the patch's axes, finest first; see `networks.supervision_scales`
    flips : axes (z, y, x) that "nnunet" mirrors along; by default those that predictions are averaged over
    grey : share of the samples whose channels all become one of theirs, drawn by chance: some pictures come grey, or miss a sequence
    grey_channel : the one they become; any of them by default

    Raises
    ------
    SpecError
        When the article's transforms are asked for a model of slices, or grey samples of a model with one channel, without that channel,
        or by other transforms than "nnunet".
    """

    def __init__(
        self,
        spec: ModelSpec,
        kind: Augmentation,
        scales: Sequence[Sequence[float]] = ((1.0, 1.0, 1.0),),
        *,
        flips: Sequence[int] | None = None,
        grey: float = 0.0,
        grey_channel: str | None = None,
    ) -> None:
        kind = Transforms() if kind == "article" else kind
        if isinstance(kind, Transforms) and spec.dimensions == 2:
            raise SpecError(f"augmentation: 'article' turns volumes and {spec.name} sees slices; use 'nnunet' or 'none'")
        if grey and (len(spec.channels) == 1 or kind != "nnunet"):
            channels = len(spec.channels)
            raise SpecError(f"grey: expected several channels and augmentation 'nnunet', got {channels} of {spec.name} and {kind!r}")
        names = [channel.name for channel in spec.channels]
        if grey and grey_channel not in (None, *names):
            raise SpecError(f"grey_channel: expected one of {', '.join(names)}, got {grey_channel!r}")
        self._grey, self._greys = grey, [names.index(grey_channel)] if grey and grey_channel else range(len(names))
        self._spec, self._kind, self._scales = spec, kind, tuple(tuple(scale) for scale in scales)
        self._transforms = _nnunet_transforms(spec, spec.inference.mirror_axes if flips is None else flips) if kind == "nnunet" else ()

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return data (C, [z,] y, x) float32 with the one-hot labels of the stage before, and one target per scale.

        Targets are class indices ([z,] y, x) int16, or for regions (K, [z,] y, x) int8 of 0 and 1; -1 where nobody annotated.
        """
        image = torch.from_numpy(sample.data)
        labels = torch.from_numpy(np.stack([sample.labels] if sample.previous is None else [sample.labels, sample.previous]))
        if self._spec.dimensions == 2:
            image, labels = image[:, 0], labels[:, 0]
        with torch.no_grad(), _one_thread():
            if self._kind == "nnunet":
                if self._grey and rng.uniform() < self._grey:
                    image = image[int(rng.choice(self._greys))].expand_as(image).clone()
                with _drawing_from(rng):
                    image, labels = self._nnunet(image, labels)
            elif isinstance(self._kind, Transforms):
                image, labels = article.augment(image, labels, self._spec.inference.patch, rng, self._kind)
            if self._spec.previous is not None:
                image = append_labels(image, labels[1], self._spec.previous.values)
                if self._kind == "nnunet":
                    with _drawing_from(rng):
                        disturb_labels(image, len(self._spec.previous.values))
            return image.contiguous(), make_targets(labels[0], self._spec, self._scales)

    def _nnunet(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sample = {"image": image, "segmentation": labels}
        for transform in self._transforms:
            sample = transform(**sample)
        image, labels = sample["image"], sample["segmentation"]
        for channel, part in enumerate(self._spec.channels):
            if isinstance(part.normalization, ZScoreNorm) and part.normalization.masked:
                image[channel][labels[0] < 0] = 0
        return image, labels


def _nnunet_transforms(spec: ModelSpec, flips: Sequence[int]) -> tuple[Any, ...]:
    """nnU-Net 2.8.1's training transforms up to the mirroring, in its order and with its numbers."""
    require("batchgeneratorsv2", extra="train")
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    slices = spec.dimensions == 2
    patch = spec.inference.patch[1:] if slices else spec.inference.patch
    rotation = plan_rotation(patch)
    angle = float(np.deg2rad(rotation.degrees))
    each: dict[str, Any] = {"synchronize_channels": False, "p_per_channel": 1}
    spatial = SpatialTransform(
        patch[1:] if rotation.in_plane else patch,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=0.2,
        rotation=(-angle, angle),
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    sometimes = (
        (GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
        # nnU-Net takes the faster of two convolutions by its watch; a batch would then depend on what else the machine did
        (GaussianBlurTransform((0.5, 1.0), synchronize_channels=False, synchronize_axes=False, p_per_channel=0.5, benchmark=False), 0.2),
        (MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), **each), 0.15),
        (ContrastTransform(BGContrast((0.75, 1.25)), preserve_range=True, **each), 0.15),
        (
            SimulateLowResolutionTransform(
                scale=(0.5, 1),
                synchronize_channels=False,
                synchronize_axes=True,
                ignore_axes=(0,) if rotation.in_plane else None,
                p_per_channel=0.5,
            ),
            0.25,
        ),
        (GammaTransform(BGContrast((0.7, 1.5)), p_invert_image=1, p_retain_stats=1, **each), 0.1),
        (GammaTransform(BGContrast((0.7, 1.5)), p_invert_image=0, p_retain_stats=1, **each), 0.3),
    )
    flattened = [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()] if rotation.in_plane else [spatial]
    axes = tuple(axis - 1 if slices else axis for axis in flips)
    mirror = [MirrorTransform(axes)] if axes else []
    return (*flattened, *(RandomTransform(transform, apply_probability=p) for transform, p in sometimes), *mirror)


@contextmanager
def _drawing_from(rng: np.random.Generator) -> Iterator[None]:
    """Let NumPy's and torch's global generators, which batchgeneratorsv2 draws from, follow `rng` inside the block and restore them."""
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        np.random.seed(rng.integers(2**32, dtype=np.uint64))  # noqa: NPY002
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: the other cores have a worker of their own, and sums do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
