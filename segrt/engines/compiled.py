"""What every engine compiled into a bundle is checked for before it runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError
from ..files import sha256

logger = logging.getLogger(__name__)


def check_compiled(bundle: Bundle, member: str, file: Path, build: Mapping[str, Any]) -> dict[str, Any]:
    """Give a member's entry of build.json; refuse a file that came from another ONNX file or was changed.

    Raises
    ------
    BackendError
        When the ONNX file or the compiled one is not that of the record.
    """
    rebuild = _rebuild(bundle, build)
    members = build.get("members")
    known = members.get(member) if isinstance(members, dict) else None
    entry: dict[str, Any] = known if isinstance(known, dict) else {}
    if entry.get("onnx_sha256") != sha256(bundle.onnx_path(member)):
        raise BackendError(f"{file} was compiled from another ONNX file than the bundle holds; {rebuild}")
    if not file.is_file() or entry.get("sha256") != sha256(file):
        raise BackendError(f"{file} is not the engine that was built (its SHA-256 differs from build.json); {rebuild}")
    if build.get("verified") is not True:
        logger.warning("%s has not passed verification (kept by --force, or its record is damaged)", file)
    return entry


def check_window(bundle: Bundle, file: Path, window: Sequence[int], build: Mapping[str, Any]) -> None:
    """Refuse an engine compiled for other windows (channels first) than the model describes.

    Raises
    ------
    BackendError
        When they differ.
    """
    patch = bundle.spec.inference.patch
    wanted = (bundle.spec.in_channels, *(patch if bundle.spec.dimensions == 3 else patch[1:]))
    if tuple(window) != wanted:
        raise BackendError(
            f"{file} was compiled for windows of {' x '.join(str(n) for n in window)} (channels first), model.json describes "
            f"{' x '.join(str(n) for n in wanted)}; {_rebuild(bundle, build)}"
        )


def _rebuild(bundle: Bundle, build: Mapping[str, Any]) -> str:
    """What makes an engine again; without --force, which would keep one that does not give the network's labels."""
    place = " --backend tensorrt --device cuda" if str(build.get("key", "")).startswith("tensorrt-") else ""
    precision = f" --{built}" if isinstance(built := build.get("precision"), str) else ""
    return f"rebuild it with: {bundle.build_command}{place}{precision}"
