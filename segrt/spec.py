"""`ModelSpec`: one frozen value that says everything a trained model needs around its network; stored as model.json."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .arrays import Shape3, Spacing3
from .errors import SpecError

SCHEMA = 1

Size = Annotated[int, Field(ge=1)]
Triple = tuple[Size, Size, Size]
Millimetres = Annotated[float, Field(gt=0)]
Features = Annotated[int, Field(ge=1, le=2**16)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
LabelValue = Annotated[int, Field(ge=0, le=65535)]

# How the names of a member's other ONNX files end: onnx/<member>-argmax.onnx lies beside onnx/<member>.onnx.
_KINDS = ("-softmax", "-argmax", "-dynamic", "-fp16")


class Part(BaseModel):
    """Base of every stored value: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


# ------------------------------------------------------------------ intensities
class CTNorm(Part):
    """Clip to [lower, upper] HU (training percentiles .5 and 99.5), subtract `mean`, divide by `std`."""

    kind: Literal["ct"] = "ct"
    lower: float
    upper: float
    mean: float
    std: float = Field(ge=0)


class ZScoreNorm(Part):
    """Zero mean, unit variance per image; with `masked` over the non-zero region only, the rest stays as it is."""

    kind: Literal["zscore"] = "zscore"
    masked: bool = False


