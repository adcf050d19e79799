"""Reading the JSON files of a training (fingerprint, plan) back into their frozen values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import SpecError
from ..spec import Part

_P = TypeVar("_P", bound=Part)


def read_stored(path: Path) -> Any:
    """Give the content of a JSON file.

    Raises
    ------
    SpecError
        When it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SpecError(f"{path}: not a readable JSON file ({err})") from err


def parse_stored(kind: type[_P], values: Any, *, where: str) -> _P:
    """Validate `values` into a value of `kind`.

    Raises
    ------
    SpecError
        When a field is missing, unknown or wrong; the sentence names its dotted path.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as err:
        first = err.errors()[0]
        dotted = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        raise SpecError(": ".join(part for part in (where, dotted, message) if part)) from err
