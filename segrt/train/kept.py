"""Results of earlier runs, trusted only while the dataset's files are the ones they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from ..files import write_atomic
from .cases import Dataset


class _Json(Protocol):
    def to_json(self) -> str: ...


_T = TypeVar("_T", bound=_Json)


def kept(folder: Path, name: str, dataset: Dataset, make: Callable[[], _T], load: Callable[[Path], _T | None]) -> _T:
    """What `folder`/reports/`name`.json says, when it was made from these files and `load` takes it; else made anew and written."""
    path, mark = folder / "reports" / f"{name}.json", folder / f"{name}.sha256"
    key = digest_of(dataset)
    if path.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == key and (found := load(path)) is not None:
        return found
    value = make()
    mark.unlink(missing_ok=True)
    write_atomic(path, value.to_json())
    write_atomic(mark, key)
    return value


def digest_of(dataset: Dataset) -> str:
    """SHA-256 over what a dataset declares and over its files' names, sizes and times."""
    files = [path for case in dataset.cases for path in (*case.images, case.labels) if path is not None]
    each = [entry for file in files for entry in (sorted(file.iterdir()) if file.is_dir() else [file])]
    stats: list[tuple[object, ...]] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in each if file.exists()]
    stats += [(str(file), "missing") for file in each if not file.exists()]
    stats += [tuple(map(str, missing.files)) for missing in dataset.missing]
    declared: list[object] = [dataset.name, dataset.channels, dict(dataset.labels), dataset.class_order, dataset.ignore]
    declared += [] if dataset.npy_window is None else [dataset.npy_window]
    read = [] if dataset.mask is None else [[dataset.mask.threshold, dataset.mask.value]]
    return hashlib.sha256(json.dumps([declared, stats, *read]).encode()).hexdigest()