class WindowNorm(Part):
    """Map the HU window [lower, upper] to [0, scale]; values outside are clipped."""

    kind: Literal["hu_window"] = "hu_window"
    lower: float
    upper: float
    scale: float = Field(default=255.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> WindowNorm:
        if self.lower >= self.upper:
            raise ValueError(f"lower: expected less than upper ({self.upper:g}), got {self.lower:g}")
        return self


class RescaleNorm(Part):
    """Map each image's own minimum and maximum to 0 and 1."""

    kind: Literal["rescale_0_1"] = "rescale_0_1"


class RGBNorm(Part):
    """Divide 8-bit colour by 255."""

    kind: Literal["rgb_0_1"] = "rgb_0_1"


class NoNorm(Part):
    """Leave intensities as they are."""

    kind: Literal["none"] = "none"


Normalization = Annotated[CTNorm | ZScoreNorm | WindowNorm | RescaleNorm | RGBNorm | NoNorm, Field(discriminator="kind")]


class Channel(Part):
    """One input channel: its name in messages and how its intensities are normalised."""

    name: str
    normalization: Normalization


# ------------------------------------------------------------------ grids
class SpacingTarget(Part):
    """Resample to this spacing, (z, y, x) in mm; None keeps the image's own spacing on that axis (2-D models: z)."""

    kind: Literal["spacing"] = "spacing"
    spacing: tuple[Millimetres | None, Millimetres | None, Millimetres | None]


class ShapeTarget(Part):
    """Resize the whole image to this shape, (z, y, x) in voxels."""

    kind: Literal["shape"] = "shape"
    shape: tuple[Size, Size, Size]


class Resampling(Part):
    """How arrays change shape.

    `method` "spline" follows scipy's zoom in grid mode (order 0, 1 or 3), "linear" torch's trilinear interpolation in float32, "none"
    forbids it. `separate` decides whether the coarsest axis is resampled by nearest neighbour on its own: True, False, or None for "when
    the ratio of spacings exceeds `threshold`".
    """

    method: Literal["spline", "linear", "none"] = "spline"
    order: Literal[0, 1, 3] = 3
    order_z: Literal[0, 1, 3] = 0
    separate: bool | None = None
    threshold: float = 3.0

    def separate_axis(self, current: Spacing3, new: Spacing3) -> int | None:
        """Give the axis to resample on its own by nearest neighbour, or None.

        nnU-Net's rule: the coarsest axis of the current spacing when that is anisotropic, else of the new spacing; none when two axes are
        equally coarse. Both spacings are (z, y, x) in mm.
        """
        if self.separate is False:
            return None
        for spacing in (current,) if self.separate else (current, new):
            if self.separate or max(spacing) / min(spacing) > self.threshold:
                coarsest = [axis for axis, s in enumerate(spacing) if s == max(spacing)]
                return coarsest[0] if len(coarsest) == 1 else None
        return None


# ------------------------------------------------------------------ labels
class Label(Part):
    """A structure with a name: the value it has in label maps, or the several values a region is made of."""

    name: str
    values: tuple[LabelValue, ...] = Field(min_length=1)


class Head(Part):
    """What the network's output channels mean.

    softmax: the channel with the highest logit wins, channel k stands for `values[k]`. sigmoid: each channel whose probability exceeds
    `threshold` paints `values[k]`, later channels over earlier ones.
    """

    activation: Literal["softmax", "sigmoid"]
    values: tuple[LabelValue, ...] = Field(min_length=1)
    threshold: float = Field(default=0.5, gt=0, lt=1)


# ------------------------------------------------------------------ inference
class Inference(Part):
    """The sliding window: patch (z, y, x) in voxels (z = 1 for 2-D models), step as a fraction of it, blending, mirrored axes."""

    patch: tuple[Size, Size, Size]
    step: float = Field(default=0.5, gt=0, le=1)
    blending: Literal["gaussian", "uniform"] = "gaussian"
    mirror_axes: tuple[Literal[0, 1, 2], ...] = ()


class KeepLargest(Part):
    """Of all voxels whose label is in `values`, keep the largest component (26-connected; ties are all kept), clear the rest."""

    kind: Literal["keep_largest"] = "keep_largest"
    values: tuple[LabelValue, ...] = Field(min_length=1)


class DropSmall(Part):
    """Clear components of `values` smaller than `minimum_mm3`."""

    kind: Literal["drop_small"] = "drop_small"
    values: tuple[LabelValue, ...] = Field(min_length=1)
    minimum_mm3: float = Field(gt=0)


class FillHoles(Part):
    """Give background enclosed by label `value` that label."""

    kind: Literal["fill_holes"] = "fill_holes"
    value: int = Field(gt=0)


PostprocessStep = Annotated[KeepLargest | DropSmall | FillHoles, Field(discriminator="kind")]


# ------------------------------------------------------------------ network
class UNetSpec(Part):
    """nnU-Net's plain or residual-encoder U-Net in numbers; kernels and strides have `dimensions` entries each.

    `blocks` counts convolutions (plain) or residual blocks (residual) per encoder stage; `decoder_convs` convolutions per decoder stage.
    """

    family: Literal["plain_unet", "residual_unet"]
    dimensions: Literal[2, 3]
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    features: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[Size, ...], ...]
    blocks: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    conv_bias: bool = True
    norm: Literal["instance", "batch", "none"] = "instance"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    nonlinearity: Literal["leaky_relu", "relu"] = "leaky_relu"
    negative_slope: float = 0.01
    dropout: float = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> UNetSpec:
        n = len(self.features)
        for name, length in (("kernels", n), ("strides", n), ("blocks", n), ("decoder_convs", n - 1)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name}: expected {length} entries for {n} stages, got {len(getattr(self, name))}")
        for name in ("kernels", "strides"):
            if any(len(k) != self.dimensions for k in getattr(self, name)):
                raise ValueError(f"{name}: every entry needs {self.dimensions} numbers")
        return self

    def refusal(self, shape: tuple[int, ...]) -> str:
        """Say why this network cannot take patches of `shape` (z, y, x) and give back logits of the same; "" when it can."""
        own = shape[3 - self.dimensions :]
        multiples = [prod(stride[axis] for stride in self.strides) for axis in range(self.dimensions)]
        for side, multiple, axis in zip(own, multiples, "zyx"[3 - self.dimensions :], strict=True):
            if side % multiple:
                return f"expected multiples of {multiple} on axis {axis}, got {side}"
        if self.norm == "instance" and own == tuple(multiples):
            return f"{shape} leaves one voxel at the coarsest level of the network, where normalising needs more; choose a larger patch"
        return ""


