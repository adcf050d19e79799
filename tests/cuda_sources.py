"""CUDA C compiled for GPUs that are not here, by NVRTC as CuPy does it: what every kernel of a source becomes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from segrt.kernels._cuda import native

GENERATIONS = (80, 90, 120)  # A100; H100 and H200; RTX 50


@dataclass(frozen=True)
class Compiled:
    """One kernel: bytes that did not fit in registers, and whether it, or what it calls, computes in double precision."""

    spilled: int
    doubles: bool


def compiled(source: str, defines: Mapping[str, int], generation: int) -> dict[str, Compiled]:
    """Every kernel of `src/<source>.cu`; skips where the CUDA packages are not installed."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the CUDA packages: pip install 'segrt[cuda]'")
    # a real architecture has NVRTC assemble as well, and its assembler tell of registers in the log
    options = [f"-arch=sm_{generation}", "-std=c++17", "-Xptxas=-v", *(f"-D{name}={value}" for name, value in defines.items())]
    _, program = nvrtc.nvrtcCreateProgram(native.source_text(source).encode(), source.encode(), 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log
    ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    nvrtc.nvrtcDestroyProgram(program)
    doubles, spilled = _doubles(ptx), _spilled(log)
    assert doubles.keys() == spilled.keys()
    return {name: Compiled(spilled[name], doubles[name]) for name in doubles}


def _text(size: Any, get: Any, program: Any) -> str:
    buffer = b" " * size(program)[1]
    get(program, buffer)
    return buffer.rstrip(b"\0").decode()


def _spilled(log: str) -> dict[str, int]:
    """Kernel -> bytes; those of functions it calls follow its own."""
    found = {}
    for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL):
        numbers = re.findall(r"(\d+) bytes spill", report)
        assert len(numbers) >= 2, log
        found[name] = sum(map(int, numbers))
    return found


def _doubles(ptx: str) -> dict[str, bool]:
    """Kernel -> whether it, or a function it calls, has an instruction in double precision."""
    parts = re.split(r"^(?:\.visible )?(?:\.weak )?\.(entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", ptx, flags=re.MULTILINE)[1:]
    texts = {name: (kind, text) for kind, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}

    def has(name: str) -> bool:
        text = texts[name][1]
        called = {other for other, (kind, _) in texts.items() if kind == "func" and other != name and re.search(rf"\b{other}\b", text)}
        return bool(re.search(r"^\s+(@%p\d+ )?\w+[\w.]*\.f64\b", text, re.MULTILINE)) or any(map(has, called))

    return {name: has(name) for name, (kind, _) in texts.items() if kind == "entry"}
