"""The rooms of each package in their order: a room imports only rooms below it, and no module is in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the ground up: a room is a folder or a module at the top of the package, and imports rooms to its left alone.
ORDER = {
    "perturbscope": (
        "errors", "container", "threads", "cells", "families", "inference", "scoring", "analysis", "protocol",
        "operations", "client", "tasks", "report", "model", "cli",
    ),
    "serving": (
        "settings", "call", "queue", "telemetry", "models", "access", "engine", "commands", "uploads", "grpc", "http",
        "openinference", "service", "__main__",
    ),
    "training": (
        "errors", "launcher", "console", "config", "data", "families", "checkpoint", "loop", "objectives", "measure",
        "commands", "__main__",
    ),
}  # fmt: skip
MOST_AT_THE_TOP = 20
"""Modules directly in a package: a reader finds a thing in one guess."""


@dataclass(frozen=True)
class Import:
    """One import of one of our modules by another, wherever in the file it stands."""

    source: Path
    line: int
    target: Path

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def imports(root: Path, package: str) -> Iterator[Import]:
    """Imports within a package, those in functions and for type checking too."""
    for path in modules(root, package):
        source = path.relative_to(root)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                target = module(root, name) or module(root, name.rpartition(".")[0])
                if target is not None and target.parts[0] == package and target != source:
                    yield Import(source, node.lineno, target)


def modules(root: Path, package: str) -> list[Path]:
    return [path for path in sorted((root / package).rglob("*.py")) if "_pb2" not in path.name]


def module(root: Path, name: str) -> Path | None:
    """File of a module or package, below the root; None if it is neither."""
    if not name:
        return None
    path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (root / candidate).is_file():
            return candidate
    return None


def room(path: Path) -> str:
    """The folder at the top of the package that a module lies in, or the module itself at the top."""
    return path.parts[1] if len(path.parts) > 2 else path.stem


def upward(root: Path, package: str, order: tuple[str, ...]) -> list[str]:
    """Imports that run upward. The package's own ``__init__`` only hands names on, so it counts on neither side."""
    floor = {name: number for number, name in enumerate(order)}
    return [
        f"{found}: {room(found.source)} may import only {', '.join(order[: floor[room(found.source)]]) or 'nothing'}"
        for found in imports(root, package)
        if "__init__" not in (room(found.source), room(found.target))
        and room(found.source) != room(found.target)
        and floor[room(found.target)] >= floor[room(found.source)]
    ]


def circle(root: Path, packages: tuple[str, ...]) -> list[str]:
    """Modules that import each other in a circle, each import of it; empty if there is none."""
    arrows = [found for package in packages for found in imports(root, package) if "__init__" not in found.source.name]
    graph: dict[Path, set[Path]] = {}
    for found in arrows:
        graph.setdefault(found.source, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        steps = list(zip(error.args[1][1:], error.args[1], strict=False))
        return [str(found) for step in steps for found in arrows if (found.source, found.target) == step]
    return []


@pytest.mark.parametrize("package", ORDER)
def test_every_room_has_its_place(package: str) -> None:
    rooms = {room(path.relative_to(ROOT)) for path in modules(ROOT, package)} - {"__init__"}
    assert rooms == set(ORDER[package])


@pytest.mark.parametrize("package", ORDER)
def test_a_room_imports_only_rooms_below_it(package: str) -> None:
    assert upward(ROOT, package, ORDER[package]) == []


def test_no_module_is_in_a_circle() -> None:
    assert circle(ROOT, (*ORDER, "export", "evaluation")) == []


@pytest.mark.parametrize("package", [*ORDER, "export", "evaluation", "benchmarks", "scripts"])
def test_no_shelf_is_too_long(package: str) -> None:
    for folder in {path.parent for path in modules(ROOT, package)}:
        assert len(list(folder.glob("*.py"))) <= MOST_AT_THE_TOP, folder


@pytest.mark.parametrize("package", ORDER)
def test_every_folder_says_what_belongs_there(package: str) -> None:
    for path in modules(ROOT, package):
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_a_broken_order_and_a_circle_are_named(tmp_path: Path) -> None:
    for name, text in {
        "house/cellar/a.py": "def f():\n    from house.attic import b\n",
        "house/attic/b.py": "if TYPE_CHECKING:\n    from house.cellar.a import f\n",
        "house/attic/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(tmp_path, "house", ("cellar", "attic")) == [
        "house/cellar/a.py:2 imports house/attic/b.py: cellar may import only nothing"
    ]
    assert sorted(circle(tmp_path, ("house",))) == [
        "house/attic/b.py:2 imports house/cellar/a.py",
        "house/cellar/a.py:2 imports house/attic/b.py",
    ]
