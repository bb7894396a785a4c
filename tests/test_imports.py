"""Imports point down, and `import arrondi` stays quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "arrondi"

FLOORS = {
    "errors": 0, "arguments": 0, "documents": 0, "_native": 0, "native": 0, "formats": 0, "tensor": 0, "sample": 0, "waiting": 0,
    "kernels": 1,
    "rounding": 2, "rewrite": 2, "repair": 2, "calibration": 2, "optim": 2,
    "nn": 3,
    "checkpoint": 4,
    "model": 5,
    "graph": 5, "measure": 6, "runtime": 6, "distributed": 6,
    "pipeline": 7, "search": 7, "adapters": 7, "training": 7, "verification": 7,
    "api": 8,
    "cli": 9, "report": 9,
    "__init__": 10, "__main__": 10,
}  # fmt: skip

# Inside the ground floor there is an order, too: each may import what stands before it.
GROUND = [
    "errors",
    "arguments",
    "_native",
    "native",
    "formats",
    "tensor",
]

FILES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def part(path: Path) -> str:
    """The folder or module of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import anywhere in a file; `from p import m` also gives `p.m`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def parts_imported(path: Path) -> list[tuple[int, str]]:
    """(line, part of arrondi) of a file. `from arrondi import x` is of `__init__`, but for the version."""
    package = ["arrondi", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for line, module in imports(ast.parse(path.read_text(encoding="utf-8")), package):
        names = module.split(".")
        if names[0] == "arrondi" and len(names) > 1 and names[1] != "__version__":
            found.append((line, names[1] if names[1] in FLOORS else "__init__"))
    return found


def run_time_imports(body: list[ast.stmt]) -> Iterator[str]:
    """Top-level modules imported when a file is, leaving out functions and `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from run_time_imports(node.orelse)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (module.split(".")[0] for _, module in imports(node, ["arrondi"]))
        else:
            yield from run_time_imports([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def test_the_package_is_where_we_look() -> None:
    assert {part(path) for path in FILES} >= {"errors", "formats", "tensor", "rounding"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = part(path)
    assert here in FLOORS, f"{here} has no floor yet: give it one in {Path(__file__).name} and in ARCHITECTURE.md"
    for line, there in parts_imported(path):
        assert FLOORS[there] <= FLOORS[here], f"{path}:{line}: {here} must not import {there}"
        if here in GROUND:
            assert GROUND.index(there) <= GROUND.index(here), f"{path}:{line}: {here} must not import {there}"


def test_parts_of_one_floor_do_not_import_each_other() -> None:
    pairs = {(part(path), there) for path in FILES for _, there in parts_imported(path) if part(path) not in GROUND}
    circles = {(a, b) for a, b in pairs if a != b and FLOORS[a] == FLOORS[b] < 10 and (b, a) in pairs}
    assert not circles


@pytest.mark.parametrize(
    "path", [p for p in FILES if part(p) in ("formats", "errors")], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_formats_are_plain_data(path: Path) -> None:
    found = set(run_time_imports(ast.parse(path.read_text(encoding="utf-8")).body))
    assert found <= {"__future__", "arrondi", *sys.stdlib_module_names}, path


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_arrondi_loads_no_heavy_package() -> None:
    loaded = loaded_by("import arrondi; assert arrondi.__file__")
    assert "arrondi" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "transformers",
        "scipy",
        "safetensors",
        "tokenizers",
        "compressed_tensors",
        "rich",
    }


def test_formats_load_neither_torch_nor_numpy() -> None:
    loaded = loaded_by("import arrondi.formats, arrondi.errors")
    assert not loaded & {"torch", "numpy", "scipy", "transformers"}


def test_quantizing_a_tensor_loads_no_model_library() -> None:
    loaded = loaded_by("import arrondi.tensor.qtensor, arrondi.rounding")
    assert "torch" in loaded
    assert not loaded & {"transformers", "scipy", "safetensors", "tokenizers", "compressed_tensors"}


def test_the_commands_load_no_library_before_one_is_run() -> None:
    loaded = loaded_by("import arrondi.cli.commands")
    assert not loaded & {"torch", "numpy", "transformers", "scipy", "onnx"}
