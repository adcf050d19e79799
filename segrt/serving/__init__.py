"""Starting a server, what runs inside it, and the client that asks it."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"RemotePredictor": "remote", "Connection": "connection", "Tls": "connection", "Server": "server", "ServerOptions": "options"}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the server's side needs none of the client, and the other way round."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
