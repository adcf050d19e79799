"""Protocol buffers' text format, as far as a Triton configuration needs it; protobuf itself is not asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = "str | int | bool | Word | Message | Sequence[Value]"
Message: TypeAlias = Mapping[str, Value]

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}


class Word(str):
    """A name that stands without quotes, such as TYPE_FP32."""

    __slots__ = ()


def to_text(message: Message, depth: int = 0) -> str:
    """Give the text of a message: a line per field, fields of messages indented by two, a list of messages as one field each."""
    return "".join(_field("  " * depth + name, value, depth) for name, value in message.items())


def map_field(entries: Mapping[str, Value]) -> list[Message]:
    """Give a map as the format has it: messages of key and value."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def _field(start: str, value: Value, depth: int) -> str:
    if isinstance(value, Mapping):
        inside = to_text(value, depth + 1)
        return f"{start} {{\n{inside}{'  ' * depth}}}\n" if inside else f"{start} {{}}\n"
    if isinstance(value, str | int):
        return f"{start}: {_scalar(value)}\n"
    if any(isinstance(item, Mapping) for item in value):
        return "".join(_field(start, item, depth) for item in value)
    return f"{start}: [{', '.join(_scalar(item) for item in value)}]\n"


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Word | int):
        return str(value)
    assert isinstance(value, str)
    return '"' + "".join(_character(c) for c in value) + '"'


def _character(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() else "".join(f"\\{byte:03o}" for byte in character.encode())
