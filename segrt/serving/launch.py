"""Where tritonserver is on this machine, and what it needs to run our models in this Python; the first step of `segrt-serve`."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import py_compile
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackendError, InputError

HOW_TO_GET = (
    "install its wheel with `pip install --no-deps nvidia-pytriton==0.7.0`, or run segrt-serve inside the container image "
    "nvcr.io/nvidia/tritonserver (see deploy/)"
)
logger = logging.getLogger(__name__)

_LITTLE_SHARED = 2**29
_PACKAGE = Path(__file__).resolve().parents[1]
_STUB = "triton_python_backend_stub"
_THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Installation:
    """One tritonserver: its program and the folder of its backends.

    Attributes
    ----------
    program : the executable
    root : folder that holds bin/ and backends/
    """

    program: Path
    root: Path

    @property
    def python_backend(self) -> Path:
        """Folder of the backend that runs models written in Python."""
        return self.root / "backends" / "python"

    @property
    def stub(self) -> Path:
        """The process a Python model runs in; wheels carry one for each Python, container images one for theirs."""
        of_wheel = self.root / "python_backend_stubs" / _THIS_PYTHON / _STUB
        return of_wheel if of_wheel.is_file() else self.python_backend / _STUB

    @property
    def libraries(self) -> tuple[Path, ...]:
        """Folders of the shared libraries it brings along."""
        return tuple(p for p in (self.root / "lib", self.root.parents[1] / "nvidia_pytriton.libs") if p.is_dir())


def find_tritonserver(program: Path | None = None) -> Installation:
    """Find the server: the one that is named, on PATH, in /opt/tritonserver, or in the wheel nvidia-pytriton.

    Raises
    ------
    InputError
        When the program that is named is no executable file.
    BackendError
        When there is none, or its python backend cannot run models in this Python.
    """
    if program is not None and not (program.is_file() and os.access(program, os.X_OK)):
        raise InputError(f"{program}: expected the program tritonserver, found no executable file")
    for candidate in _candidates() if program is None else [program]:
        if candidate.is_file():
            installation = Installation(candidate.resolve(), candidate.resolve().parents[1])
            _check_stub(installation)
            return installation
    raise BackendError(f"tritonserver is neither on PATH, nor in /opt/tritonserver, nor in this environment; {HOW_TO_GET}")


def _candidates() -> Iterator[Path]:
    on_path = shutil.which("tritonserver")
    if on_path:
        yield Path(on_path)
    yield Path("/opt/tritonserver/bin/tritonserver")
    # found without importing it: it would bring pyzmq and more, which nothing here needs
    wheel = importlib.util.find_spec("pytriton")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        yield Path(folder) / "tritonserver" / "bin" / "tritonserver"


def _check_stub(installation: Installation) -> None:
    stub = installation.stub
    if not stub.is_file():
        raise BackendError(f"{installation.program}: its python backend has no {_STUB} for Python {_THIS_PYTHON}; {HOW_TO_GET}")
    wanted = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    if wanted and wanted[1].decode() != _THIS_PYTHON:
        raise BackendError(
            f"{stub} runs Python {wanted[1].decode()}, but segrt is installed in Python {_THIS_PYTHON}; install segrt in the former"
        )


def prepare_backends(installation: Installation, folder: Path) -> Path:
    """Make the backend folder the server is started with; the python backend in it runs this Python.

    Parameters
    ----------
    folder : an empty folder that stays while the server runs

    Returns
    -------
    Path
        `folder`, or the installation's own where it already has the right stub beside the backend
    """
    if installation.stub.parent == installation.python_backend:
        return installation.python_backend.parent
    for backend in installation.python_backend.parent.iterdir():
        if backend.is_dir() and backend.name != "python":
            (folder / backend.name).symlink_to(backend, target_is_directory=True)
    # the backend looks for the stub beside itself; a link would lead it to where it came from
    shutil.copytree(installation.python_backend, folder / "python", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(installation.stub, folder / "python" / _STUB)
    return folder


def server_environment(installation: Installation, environment: Mapping[str, str]) -> dict[str, str]:
    """Give back a copy of `environment` in which the models' processes find this Python, its packages and segrt.

    Raises
    ------
    BackendError
        When this Python has no shared library, which the models' processes load it from.
    """
    paths = sysconfig.get_paths()
    packages = dict.fromkeys([paths["purelib"], paths["platlib"], str(_PACKAGE.parent)])
    libraries = [str(_python_library().parent), *map(str, installation.libraries)]
    return {
        **environment,
        "LD_LIBRARY_PATH": _joined(libraries, environment.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _joined(packages, environment.get("PYTHONPATH")),
        # the wheel's stub reads no variable of Python's own: it finds its packages beside whatever python3 is first here
        "PATH": _joined([str(Path(sys.executable).parent)], environment.get("PATH")),
        # others take these
        "PYTHONHOME": sys.base_prefix,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _python_library() -> Path:
    name = sysconfig.get_config_var("INSTSONAME") or f"libpython{_THIS_PYTHON}.so.1.0"
    folder, multiarch = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"), sysconfig.get_config_var("MULTIARCH") or ""
    for candidate in (folder / name, folder / multiarch / name, Path(sys.base_prefix) / "lib" / name):
        if candidate.suffix != ".a" and candidate.is_file():
            return candidate
    raise BackendError(
        f"Python {_THIS_PYTHON} at {sys.base_prefix} has no shared library (libpython{_THIS_PYTHON}.so.1.0), from which tritonserver runs "
        f"its models; install it (Debian: apt-get install libpython{_THIS_PYTHON}), or a Python built with --enable-shared"
    )


def _joined(first: list[str] | dict[str, None], then: str | None) -> str:
    return os.pathsep.join([*first, *([then] if then else [])])


def warn_of_little_shared_memory(folder: Path = Path("/dev/shm")) -> None:
    """Warn when the memory through which images reach the models is what a container has that was given none."""
    total = shutil.disk_usage(folder).total if folder.is_dir() else _LITTLE_SHARED
    if total < _LITTLE_SHARED:
        logger.warning("%s has %.0f MB, which is too little for volumes; give it more (docker run --shm-size 8g)", folder, total / 2**20)


def compile_models(repository: Path) -> None:
    """Compile each model.py as its process would, which otherwise makes the server take an unchanged model for a changed one."""
    for source in repository.glob("*/*/model.py"):
        compiled = Path(importlib.util.cache_from_source(source))
        with contextlib.suppress(OSError, py_compile.PyCompileError):
            if not compiled.is_file() or compiled.stat().st_mtime < source.stat().st_mtime:
                py_compile.compile(str(source), doraise=True)
