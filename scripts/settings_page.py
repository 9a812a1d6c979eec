"""Writes docs/settings.md, the table of the server's settings, from the fields of ``serving.settings.Settings``.

``python scripts/settings_page.py > docs/settings.md``; a test compares.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from perturbscope.client import access  # noqa: E402
from serving import settings as module  # noqa: E402
from serving.settings import PREFIX, Settings  # noqa: E402

HEAD = f"""# Settings

Written by `python scripts/settings_page.py` from the source; edit `serving/settings.py` instead.

The server reads each setting from the environment variable that is named here. An unset or empty variable means the
default. A variable with the prefix `{PREFIX}` that is no setting keeps the server from starting, and the error names
the nearest one; variables that Kubernetes sets in pods beside a Service called `perturbscope` or alike are known and
ignored. Some settings are options of `python -m serving` too.
"""
CLIENTS = """
## Clients and the command line

A variable that is nearly one of these is an error, so that no key is left out for a slip of the hand.
"""


def page() -> str:
    """Return the whole page."""
    sentences = _sentences()
    rows = [
        f"| `{PREFIX}{item.name.upper()}` | {_default(item.default)} | {sentences[item.name]} |"
        for item in fields(Settings)
    ]
    table = re.findall(r"^``(PERTURBSCOPE_\w+)`` +(.+)$", access.__doc__ or "", flags=re.MULTILINE)
    table += [
        ("PERTURBSCOPE_BUNDLE", "directory of the bundle, where no model is chosen"),
        ("PERTURBSCOPE_DEBUG", "anything: log everything, and the traceback of an unexpected error"),
    ]
    clients = [f"| `{name}` | {what} |" for name, what in table]
    servers = ["| variable | default | what it is |", "|---|---|---|", *rows]
    return "\n".join([HEAD, *servers, CLIENTS, "| variable | value |", "|---|---|", *clients, ""])


def _sentences() -> dict[str, str]:
    """The docstring below each field, on one line."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            text = re.sub(r"\s+", " ", str(below.value.value)).replace("``", "`").replace("|", "\\|")
            found[field.target.id] = text
    return found


def _default(value: str | int) -> str:
    return str(value) if isinstance(value, int) else f"`{value}`" if value else "empty"


if __name__ == "__main__":
    sys.stdout.write(page())
