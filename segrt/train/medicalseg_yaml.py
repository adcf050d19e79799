"""MedicalSeg's YAML as nested mappings with `_base_` files merged; first step of an import. Nothing in a file is ever executed."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..arrays import require
from ..errors import InputError, SpecError

MOST_BYTES, MOST_VALUES, DEEPEST, LONGEST_KEY = 1_000_000, 10_000, 16, 100


@dataclass(frozen=True)
class Document:
    """`values` of a configuration and its bases together; `files` they come from, the outermost first; `root` none of them lies outside."""

    values: dict[str, Any]
    files: tuple[Path, ...]
    root: Path


def read_document(path: Path, *, root: Path | None = None) -> Document:
    """Read a configuration and the files that `_base_` names, each relative to the file that names it.

    As in MedicalSeg, what a file says beats its base, key by key in mappings; lists are replaced; `_inherited_: False` cuts a mapping off
    from its base.

    Parameters
    ----------
    root : folder that no base may lie outside; by default the nearest folder above named `configs`, where MedicalSeg keeps all its files,
        else the folder above the file's

    Raises
    ------
    InputError
        When a file cannot be read, lies outside `root` or inherits from itself.
    SpecError
        When a file is no YAML, says a key twice, or is nested deeper or larger than a configuration can be.
    """
    path = _plain(path)
    root = root.resolve() if root is not None else default_root(path)
    if not inside(path, root):
        raise InputError(f"{path} does not lie in {root}, the folder its configurations may come from; name one that holds it")
    values, files = _with_bases(path, root, ())
    return Document(_without_marks(values), files, root)


def default_root(path: Path) -> Path:
    """The nearest folder above named `configs`, else the one above the file's own."""
    return next((folder for folder in path.parents if folder.name == "configs"), path.parent.parent)


def inside(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder, itself and with all links followed."""
    return all(where.is_relative_to(root.resolve()) for where in (path.resolve(), _plain(path)))


def _plain(path: Path) -> Path:
    """The path without `..` and links among its folders; a file that is a link keeps its own name and place."""
    return path.parent.resolve() / path.name


def relative_path(text: str) -> bool:
    """Whether a path in a file is relative on every system."""
    return not (PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or PureWindowsPath(text).root)


def _with_bases(path: Path, root: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    if path.resolve() in above:
        chain = " -> ".join(file.name for file in (*above[above.index(path.resolve()) :], path))
        raise InputError(f"{above[0]}: _base_ leads back to where it began ({chain}); a file cannot inherit from itself")
    values = _read(path)
    if "_base_" not in values:
        return values, (path,)
    base = _base_path(path, values.pop("_base_"), root)
    inherited, files = _with_bases(base, root, (*above, path.resolve()))
    return _merged(values, inherited), (path, *files)


def _base_path(path: Path, text: object, root: Path) -> Path:
    if not isinstance(text, str) or not text.isprintable() or not text.endswith((".yml", ".yaml")):
        raise SpecError(f"{path}: _base_: expected the name of one .yml or .yaml file, got {reprlib.repr(text)}")
    if not relative_path(text):
        raise InputError(f"{path}: _base_: expected a path relative to this file, got {text!r}")
    base = _plain(path.parent / text)
    if not inside(base, root):
        raise InputError(
            f"{path}: _base_: {text!r} leads out of {root}; put the file below that folder, or name a higher one (--medicalseg-root)"
        )
    return base


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as err:
        raise InputError(f"{path} cannot be read ({err.strerror or err}); expected a MedicalSeg configuration") from err
    if len(content) > MOST_BYTES:
        raise SpecError(f"{path}: larger than {MOST_BYTES // 1000} kB, so it is no configuration")
    values = _parsed(content, path)
    if not isinstance(values, dict):
        raise SpecError(f"{path}: expected keys with values, such as 'iters: 30000', got {type(values).__name__}")
    _check_size(values, path)
    return values


def _parsed(content: bytes, path: Path) -> Any:
    require("yaml", extra="train")
    import yaml

    try:
        text = content.decode("utf-8-sig")
        for key, line in _repeated(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise SpecError(f"{path}, line {line}: key {reprlib.repr(key)} is there twice; keep one of them")
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as err:
        if isinstance(err, SpecError):
            raise
        where = getattr(err, "problem_mark", None)
        place = f", line {where.line + 1}" if where else ""
        why = getattr(err, "problem", None) or str(err).partition("\n")[0]
        raise SpecError(f"{path}{place}: no YAML of plain values ({why})") from err


def _repeated(node: Any) -> Iterator[tuple[str, int]]:
    """Keys that a mapping has twice, of which YAML would silently take the last, with their lines."""
    left, known = [node], set()
    while left:
        node = left.pop()
        if node is None or id(node) in known or node.id == "scalar":
            continue
        known.add(id(node))
        if node.id == "sequence":
            left += node.value
            continue
        keys = set()
        for key, value in node.value:
            if key.id == "scalar" and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    yield key.value, key.start_mark.line + 1
                keys.add(key.value)
            left.append(value)


def _check_size(values: Any, path: Path) -> None:
    """Aliases make a few lines endless."""
    left, count = [(values, 1)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            limit = f"{MOST_VALUES} values" if count > MOST_VALUES else f"{DEEPEST} levels"
            raise SpecError(f"{path}: more than {limit}, so it is no configuration")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or not key.isprintable() or len(key) > LONGEST_KEY:
                    raise SpecError(f"{path}: expected names as keys, got {reprlib.repr(key)}")
            left += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            left += [(item, depth + 1) for item in value]


def _merged(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("_inherited_", True) is False:
        return dict(values)
    both = dict(base)
    for key, value in values.items():
        beneath = both.get(key)
        both[key] = _merged(value, beneath) if isinstance(value, dict) and isinstance(beneath, dict) else value
    return both


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_marks(item) for key, item in value.items() if key != "_inherited_"}
    return [_without_marks(item) for item in value] if isinstance(value, list) else value
