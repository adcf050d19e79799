"""`segrt-serve`: a bundle, or a model repository, on a Triton server that stays up."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import InputError
from .common import FAILED, configure_logging, run

if TYPE_CHECKING:
    from ..serving.options import LogLevel
    from ..serving.server import Server

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CUT_OFF = 1
_MOST, _WITHIN_S = 5, 600.0  # deaths of a server that are answered by another


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Bundle, or model repository (what segrt-build --triton writes).")],
    repository: Annotated[Path | None, typer.Option(help="Where a bundle's repository is written; a temporary folder by default.")] = None,
    name: Annotated[str | None, typer.Option(help="Name a bundle is served under; its folder's by default.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Requests that run at once, each with engines of its own.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda (every GPU) or cuda:1: where a bundle's engines run.")] = "auto",
    host: Annotated[str, typer.Option(help="IP address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8002,
    allow_loading: Annotated[bool, typer.Option("--allow-loading", help="Clients on this machine may load and unload models.")] = False,
    log_level: Annotated[str, typer.Option(help="error, warning, info or verbose.")] = "warning",
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds until every model must be ready.")] = 600,
    exit_timeout: Annotated[int, typer.Option(min=0, help="Seconds that requests in flight get to finish.")] = 120,
    tritonserver: Annotated[Path | None, typer.Option(help="The server's program; searched by default.")] = None,
) -> None:
    """Start tritonserver, wait until every model is ready, and stop it in order on Ctrl-C or SIGTERM.

    SIGHUP loads what is new in the repository; requests go on meanwhile. Arguments after -- go to tritonserver.

    Exit codes: 0 stopped, 1 stopped with requests unfinished, 2 not started; else that of a server that ended by itself.
    """
    from ..serving.options import ServerOptions
    from ..serving.server import Server

    configure_logging(verbose=log_level in ("info", "verbose"))
    options = ServerOptions(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        control="explicit" if allow_loading else "none",
        log_level=cast("LogLevel", log_level),
        ready_s=ready_timeout,
        exit_s=exit_timeout,
        program=tritonserver,
        arguments=tuple(context.args),
    )
    options.check()
    asked = _Asked(model, repository, name, {"instances": instances, "device": device})
    with _stopping_on_signals() as reload_wanted, asked.repository_folder() as folder:
        code = _keep_up(Server(folder, options, show=_show), reload_wanted)
    raise typer.Exit(code)


@dataclass(frozen=True)
class _Asked:
    """What is to be served."""

    model: Path
    repository: Path | None
    name: str | None
    export: dict[str, Any]

    @contextmanager
    def repository_folder(self) -> Iterator[Path]:
        """A model repository: the one that was named, or a bundle's, which is written first."""
        if not (self.model / "model.json").is_file():
            if self.repository or self.name:
                raise InputError(f"--repository and --name are for a bundle; {self.model} has no model.json")
            yield self.model
        elif self.repository:
            self._write(self.repository)
            yield self.repository
        else:
            with tempfile.TemporaryDirectory(prefix=f"segrt-repository-{os.getpid()}-") as folder:
                self._write(Path(folder))
                yield Path(folder)

    def _write(self, folder: Path) -> None:
        from ..bundle import Bundle
        from ..export.triton import write_triton

        bundle = Bundle.open(self.model)
        # a relative "." has no name of its own
        write_triton(bundle, folder, name=self.name or self.model.resolve().name, **self.export)


def _keep_up(server: Server, reload_wanted: threading.Event) -> int:
    """Run the server until it is told to stop or ends by itself, and give the exit code."""
    try:
        try:
            server.start()
        except KeyboardInterrupt:
            return FAILED
        _announce(server)
        ends: list[float] = []
        while (code := server.wait(0.5)) is None or _starts_again(server, code, ends):
            if reload_wanted.is_set():
                reload_wanted.clear()
                _reload(server)
    except KeyboardInterrupt:
        typer.echo("stopping once the requests in flight have finished; again to stop at once", err=True)
        try:
            return CUT_OFF if server.stop() else 0
        except KeyboardInterrupt:
            return CUT_OFF
    finally:
        server.kill()
    typer.echo(f"error: tritonserver ended by itself with code {code}: {server.failure or server.reason}", err=True)
    return 128 - code if code < 0 else code or FAILED


def _starts_again(server: Server, code: int, ends: list[float]) -> bool:
    """Start a server anew that died, as of a request that it had no memory for, unless it keeps on dying or one of its models does."""
    from ..errors import BackendError

    now = time.monotonic()
    ends[:] = [*(then for then in ends if now - then < _WITHIN_S), now]
    if code >= 0 or server.failure or len(ends) > _MOST:
        return False
    typer.echo(f"error: tritonserver ended by itself with code {code}: {server.reason}; it is started again", err=True)
    try:
        server.start_again()
    except BackendError as err:
        typer.echo(f"error: {err}", err=True)
        return False
    typer.echo("ready again", err=True)
    return True


def _reload(server: Server) -> None:
    from ..errors import SegrtError

    try:
        server.reload()
        typer.echo("loaded what was new", err=True)
    except SegrtError as err:
        # what runs goes on
        typer.echo(f"error: not loaded: {err}", err=True)


def _announce(server: Server) -> None:
    """Say where it is, and how to ask it."""
    from ..protocol import BLS_SUFFIX, PATCH_SUFFIX, STREAM_SUFFIX

    models = sorted(server.models())
    whole = [name for name in models if not any(suffix in name for suffix in (PATCH_SUFFIX, BLS_SUFFIX, STREAM_SUFFIX))] or models
    print(f"ready: {', '.join(models)}")
    print(f"  HTTP     http://{server.http}\n  gRPC     {server.grpc}\n  metrics  http://{server.metrics}/metrics")
    print(f"try: segrt-predict images/ out/ --triton {server.grpc} --model {whole[0]}", flush=True)


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _stopping_on_signals() -> Iterator[threading.Event]:
    """SIGTERM interrupts as Ctrl-C does; SIGHUP sets the event."""
    reload_wanted = threading.Event()
    chosen = {signal.SIGTERM: _interrupt, signal.SIGHUP: lambda _number, _frame: reload_wanted.set()}
    before = {number: signal.signal(number, action) for number, action in chosen.items()}
    try:
        yield reload_wanted
    except KeyboardInterrupt:
        # before or while the server starts
        raise typer.Exit(FAILED) from None
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command."""
    run(app)
