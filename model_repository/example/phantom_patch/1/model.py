"""The bare network: patches in, logits out.

All it does is in segrt.serving.backend, which the server's Python has to find.
"""

from segrt.serving.backend import PatchModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
