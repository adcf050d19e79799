"""Between the tensors of the server's python backend and NumPy 2, whose arrays that backend reads and writes wrongly by its own means.

`as_numpy` gives the right shape with wrong data, and `Tensor(name, array)` a tensor without any, so everything goes through DLPack.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

from ..arrays import Array

# the backend renames a capsule it has used to something NumPy does not know, which then complains into the log at every answer
_USED = b"used_dltensor"
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes = [ctypes.py_object, ctypes.c_char_p]


def server_module() -> Any:
    """What the server gives a Python model to talk to it; it is only there in a process that the server started."""
    return importlib.import_module("triton_python_backend_utils")


def views_of(request: Any) -> dict[str, Array]:
    """Name -> data of a request's inputs; read-only, and the server's memory: gone once the request is answered."""
    return {tensor.name(): view(tensor) for tensor in request.inputs()}


def view(tensor: Any) -> Array:
    """The data of one tensor, as `views_of` has them."""
    return np.from_dlpack(tensor)


def to_tensor(name: str, array: Array) -> Any:
    """A tensor that shares the array's memory and keeps it."""
    data = np.require(array, requirements=["C", "W"])  # DLPack has no way to say that an array is read-only, and NumPy then refuses
    capsule = data.__dlpack__()
    tensor = server_module().Tensor.from_dlpack(name, capsule)
    _rename(capsule, _USED)
    return tensor
