"""HTTP/1.1 messages as they pass by: the head of a request or an answer, and its body piece by piece; standard library alone."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeAlias

from .announced import Refused
from .streams import Stream, TooLong

PIECE = 2**20
_TURN = 16  # chunks that are passed on before other connections have their turn: a buffer holds thousands of small ones
Piece: TypeAlias = bytes | memoryview
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,15})\r\n")


@dataclass(frozen=True)
class Head:
    """The first lines of a message.

    Attributes
    ----------
    first : the request or status line
    headers : names as they came, and values
    """

    first: bytes
    headers: tuple[tuple[bytes, bytes], ...]

    def value(self, name: bytes) -> bytes | None:
        """The value of a header; None without it.

        Raises
        ------
        Refused
            When it is there twice, for whoever comes after us may take the other one.
        """
        values = [value for own, value in self.headers if own.lower() == name]
        if len(values) > 1:
            raise Refused(400, f"the header {name.decode()} is there {len(values)} times")
        return values[0] if values else None

    def number(self, name: bytes) -> int | None:
        """The value of a header that is a whole number from 0."""
        value = self.value(name)
        if value is None:
            return None
        if not re.fullmatch(rb"[0-9]{1,18}", value):
            raise Refused(400, f"the header {name.decode()} is {value[:40].decode(errors='replace')!r}, expected a whole number from 0")
        return int(value)

    def says(self, name: bytes, word: bytes) -> bool:
        """Whether a word is in the list that a header is."""
        return any(word in [part.strip() for part in value.lower().split(b",")] for own, value in self.headers if own.lower() == name)

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks."""
        value = self.value(b"transfer-encoding")
        if value is None:
            return False
        if value.lower() != b"chunked" or self.value(b"content-length") is not None:
            raise Refused(400, "expected Content-Length or Transfer-Encoding: chunked, and not both")
        return True

    @property
    def stays(self) -> bool:
        """Whether the connection is kept after this message."""
        return not self.says(b"connection", b"close") and (b"HTTP/1.0" not in self.first or self.says(b"connection", b"keep-alive"))

    def to_bytes(self, *, without: frozenset[bytes] = frozenset(), more: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
        """The head as it travels."""
        lines = [name + b": " + value for name, value in (*self.headers, *more) if name.lower() not in without or (name, value) in more]
        return b"\r\n".join([self.first, *lines, b"", b""])


async def read_head(stream: Stream) -> Head | None:
    """The next message's head; None when the connection ends before it.

    Raises
    ------
    Refused
        When it is none.
    """
    try:
        text = await stream.until(b"\r\n\r\n")
    except TooLong:
        raise Refused(431, "the request's headers are too long") from None
    if not text:
        return None
    first, *lines = text[:-4].split(b"\r\n")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        # whatever may be taken for the end of a line, or for another header, by one and not by the other
        if not colon or not _NAME.fullmatch(name):
            raise Refused(400, f"expected a header, got {line[:80].decode(errors='replace')!r}")
        headers.append((name, value.strip(b" \t")))
    if any(letter in part for part in (first, *lines) for letter in (b"\r", b"\n", b"\0")):
        raise Refused(400, "the request's headers hold a line end that is none")
    return Head(first, tuple(headers))


async def pieces(stream: Stream, head: Head, *, until_the_end: bool = False) -> AsyncIterator[tuple[Piece, Piece]]:
    """Yield a body as it comes: what travels, and what of it is content; both are there until the next piece.

    Parameters
    ----------
    until_the_end : a body of no known length ends with the connection

    Raises
    ------
    ConnectionError
        When the connection ends before the body does.
    """
    if head.is_chunked:
        async for piece in _chunks(stream):
            yield piece
        return
    left = head.number(b"content-length")
    if left is None:
        while until_the_end and (data := await stream.some(PIECE)):
            yield data, data
        return
    while left:
        data = await _some(stream, left)
        left -= len(data)
        yield data, data


async def _chunks(stream: Stream) -> AsyncIterator[tuple[Piece, Piece]]:
    for number in itertools.count(1):
        if not number % _TURN:
            await asyncio.sleep(0)
        line = await _line(stream)
        found = _CHUNK_LINE.fullmatch(line)
        if not found:
            raise Refused(400, f"expected the length of a chunk, got {line[:40].decode(errors='replace')!r}")
        yield line, b""
        left = int(found[1], 16)
        last = not left
        while left:
            data = await _some(stream, left)
            left -= len(data)
            yield data, data
        if await _line(stream) != b"\r\n":
            raise Refused(400, "expected the end of a chunk")
        yield b"\r\n", b""
        if last:
            return


async def _line(stream: Stream) -> bytes:
    try:
        line = await stream.until(b"\r\n", 64)
    except TooLong:
        raise Refused(400, "expected the length of a chunk") from None
    if not line:
        raise ConnectionError("the connection ended within a chunk")
    return line


async def _some(stream: Stream, most: int) -> memoryview:
    data = await stream.some(most)
    if not data:
        raise ConnectionError("the connection ended within a body")
    return data
