"""Pages point to what is there: links, paths and modules that README, docs/ and the benchmarks name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    ROOT / "data/README.md",
    *sorted((ROOT / "deploy").glob("*.md")),
]
FOLDERS = "perturbscope|serving|training|export|evaluation|benchmarks|tests|scripts|docs|deploy|examples|requirements"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in target]
    lost = [target for target in links if not (page.parent / target).exists()]
    paths = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text))
    lost += [path for path in paths if not (ROOT / path).exists()]
    modules = set(re.findall(rf"-m ((?:{FOLDERS})[\w.]*)", text))
    for path in (ROOT.joinpath(*module.split(".")) for module in modules):
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            lost.append(path.relative_to(ROOT).as_posix())
    assert not lost


def test_every_event_of_the_servers_log_is_in_the_operations_page() -> None:
    emitted = {
        node.args[0].value
        for path in (ROOT / "serving").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("event", "log.event")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    page = (ROOT / "docs/operations.md").read_text()
    table = page[page.index("| event | when |") :].partition("\n\n")[0]
    documented = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines())))
    assert "started" in emitted
    assert emitted <= documented
