"""The address that HTTP clients see: a socket of ours, served by the guard's process for as long as it is open."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from ..errors import BackendError
from .process import ServerProcess

logger = logging.getLogger(__name__)

_PROGRAM = "from segrt.serving.guard import main; main()"
_PACKAGES = Path(__file__).resolve().parents[2]
_WAITING = 1024  # connections that nobody has taken yet
_PAUSE_S, _DRAIN_S = 0.5, 5.0


class Front:
    """Listens at HOST:PORT and passes requests on to a server on this machine; see `segrt.serving.guard`.

    A guard that dies is started again; connections made meanwhile wait. It outlives the server, whose next process is found behind it.

    Parameters
    ----------
    port : not 0
    inner : the server's own port, on 127.0.0.1
    show : gets what the guard prints

    Raises
    ------
    BackendError
        When the address cannot be used.
    """

    def __init__(self, host: str, port: int, inner: int, show: Callable[[str], object]) -> None:
        self._inner, self._show = inner, show
        self._socket = socket.socket(socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(_WAITING)
        except OSError as err:
            self._socket.close()
            raise BackendError(f"http_port: {host}:{port} cannot be used ({err.strerror}); choose another, or 0 for a free one") from err
        self._closing = threading.Event()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep_up, name="segrt-guard", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        """The guard's process."""
        return self._process.pid

    def drain(self) -> None:
        """Take no more connections and requests; those under way get their answers."""
        self._closing.set()
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.send(signal.SIGTERM)

    def close(self) -> None:
        """End the guard; what it is still passing on gets a moment after `drain`, and none without."""
        if self._closing.is_set():
            self._process.wait(_DRAIN_S)
        self._closing.set()
        self._socket.close()
        self._process.kill()
        self._keeper.join()
        self._process.kill()  # one that was started again at the last moment

    def _start(self) -> ServerProcess:
        number = self._socket.fileno()
        command = [sys.executable, "-S", "-c", _PROGRAM, str(number), str(self._inner)]
        return ServerProcess(command, {**os.environ, "PYTHONPATH": str(_PACKAGES)}, self._show, pass_fds=[number])

    def _keep_up(self) -> None:
        while not self._closing.is_set():
            if self._process.wait(_PAUSE_S) is not None and not self._closing.wait(_PAUSE_S):
                logger.warning("the guard of the HTTP port died; starting it again")
                with contextlib.suppress(OSError):  # the socket was closed meanwhile
                    self._process.kill()
                    self._process = self._start()