class VNetSpec(Part):
    """The V-Net of MedicalSeg and MedicalZooPytorch in numbers: five levels in 3-D, each half as fine and twice as wide as the one above.

    `width` is a factor on the 16 features of the finest level. `kernels` and `strides` are those of the four steps down, finest first, and
    serve the steps up too; `dropout` acts on whole features of the two coarsest levels. With `deep_supervision` the network has heads at
    the three coarser levels of its decoder.
    """

    family: Literal["vnet"] = "vnet"
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    width: float = Field(default=1.0, ge=1 / 16, le=64)
    elu: bool = False
    kernels: tuple[Triple, Triple, Triple, Triple] = ((2, 2, 2),) * 4
    strides: tuple[Triple, Triple, Triple, Triple] = ((2, 2, 2),) * 4
    dropout: float = Field(default=0.5, ge=0, lt=1)
    deep_supervision: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> VNetSpec:
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            if any(k < s for k, s in zip(kernel, stride, strict=True)):
                raise ValueError(f"kernels: {kernel} leaves out voxels between strides of {stride}")
        return self

    @property
    def dimensions(self) -> Literal[3]:
        """A V-Net sees volumes."""
        return 3

    @property
    def features(self) -> tuple[int, ...]:
        """Features per level, finest first."""
        return tuple(round(16 * self.width) * 2**level for level in range(5))

    def refusal(self, shape: tuple[int, ...]) -> str:
        """Say why this network cannot take patches of `shape` (z, y, x) and give back logits of the same; "" when it can."""
        for axis, side in enumerate(shape):
            steps = [(kernel[axis], stride[axis]) for kernel, stride in zip(self.kernels, self.strides, strict=True)]
            left = side
            for level, (kernel, stride) in enumerate(steps, 1):
                if left < kernel or (left - kernel) % stride:
                    if all(k == s for k, s in steps):
                        return f"expected multiples of {prod(s for _, s in steps)} on axis {'zyx'[axis]}, got {side}"
                    return f"{side} on axis {'zyx'[axis]} is {left} at level {level}, which kernel {kernel} and stride {stride} do not fill"
                left = (left - kernel) // stride + 1
        return ""


class UNetPPSpec(Part):
    """UNet++, and the U-Net it is measured against, in numbers: five scales, each half as fine as the one above.

    Node (i, j) works at scale i and reads every node left of it at that scale and the one below, enlarged; "unet" has only the nodes of the
    first column and of the last diagonal, each of which reads one node of its scale. `level` says how many scales below the finest are
    used: nodes with i + j <= level exist. With `deep_supervision` there is a head for each of the levels 1..`level`, else one for the last.
    `mode` is what a network with several heads answers: their mean (accurate), or the last one's logits (fast).

    `norm` and `up` tell two published forms apart: batch normalisation and linear enlargement, or neither normalisation nor that, but
    transposed convolutions (and dropout).
    """

    family: Literal["unetpp", "unet"]
    dimensions: Literal[2, 3] = 2
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    features: tuple[Features, Features, Features, Features, Features] = (32, 64, 128, 256, 512)
    level: int = Field(default=4, ge=1, le=4)
    deep_supervision: bool = False
    mode: Literal["accurate", "fast"] = "accurate"
    norm: Literal["batch", "none"] = "batch"
    up: Literal["linear", "transposed"] = "linear"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> UNetPPSpec:
        if self.family == "unet" and self.deep_supervision:
            raise ValueError("deep_supervision: a plain U-Net has one head only; take family 'unetpp'")
        return self

    @property
    def heads(self) -> tuple[int, ...]:
        """The levels that have a head."""
        return tuple(range(1, self.level + 1)) if self.deep_supervision else (self.level,)

    @property
    def nodes(self) -> tuple[tuple[int, int], ...]:
        """Nodes (scale, column) in an order in which each finds what it reads; those of a lower level come first."""
        if self.family == "unet":
            up = tuple((i, self.level - i) for i in reversed(range(self.level)))
            return tuple((i, 0) for i in range(self.level + 1)) + up
        return tuple((n - j, j) for n in range(self.level + 1) for j in range(n + 1))

    def beside(self, j: int) -> range:
        """Columns of its own scale that a node of column j reads."""
        return range(j if self.family == "unetpp" else min(j, 1))

    def width(self, i: int, j: int) -> int:
        """Channels that node (i, j) reads."""
        if j == 0:
            return self.features[i - 1] if i else self.in_channels
        return len(self.beside(j)) * self.features[i] + self.features[i if self.up == "transposed" else i + 1]

    def refusal(self, shape: tuple[int, ...]) -> str:
        """Say why this network cannot take patches of `shape` (z, y, x) and give back logits of the same; "" when it can."""
        multiple = 2**self.level
        for side, axis in zip(shape[3 - self.dimensions :], "zyx"[3 - self.dimensions :], strict=True):
            if side % multiple:
                return f"expected multiples of {multiple} on axis {axis}, got {side}"
        return ""

    def pruned(self, level: int) -> UNetPPSpec:
        """Give this network without what the heads up to `level` do not need; in fast mode without the other heads too.

        Raises
        ------
        SpecError
            When it has no head at that level.
        """
        if level == self.level:
            return self
        if level not in self.heads:
            raise SpecError(f"network.level: expected one of {', '.join(f'L{n}' for n in self.heads)} (those with a head), got L{level}")
        return self.model_copy(update={"level": level, "deep_supervision": self.mode == "accurate"})


