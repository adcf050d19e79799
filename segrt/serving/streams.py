"""One end of a connection, with as few copies of what passes as Python allows; standard library alone."""

from __future__ import annotations

import asyncio
import socket

_BUFFER = 2**20
_LINE = 2**16


class TooLong(Exception):  # noqa: N818 - an answer, not a failure
    """What was looked for is not among the bytes that may come before it."""


class Stream:
    """Reads from and writes to a socket.

    Attributes
    ----------
    socket : non-blocking; `close` closes it
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._loop = connected, asyncio.get_running_loop()
        self._memory = memoryview(bytearray(_BUFFER))
        self._rest = self._memory[:0]

    async def until(self, end: bytes, most: int = _LINE) -> bytes:
        """What comes up to `end`, that included; b"" when the connection ends before.

        Raises
        ------
        TooLong
            When `end` is not among the next `most` bytes.
        """
        found = bytearray()
        while True:
            searched = max(len(found) - len(end) + 1, 0)
            before = len(found)
            found += await self.some(most)
            if len(found) == before:
                return b""
            at = found.find(end, searched)
            if at >= 0:
                # what was taken too much lies at the end of what was read last
                self._rest = memoryview(bytes(found[at + len(end) :]) + bytes(self._rest))
                return bytes(found[: at + len(end)])
            if len(found) >= most:
                raise TooLong

    async def some(self, most: int) -> memoryview:
        """The next bytes, at most as many; none when the connection has ended. They are there until the next call."""
        if not self._rest:
            self._rest = self._memory[: await self._loop.sock_recv_into(self.socket, self._memory)]
        data, self._rest = self._rest[:most], self._rest[most:]
        return data

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it."""
        await self._loop.sock_sendall(self.socket, data)

    def close(self) -> None:
        """End the connection."""
        self.socket.close()
