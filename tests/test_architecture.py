"""The shape of the project: who imports whom, what loads torch, what is public, how large a tracked file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import UNET_3D, make_spec

import segrt
from segrt.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "segrt"

# Imports point only downwards; parts on one row do not know each other.
LAYERS = {
    13: ("cli",),
    12: ("train", "export", "evaluate", "serving"),
    11: ("pipeline", "report", "repository"),
    10: ("predictor", "protocol"),
    9: ("frames",),
    8: ("opened",),
    7: ("infer", "opening", "memory", "device_plan"),
    6: ("engines", "assemble", "slabs"),
    5: ("io", "bundle", "preprocess", "windows", "restore", "postprocess", "networks", "metrics", "phantom"),
    4: ("volume", "kernels", "clock", "pair", "level", "files"),
    3: ("device", "spec"),
    2: ("arrays",),
    1: ("errors",),
    0: ("__version__",),  # all that a module may take from segrt/__init__.py
}
ROW = {part: row for row, parts in LAYERS.items() for part in parts}
WITH_TORCH = ("networks", "train", "export", "engines.pytorch", "engines.torch_fused")
IMPORT_NAMES = {"connected-components-3d": "cc3d"}
HEAVY = ("torch", "cupy", "numba", "tensorrt", "onnxruntime", "openvino", "scipy", "SimpleITK")
PUBLIC = {
    "__version__",
    "Predictor",
    "predict_many",
    "Segmentation",
    "Volume",
    "Grid",
    "ModelSpec",
    "Bundle",
    "read_volume",
    "write_labels",
    "SegrtError",
}

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(PACKAGE.rglob("*.py"))}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _import_nodes(tree: ast.AST, *, functions: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that runs: those under TYPE_CHECKING never do, those inside functions only when asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif _is_type_checking(node):
            for other in node.orelse:  # type: ignore[attr-defined]
                yield from _import_nodes(other, functions=functions)
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _import_nodes(node, functions=functions)


def _package_of(module: str, path: Path) -> list[str]:
    return module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]


def imports(module: str, path: Path, *, functions: bool = True) -> set[str]:
    """Absolute dotted names of what a module imports."""
    found = set()
    for node in _import_nodes(ast.parse(path.read_text(encoding="utf-8")), functions=functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            continue
        base = node.module or ""
        if node.level:
            package = _package_of(module, path)
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        # `from .kernels import resample` may name a module: the longest dotted name that exists counts
        names = [f"{base}.{alias.name}" for alias in node.names]
        found.update(name if name in MODULES or base == "segrt" else base for name in names)
    return found


def part(module: str) -> str:
    """The row entry a module of segrt belongs to: `segrt.engines.trt` -> engines."""
    return module.split(".")[1] if "." in module else ""


def core_packages() -> set[str]:
    """What a plain `pip install segrt` brings, by the names it is imported under."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CORE":
            names = [re.split(r"[<>=!~\[]", requirement)[0] for requirement in ast.literal_eval(node.value)]
            return {IMPORT_NAMES.get(name, name) for name in names}
    raise AssertionError("setup.py: no list CORE")


def _top(module: str) -> str:
    return module.split(".")[0]


def _may_load_torch(module: str) -> bool:
    name = module.removeprefix("segrt.")
    return any(name == allowed or name.startswith(allowed + ".") for allowed in WITH_TORCH)


def test_every_part_has_a_row() -> None:
    assert {part(m) for m in MODULES} - {""} <= ROW.keys(), "put the new part into LAYERS, where it belongs"


@pytest.mark.parametrize("module", [m for m in MODULES if part(m)])
def test_imports_point_downwards(module: str) -> None:
    own = part(module)
    for other in imports(module, MODULES[module]):
        if _top(other) != "segrt" or part(other) == own:
            continue
        assert part(other) in ROW, f"{module} imports the package's front door ({other}); import the module it comes from"
        assert ROW[part(other)] < ROW[own], f"{module} (row {ROW[own]}) imports {other} (row {ROW[part(other)]})"


