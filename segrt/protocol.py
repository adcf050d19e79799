"""What a served model is asked and what it answers: tensors, their types and axes, and options; server, client and exporter agree here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .arrays import Shape3
from .errors import InputError
from .spec import ModelSpec, parse_spec
from .volume import Grid, Matrix3

# inputs: exactly one of the first three is the image
IMAGE, IMAGE_INT16, FILE = "IMAGE", "IMAGE_INT16", "FILE"
FILE_SIZES, SPACING, ORIGIN, DIRECTION, PREVIOUS = "FILE_SIZES", "SPACING", "ORIGIN", "DIRECTION", "PREVIOUS"
# outputs
LABELS, PROBABILITIES, LABEL_FILE, REPORT, PROGRESS = "LABELS", "PROBABILITIES", "LABEL_FILE", "REPORT", "PROGRESS"
# a parameter of requests over HTTP, which segrt-serve adds: when they came
ARRIVED = "segrt-arrived"
# of the bare engine: named as in the ONNX files that are exported here, so that a server's own backends can take its place
PATCHES, LOGITS = "patches", "logits"

# name -> (type, shape); bytes travel as UINT8, which every client can send and the python backend can hand on under NumPy 2
INPUTS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    IMAGE: ("FP32", (-1, -1, -1, -1)),  # (C, Z, Y, X)
    IMAGE_INT16: ("INT16", (-1, -1, -1, -1)),  # (C, Z, Y, X), half the bytes of a CT
    FILE: ("UINT8", (-1,)),  # an image file's bytes; the channels' files one after the other
    FILE_SIZES: ("INT64", (-1,)),  # bytes of each channel's file; one file without it
    SPACING: ("FP64", (3,)),  # (z, y, x), mm; with an array only
    ORIGIN: ("FP64", (3,)),  # as the file formats have it: (x, y, z), mm
    DIRECTION: ("FP64", (3, 3)),  # columns are the axes x, y, z
    PREVIOUS: ("UINT16", (-1, -1, -1)),  # (Z, Y, X) labels of a cascade's first stage
}

# parameters of <name> in config.pbtxt that tell a client what it serves; see `ServedModel`
SPEC, BUNDLE_SHA, TAKES_PREVIOUS = "spec", "bundle_sha", "takes_previous"

# models of a repository beside the one that runs everything itself; what each is told by its config.pbtxt, and which class its model.py
# binds, is in segrt.repository
PATCH_SUFFIX, BLS_SUFFIX, STREAM_SUFFIX = "_patch", "_bls", "_stream"

# of a failed request, named as in TritonError
ErrorCode: TypeAlias = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def outputs_of(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of a model's answers.

    LABELS (Z, Y, X), PROBABILITIES (K, Z, Y, X), a label file's bytes, and a JSON report, of which only LABELS and REPORT come unasked.
    """
    return {
        LABELS: (spec.label_dtype.upper(), (-1, -1, -1)),
        PROBABILITIES: ("FP32", (-1, -1, -1, -1)),
        LABEL_FILE: ("UINT8", (-1,)),
        REPORT: ("UINT8", (-1,)),
    }


