"""Files and folders that appear whole or not at all, and what tells whether one was changed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

_THREADS = threading.Lock()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write a file under a temporary name in its folder, then rename it; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "part")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep every other thread and process that asks for the same folder waiting, so that a file in it may be read, changed and written.

    Whoever has a folder must not ask for it again. A file system that cannot lock a folder (NFS) lets other processes go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _locked(place):
            yield
    finally:
        os.close(place)


@contextmanager
def _locked(place: int) -> Iterator[None]:
    try:
        fcntl.flock(place, fcntl.LOCK_EX)  # an open file's own: threads wait for each other too
        locked = True
    except OSError:
        locked = False
    with nullcontext() if locked else _THREADS:
        try:
            yield
        finally:
            if locked:
                fcntl.flock(place, fcntl.LOCK_UN)  # closing is not enough where a forked child has the same open file


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(target, "part")
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            old = _beside(target, "old")
            target.replace(old)
            try:
                folder.replace(target)
            except BaseException:
                old.replace(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _beside(path: Path, suffix: str) -> Path:
    """A hidden name in the same folder that nothing has yet.

    Not through `tempfile`, whose files only their owner may read: what is made under this name gets the permissions of any other file.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")
