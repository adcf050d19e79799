"""Assemble TensorRT 8.6 for Python 3.11 out of what PyPI has of it, for machines that cannot reach NVIDIA's own index.

    python benchmarks/make_tensorrt86.py FOLDER
    PYTHONPATH=FOLDER/package LD_LIBRARY_PATH=FOLDER/lib:$LD_LIBRARY_PATH python -c "import tensorrt"

The libraries are those of tensorrt 8.6.0 (its wheel is for Python 3.10), the bindings those of tensorrt-bindings 8.6.1, which call them
through the same virtual tables; `OnnxParser.set_flag` is newer than 8.6.0 and must not be called. libnvinfer_plugin asks for cuBLAS 12 and
cuDNN 8 by name. Where they are missing it gets stand-ins: handles can be made and thrown away, every computation fails with a line on
stderr. Instance normalisation of 16-bit volumes computes without them; see `segrt.export.weak`. 1.2 GB; needs gcc and nm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARIES = (
    "libnvinfer.so.8",
    "libnvinfer_plugin.so.8",
    "libnvonnxparser.so.8",
    "libnvparsers.so.8",
    "libnvinfer_builder_resource.so.8.6.0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    libraries, package = folder / "lib", folder / "package" / "tensorrt"
    for made in (libraries, package):
        made.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name in LIBRARIES:
            extract(download("tensorrt==8.6.0", "3.10", Path(scratch)), f"tensorrt/{name}", libraries / name)
        bindings = download("tensorrt-bindings==8.6.1", "3.11", Path(scratch))
        for name in ("__init__.py", "tensorrt.so"):
            extract(bindings, f"tensorrt_bindings/{name}", package / name)
    init = package / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "8.6.1"', '__version__ = "8.6.0"'))
    for library, symbols in missing(libraries / "libnvinfer_plugin.so.8").items():
        stand_in(libraries / library, symbols)


def download(requirement: str, python: str, folder: Path) -> Path:
    """The wheel of a requirement for a Python version; fetched once."""
    name = requirement.partition("==")[0].replace("-", "_")
    if not list(folder.glob(f"{name}-*.whl")):
        platforms = [f"--platform={p}" for p in ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64")]
        how = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *how, "-d", str(folder), requirement], check=True)
    return next(folder.glob(f"{name}-*.whl"))


def extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 2**24)


def missing(library: Path) -> dict[str, list[str]]:
    """Libraries of cuBLAS and cuDNN -> the symbols asked of them."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for symbol, needed in re.findall(r"((?:cublas|cudnn)\w+)@(lib\w+\.so\.\d+)", listing):
        found.setdefault(needed, []).append(symbol)
    return found


def stand_in(target: Path, symbols: list[str]) -> None:
    """Compile a library that has the symbols, in the version node that the linker recorded."""
    harmless = re.compile(r"Create|Destroy|Set|Get|Derive")
    lines = ["#include <stdio.h>"]
    for symbol in symbols:
        if symbol == "cudnnGetErrorString":
            lines.append(f'const char* {symbol}(int status) {{ return "no cuDNN"; }}')
        elif harmless.search(symbol):
            lines.append(f"int {symbol}(void) {{ return 0; }}")
        else:
            lines.append(f'int {symbol}(void) {{ fputs("{symbol} is not there\\n", stderr); return 1; }}')
    with tempfile.TemporaryDirectory() as scratch:
        code, versions = Path(scratch) / "s.c", Path(scratch) / "s.map"
        code.write_text("\n".join(lines) + "\n")
        versions.write_text(f"{target.name} {{ global: *; }};\n")
        link = [f"-Wl,-soname,{target.name}", f"-Wl,--version-script={versions}"]
        subprocess.run(["gcc", "-shared", "-fPIC", str(code), "-o", str(target), *link], check=True)


if __name__ == "__main__":
    main()
