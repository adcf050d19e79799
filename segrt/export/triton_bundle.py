"""SERVE: what a served bundle consists of, and its copy in a model repository."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..bundle import Bundle
from ..files import sha256
from ..repository import levels_in

# everything that writes these makes a new file, so a second name for them is a copy that takes no room
_LINKED = (".onnx", ".blob", ".plan", ".safetensors")


def bundle_files(bundle: Bundle, *, with_weights: bool) -> Iterator[Path]:
    """Give the paths, relative to the bundle's folder, of all that predicting reads: its stages and levels, on any machine's engines.

    Parameters
    ----------
    with_weights : also those of members that have an ONNX file, for PyTorch to run
    """
    yield Path("model.json")
    for level in levels_in(bundle):
        for member in bundle.spec.members:
            files = level.onnx_path(member), level.onnx_path(f"{member}-fp16")
            yield from (file.relative_to(bundle.path) for file in files if file.is_file())
    for member in bundle.spec.members:
        if bundle.weights_path(member).is_file() and (with_weights or not bundle.onnx_path(member).is_file()):
            yield bundle.weights_path(member).relative_to(bundle.path)
    for file in [bundle.path / "onnx" / "build.json", *sorted((bundle.path / "engines").glob("[!.]*/*"))]:
        if file.is_file():
            yield file.relative_to(bundle.path)
    for stage in (bundle.previous, bundle.partner):
        if stage is not None:
            yield from (stage.path.relative_to(bundle.path) / file for file in bundle_files(stage, with_weights=with_weights))


def holds(folder: Path, bundle: Bundle, files: Sequence[Path]) -> bool:
    """Whether a version's bundle is these files and no others."""
    there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return there == set(files) and all(_is_same(bundle.path / file, folder / file) for file in files)


def _is_same(source: Path, copy: Path) -> bool:
    """Whether two files have the same content; of one file under two names nothing needs to be read."""
    return source.samefile(copy) or (source.stat().st_size == copy.stat().st_size and sha256(source) == sha256(copy))


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` what `source` is: large files under a second name, where the file system has that, others as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in _LINKED:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copyfile(source, target)
