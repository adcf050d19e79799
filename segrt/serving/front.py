"""The address that HTTP clients see: a socket of ours, served by the guard's process for as long as it is open."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from ..errors import BackendError
from .process import ServerProcess

logger = logging.getLogger(__name__)

_PACKAGES = Path(__file__).resolve().parents[2]
# after the standard library, so that nothing there or in the current folder takes its place
_PROGRAM = f"import sys; sys.path.append({str(_PACKAGES)!r}); from segrt.serving.guard import main; main()"
_WAITING = 1024  # connections that nobody has taken yet
_PAUSE_S, _DRAIN_S, _MOST, _WITHIN_S = 0.2, 5.0, 4, 60.0


class Front:
    """Listens at HOST:PORT and passes requests on to a server on this machine; see `segrt.serving.guard`.

    A guard that dies is started again; connections made meanwhile wait. It outlives the server, whose next process is found behind it.

    Parameters
    ----------
    port : not 0
    inner : the server's own port, on 127.0.0.1
    show : gets what the guard prints
    give_up : called with a sentence when the guard died 5 times within a minute

    Raises
    ------
    BackendError
        When the address cannot be used.
    """

    def __init__(
        self, host: str, port: int, inner: int, show: Callable[[str], object], give_up: Callable[[str], object] = logger.error
    ) -> None:
        self._inner, self._show, self._give_up = inner, show, give_up
        self._socket = socket.socket(socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(_WAITING)
        except OSError as err:
            self._socket.close()
            raise BackendError(f"http_port: {host}:{port} cannot be used ({err.strerror}); choose another, or 0 for a free one") from err
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep_up, name="segrt-guard", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        """The guard's process."""
        return self._process.pid

    def drain(self) -> None:
        """Take no more connections and requests; those under way get their answers."""
        self._stop_listening()
        with contextlib.suppress(ProcessLookupError):
            self._process.send(signal.SIGTERM)

    def close(self) -> None:
        """End the guard; what it is still passing on gets a moment after `drain`, and none without."""
        if self._closing.is_set():
            self._process.wait(_DRAIN_S)
        self._stop_listening()
        self._process.kill()
        if self._keeper is not threading.current_thread():
            self._keeper.join()

    def _stop_listening(self) -> None:
        with self._lock:
            self._closing.set()
            self._socket.close()

    def _start(self) -> ServerProcess:
        number = self._socket.fileno()
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(number), str(self._inner), str(os.getpid())]
        return ServerProcess(command, None, self._show, pass_fds=[number])

    def _keep_up(self) -> None:
        deaths = list[float]()
        while not self._closing.is_set():
            if self._process.wait(_PAUSE_S) is not None and not self._closing.wait(_PAUSE_S):
                self._process.kill()
                deaths = [then for then in deaths if time.monotonic() - then < _WITHIN_S] + [time.monotonic()]
                if len(deaths) > _MOST:
                    self._give_up(f"the guard of the HTTP port died {len(deaths)} times within {_WITHIN_S:g} s: {self._process.reason}")
                    return
                logger.warning("the guard of the HTTP port died; starting it again")
                with self._lock:  # nobody closes the socket meanwhile
                    if not self._closing.is_set():
                        self._process = self._start()