def check_name(name: str) -> str:
    """Give back a model's name that is also a folder's.

    Raises
    ------
    InputError
        When it has other characters than letters, digits, - and _, or more than 64.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"model name {name!r}: expected 1 to 64 letters, digits, - or _, the first a letter or digit")
    return name


class RequestOptions(BaseModel):
    """What one request may ask for; it travels as the request's parameters.

    Attributes
    ----------
    tta : average over the model's mirrored axes
    step : window step as a fraction of the patch; the model's own by default
    level : pruned network to run, such as "L2"
    postprocess : apply the model's post-processing
    probabilities : also answer PROBABILITIES
    format : suffix of the LABEL_FILE wanted, such as ".nii.gz"; none by default
    name : what the image is called in sentences and reports
    timeout_s : seconds after which the server gives up; none by default ("timeout" is a parameter of the server's own, in microseconds)
    arrived : when the request came, in seconds since 1970 by the server's clock; segrt-serve says so over HTTP, clients do not
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tta: bool = True
    step: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    level: str | None = None
    postprocess: bool = True
    probabilities: bool = False
    format: str | None = None
    name: Annotated[str, Field(max_length=255)] = "image"
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    arrived: Annotated[float | None, Field(alias=ARRIVED, allow_inf_nan=False)] = None

    @classmethod
    def from_parameters(cls, parameters: str | Mapping[str, Any]) -> RequestOptions:
        """Read the parameters of a request, as a mapping or as the JSON text the server hands on.

        Raises
        ------
        InputError
            When there is an unknown option, or a value that cannot be one.
        """
        values = _parsed(parameters) if isinstance(parameters, str) else parameters
        try:
            # fractions and seconds may come as text, for not every client can send them as numbers
            return cls.model_validate(values, strict=False)
        except ValidationError as err:
            first = err.errors()[0]
            option = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise InputError(
                    f"unknown option {option!r}; this model takes {', '.join(name for name in cls.model_fields if name != 'arrived')}"
                ) from err
            raise InputError(f"option {option!r}: {first['msg']}, got {first['input']!r}") from err

    def to_parameters(self) -> dict[str, bool | str]:
        """What differs from the defaults, in types that every client can send."""
        given = self.model_dump(exclude_defaults=True)
        return {name: value if isinstance(value, bool) else str(value) for name, value in given.items()}


class ServedModel(BaseModel):
    """What a client has to know of a model before it asks; it travels as the parameters of the model's configuration.

    Attributes
    ----------
    spec : the bundle's
    bundle_sha : `Bundle.fingerprint`
    takes_previous : a request may bring labels of a cascade's first stage, for the model or for the other one of a pair
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: ModelSpec
    bundle_sha: str
    takes_previous: bool = False

    def to_parameters(self) -> dict[str, str]:
        """The parameters as text: SPEC (the text of model.json, without line ends), BUNDLE_SHA and TAKES_PREVIOUS ("true" or "false")."""
        return {
            SPEC: self.spec.model_dump_json(by_alias=True),
            BUNDLE_SHA: self.bundle_sha,
            TAKES_PREVIOUS: str(self.takes_previous).lower(),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServedModel:
        """Read the parameters of a model's configuration; those of the server's own are passed over.

        Raises
        ------
        InputError
            When the model was not written by `segrt-build --triton`.
        SpecError
            When its spec cannot be right.
        """
        missing = [name for name in (SPEC, BUNDLE_SHA) if name not in parameters]
        if missing:
            raise InputError(f"its configuration has no parameter {missing[0]!r}; expected a model written by segrt-build --triton")
        spec = parse_spec(_parsed(parameters[SPEC]), where=f"parameter {SPEC!r}")
        return cls(spec=spec, bundle_sha=parameters[BUNDLE_SHA], takes_previous=parameters.get(TAKES_PREVIOUS) == "true")


class Report(BaseModel):
    """The JSON in REPORT: how the labels were made and where they lie.

    Attributes
    ----------
    bundle_sha : `Bundle.fingerprint` of what made them
    version : of the model, as the server counts them
    windows : windows the network ran on, and those whose result was shared
    seconds : stage -> wall seconds on the server
    voxels : label name -> voxels
    spacing, origin, direction : of the image, as in the inputs SPACING, ORIGIN and DIRECTION; the shape is that of LABELS
    dimensions : 2 when the image was a plain 2-D file, else 3
    """

    # a newer server may say more
    model_config = ConfigDict(frozen=True, extra="ignore")

    bundle_sha: str
    version: str = ""
    windows: tuple[int, int] = (0, 0)
    seconds: dict[str, float] = Field(default_factory=dict)
    voxels: dict[str, int] = Field(default_factory=dict)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: Matrix3 = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    dimensions: int = 3


def coded(code: ErrorCode, sentence: str) -> str:
    """The sentence of an error of <name>_stream with its code in front: a stream carries text alone (asked for more, the server dies)."""
    return f"[{code}] {sentence}"


def code_of(text: str) -> tuple[ErrorCode | None, str]:
    """Code and sentence of `coded`; None when the text has none, such as one of the server's own."""
    for code in get_args(ErrorCode):
        if text.startswith(f"[{code}] "):
            return code, text[len(code) + 3 :]
    return None, text


def geometry_of(grid: Grid) -> dict[str, tuple[Any, ...]]:
    """SPACING, ORIGIN and DIRECTION of a grid."""
    return {SPACING: grid.spacing, ORIGIN: grid.origin, DIRECTION: tuple(row[::-1] for row in grid.axes)}


def grid_of(
    shape: Shape3, spacing: Sequence[float], origin: Sequence[float], direction: Sequence[Sequence[float]], *, flat: bool = False
) -> Grid:
    """The grid of `geometry_of`; `flat` for a plain 2-D image."""
    z, y, x = (float(step) for step in spacing)
    first, second, third = ((float(c), float(b), float(a)) for a, b, c in direction)
    px, py, pz = (float(position) for position in origin)
    return Grid(shape, (z, y, x), (px, py, pz), (first, second, third), 2 if flat else 3)


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"parameters: expected a JSON object, got {text[:80]!r}")
    return values
