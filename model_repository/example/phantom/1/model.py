"""Whole images in, labels out, on engines of its own.

All it does is in segrt.serving.backend, which the server's Python has to find.
"""

from segrt.serving.backend import PipelineModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
