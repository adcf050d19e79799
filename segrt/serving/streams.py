"""One end of a connection, with as few copies of what passes as Python allows; standard library alone."""

from __future__ import annotations

import asyncio
import socket

# an idle connection keeps a small buffer; a large one comes with a body
_SMALL, _LARGE = 2**14, 2**20
_LINE = 2**16


class TooLong(Exception):  # noqa: N818 - an answer, not a failure
    """What was looked for is not among the bytes that may come before it."""


class Stream:
    """Reads from and writes to a socket; before each read, other connections have their turn.

    Attributes
    ----------
    socket : non-blocking; `close` closes it
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._loop = connected, asyncio.get_running_loop()
        self._buffer, self._start, self._stop = bytearray(), 0, 0

    @property
    def is_quiet(self) -> bool:
        """Whether the other end is there and has sent nothing that was not taken."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._start == self._stop
        except OSError:
            pass
        return False

    async def until(self, end: bytes, most: int = _LINE) -> bytes:
        """What comes up to `end`, that included; b"" when the connection ends before.

        Raises
        ------
        TooLong
            When `end` is not among the next `most` bytes.
        """
        while (at := self._buffer.find(end, self._start, min(self._stop, self._start + most))) < 0:
            if self._stop - self._start >= most:
                raise TooLong
            if not await self._more(_SMALL):
                return b""
        return bytes(self._taken(at + len(end) - self._start))

    async def some(self, most: int) -> memoryview:
        """The next bytes, at most as many; none when the connection has ended. They are there until the next call."""
        if self._start == self._stop:
            await self._more(_SMALL if most <= _SMALL else _LARGE)
        return self._taken(min(most, self._stop - self._start))

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it."""
        await self._loop.sock_sendall(self.socket, data)

    def rest(self) -> None:
        """Give a large buffer back, for nothing may come for a long time."""
        if self._start == self._stop:
            self._buffer, self._start, self._stop = bytearray(), 0, 0

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def _taken(self, size: int) -> memoryview:
        data = memoryview(self._buffer)[self._start : self._start + size]
        self._start += size
        return data

    async def _more(self, size: int) -> int:
        """Read behind what is there and was not taken, which is less than a line."""
        left = self._stop - self._start
        if left or len(self._buffer) != size:
            buffer = bytearray(max(size, 2 * left))
            buffer[:left] = self._buffer[self._start : self._stop]
            self._buffer, self._start, self._stop = buffer, 0, left
        await asyncio.sleep(0)
        got = await self._loop.sock_recv_into(self.socket, memoryview(self._buffer)[left:])
        self._start, self._stop = 0, left + got
        return got
