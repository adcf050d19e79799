"""The program in front of tritonserver's HTTP port: what would end the server is refused with a sentence, all else passes byte by byte.

A process of its own, of the standard library alone, so that nothing else a Python process does slows it down. It hands on when a request
came, for no model is told how long a request waited.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote_to_bytes

from .announced import Refused
from .inspection import Budget, Inspection
from .messages import PIECE, Head, Piece, pieces, read_head
from .streams import Stream

_ARRIVED = b"segrt-arrived"  # segrt.protocol.ARRIVED, which brings more than the standard library
_REQUEST = re.compile(rb"[A-Z]+ [^ ]+ HTTP/1\.[01]")
_INFER = re.compile(rb"/models/.*/infer", re.IGNORECASE | re.DOTALL)
_STATUS = re.compile(rb"HTTP/1\.[01] [1-5]\d\d( .*)?", re.DOTALL)
_NO_BODY = re.compile(rb"HTTP/1\.. (1\d\d|204|304) ")
_SHARED = Path("/dev/shm")
_MOST_BYTES = 2**40
# a client that was refused while it sent gets to read why before the connection is cut
_LINGER_S = 5.0
# between two requests, and for a request's head
_IDLE_S = 600.0
# others wait until one ends
_MOST_CONNECTIONS = 2000


class Guard:
    """Serves connections on a listening socket, each with one of its own to the server."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream, self._budget, self._ending = upstream, Budget(), asyncio.Event()
        self._idle, self._tasks = set[Stream](), set[asyncio.Task[None]]()

    async def run(self, listening: socket.socket) -> None:
        """Serve until `end`, and then until what is under way has its answers."""
        listening.setblocking(False)
        accepting = asyncio.ensure_future(self._accept(listening))
        ending = asyncio.ensure_future(self._ending.wait())
        await asyncio.wait({ending, accepting}, return_when=asyncio.FIRST_COMPLETED)
        if accepting.done():
            accepting.result()  # it never ends by itself: what ended it ends us, and another guard follows
        accepting.cancel()
        listening.close()
        for client in self._idle:
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_RD)  # as if it had left
        while self._tasks:
            await asyncio.wait(self._tasks)

    def end(self) -> None:
        """Take no more requests."""
        self._ending.set()

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            while len(self._tasks) >= _MOST_CONNECTIONS:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            try:
                connected, _ = await asyncio.get_running_loop().sock_accept(listening)
                client = Stream(connected)
            except OSError:  # it left again, or there are no more files to open for the moment
                await asyncio.sleep(0.01)
                continue
            task = asyncio.ensure_future(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Stream) -> None:
        link = _Link(client, self._upstream, self._budget)
        try:
            while not self._ending.is_set():
                self._idle.add(client)
                async with asyncio.timeout(_IDLE_S):
                    head = await read_head(client)
                self._idle.discard(client)
                if head is None or not await link.relay(head):
                    return
        except Refused as refused:
            await link.refuse(refused)
        except OSError:
            pass  # one of the two is gone, and the other hears of it by the end of its connection
        finally:
            self._idle.discard(client)
            link.close()


