"""CUDA C compiled for GPUs that are not here, by NVRTC as CuPy does it: what every kernel of a source becomes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from segrt.kernels._cuda import native

GENERATIONS = (80, 90, 120)  # A100; H100 and H200; RTX 50

# an instruction may hang on a predicate, and follow another or a brace on its line
_DOUBLE = re.compile(r"(?:^|[;{}])\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*\.f64(?:\.\w+)*)\b", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """One kernel: bytes that did not fit in registers, and whether it, or what it calls, computes in double precision."""

    spilled: int
    doubles: bool


def compiled(source: str, defines: Mapping[str, int], generation: int, *, kernel: str | None = None) -> dict[str, Compiled]:
    """Every kernel of `src/<source>.cu`, or of the part of it that holds `kernel`; skips where the CUDA packages are not installed."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the CUDA packages: pip install 'segrt[cuda]'")
    # a real architecture has NVRTC assemble as well, and its assembler tell of registers in the log
    options = [f"-arch=sm_{generation}", "-std=c++17", "-Xptxas=-v", *(f"-D{name}={value}" for name, value in defines.items())]
    text = native.source_text(source)
    _, program = nvrtc.nvrtcCreateProgram((text if kernel is None else part_of(text, kernel)).encode(), source.encode(), 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log
    ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    nvrtc.nvrtcDestroyProgram(program)
    double, used = doubles(ptx), spills(log)
    assert double.keys() == used.keys()
    return {name: Compiled(used[name].spilled, bool(double[name])) for name in double}


def part_of(code: str, kernel: str) -> str:
    """What a kernel needs of a source that headings divide: what all parts share, and its own."""
    shared, *parts = re.split(r"^(?=// -{10})", code, flags=re.MULTILINE)
    return shared + next((part for part in parts if re.search(rf"\b{kernel}\(", part)), "")


def _text(size: Any, get: Any, program: Any) -> str:
    buffer = b" " * size(program)[1]
    get(program, buffer)
    return buffer.rstrip(b"\0").decode()


@dataclass(frozen=True)
class Used:
    """What a kernel takes once it is assembled: registers of a thread, and bytes that did not fit in them."""

    registers: int
    spilled: int


def spills(log: str) -> dict[str, Used]:
    """Every kernel in an assembler's report; the bytes of functions it calls follow its own."""
    found = {}
    for name, report in re.findall(r"Compiling entry function '([\w$]+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL):
        numbers, registers = re.findall(r"(\d+) bytes spill", report), re.search(r"Used (\d+) registers", report)
        assert len(numbers) >= 2, log
        assert registers, log
        found[name] = Used(int(registers[1]), sum(map(int, numbers)))
    return found


def doubles(ptx: str) -> dict[str, list[str]]:
    """Every kernel's instructions in double precision, and those of the functions it calls."""
    parts = re.split(r"^(?:\.visible )?(?:\.weak )?\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)", ptx, flags=re.MULTILINE)[1:]
    texts = {name: (kind, text) for kind, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}
    functions = {name for name, (kind, _) in texts.items() if kind == "func"}
    own = {name: set(_DOUBLE.findall(text)) for name, (_, text) in texts.items()}
    called = {name: set(re.findall(r"[\w$]+", text)) & functions - {name} for name, (_, text) in texts.items()}

    def instructions(name: str) -> set[str]:
        return own[name].union(*map(instructions, called[name]))

    return {name: sorted(instructions(name)) for name, (kind, _) in texts.items() if kind == "entry"}
