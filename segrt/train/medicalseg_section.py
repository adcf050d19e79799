"""`Section`, a part of a MedicalSeg YAML whose keys are taken one by one, and `Notes`, what was made of each; used by the import."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import SpecError

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def shown(value: object) -> str:
    """A value on a few characters of one line, however large it is."""
    return value if isinstance(value, str) and len(value) <= 60 and value.isprintable() else _SHORT.repr(value)


@dataclass(frozen=True)
class Row:
    """One key of the file, what it says, and what segrt does."""

    key: str
    value: str
    does: str


@dataclass
class Notes:
    """What an import makes of a file, gathered while it is read.

    Attributes
    ----------
    file : name of the file, for sentences
    given : fields of `TrainConfig` that the caller chooses himself, whatever the file says
    changes : fields that the file chooses
    """

    file: str
    given: frozenset[str] = frozenset()
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)

    def use(self, key: str, value: object, does: str, **changes: Any) -> None:
        """The file's value is honoured, by these fields; those the caller chose stay his."""
        self.changes |= changes
        beaten = sorted(self.given & changes.keys())
        told = does if not beaten else f"{does}; {' and '.join(beaten)} as you say instead"
        self.rows.append(Row(key, shown(value), told))

    def beaten(self, *fields: str) -> bool:
        """Whether the caller chose all of these fields himself."""
        return self.given.issuperset(fields)

    def in_order(self, keys: Iterable[str]) -> tuple[Row, ...]:
        """The rows in the order of the file's outermost keys."""
        place = {key: at for at, key in enumerate(keys)}
        return tuple(sorted(self.rows, key=lambda row: place.get(row.key.split(".")[0], len(place))))

    def warn(self, key: str, value: object, instead: str) -> None:
        """The file's value is not honoured, or not as it stands."""
        self.rows.append(Row(key, shown(value), f"! {instead}"))
        self.warnings.append(f"{key} ({shown(value)}): {instead}")

    def refuse(self, key: str, value: object, expected: str, *fields: str, flag: str = "") -> None:
        """The file's value cannot be trained; unless the caller chose all `fields` himself, that is an error.

        Raises
        ------
        SpecError
        """
        if fields and self.beaten(*fields):
            self.warn(key, value, "not used, as you chose another")
            return
        raise SpecError(f"{self.file}: {key}: expected {expected}, got {shown(value)}{flag and f'; or choose yourself ({flag})'}")


class Section:
    """A mapping of the file. Keys are taken by what they should hold; `close` names those that nobody took.

    Raises
    ------
    SpecError
        By all methods that take a key, when it holds something else; the sentence names file and key.
    """

    def __init__(self, values: Mapping[str, Any], notes: Notes, where: str = "") -> None:
        self._values, self._taken, self.notes, self._where = values, set[str](), notes, where

    def name(self, key: str) -> str:
        """The dotted name of a key."""
        return f"{self._where}.{key}" if self._where else key

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def take(self, key: str, default: Any = None) -> Any:
        """Whatever the key holds."""
        self._taken.add(key)
        return self._values.get(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; text such as 1e-3, which YAML takes for a word, is one too."""
        value = self.take(key, default)
        number = math.nan
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                number = float(value)
        if not math.isfinite(number):
            raise self._wrong(key, "a number", value)
        return number

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.number(key, default)
        if value != int(value):
            raise self._wrong(key, "a whole number", self._values.get(key))
        return int(value)

    def yes(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "True or False", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A word."""
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a name", value)
        return value

    def numbers(self, key: str, default: Iterable[float] | None = None) -> tuple[float, ...]:
        """A list of numbers."""
        value = self.take(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in value):
            raise self._wrong(key, "a list of numbers", value)
        return tuple(float(n) for n in value)

    def section(self, key: str) -> Section:
        """A mapping."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "keys with values", value)
        return Section(value, self.notes, self.name(key))

    def sections(self, key: str, default: list[Any] | None = None) -> list[Section]:
        """A list of mappings."""
        value = self.take(key, default)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "a list of keys with values", value)
        return [Section(item, self.notes, f"{self.name(key)}.{at}") for at, item in enumerate(value)]

    def left(self) -> tuple[str, ...]:
        """Keys that nobody took yet."""
        return tuple(key for key in self._values if key not in self._taken)

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Keys segrt knows and has no use for: key -> what happens instead."""
        for key in [key for key in self._values if key in reasons]:
            self.notes.warn(self.name(key), self.take(key), reasons[key])

    def close(self, known: Iterable[str] = ()) -> None:
        """Name every key that nobody took, and give those that were taken without a word a row; `known` could have been meant."""
        for key in self.left():
            near = difflib.get_close_matches(key, [*self._taken, *known], 1, 0.75)
            meant = f" (is {near[0]} meant?)" if near else ""
            self.notes.warn(self.name(key), self._values[key], f"segrt does not know this key{meant}, it is left out")
        for key, value in self._values.items():
            parts = value if isinstance(value, list) else [value]
            if not any(isinstance(part, dict) for part in parts) and not any(row.key == self.name(key) for row in self.notes.rows):
                self.notes.use(self.name(key), value, "read with the keys around it")
        self._taken |= self._values.keys()

    def _wrong(self, key: str, expected: str, value: object) -> SpecError:
        got = "nothing" if key not in self._values else shown(value) if value is not None else "Null"
        return SpecError(f"{self.notes.file}: {self.name(key)}: expected {expected}, got {got}")
