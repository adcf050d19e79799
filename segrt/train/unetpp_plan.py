"""TRAIN, `plan_unetpp`: UNet++ and its U-Net as a `Plan`: whole images resized, or windows that slide; one logit for one structure."""

from __future__ import annotations

from math import ceil
from typing import Literal

import numpy as np

from ..arrays import Shape3
from ..errors import InputError
from ..io.peek import peek
from ..spec import Channel, Head, Inference, ModelSpec, Resampling, ShapeTarget, SpacingTarget, UNetPPSpec
from .cases import Dataset
from .configuration import UNTRAINED, Configuration, Plan, head_of, labels_of
from .fingerprint import Fingerprint
from .vnet_plan import Window, choose_normalization, tell_normalization

Family = Literal["unetpp", "unet"]

FEATURES = (32, 64, 128, 256, 512)
BATCH = 16
_MULTIPLE = 16  # four halvings
_LONGEST = 512  # side of a picture that nobody chose a size for
_PATCH = 64  # side of a volume's patch, the one of the article's lung nodules


def plan_unetpp(
    dataset: Dataset,
    fingerprint: Fingerprint,
    *,
    family: Family = "unetpp",
    window: Window | tuple[float, float] = "auto",
    shape: Shape3 | None = None,
    sliding: bool = False,
    resampling: Literal["linear", "cubic"] = "linear",
    width: float = 1.0,
    deep_supervision: bool = True,
    mode: Literal["accurate", "fast"] = "accurate",
    dropout: float = 0.0,
) -> Plan:
    """Give one configuration, named as its family, complete with its way back onto the image's own grid.

    Parameters
    ----------
    family : "unetpp", or "unet": the plain network it is measured against, which has one head
    window : see `plan_vnet`
    shape : (z, y, x) in voxels that images are resized to, or of the sliding window; z is 1 for a network of slices. By default pictures
        are resized to their median size, rounded to multiples of 16 and at most 512, and volumes keep theirs under a window of 64^3
    sliding : keep images at the dataset's median spacing and slide a window over them
    resampling : "linear" resizes images by order 1, "cubic" by order 3; masks are resized as indicators either way
    width : factor on the published features, 32 to 512
    deep_supervision : a head at each of the four levels, so that the network can be pruned; of "unetpp" only
    mode : what several heads answer: their mean, or the last one's logits

    Raises
    ------
    InputError
        When the network cannot take `shape`, or a window is empty.

    References
    ----------
    Zhou, Siddiquee, Tajbakhsh, Liang 2018, UNet++, doi:10.1007/978-3-030-00889-5_1.
    """
    _check(dataset, fingerprint, width)
    spacing = np.median(np.asarray(fingerprint.spacings), axis=0).tolist()
    shapes = _shapes(dataset, fingerprint)
    pictures = all(z == 1 for z, _, _ in shapes)
    slices = pictures or (shape is not None and shape[0] == 1)
    whole = not sliding and (pictures or (shape is not None and not slices))
    patch = shape or (_picture_size(shapes) if pictures else _volume_patch(shapes))
    head = binary_head(dataset)
    supervised = deep_supervision and family == "unetpp"
    network = UNetPPSpec(
        family=family,
        dimensions=2 if slices else 3,
        in_channels=len(dataset.channels),
        out_channels=len(head.values),
        features=_features(width),
        deep_supervision=supervised,
        mode=mode,
        dropout=dropout,
    )
    if pictures and patch[0] != 1:
        raise InputError(f"patch: dataset {dataset.name} holds pictures, so z is 1, got {patch}")
    if refusal := network.refusal(patch):
        raise InputError(f"patch: the network halves its input four times: {refusal}")
    order: Literal[1, 3] = 3 if resampling == "cubic" else 1
    spec = ModelSpec(
        name=dataset.name,
        source=f"segrt-train, {'UNet++' if family == 'unetpp' else 'U-Net'}",
        channels=tuple(
            Channel(name=name, normalization=choose_normalization(window, name, values))
            for name, values in zip(dataset.channels, fingerprint.intensities, strict=True)
        ),
        labels=labels_of(dataset),
        ignore=dataset.ignore,
        head=head,
        crop_nonzero=False,
        target=ShapeTarget(shape=patch) if whole else SpacingTarget(spacing=(None if slices else spacing[0], spacing[1], spacing[2])),
        resample_image=Resampling(order=order, separate=False),
        resample_labels=Resampling(order=1, separate=False),
        resample_logits=Resampling(order=1, separate=False),
        inference=Inference(patch=patch, step=1.0 if whole else 0.5, blending="uniform" if whole else "gaussian"),
        network=network,
        members=UNTRAINED,
    )
    median = np.median(np.asarray(shapes), axis=0).tolist()
    configuration = Configuration(
        spec=spec,
        batch_size=BATCH if slices else 2,
        batch_dice=False,
        median_shape=patch if whole else tuple(median),
        deep_supervision=supervised,
        flips=(1, 2) if slices else (0, 1, 2),
        reasons=_reasons(spec, network, whole=whole, pictures=pictures),
    )
    return Plan(
        dataset=dataset.name,
        planner=family,
        memory_gb=None,
        transpose=(0, 1, 2),
        median_spacing=tuple(spacing),
        median_shape=tuple(round(n) for n in median),
        configurations={family: configuration},
    )


