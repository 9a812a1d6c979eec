"""The table of settings is what the source says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from serving.settings import Settings

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_current_and_complete() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/settings_page.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text = (ROOT / "docs" / "settings.md").read_text()
    assert done.stdout == text, "python scripts/settings_page.py > docs/settings.md"
    for item in fields(Settings):
        row, *_ = [line for line in text.splitlines() if line.startswith(f"| `PERTURBSCOPE_{item.name.upper()}` |")]
        assert len(row.split(" | ")[-1]) > 20, row
