"""A family is one module in a table: nothing but its own folder names it, so the next family needs no other file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OF_ONE_FAMILY = {"training/commands/adopt.py"}
"""Published weights are those of one family, so the command that reads them names it."""


def imported(source: str) -> set[str]:
    """Dotted names of all imports, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", ["training", "evaluation", "serving"])
def test_no_family_is_named_outside_its_folder(package: str) -> None:
    folders = {path.name for path in (ROOT / "training" / "families").iterdir() if (path / "__init__.py").is_file()}
    assert folders
    paths = [path for path in (ROOT / package).rglob("*.py") if path.parts[-3] != "families"]
    assert paths
    for path in paths:
        if path.relative_to(ROOT).as_posix() in OF_ONE_FAMILY:
            continue
        for name in imported(path.read_text()):
            family = name.removeprefix("training.families.").partition(".")[0]
            assert not (name.startswith("training.families.") and family in folders), f"{path} imports {name}"
        assert "input_ids" not in path.read_text() or package == "serving", f"{path} names an input of the rank family"