class OnnxNetwork(Part):
    """A network segrt does not build itself: the bundle holds only its ONNX file."""

    family: Literal["onnx"] = "onnx"
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)


NetworkSpec = Annotated[UNetSpec | VNetSpec | UNetPPSpec | OnnxNetwork, Field(discriminator="family")]


class PreviousStage(Part):
    """A cascade's first stage: its labels enter as one-hot channels, one per value, after the image's channels."""

    values: tuple[LabelValue, ...] = Field(min_length=1)


class Partner(Part):
    """The other model of a pair: a bundle in partner/, known by the SHA-256 of its model.json and of each member's weights.

    The probabilities of both are averaged on the image's own grid. A member that came without weights has "".
    """

    spec_sha256: Sha256
    weights_sha256: tuple[Literal[""] | Sha256, ...] = Field(min_length=1)


# ------------------------------------------------------------------ the whole
class ModelSpec(Part):
    """Everything around the network; see the parts. Arrays follow (z, y, x), spacings are mm."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    name: str
    source: str = ""
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: tuple[Label, ...]
    ignore: int | None = None
    head: Head
    transpose: Shape3 = (0, 1, 2)
    crop_nonzero: bool = True
    target: Annotated[SpacingTarget | ShapeTarget, Field(discriminator="kind")]
    resample_image: Resampling = Resampling(order=3)
    resample_labels: Resampling = Resampling(order=1)
    resample_logits: Resampling = Resampling(order=1)
    inference: Inference
    network: NetworkSpec
    members: tuple[str, ...] = Field(min_length=1)
    previous: PreviousStage | None = None
    partner: Partner | None = None
    postprocess: tuple[PostprocessStep, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(f"transpose: expected a permutation of 0, 1, 2, got {self.transpose}")
        if self.in_channels != self.network.in_channels:
            raise ValueError(
                f"network.in_channels: expected {self.in_channels} (channels and previous labels), got {self.network.in_channels}"
            )
        if len(self.head.values) != self.network.out_channels:
            raise ValueError(
                f"head.values: expected {self.network.out_channels} values (network.out_channels), got {len(self.head.values)}"
            )
        if not isinstance(self.network, OnnxNetwork) and (refusal := self.network.refusal(self.inference.patch)):
            raise ValueError(f"inference.patch: {refusal}")
        if self.dimensions == 2 and self.inference.patch[0] != 1:
            raise ValueError(f"inference.patch: a 2-D model's patch has z = 1, got {self.inference.patch}")
        if self.dimensions == 2 and 0 in self.inference.mirror_axes:
            raise ValueError(f"inference.mirror_axes: a 2-D model cannot be mirrored along z (axis 0), got {self.inference.mirror_axes}")
        for name, values in (("inference.mirror_axes", self.inference.mirror_axes), ("members", self.members)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: expected no entry twice, got {values}")
        for name in ("resample_image", "resample_logits"):
            if getattr(self, name).method == "none" and (self.resample_image.method != "none" or isinstance(self.target, ShapeTarget)):
                raise ValueError(f"{name}.method: 'none' needs a target spacing and images that are not resampled either")
        for member in self.members:
            if member.endswith(_KINDS) or (isinstance(self.network, UNetPPSpec) and member[-3:-1] == "-L"):
                raise ValueError(
                    f"members: a member's name may not end like those of its other files ({', '.join(_KINDS)}, -L1), got {member!r}"
                )
            if not member.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"members: a member's name is letters, digits, - and _, got {member!r}")
        return self

    @property
    def in_channels(self) -> int:
        """Channels the network reads: the image's and one per label of the previous stage."""
        return len(self.channels) + (len(self.previous.values) if self.previous else 0)

    @property
    def classes(self) -> int:
        """Channels the network writes."""
        return self.network.out_channels

    @property
    def dimensions(self) -> int:
        """2 when the network sees single slices, else 3."""
        if isinstance(self.network, OnnxNetwork):
            return 2 if self.inference.patch[0] == 1 else 3
        return self.network.dimensions

    @property
    def label_dtype(self) -> str:
        """dtype of label maps: uint8, or uint16 from 255 foreground labels on."""
        foreground = [v for v in self.head.values if v]
        return "uint8" if len(foreground) < 255 and max(self.head.values) < 256 else "uint16"

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Label name -> values."""
        return {label.name: label.values for label in self.labels}

    def to_json(self) -> str:
        """The text of model.json."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def load_spec(path: Path) -> ModelSpec:
    """Read a model.json.

    Raises
    ------
    SpecError
        When the file is not JSON, is of a newer schema, or a value is wrong; the sentence names the dotted path and the value.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SpecError(f"{path}: not a readable model.json ({err})") from err
    if not isinstance(values, dict):
        raise SpecError(f"{path}: expected a JSON object, got {type(values).__name__}")
    version = values.get("schema")
    if version != SCHEMA:
        raise SpecError(f"{path}: schema {version!r}, this segrt reads schema {SCHEMA}; install the segrt that wrote it or a newer one")
    return parse_spec(values, where=str(path))


def parse_spec(values: dict[str, Any], *, where: str = "model spec") -> ModelSpec:
    """Validate a dictionary into a ModelSpec; a SpecError names the first wrong field by its dotted path."""
    try:
        return ModelSpec.model_validate(values)
    except ValidationError as err:
        first = err.errors()[0]
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        got = first["input"]
        # what a validator of ours refuses is a whole part; its message names the field and the value
        shown = "" if isinstance(got, dict | list | tuple | Part) or first["type"] == "missing" else f", got {got!r}"
        dotted = _dotted(first["loc"], values)
        raise SpecError(": ".join(part for part in (where, dotted, message + shown) if part)) from err


def _dotted(loc: tuple[int | str, ...], values: Any) -> str:
    """Path of a field in the file: pydantic also names the kind of a part that comes in several, which is no field."""
    parts: list[str] = []
    entered = False
    for key in loc:
        if not entered and isinstance(values, dict) and key in (values.get("kind"), values.get("family")):
            entered = True
            continue
        parts.append(str(key))
        try:
            values, entered = values[key], False
        except (LookupError, TypeError):
            values = None
    return ".".join(parts)
