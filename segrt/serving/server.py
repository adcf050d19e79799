"""A tritonserver of our own: started over a model repository, ready when it returns, stopped without cutting requests off."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import BackendError, InputError
from ..protocol import PATCH_SUFFIX
from .calls import call
from .fatal import FATAL
from .front import Front
from .launch import compile_models, find_tritonserver, prepare_backends, server_environment, warn_of_little_shared_memory
from .options import ServerOptions, free_port
from .process import ServerProcess
from .watch import Watch, processes_of

logger = logging.getLogger(__name__)

_POLL_S, _ATTEMPTS, _UNLOAD_S = 0.1, 5, 5.0
_BUSY, _STARVED = "already in use", "lock_exception"


class Server:
    """A running tritonserver over one model repository; used with `with`, or `start` and `stop`.

    Parameters
    ----------
    repository : folder of models, as `segrt-build --triton` writes it
    options : ports, logging, limits
    show : gets the lines of the server's log that `options.log_level` asks for; the last of all lines are in `log`

    Raises
    ------
    InputError
        When the repository or an option cannot be used.
    BackendError
        When there is no tritonserver, or it does not become ready.

    Examples
    --------
    >>> with Server("model_repository/") as server:                        # doctest: +SKIP
    ...     print(server.http, server.grpc)
    127.0.0.1:43211 127.0.0.1:37651
    """

    def __init__(
        self, repository: str | Path, options: ServerOptions | None = None, *, show: Callable[[str], object] | None = None
    ) -> None:
        self.repository, self.options = Path(repository).resolve(), options or ServerOptions()
        self.options.check()
        self.installation = find_tritonserver(self.options.program)
        self.failure: str | None = None
        self._show = show
        self._key = secrets.token_hex(16)
        self._ports = self.options
        # also begins the names of its shared memory, so that what a killed one leaves can be told and removed
        self._name = f"segrt_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: ServerProcess | None = None
        self._watch: Watch | None = None
        self._front: Front | None = None
        self._inner = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.models()

    @property
    def http(self) -> str:
        """HOST:PORT for HTTP clients."""
        return self.options.address(self._ports.http_port)

    @property
    def grpc(self) -> str:
        """HOST:PORT for gRPC clients."""
        return self.options.address(self._ports.grpc_port)

    @property
    def metrics(self) -> str:
        """HOST:PORT of /metrics."""
        return self.options.address(self._ports.metrics_port)

    @property
    def log(self) -> str:
        """The last lines the server logged, of every level."""
        return "\n".join(self._process.log if self._process else [])

    @property
    def reason(self) -> str:
        """The line of the log that says why it ended."""
        return self._running.reason

    @property
    def pid(self) -> int:
        """Process of the server; its group holds the models' processes."""
        return self._running.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.is_running

    @property
    def restarts(self) -> int:
        """Processes of models that died and were replaced."""
        return self._watch.deaths if self._watch else 0

    def processes(self) -> dict[int, str]:
        """Process -> model, one for each instance of a model."""
        return processes_of(self.pid)

    def models(self) -> list[str]:
        """Names in the repository, in an order in which they can be loaded: engines before what calls them."""
        names = sorted(path.parent.name for path in self.repository.glob("*/config.pbtxt"))
        if not names:
            raise InputError(
                f"{self.repository}: expected a model repository (folders with a config.pbtxt), found none; segrt-build --triton writes one"
            )
        return sorted(names, key=lambda name: PATCH_SUFFIX not in name)

    def start(self) -> Server:
        """Start it and wait until every model is ready."""
        warn_of_little_shared_memory()
        self.failure = None
        for attempt in range(_ATTEMPTS):
            self._ports, self._inner = self.options.with_free_ports(), free_port()
            try:
                self._launch()
            except BackendError as err:
                if attempt + 1 < _ATTEMPTS and (self._lost_a_port(str(err)) or self._was_starved()):
                    continue
                raise
            break
        return self

    def start_again(self) -> None:
        """Start it at the addresses it had, after its process ended by itself, and wait until every model is ready.

        Raises
        ------
        BackendError
            When it does not become ready.
        """
        self._end()
        self._launch()

    def load(self, model: str) -> None:
        """Load a model, or what is new of it; requests go on meanwhile.

        Raises
        ------
        BackendError
            When the server cannot load it.
        """
        self._ask_to_load(model, {})

    def reload(self) -> None:
        """Load whatever is new in the repository: models, and versions of models."""
        compile_models(self.repository)
        for model in self.models():
            self.load(model)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process ends, and give its exit code (negative: minus the signal); None after `timeout` seconds."""
        return self._process.wait(timeout) if self._process else None

    def stop(self) -> int | None:
        """End the server once its requests have finished, and give its exit code; it is safe to call twice."""
        if not self.is_running:
            return self.kill()
        running = self._running
        try:
            if self._watch:
                self._watch.stop()
            if self._front:
                self._front.drain()
            running.send(signal.SIGTERM)
            self._drain(running)
        finally:
            code = self.kill()
        # a model whose process was killed keeps tritonserver from unloading it; all requests had their answers
        return 0 if running.requests_done.is_set() else code

    def kill(self) -> int | None:
        """End whatever still runs, remove what it left, and give the exit code."""
        code = self._end()
        if self._front:
            self._front.close()
            self._front = None
        return code

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def _running(self) -> ServerProcess:
        if self._process is None:
            raise BackendError("the server was not started")
        return self._process

    def _launch(self) -> None:
        try:
            self._run()
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        self._watch = Watch(self.pid, self._revive, self._give_up)
        self._watch.start()

    def _run(self) -> None:
        compile_models(self.repository)
        if self._front is None:
            self._front = Front(self.options.host, self._ports.http_port, self._inner, self._log, self._give_up)
        self._folder = tempfile.TemporaryDirectory(prefix=f"segrt-serve-{os.getpid()}-")
        backends = prepare_backends(self.installation, Path(self._folder.name))
        arguments = self._ports.server_arguments(self.repository, backends, http=self._inner, name=self._name, key=self._key)
        environment = server_environment(self.installation, os.environ) | dict(self.options.environment)
        self._process = ServerProcess([str(self.installation.program), *arguments], environment, self._log)

    def _end(self) -> int | None:
        if self._process is None:
            return None
        if self._watch:
            self._watch.stop()
        code = self._process.kill()
        for region in Path("/dev/shm").glob(f"{self._name}*"):
            region.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()
        return code

    def _log(self, line: str) -> None:
        if self._show is not None and self.options.shows(line):
            self._show(line)

    def _lost_a_port(self, reason: str) -> bool:
        """Whether somebody else took one that we had chosen, between the choice and its use."""
        chosen = {*self._ports.ports, self._inner} - set(self.options.ports)
        return _BUSY in reason and any(f":{port}" in reason for port in chosen)

    def _was_starved(self) -> bool:
        """Whether it aborted because a model's process got no CPU for so long that a lock they share was given up."""
        return self.wait() == -signal.SIGABRT and _STARVED in self.log

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + self.options.ready_s
        is_hidden = False
        while not self._is_ready():
            # who reads the key on the command line can have this user run programs; a server that logs has read it
            is_hidden = is_hidden or (bool(self.log) and self._running.hide(self._key))
            if self.failure:
                raise BackendError(self.failure)
            if not self.is_running:
                raise BackendError(f"tritonserver ended with code {self.wait()} before it was ready: {self.reason}")
            if time.monotonic() > until:
                raise BackendError(f"tritonserver was not ready after {self.options.ready_s:g} s (ready_s, --ready-timeout): {self.reason}")
            time.sleep(_POLL_S)
        if not (is_hidden or self._running.hide(self._key)):
            logger.warning("users of this machine can read the key that lets models be loaded, in /proc/%d/cmdline", self.pid)

    def _is_ready(self) -> bool:
        """Whether every model is ready; the server itself says so, and by its name that it is ours and not another one at that port."""
        try:
            self._call("health/ready", timeout=5)
            is_ours = bool(json.loads(self._call("", timeout=5))["name"] == self._name)
            call(self.http, "health/live", key="", timeout=5)  # as its clients reach it
            return is_ours
        except BackendError:
            return False

    def _drain(self, running: ServerProcess) -> None:
        """Wait while requests finish, and a moment for models to be unloaded."""
        until = time.monotonic() + self.options.exit_s + _UNLOAD_S
        while running.wait(_POLL_S) is None and time.monotonic() < until:
            if running.requests_done.is_set():
                running.wait(_UNLOAD_S)
                return

    def _revive(self, model: str) -> None:
        """Load the versions of a model that ran when its process died, and no other, such as one that was written since.

        Unchanged, it would be taken for loaded, so it gets a parameter that tells how often.
        """
        config = json.loads(self._call(f"models/{model}/config"))
        versions = json.loads(self._call(f"models/{model}"))["versions"]
        config["version_policy"] = {"specific": {"versions": [int(version) for version in versions]}}
        fatal = self._watch.fatal_to(model) if self._watch else []
        told = {"RESTARTS": str(self.restarts), FATAL: ",".join(fatal)}
        config.setdefault("parameters", {}).update({key: {"string_value": text} for key, text in told.items()})
        self._ask_to_load(model, {"parameters": {"config": json.dumps(config)}})

    def _give_up(self, why: str) -> None:
        """End a server that cannot do its work, so that whoever watches it starts another."""
        self.failure = why
        logger.error("%s; the server ends", why)
        if self._process is not None:
            self._process.send(signal.SIGKILL)

    def _ask_to_load(self, model: str, body: dict[str, Any]) -> None:
        self._call(f"repository/models/{model}/load", body, timeout=self.options.ready_s)

    def _call(self, path: str, body: dict[str, Any] | None = None, *, timeout: float = 30.0) -> bytes:
        # past the guard, which others keep busy
        return call(f"127.0.0.1:{self._inner}", path, body, key=self._key, timeout=timeout)
