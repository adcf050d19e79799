"""Calls to a tritonserver of our own: whether it is ready, what it has loaded, and what it is to load."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from ..errors import BackendError
from .options import KEY_HEADER

# straight to it: a proxy for the outside is no way to our own process
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(address: str, path: str, body: dict[str, Any] | None = None, *, key: str, timeout: float) -> bytes:
    """Give the server's answer to a GET, or to a POST of `body`.

    Parameters
    ----------
    address : HOST:PORT it listens at for HTTP
    key : lets it load models where clients may not
    timeout : seconds

    Raises
    ------
    BackendError
        When it does not answer, or refuses, with its words.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}/v2/{path}".rstrip("/"), data, {KEY_HEADER: key})
    try:
        with _DIRECT.open(request, timeout=timeout) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as err:
        with err:
            raise BackendError(f"{path}: {err.read().decode(errors='replace')[:500] or err.reason}") from err
    except (urllib.error.URLError, HTTPException, OSError) as err:
        raise BackendError(f"{path}: no answer from the server ({err})") from err
