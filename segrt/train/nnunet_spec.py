"""A planned stage of nnU-Net as a `Configuration`: its `ModelSpec`, batch and reasons; used by the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..arrays import Shape3
from ..spec import (
    Channel,
    CTNorm,
    Inference,
    ModelSpec,
    NoNorm,
    Normalization,
    PreviousStage,
    Resampling,
    RescaleNorm,
    RGBNorm,
    SpacingTarget,
    UNetSpec,
    ZScoreNorm,
)
from .cases import Dataset
from .configuration import UNTRAINED, Configuration, head_of, labels_of
from .fingerprint import Fingerprint, Intensities
from .patch import Fit
from .presets import REFERENCE_BATCH, SMALLEST_BATCH, Preset, features_per_stage
from .target import Target

MASKED_BELOW = 0.75  # share of the image the crop keeps

_MIRROR: dict[int, tuple[Literal[0, 1, 2], ...]] = {2: (1, 2), 3: (0, 1, 2)}


@dataclass(frozen=True)
class Stage:
    """What the planner decided about one configuration.

    Attributes
    ----------
    spacing : (z, y, x) in mm, None for z in 2-D
    median_shape : (z, y, x) in voxels of the median case at that spacing
    dataset_voxels : all cases together, at the spacing nnU-Net counts them
    reasons : choice -> why, of what the planner chose
    """

    name: str
    spacing: tuple[float | None, ...]
    median_shape: Sequence[float]
    dataset_voxels: float
    fit: Fit
    preset: Preset
    memory_gb: float
    batch_dice: bool
    reasons: Mapping[str, str]

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.fit.topology.patch)

    @property
    def batch_size(self) -> int:
        """The largest batch that fits the memory and covers no more of the dataset than allowed, at least 2."""
        return max(min(self.fit.batch_size(self.preset, self.dataset_voxels)), SMALLEST_BATCH)


def stage_configuration(stage: Stage, dataset: Dataset, fingerprint: Fingerprint, target: Target) -> Configuration:
    """Give the stage's `Configuration`."""
    masked = fingerprint.relative_size < MASKED_BELOW
    z, y, x = stage.spacing
    head = head_of(dataset)
    spec = ModelSpec(
        name=dataset.name,
        source=f"segrt-train, nnU-Net 2.8.1's rules, {stage.name}",
        channels=tuple(
            Channel(name=name, normalization=_normalization(name, values, masked))
            for name, values in zip(dataset.channels, fingerprint.intensities, strict=True)
        ),
        labels=labels_of(dataset),
        ignore=dataset.ignore,
        head=head,
        transpose=target.transpose,
        target=SpacingTarget(spacing=(z, y, x)),
        resample_image=Resampling(order=3),
        resample_labels=Resampling(order=1),
        resample_logits=Resampling(order=1),
        inference=Inference(patch=_three(stage.fit.topology.patch), mirror_axes=_MIRROR[stage.dimensions]),
        network=_network(stage, len(dataset.channels), len(head.values)),
        members=UNTRAINED,
    )
    median = stage.median_shape
    return Configuration(
        spec=spec,
        batch_size=stage.batch_size,
        batch_dice=stage.batch_dice,
        median_shape=(median[0], median[1], median[2]),
        deep_supervision=True,
        reasons={**stage.reasons, **_reasons(stage, spec, target, fingerprint)},
    )


def cascade(fullres: Configuration, previous: str) -> Configuration:
    """Give the second stage of a cascade: `fullres` with one more input per label of the configuration `previous`."""
    values = tuple(sorted({value for label in fullres.spec.labels for value in label.values} - {0}))
    network = fullres.spec.network.model_copy(update={"in_channels": fullres.spec.in_channels + len(values)})
    spec = fullres.spec.model_copy(
        update={
            "previous": PreviousStage(values=values),
            "network": network,
            "source": fullres.spec.source.replace("3d_fullres", "3d_cascade_fullres"),
        }
    )
    reason = f"The labels of {previous}, which sees more of the image, are {len(values)} more input channels of 3d_fullres."
    return fullres.model_copy(update={"spec": spec, "previous": previous, "reasons": {**fullres.reasons, "previous": reason}})


def _normalization(name: str, values: Intensities, masked: bool) -> Normalization:
    match name.casefold():
        case "ct":
            return CTNorm(lower=values.percentile_00_5, upper=values.percentile_99_5, mean=values.mean, std=values.std)
        case "nonorm":
            return NoNorm()
        case "rescale_to_0_1":
            return RescaleNorm()
        case "rgb_to_0_1":
            return RGBNorm()
    return ZScoreNorm(masked=masked)


