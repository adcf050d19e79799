"""How pictures show names of files and structures, which may hold anything."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..arrays import require


@contextmanager
def plain_text() -> Iterator[None]:
    """Inside the block a "$" in a text begins no formula, and a letter that the font lacks is a box instead of a warning.

    Raises
    ------
    BackendError
        When matplotlib is not installed.
    """
    with require("matplotlib", extra="report").rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def legend_text(name: str) -> str:
    """The name as a curve's label; matplotlib leaves those out that are empty or begin with an underscore."""
    return name if name[:1] not in ("", "_") else f" {name}"