def binary_head(dataset: Dataset) -> Head:
    """One logit, above 0 where the structure is, for a dataset of one structure; else the dataset's own head."""
    foreground = list(dataset.foreground.values())
    if len(foreground) == 1 and len(foreground[0]) == 1:
        return Head(activation="sigmoid", values=foreground[0])
    return head_of(dataset)


def _check(dataset: Dataset, fingerprint: Fingerprint, width: float) -> None:
    for what, have, need in (
        ("cases", len(fingerprint.shapes), len(dataset.cases)),
        ("channels", len(fingerprint.intensities), len(dataset.channels)),
    ):
        if have != need:
            raise InputError(f"the fingerprint is of {have} {what}, dataset {dataset.name} has {need}; measure it again")
    if not 1 / 32 <= width <= 64:
        raise InputError(f"width: expected 1/32 to 64 times the features {', '.join(map(str, FEATURES))}, got {width:g}")


def _features(width: float) -> tuple[int, int, int, int, int]:
    a, b, c, d, e = (max(1, round(n * width)) for n in FEATURES)
    return a, b, c, d, e


def _shapes(dataset: Dataset, fingerprint: Fingerprint) -> list[Shape3]:
    """Of whole images, from their headers: the fingerprint's are without black borders."""
    headers = [peek(case.images) for case in dataset.cases]
    return [header[0].shape if header else shape for header, shape in zip(headers, fingerprint.shapes, strict=True)]


def _picture_size(shapes: list[Shape3]) -> Shape3:
    _, y, x = np.median(np.asarray(shapes), axis=0).tolist()
    factor = min(1.0, _LONGEST / max(y, x))
    y, x = (max(_MULTIPLE, round(side * factor / _MULTIPLE) * _MULTIPLE) for side in (y, x))
    return 1, y, x


def _volume_patch(shapes: list[Shape3]) -> Shape3:
    z, y, x = (min(_PATCH, ceil(side / _MULTIPLE) * _MULTIPLE) for side in np.median(np.asarray(shapes), axis=0).tolist())
    return z, y, x


def _reasons(spec: ModelSpec, network: UNetPPSpec, *, whole: bool, pictures: bool) -> dict[str, str]:
    size = " x ".join(str(n) for n in spec.inference.patch[3 - network.dimensions :])
    heads = f"{len(network.heads)} heads, one per level, count alike in the loss; a prediction is "
    return {
        "target": (
            f"Every image is resized to {size} as a whole, and its labels go back to its own size."
            if whole
            else f"Images keep {'their size' if pictures else 'the median spacing'}, and windows of {size} slide over them."
        ),
        "normalization": "; ".join(f"{c.name}: {tell_normalization(c.normalization)}" for c in spec.channels) + ".",
        "resampling": f"Spline order {spec.resample_image.order} for images, indicators of the labels and logits linearly.",
        "head": (
            "There is one structure, so one logit, which is above 0 where it is."
            if spec.head.activation == "sigmoid" and len(spec.head.values) == 1
            else "Each structure has a logit of its own."
        ),
        "network": f"{'UNet++' if network.family == 'unetpp' else 'U-Net'} in {network.dimensions}-D, features {network.features}.",
        "deep_supervision": (
            heads + ("their mean." if network.mode == "accurate" else "the last one's.")
            if network.deep_supervision
            else "There is one head, so the network cannot be pruned."
        ),
        "batch_dice": "The article's loss takes each image by itself.",
        "mirroring": "Patches are mirrored in training; a prediction is made once.",
    }
