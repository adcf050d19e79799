"""What a dataset.json says, of nnU-Net or the Medical Decathlon: channels, labels, regions, the ignored value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

Labels = dict[str, tuple[int, ...]]
_ORDER = "regions_class_order"


@dataclass(frozen=True)
class Declared:
    """What the dataset's author says about it: see `Dataset`; `values` is the whole file."""

    channels: tuple[str, ...]
    labels: Labels
    class_order: tuple[int, ...]
    ignore: int | None
    values: Mapping[str, Any]


def read_dataset_json(path: Path) -> Declared:
    """Read a dataset.json with "channel_names" (nnU-Net) or "modality" (Decathlon) and "labels".

    Raises
    ------
    InputError
        When it is not JSON, lacks one of them, or a value is of another kind; the sentence names the key.
    """
    values = _read(path, "dataset.json")
    labels, order = _labels(values, path)
    own = parse_labels(labels, where=f"{path}: labels")
    ignore = pop_ignore(own, where=f"{path}: labels")
    return Declared(_channels(values, path), own, order, ignore, values)


def read_labels(path: Path) -> dict[str, Any]:
    """Read what label values mean from a JSON file: {"liver": 1, "tumour": [2, 3], "ignore": 255}, or with that under "labels".

    Returns
    -------
    dict : arguments "labels" and "class_order" of `open_dataset`; the latter from "regions_class_order", as in a dataset.json

    Raises
    ------
    InputError
        When it is not JSON or a value is of another kind; the sentence names the key.
    """
    values = _read(path, "file of labels")
    if not isinstance(values.get("labels"), dict):
        values = {"labels": {k: v for k, v in values.items() if k != _ORDER}, _ORDER: values.get(_ORDER)}
    labels, order = _labels(values, path)
    parse_labels(labels, where=f"{path}: labels")
    return {"labels": labels, "class_order": order}


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: not a readable {what} ({err})") from err
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def _labels(values: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What "labels" and "regions_class_order" say."""
    declared = values.get("labels")
    if not isinstance(declared, dict) or not declared:
        raise InputError(f"{path}: labels: expected names and values, such as {{'background': 0, 'liver': 1}}, got {declared!r}")
    order = values.get(_ORDER) or ()
    if not isinstance(order, list | tuple) or not all(isinstance(v, int) for v in order):
        raise InputError(f"{path}: {_ORDER}: expected a list of label values, got {order!r}")
    return _named_first(declared), tuple(order)


def pop_ignore(labels: Labels, *, where: str) -> int | None:
    """Take the value to ignore out of `labels`, where there is one.

    Raises
    ------
    InputError
        When there are several.
    """
    ignore = labels.pop("ignore", None)
    if ignore is not None and len(ignore) != 1:
        raise InputError(f"{where}.ignore: expected one value, got {list(ignore)}")
    return ignore[0] if ignore else None


def parse_labels(labels: Mapping[str, int | Sequence[int]], *, where: str) -> Labels:
    """Give name -> values; a single value, a list of them and whole numbers in text are all understood.

    Raises
    ------
    InputError
        When a value is not a whole number.
    """
    return {name: _values(value, f"{where}.{name}") for name, value in labels.items()}


def _named_first(declared: Mapping[str, Any]) -> dict[str, Any]:
    """The Decathlon writes {"1": "liver"}, nnU-Net {"liver": 1}."""
    if declared and all(key.lstrip("-").isdigit() and isinstance(value, str) for key, value in declared.items()):
        return {value: int(key) for key, value in declared.items()}
    return dict(declared)


def _values(value: Any, where: str) -> tuple[int, ...]:
    parts = value if isinstance(value, list | tuple) else [value]
    try:
        numbers = tuple(int(part) for part in parts if not isinstance(part, float) or part == int(part))
    except (TypeError, ValueError, OverflowError) as err:
        raise InputError(f"{where}: expected a label value or a list of them, got {value!r}") from err
    if not numbers or len(numbers) != len(parts):
        raise InputError(f"{where}: expected a label value or a list of them, got {value!r}")
    return numbers


def _channels(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names = values.get("channel_names") or values.get("modality") or values.get("modalities")
    if isinstance(names, dict) and names and all(str(key).isdigit() for key in names):
        return tuple(str(names[key]) for key in sorted(names, key=int))
    if isinstance(names, list) and names:
        return tuple(str(name) for name in names)
    raise InputError(f"{path}: channel_names (or modality): expected numbers and names, such as {{'0': 'CT'}}, got {names!r}")
