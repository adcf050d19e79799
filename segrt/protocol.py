"""What a served model is asked and what it answers: tensors, their types and axes, and options; server, client and exporter agree here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InputError
from .spec import ModelSpec

# inputs: exactly one of the first three is the image
IMAGE, IMAGE_INT16, FILE = "IMAGE", "IMAGE_INT16", "FILE"
FILE_SIZES, SPACING, ORIGIN, DIRECTION, PREVIOUS = "FILE_SIZES", "SPACING", "ORIGIN", "DIRECTION", "PREVIOUS"
# outputs
LABELS, PROBABILITIES, LABEL_FILE, REPORT, PROGRESS = "LABELS", "PROBABILITIES", "LABEL_FILE", "REPORT", "PROGRESS"
# of the bare engine
PATCHES, LOGITS = "PATCHES", "LOGITS"

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

# models of a repository beside the one that runs everything itself
PATCH_SUFFIX, BLS_SUFFIX, STREAM_SUFFIX = "_patch", "_bls", "_stream"

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
    timeout : seconds after which the server gives up; none by default
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tta: bool = True
    step: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    level: str | None = None
    postprocess: bool = True
    probabilities: bool = False
    format: str | None = None
    name: Annotated[str, Field(max_length=255)] = "image"
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

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
                raise InputError(f"unknown option {option!r}; this model takes {', '.join(cls.model_fields)}") from err
            raise InputError(f"option {option!r}: {first['msg']}, got {first['input']!r}") from err

    def to_parameters(self) -> dict[str, bool | str]:
        """What differs from the defaults, in types that every client can send."""
        given = self.model_dump(exclude_defaults=True)
        return {name: value if isinstance(value, bool) else str(value) for name, value in given.items()}


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"parameters: expected a JSON object, got {text[:80]!r}")
    return values