def test_train_and_export_meet_only_in_the_bundle() -> None:
    for module, path in MODULES.items():
        others = {part(m) for m in imports(module, path) if _top(m) == "segrt"}
        if part(module) in ("train", "export"):
            assert ({"train", "export"} - {part(module)}).isdisjoint(others), module


def test_torch_stays_where_networks_are() -> None:
    found = {m for m, path in MODULES.items() if "torch" in {_top(i) for i in imports(m, path)}}
    assert {m for m in found if not _may_load_torch(m)} == set()


def test_nothing_that_predicts_imports_a_torch_module_when_loaded() -> None:
    """The command lines and open_engine reach them too, inside the one function that needs them."""
    for module, path in MODULES.items():
        if not _may_load_torch(module):
            reached = {m for m in imports(module, path, functions=False) if _top(m) == "segrt" and m != "segrt" and _may_load_torch(m)}
            assert reached == set(), f"{module} imports {reached} at its top"


def test_loading_the_runtime_needs_only_the_core_packages() -> None:
    allowed = core_packages() | set(sys.stdlib_module_names) | {"segrt"}
    for module, path in MODULES.items():
        if not _may_load_torch(module):
            outside = {_top(m) for m in imports(module, path, functions=False)} - allowed
            assert outside == set(), f"{module} needs {outside} at import; go through arrays.require inside the function"


def test_kernels_know_no_spec_and_no_file() -> None:
    for module, path in MODULES.items():
        if part(module) == "kernels":
            found = imports(module, path)
            assert {part(m) for m in found if _top(m) == "segrt"} <= {"kernels", "device", "arrays", "errors"}, module
            assert {_top(m) for m in found}.isdisjoint({"pathlib", "os", "io", "SimpleITK", "pydantic"}), module


def test_the_environment_is_read_by_commands_alone() -> None:
    passes_it_on = {"segrt.export.calibrate", "segrt.serving.server"}  # whole, to a process of its own
    for module, path in MODULES.items():
        if part(module) != "cli" and module not in passes_it_on:
            used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)}
            assert used.isdisjoint({"os.environ", "os.getenv", "os.environb"}), f"{module} reads the environment; take an argument"


def test_public_names_are_pinned() -> None:
    assert set(segrt.__all__) == PUBLIC
    assert set(dir(segrt)) == PUBLIC


def test_importing_segrt_loads_nothing_heavy() -> None:
    code = f"import sys, segrt; print([m for m in {HEAVY!r} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_the_commands_load_without_torch() -> None:
    """A bundle that has its ONNX files is built and run on machines without torch."""
    commands = [m for m in MODULES if part(m) == "cli"]
    code = (
        f"import importlib, sys; sys.modules['torch'] = None; [importlib.import_module(m) for m in {[*commands, 'segrt.export.build']!r}]"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    "call",
    [
        "from segrt.export.build import build_model; build_model('nnunet_folder', 'new')",
        "from segrt.bundle import Bundle; from segrt.engines import open_engine; open_engine(Bundle.open('bundle'), '0')",
    ],
)
def test_what_needs_torch_says_so_where_it_is_missing(tmp_path: Path, call: str) -> None:
    """A plain installation brings no torch: importing a model, or running one from its weights, ends in a sentence."""
    bundle = Bundle.create(tmp_path / "bundle", make_spec(network=UNET_3D))
    bundle.weights_path("0").parent.mkdir()
    bundle.weights_path("0").write_bytes(b"weights")
    (tmp_path / "nnunet_folder").mkdir()
    code = f"import sys; sys.modules['torch'] = None; {call}"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("segrt.errors.BackendError: torch is needed here")
    assert "pip install 'segrt[export]'" in last


def test_no_tracked_file_is_large() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split("\0")
    large = [n for n in names if n and (ROOT / n).is_file() and (ROOT / n).stat().st_size > 2_000_000]
    assert large == []
