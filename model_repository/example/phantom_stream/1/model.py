"""Whole images in, progress and then labels out; the windows of all requests meet in the patch models.

All it does is in segrt.serving.backend, which the server's Python has to find.
"""

from segrt.serving.backend import StreamModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
