"""How many files two flows enter: a reader who follows a request or a command opens no more than these."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("flow", "most"), [("embed", 26), ("score", 25)])
def test_a_flow_enters_few_files(flow: str, most: int) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/flows.py", flow], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, *files = done.stdout.splitlines()
    assert first == f"{flow}: {len(files)} files"
    assert 10 < len(files) <= most, done.stdout
