"""Bring back models whose process was killed: tritonserver itself answers "not healthy" from then on and calls itself ready."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SegrtError
from .fatal import image_in

logger = logging.getLogger(__name__)

_LEARN_S, _POLL_S, _MOST, _WITHIN_S, _FATAL = 0.05, 0.5, 5, 600.0, 2


class Watch:
    """Look after the models' processes, the children of a tritonserver.

    One that ends as it should is waited for by its parent and disappears; one that was killed stays as a zombie. A model whose process is a
    zombie twice in a row is revived. An image at which a model's process died twice is fatal to it, and told to those that follow.

    Parameters
    ----------
    pid : process of the server
    revive : loads a model anew
    give_up : called with a sentence when a model's process died 5 times within 10 minutes, or cannot be brought back

    Notes
    -----
    Restarting was the server's own doing until 24.05 and is not in those after it (triton-inference-server/server#8604).
    """

    def __init__(self, pid: int, revive: Callable[[str], None], give_up: Callable[[str], object]) -> None:
        self._pid, self._revive, self._give_up = pid, revive, give_up
        self._models: dict[int, str] = {}
        self._suspects: set[int] = set()
        self._deaths: dict[str, list[float]] = defaultdict(list)
        self._images: Counter[tuple[str, str]] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="segrt-watch", daemon=True)

    def start(self) -> None:
        """Begin; the processes there are by now are known when it returns."""
        self._look()
        self._thread.start()

    def stop(self) -> None:
        """End; a revival that is under way is not waited for."""
        self._ended.set()

    @property
    def deaths(self) -> int:
        """Processes that died and were noticed."""
        return sum(map(len, list(self._deaths.values())))  # another thread may add to it meanwhile

    def fatal_to(self, model: str) -> list[str]:
        """Images at which a model's process died twice; the first time may have been another process's fault."""
        return [image for (whose, image), deaths in self._images.items() if whose == model and deaths >= _FATAL]

    def _run(self) -> None:
        while not self._ended.wait(_POLL_S):
            for model in self._look():
                logger.warning("the process of model %s died; loading the model again", model)
                self._bring_back(model)

    def _look(self) -> list[str]:
        """Models that lost a process since the last look."""
        children = self._learn()
        zombies = {child for child, (_, state) in children.items() if state == "Z" and child in self._models}
        dead = zombies & self._suspects
        self._suspects = zombies - dead
        for child in dead:
            if image := image_in(children[child][0]):
                self._images[self._models[child], image] += 1
        return sorted({self._models.pop(child) for child in dead})

    def _learn(self) -> dict[int, tuple[str, str]]:
        """The server's children; whose they are can be told only while they live."""
        children = _children(self._pid)
        self._models |= {child: model for child in children.keys() - self._models if (model := _model_of(_command(child)))}
        return children

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Learn of new processes while the block runs: one may die at the first request that finds it."""
        done = threading.Event()

        def learn() -> None:
            while not done.wait(_LEARN_S):
                self._learn()

        learner = threading.Thread(target=learn, name="segrt-watch-learner", daemon=True)
        learner.start()
        try:
            yield
        finally:
            done.set()
            learner.join()

    def _bring_back(self, model: str) -> None:
        now = time.monotonic()
        recent = [then for then in self._deaths[model] if now - then < _WITHIN_S] + [now]
        self._deaths[model] = recent
        if len(recent) > _MOST:
            self._give_up(f"the process of model {model!r} died {len(recent)} times within {_WITHIN_S / 60:.0f} minutes")
            return
        try:
            with self._learning():
                self._revive(model)
        except SegrtError as err:
            if not self._ended.is_set():
                self._give_up(f"the process of model {model!r} died and cannot be started again: {err}")


def processes_of(pid: int) -> dict[int, str]:
    """Process -> model, of those that a tritonserver runs."""
    return {child: model for child in _children(pid) if (model := _model_of(_command(child)))}


def _children(pid: int) -> dict[int, tuple[str, str]]:
    """Processes that `pid` started: their name and state (Z: ended, not waited for); none where there is no /proc."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "7 (a name) S 1 ...": the name may hold anything
            name, _, rest = path.read_text(errors="replace").partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
        except (OSError, ValueError):  # ended meanwhile
            continue
        if int(parent) == pid:
            found[int(path.parent.name)] = name, state
    return found


def _command(pid: int) -> list[str]:
    """Its arguments; none when it has ended."""
    try:
        return [part for part in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0") if part]
    except OSError:
        return []


def _model_of(command: list[str]) -> str | None:
    """The model a process runs: its first argument is <repository>/<model>/<version>/model.py."""
    if len(command) < 2 or not command[0].endswith("triton_python_backend_stub"):
        return None
    return Path(command[1]).parents[1].name
