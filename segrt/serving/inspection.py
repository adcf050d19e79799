"""The beginning of a request for an inference, looked at as it comes until it is known whether the server may have it.

Standard library alone, for the guard runs it.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass

from .announced import MOST_JSON, Refused, check_announced
from .messages import PIECE, Head, Piece

_HEADER_SIZE = b"inference-header-content-length"
# beyond this, JSON is read beside the other connections, and counts
_SMALL = 2**18


@dataclass
class Budget:
    """JSON of all requests that may lie in this process's memory at once, in bytes."""

    left: int = 4 * MOST_JSON


class Inspection:
    """Looks at a request's body.

    Parameters
    ----------
    room : bytes that fit where requests pass through
    where : its name

    Attributes
    ----------
    is_done : whether the server may have what came, and all that comes as long as `feed` does not refuse it
    """

    def __init__(self, head: Head, room: int, where: str, budget: Budget) -> None:
        self._wanted, self._room, self._where, self._budget = head.number(_HEADER_SIZE), room, where, budget
        encoding = (head.value(b"content-encoding") or b"identity").lower()
        if encoding not in (b"identity", b"gzip", b"deflate"):
            raise Refused(415, f"Content-Encoding is {encoding.decode(errors='replace')!r}, expected gzip or deflate")
        self._unpack = None if encoding == b"identity" else zlib.decompressobj(47)  # gzip or zlib, by its first bytes
        self._text, self._size = bytearray(), 0
        self.is_done = self._wanted == 0  # one tensor's bytes and no JSON
        self._check_size(head.number(b"content-length") or 0)

    async def feed(self, content: Piece) -> None:
        """Take in what came next.

        Raises
        ------
        Refused
            When the server must not have it.
        """
        while content:
            data, content = self._unpacked(content)
            self._size += len(data)
            self._check_size(self._size)
            if not self.is_done:
                await self._look(data)
            if content:  # little may unpack to much, and others have their turn meanwhile
                await asyncio.sleep(0)

    async def end(self) -> None:
        """There is no more."""
        if not self.is_done:
            self._text += self._unpack.flush() if self._unpack else b""
            await self._decide()

    def close(self) -> None:
        """Forget what came."""
        self._budget.left += self._counted
        self._text = bytearray()

    @property
    def _counted(self) -> int:
        return len(self._text) if len(self._text) > _SMALL else 0

    def _unpacked(self, content: Piece) -> tuple[Piece, Piece]:
        """Some of the content as the server will see it, and what is left."""
        if self._unpack is None:
            return content, b""
        if self._unpack.eof:
            raise Refused(400, "the request's compressed body goes on after its end")
        try:
            data = self._unpack.decompress(content, PIECE)
        except zlib.error as err:
            raise Refused(400, f"the request's compressed body is damaged ({err})") from None
        return data, self._unpack.unconsumed_tail or self._unpack.unused_data

    def _check_size(self, size: int) -> None:
        if size > self._room:
            raise Refused(
                413,
                f"the request brings more than {self._room / 2**20:.0f} MB, all that the server's shared memory ({self._where}) holds; "
                "give it more (docker run --shm-size), or crop the image",
            )

    async def _look(self, data: Piece) -> None:
        before = self._counted
        self._text += data if self._wanted is None else data[: self._wanted - len(self._text)]
        self._budget.left -= self._counted - before
        if self._wanted is not None and len(self._text) >= self._wanted:
            await self._decide()
        elif len(self._text) > MOST_JSON:
            raise Refused(413, f"the request has more than {MOST_JSON >> 20} MB of JSON; send its tensors as binary data")
        elif self._budget.left < 0 and self._counted:
            raise Refused(503, "too many requests bring much JSON at this moment; send tensors as binary data, or try again later")

    async def _decide(self) -> None:
        self.is_done = True
        if len(self._text) > _SMALL:
            await asyncio.to_thread(check_announced, self._text)
        else:
            check_announced(self._text)
        self.close()