def _network(stage: Stage, inputs: int, outputs: int) -> UNetSpec:
    topology, preset = stage.fit.topology, stage.preset
    return UNetSpec(
        family="residual_unet" if preset.residual else "plain_unet",
        dimensions=2 if stage.dimensions == 2 else 3,
        in_channels=inputs,
        out_channels=outputs,
        features=features_per_stage(topology.stages, stage.dimensions),
        kernels=topology.kernels,
        strides=topology.strides,
        blocks=preset.encoder_blocks(topology.stages),
        decoder_convs=(preset.decoder_convs,) * (topology.stages - 1),
    )


def _three(patch: Sequence[int]) -> Shape3:
    z, y, x = (1, *patch) if len(patch) == 2 else patch
    return z, y, x


def _reasons(stage: Stage, spec: ModelSpec, target: Target, fingerprint: Fingerprint) -> dict[str, str]:
    topology, fit = stage.fit.topology, stage.fit
    fitting, covering = fit.batch_size(stage.preset, stage.dataset_voxels)
    return {
        "transpose": (
            f"Axis {'zyx'[target.transpose[0]]} has the largest spacing and comes first, so that slices are fine in their plane."
            if target.spacing[0] > min(target.spacing)
            else "All axes have the same spacing and keep their order."
        ),
        "patch": _patch_reason(stage),
        "topology": (
            f"Axes are halved while 4 voxels are left and their spacing is within a factor 2 of the finest: {topology.stages} stages, "
            f"strides {_times(topology.divisor)} in all; kernels are 1 along an axis as long as it is twice as coarse."
        ),
        "network": f"{'Residual' if stage.preset.residual else 'Plain'} U-Net, features from 32 doubling up to {_most_features(spec)}.",
        "batch_size": (
            f"{fitting} fit into {stage.memory_gb:g} GB and {covering} would cover {stage.preset.coverage:.0%} of the dataset's voxels; "
            f"the smaller counts, but at least {SMALLEST_BATCH}."
        ),
        "normalization": _normalization_reason(spec, fingerprint),
        "resampling": (
            "Images by third-order splines, labels and logits linearly; slices by themselves and nearest neighbour across them where one "
            "axis is more than 3 times coarser."
        ),
        "deep_supervision": "nnU-Net trains with a loss at every resolution but the lowest.",
    }


def _most_features(spec: ModelSpec) -> int:
    return max(spec.network.features) if isinstance(spec.network, UNetSpec) else 0


def _patch_reason(stage: Stage) -> str:
    fit = stage.fit
    start = f"From a patch of equal edges in mm ({_times(fit.unclipped)}) cut to the median image and padded to the strides"
    reference = SMALLEST_BATCH if stage.preset.fits_smallest_batch else REFERENCE_BATCH[stage.dimensions]
    if not fit.shrunk:
        return f"{start}; a batch of {reference} fits into {stage.memory_gb:g} GB, so it stays."
    times = "once" if fit.shrunk == 1 else f"{fit.shrunk} times"
    return f"{start}; it shrank {times} along its relatively longest axis until a batch of {reference} fitted into {stage.memory_gb:g} GB."


def _normalization_reason(spec: ModelSpec, fingerprint: Fingerprint) -> str:
    kinds = {c.name: c.normalization.kind for c in spec.channels}
    told = {
        "ct": "CT numbers mean the same in every image, so they are clipped and scaled by the dataset's foreground",
        "zscore": "intensities differ from image to image, so each is brought to zero mean and unit variance",
        "none": "the channel asks for no normalisation",
        "rescale_0_1": "the channel asks for its own range mapped to 0..1",
        "rgb_0_1": "8-bit colour is divided by 255",
    }
    text = "; ".join(f"{', '.join(n for n in kinds if kinds[n] == kind)}: {told[kind]}" for kind in dict.fromkeys(kinds.values()))
    share = fingerprint.relative_size
    if any(isinstance(c.normalization, ZScoreNorm) for c in spec.channels):
        where = "only the non-zero region counts" if share < MASKED_BELOW else "the whole image counts"
        text += f" ({where}, the crop keeps {share:.0%} of it)"
    return f"{text}."


def _times(numbers: Sequence[int]) -> str:
    return " x ".join(str(n) for n in numbers)
