"""Every kernel compiles for every generation of GPUs that is supported, in single precision where that is meant, and in registers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_sources import doubles, spills

pytest.importorskip("numba_cuda", reason="needs the CUDA packages: pip install 'segrt[cuda]'")

SCRIPT = Path(__file__).parents[1] / "compile_kernels.py"
# A100; H100 and H200, for all types; RTX 50. Generations differ behind the types: there one of each kernel's is enough for every run
GENERATIONS = ("80:brief", "90", "120:brief")
NEWEST_PTX = (9, 0)  # what a driver of CUDA 13.0 reads

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports():
    """What `compile_kernels.py` says, by generation."""
    # Numba is without its simulator there; the script's folder is on its path, the package's has to be
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"} | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *GENERATIONS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=GENERATIONS, ids=lambda generation: f"sm_{generation.partition(':')[0]}")
def report(request: pytest.FixtureRequest, reports):
    return reports[request.param]


PTX = """
.func inner$1(
{
  cvt.f64.f32 	%fd1, %f1;
}
.visible .entry clean_f64(
{
  .reg .f64 %fd<2>;
  @%p1 add.f32 %f1, %f2, %f3;
  // mul.f64 is named
}
.visible .entry predicated(
{
  @%p1 add.f64 	%fd1, %fd2, %fd3;
  { @!%p2 fma.rn.f64 %fd1, %fd2, %fd3, %fd4; }
}
.entry calling(
{
  call.uni inner$1, (param0);
}
"""
LOG = """
ptxas info : Compiling entry function 'clean_f64' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info : Used 40 registers
ptxas info : Compiling entry function 'calling' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info : Used 255 registers
ptxas info : Function properties for inner$1
    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
"""


def test_the_checks_can_fail():
    assert doubles(PTX) == {"clean_f64": [], "predicated": ["add.f64", "fma.rn.f64"], "calling": ["cvt.f64.f32"]}
    assert {name: (used.registers, used.spilled) for name, used in spills(LOG).items()} == {"clean_f64": (40, 0), "calling": (255, 12)}


def of_form(form):
    return f"{form['kernel']}({form['types']})"


def test_every_kernel_is_reached(report):
    assert report["missing"] == [], "add a call to STAGES in compile_kernels.py"
    assert len(report["forms"]) > 30


def test_no_double_precision_where_single_is_meant(report):
    assert {of_form(f): f["double"] for f in report["forms"] if f["double"] and not f["float64"]} == {}


def test_a_kernel_that_asks_for_double_precision_uses_it(report):
    asking = {f["kernel"] for f in report["forms"] if f["float64"]}
    assert asking <= {f["kernel"] for f in report["forms"] if f["double"]}


def test_drivers_of_cuda_13_0_read_the_ptx(report):
    versions = {tuple(int(n) for n in f["version"].split(".")) for f in report["forms"]}
    assert max(versions) <= NEWEST_PTX


def test_no_register_spills(report, capsys: pytest.CaptureFixture[str]):
    if report["assembler"] is None:
        pytest.skip("PTX is not assembled: there is neither ptxas nor nvJitLink")
    assert {of_form(f): f["spilled"] for f in report["forms"] if f["spilled"]} == {}
    most = {}
    for form in report["forms"]:
        most[form["kernel"]] = max(most.get(form["kernel"], 0), form["registers"])
    with capsys.disabled():
        print(f"\nregisters of a thread, {report['arch']}: {', '.join(f'{k} {n}' for k, n in sorted(most.items()))}")
