"""Benchmarks, scripts and examples run by hand: what they import from the project is there."""

import ast
import importlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OURS = ("perturbscope", "serving", "training", "export", "evaluation", "benchmarks", "tests")


def file_of(module: str) -> Path | None:
    """The file of a module or of a package's `__init__`."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def names(file: Path) -> set[str]:
    """Return the names that a module defines or imports at its top."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    return found


def missing(module: str, name: str) -> bool:
    if file_of(f"{module}.{name}") is not None or (ROOT.joinpath(*module.split("."), name)).is_dir():
        return False
    file = file_of(module)
    if file is None:
        return True
    if "__getattr__" in names(file) or module.endswith("_pb2"):  # its names are made when it is imported
        return not hasattr(importlib.import_module(module), name)
    return name not in names(file)


@pytest.mark.parametrize("folder", ["benchmarks", "scripts", "examples"])
def test_what_is_imported_is_there(folder: str) -> None:
    lost = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
                lost += [
                    (path.name, node.module, alias.name) for alias in node.names if missing(node.module, alias.name)
                ]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names if alias.name.partition(".")[0] in OURS]
                lost += [(path.name, module, "") for module in modules if file_of(module) is None]
    assert not lost