class _Link:
    """A client's connection and ours to the server, opened with the first request."""

    def __init__(self, client: Stream, upstream: tuple[str, int], budget: Budget) -> None:
        self._client, self._address, self._budget = client, upstream, budget
        self._server: Stream | None = None

    async def relay(self, head: Head) -> bool:
        """Pass a request on and its answer back; give whether the connection is kept."""
        arrived = time.time()
        if self._server is not None and not self._server.is_quiet:  # the server that answered last is gone
            self._server.close()
            self._server = None
        if not _REQUEST.fullmatch(head.first):
            raise Refused(400, f"expected a request of HTTP/1.1, got {head.first[:80].decode(errors='replace')!r}")
        inspection = Inspection(head, _room(), str(_SHARED), self._budget) if _asks_for_inference(head) else None
        try:
            await self._ask(head, inspection, arrived)
        finally:
            if inspection is not None:
                inspection.close()
        is_kept = await self._answer(head) and head.stays
        for stream in (self._client, self._server):
            if stream is not None:
                stream.rest()
        return is_kept

    async def _ask(self, head: Head, inspection: Inspection | None, arrived: float) -> None:
        """Pass a request on, once it is known that the server may have it."""
        if head.says(b"expect", b"100-continue"):
            await self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        waiting = bytearray(head.to_bytes(without=_OURS, more=((_ARRIVED, f"{arrived:.6f}".encode()),)))
        async for raw, content in pieces(self._client, head):
            if inspection is not None:
                await inspection.feed(content)
                if not inspection.is_done:
                    waiting += raw
                    continue
            if waiting:
                await self._send(waiting)
                waiting = bytearray()
            await self._send(raw)
        if inspection is not None:
            await inspection.end()
        await self._send(waiting)

    async def refuse(self, refused: Refused) -> None:
        """Answer in the server's stead. What the client still sends is read for a while, or it would not see the answer."""
        body = json.dumps({"error": refused.text}).encode()
        first = f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}\r\n"
        headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError, TimeoutError):
            await self._client.send(first.encode() + headers.encode() + body)
            self._client.socket.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LINGER_S):
                while await self._client.some(PIECE):
                    pass

    def close(self) -> None:
        """End both connections."""
        self._client.close()
        if self._server is not None:
            self._server.close()

    async def _send(self, data: Piece | bytearray) -> None:
        server = await self._connected()
        # a server that answers at once closes while we send; its answer can be read all the same
        with contextlib.suppress(ConnectionError):
            await server.send(data)

    async def _connected(self) -> Stream:
        if self._server is None:
            try:
                connecting = socket.socket()
                self._server = Stream(connecting)
                await asyncio.get_running_loop().sock_connect(connecting, self._address)
            except OSError as err:
                raise Refused(503, f"the server is not there now ({err.strerror or err}); try again later") from None
        return self._server

    async def _answer(self, asked: Head) -> bool:
        """Pass the server's answer back; give whether its connection is kept."""
        server = await self._connected()
        while True:
            try:
                head = await read_head(server)
            except (ConnectionError, Refused):
                head = None
            if head is None or not _STATUS.fullmatch(head.first):
                raise Refused(502, "the server ended the connection without an answer; try again later")
            await self._client.send(head.to_bytes())
            if not _NO_BODY.match(head.first) and not asked.first.startswith(b"HEAD "):
                try:
                    async for raw, _ in pieces(server, head, until_the_end=True):
                        await self._client.send(raw)
                except Refused as err:  # within an answer there is no place for another one
                    raise ConnectionError(err.text) from err
            if not head.first.split(b" ")[1].startswith(b"1"):
                known = head.is_chunked or head.value(b"content-length") is not None or _NO_BODY.match(head.first) is not None
                return head.stays and known


_OURS = frozenset([b"expect", _ARRIVED])


def _asks_for_inference(head: Head) -> bool:
    """Whether a body may announce tensors; a path in disguise is looked at too."""
    return head.first.startswith(b"POST ") and _INFER.search(unquote_to_bytes(head.first.split(b" ")[1])) is not None


def _room() -> int:
    """The most bytes that fit where requests pass through; what is free says little, for the server keeps and uses again what it took."""
    return min(shutil.disk_usage(_SHARED).total if _SHARED.is_dir() else _MOST_BYTES, _MOST_BYTES)


async def _serve(listening: socket.socket, upstream: tuple[str, int], parent: int) -> None:
    guard = Guard(upstream)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, guard.end)
    running = asyncio.ensure_future(guard.run(listening))
    while not running.done():
        if os.getppid() != parent:  # whoever started us is gone
            return
        await asyncio.wait([running], timeout=1)
    await running


def main() -> None:
    """Serve the socket whose number is the first argument, before the server whose port on this machine is the second, for the third."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number, port, parent = (int(text) for text in sys.argv[1:])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 2 * _MOST_CONNECTIONS + 100
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))
    asyncio.run(_serve(socket.socket(fileno=number), ("127.0.0.1", port), parent))
