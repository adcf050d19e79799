"""TRAIN, `plan_vnet`: the article's V-Net recipe as a `Plan`: window, resize of the whole image (or sliding window), network."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..arrays import Shape3
from ..errors import InputError
from ..spec import (
    Channel,
    Inference,
    ModelSpec,
    NoNorm,
    Normalization,
    Resampling,
    ShapeTarget,
    SpacingTarget,
    VNetSpec,
    WindowNorm,
    ZScoreNorm,
)
from .cases import Dataset
from .config import WINDOWS
from .configuration import UNTRAINED, Configuration, Plan, head_of, labels_of
from .fingerprint import Fingerprint, Intensities

Window = Literal["auto", "article", "abdomen", "percentile", "zscore", "none"]
Steps = tuple[Shape3, Shape3, Shape3, Shape3]

BATCH = 6
_HALVING: Steps = ((2, 2, 2),) * 4
OVERLAP = 16  # voxels by which sliding windows overlap, at most a quarter of the patch


def plan_vnet(
    dataset: Dataset,
    fingerprint: Fingerprint,
    *,
    window: Window | tuple[float, float] = "auto",
    shape: Shape3 = (128, 128, 128),
    sliding: bool = False,
    resampling: Literal["linear", "cubic"] = "linear",
    width: float = 1.0,
    deep_supervision: bool = False,
    elu: bool = False,
    kernels: Steps | None = None,
    strides: Steps | None = None,
) -> Plan:
    """Give the one configuration "vnet", complete with its way back onto the image's own grid.

    Parameters
    ----------
    window : "article" maps -1200..600 HU to 0..255, "abdomen" -160..240, "percentile" each channel's foreground percentiles 0.5 and
        99.5, two numbers their own range; "zscore" is for images without a scale of their own, "none" leaves intensities as they are;
        "auto" is "article" for a channel named CT, else "zscore"
    shape : (z, y, x) in voxels the whole image is resized to, or of the sliding window's patch
    sliding : keep the image at the dataset's median spacing and slide a window of `shape` over it, averaged uniformly
    resampling : "linear" resizes images by order 1 and labels to the nearest, as the public code does; "cubic" both by order 3, labels as
        indicators, as the article prints it (the label with the largest indicator wins; the article's code takes the last above 0.5)
    width : factor on the network's features
    elu : ELU instead of PReLU
    kernels, strides : (z, y, x) of the network's four steps down, finest first; 2 along every axis where None

    Raises
    ------
    InputError
        When the images are 2-D, the network cannot take `shape`, or a window is empty.

    References
    ----------
    Milletari et al. 2016, V-Net, doi:10.1109/3DV.2016.79; MedicalSeg's configuration of it for CT.
    """
    _check(dataset, fingerprint, width)
    head = head_of(dataset)
    network = VNetSpec(
        in_channels=len(dataset.channels),
        out_channels=len(head.values),
        width=width,
        elu=elu,
        kernels=kernels or _HALVING,
        strides=strides or _HALVING,
        deep_supervision=deep_supervision,
    )
    if refusal := network.refusal(shape):
        raise InputError(f"shape: a V-Net halves its input four times: {refusal}")
    spacing = np.median(np.asarray(fingerprint.spacings), axis=0).tolist()
    median = np.median(np.asarray(fingerprint.shapes), axis=0).tolist()
    target = SpacingTarget(spacing=tuple(spacing)) if sliding else ShapeTarget(shape=shape)
    image, labels = (Resampling(order=1, separate=False), Resampling(order=0, separate=False))
    if resampling == "cubic":
        image = labels = Resampling(order=3, separate=False)
    channels = tuple(
        Channel(name=name, normalization=choose_normalization(window, name, values))
        for name, values in zip(dataset.channels, fingerprint.intensities, strict=True)
    )
    spec = ModelSpec(
        name=dataset.name,
        source="segrt-train, V-Net",
        channels=channels,
        labels=labels_of(dataset),
        ignore=dataset.ignore,
        head=head,
        crop_nonzero=False,
        target=target,
        resample_image=image,
        resample_labels=labels,
        resample_logits=Resampling(order=1, separate=False),
        inference=Inference(patch=shape, step=_step(shape) if sliding else 1.0, blending="uniform"),
        network=network,
        members=UNTRAINED,
    )
    configuration = Configuration(
        spec=spec,
        batch_size=BATCH,
        batch_dice=True,
        median_shape=tuple(median) if sliding else shape,
        deep_supervision=deep_supervision,
        reasons=_reasons(spec, network, sliding=sliding),
    )
    return Plan(
        dataset=dataset.name,
        planner="vnet",
        memory_gb=None,
        transpose=(0, 1, 2),
        median_spacing=tuple(spacing),
        median_shape=tuple(round(n) for n in median),
        configurations={"vnet": configuration},
    )


def _check(dataset: Dataset, fingerprint: Fingerprint, width: float) -> None:
    if len(fingerprint.intensities) != len(dataset.channels):
        raise InputError(
            f"the fingerprint is of {len(fingerprint.intensities)} channels, dataset {dataset.name} has {len(dataset.channels)}; "
            "measure it again"
        )
    if all(z == 1 for z, _, _ in fingerprint.shapes):
        raise InputError(f"dataset {dataset.name} holds single slices, and a V-Net sees volumes; train an nnU-Net (2d) on it")
    if not 1 / 16 <= width <= 64:
        raise InputError(f"width: expected 1/16 to 64 times the V-Net's 16 features, got {width:g}")


def choose_normalization(window: Window | tuple[float, float], channel: str, values: Intensities) -> Normalization:
    """Give the normalisation that `window` means for a channel of these intensities; see `plan_vnet`."""
    if window == "auto":
        window = "article" if channel.casefold() == "ct" else "zscore"
    if window == "none":
        return NoNorm()
    if window == "zscore":
        return ZScoreNorm()
    if isinstance(window, str):
        window = WINDOWS.get(window, (values.percentile_00_5, values.percentile_99_5))
    lower, upper = window
    if not lower < upper:
        raise InputError(f"window: channel {channel!r} would be mapped from {lower:g}..{upper:g}, expected a lower and a higher intensity")
    return WindowNorm(lower=lower, upper=upper)


def _step(shape: Shape3) -> float:
    """MedicalSeg moves its window by all but 16 voxels, at least three quarters of it."""
    return min(max(1 - OVERLAP / side, 0.75) for side in shape)


def _reasons(spec: ModelSpec, network: VNetSpec, *, sliding: bool) -> dict[str, str]:
    size = " x ".join(str(n) for n in spec.inference.patch)
    grid = (
        f"Images keep the dataset's median spacing, and windows of {size} voxels slide over them, averaged uniformly."
        if sliding
        else f"The article resizes every image to {size} voxels as a whole, so one window holds all of it, at the price of detail."
    )
    orders = f"order {spec.resample_image.order} for images, {spec.resample_labels.order} for labels"
    return {
        "target": grid,
        "normalization": "; ".join(f"{c.name}: {tell_normalization(c.normalization)}" for c in spec.channels) + ".",
        "resampling": f"Spline {orders}; logits go back onto the image's own grid linearly.",
        "network": "The V-Net of the article: kernels of 5 voxels, residual stages, PReLU.",
        "batch_size": f"The article's {BATCH}.",
        "batch_dice": "The article's Dice loss sums over the whole batch.",
        "deep_supervision": "Heads at the coarser levels were asked for."
        if network.deep_supervision
        else "The article's V-Net has one head.",
        "mirroring": "The article predicts each window once, without mirroring.",
    }


def tell_normalization(norm: Normalization) -> str:
    """Say what is done to a channel's intensities, and why."""
    match norm:
        case WindowNorm():
            return f"{norm.lower:g}..{norm.upper:g} is mapped to 0..{norm.scale:g}"
        case ZScoreNorm():
            return "it has no scale of its own, so each image gets zero mean and unit variance"
    return "left as it is"
