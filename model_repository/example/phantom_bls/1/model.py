"""Whole images in, labels out; the windows of all requests meet in the patch models.

All it does is in segrt.serving.backend, which the server's Python has to find.
"""

from segrt.serving.backend import BlsModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
