"""What goes over the wire, whichever protocol carries it: a question, its answer, and how one can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from ..arrays import Array
from ..errors import BackendError

Reason: TypeAlias = Literal["invalid", "unknown", "unavailable", "late", "cancelled", "failed"]
Answer: TypeAlias = Mapping[str, Array]

# Triton's name of a type -> NumPy's; all that segrt's models use
DTYPES: Mapping[str, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# what the server says of a model process that died under a request, and while one version of a model gives way to another
_PASSING = ("stub process", "stub is not", "shared memory segment", "unloading", "is not ready", "no available versions")


class Failure(Exception):  # noqa: N818 - no error of segrt's: it never leaves the client, which says it as a SegrtError
    """Why a question got no answer: a reason to act on, and the server's or the network's own words."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason, self.text = reason, text


def reason_of(text: str, otherwise: Reason = "failed") -> Reason:
    """Tell a process that died or a model that is being exchanged, which is worth a repeat, from a failure that will repeat itself."""
    return "unavailable" if any(sign in text.lower() for sign in _PASSING) else otherwise


@dataclass(frozen=True)
class Slot:
    """A stretch of a registered shared-memory region that holds one tensor."""

    region: str
    offset: int
    size: int


@dataclass(frozen=True)
class Question:
    """One request: tensors by name, the outputs wanted, options; `slots` says which tensors lie in shared memory instead."""

    model: str
    version: str
    inputs: Mapping[str, Array]
    outputs: Sequence[str]
    parameters: Mapping[str, bool | str] = field(default_factory=dict)
    slots: Mapping[str, Slot] = field(default_factory=dict)

    @property
    def sent(self) -> list[Array]:
        """Inputs that travel with the request, in order."""
        return [array for name, array in self.inputs.items() if name not in self.slots]


class Region(Protocol):
    """Shared memory as a server has to know it."""

    name: str
    size: int

    @property
    def registration(self) -> tuple[Literal["system", "cuda"], str | bytes]:
        """Its kind, and the key (system) or the raw handle (cuda) by which another process opens it."""
        ...


class Transport(Protocol):
    """A protocol to one server. Every method raises a `Failure`."""

    streams: bool

    def parameters(self, model: str, version: str, timeout: float | None) -> dict[str, str]:
        """Parameters of a model's configuration."""
        ...

    def is_ready(self, model: str, version: str, timeout: float | None) -> bool:
        """Whether a model is there and ready."""
        ...

    def infer(self, question: Question, timeout: float | None) -> Answer:
        """One question, one answer; with a `placeholder` for what lies in shared memory."""
        ...

    def stream(self, question: Question, timeout: float | None) -> Generator[Answer]:
        """One question, several answers as they come; only where `streams`."""
        ...

    def register(self, region: Region, timeout: float | None) -> None:
        """Make a region known to the server."""
        ...

    def unregister(self, kind: Literal["system", "cuda"], name: str, timeout: float | None) -> None:
        """Make the server forget a region; it is no failure when it has."""
        ...

    def system_regions(self, timeout: float | None) -> dict[str, str]:
        """Name -> key of the system shared memory the server knows."""
        ...

    def cancel(self) -> None:
        """Cancel what is under way, and refuse all but `unregister` from now on."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


class Running:
    """What is under way on a transport, so that another thread can end it."""

    def __init__(self) -> None:
        self._lock, self._ends, self.is_cancelled = threading.Lock(), set[Callable[[], object]](), False

    @contextmanager
    def __call__(self, end: Callable[[], object], *, tidying: bool = False) -> Iterator[None]:
        """While the block runs, `cancel` calls `end`; after it no block is entered but those that tidy up."""
        with self._lock:
            if self.is_cancelled and not tidying:
                raise Failure("cancelled", "closed")
            self._ends.add(end)
        try:
            yield
        finally:
            with self._lock:
                self._ends.discard(end)

    def cancel(self) -> None:
        """End what is under way."""
        with self._lock:
            self.is_cancelled, ends = True, list(self._ends)
        for end in ends:
            end()


def type_name(array: Array) -> str:
    """Triton's name of an array's type."""
    return _NAMES[array.dtype.newbyteorder("<")]


def placeholder(datatype: str, shape: Sequence[int], name: str) -> Array:
    """What stands in an answer for a tensor that lies in shared memory: its type and shape, without its bytes."""
    return np.broadcast_to(decode(bytes(_dtype(datatype, name).itemsize), datatype, (), name), tuple(shape))


def decode(data: bytes | bytearray | memoryview, datatype: str, shape: Sequence[int], name: str) -> Array:
    """An array of what a server sent; it can be written to."""
    dtype = _dtype(datatype, name)
    if len(data) != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise BackendError(
            f"the server sent {len(data)} bytes as {name}, {datatype} of shape {tuple(shape)}; expected a segrt model's answer"
        )
    array = np.frombuffer(data, dtype).reshape(tuple(shape))
    return array if array.flags.writeable else array.copy()


def _dtype(datatype: str, name: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise BackendError(f"the server sent {name} as {datatype}, expected one of {', '.join(DTYPES)}; is it a segrt model's answer?")
    return DTYPES[datatype]
