"""What the commands share: comma lists, logging, and errors as sentences with exit codes."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable

from ..errors import InputError, SegrtError

FAILED, PARTLY_FAILED = 2, 3


def run(app: Callable[[], object]) -> None:
    """Run a command; a SegrtError, or a file that cannot be read or written, becomes one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # a name the terminal cannot show is no reason to lose the summary of a finished run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("SEGRT_CUDA_C") == "1":  # kernels on trial; see docs/gpu.md
        from ..kernels._cuda.native import use_cuda_c

        use_cuda_c(True)
    if os.environ.get("SEGRT_TORCH_COMPILE") == "1":
        from ..engines.pytorch import use_compile

        use_compile(True)
    try:
        app()
    except SegrtError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(FAILED)
    except OSError as err:
        where = f"{err.filename} cannot be read or written" if err.filename else "a file cannot be read or written"
        print(f"error: {where} ({err.strerror or err}); check its permissions and the space that is left", file=sys.stderr)
        sys.exit(FAILED)


def comma_list(text: str | None) -> tuple[str, ...] | None:
    """Split "0,1,2"; None stays None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def triples(text: str | None) -> tuple[tuple[str, ...], ...] | None:
    """Split "1,2,2/2,2,2"; None stays None."""
    return None if text is None else tuple(comma_list(part) or () for part in text.split("/"))


def configure_logging(*, verbose: bool) -> None:
    """Send warnings (with `verbose` everything) of the library to stderr."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)


def gigabytes(count: float) -> str:
    """Bytes as text in GB."""
    return f"{count / 1e9:.2f} GB"


_CHOICES = {
    "backend": ("auto", "openvino", "onnxruntime", "pytorch", "tensorrt", "tensorrt-rtx"),
    "across": ("cases", "windows"),
    "precision": ("fp32", "bf16", "fp16", "int8"),
    "accumulate": ("float32", "float16"),
    "head": ("logits", "softmax", "argmax"),
}


def check_choices(**options: str) -> None:
    """Raise an InputError that lists the choices when an option has none of them."""
    for name, value in options.items():
        if value not in _CHOICES[name]:
            raise InputError(f"--{name}: expected {' or '.join(_CHOICES[name])}, got {value!r}")
