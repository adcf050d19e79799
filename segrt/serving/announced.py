"""What the JSON of an HTTP request announces, held against what the request brings; standard library alone, for the guard runs it.

tritonserver 2.51 allocates what a `shape` announces before it reads the numbers, and ends (SIGABRT) when it cannot.
"""

from __future__ import annotations

import json
import re
from math import prod
from typing import Any

# JSON takes a server some ten times its size; images of more are sent as binary data, as every client does by default
MOST_JSON = 2**26
# beyond this, lists of numbers are taken out before the rest is read
_PLAIN = 2**20
_LISTS = re.compile(rb'"shape"\s*:\s*\[[^\]]{0,200}\]|(\[[-+0-9\s,.eE]*+\])')
# as deep as tensors are
_DEEPEST = 8


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """A request that is answered here, with an HTTP status and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def check_announced(text: bytes | bytearray) -> None:
    """Refuse a request for an inference that announces more numbers than its JSON could hold.

    Tensors that travel as binary data or lie in shared memory are passed over: there the server compares sizes itself.

    Parameters
    ----------
    text : the whole JSON of the request

    Raises
    ------
    Refused
        Also when it is no JSON, or says something twice, for then the server may read it otherwise than we do.
    """
    short = _shortened(text)
    if len(short) > _PLAIN:
        raise Refused(413, f"the request has {len(text)} bytes of JSON that is not numbers; send its tensors as binary data")
    try:
        asked = json.loads(short, object_pairs_hook=_said_once)
    except RecursionError:
        raise Refused(400, "the request's JSON is nested too deeply") from None
    except ValueError as err:
        raise Refused(400, f"the request is no JSON that can be read ({err})") from None
    inputs = asked.get("inputs") if isinstance(asked, dict) else None
    for tensor in inputs if isinstance(inputs, list) else ():
        if isinstance(tensor, dict):
            _check_tensor(tensor, len(text))


def _shortened(text: bytes | bytearray) -> bytes | bytearray:
    """The text with a number in place of each list of numbers, and then of lists of those; a shape that is none is refused later."""
    short = text
    for _ in range(_DEEPEST):
        if len(short) <= _PLAIN:
            break
        short = _LISTS.sub(lambda found: found[0] if found[1] is None else b"0", short)
    return short


def _check_tensor(tensor: dict[str, Any], size: int) -> None:
    parameters = tensor.get("parameters")
    if isinstance(parameters, dict) and ("binary_data_size" in parameters or "shared_memory_region" in parameters):
        return
    name, shape = tensor.get("name"), tensor.get("shape", [])
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise Refused(400, f"{name} has no shape that can be read, expected a list of whole numbers from 0")
    # each number takes a digit and a comma
    if prod(shape) > size:
        sizes = " x ".join(map(str, shape))
        raise Refused(400, f"{name} announces {sizes} voxels, but the request brings {size} bytes; send as many as it announces")


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) < len(pairs):
        raise ValueError("a name appears twice in one object")
    return said
