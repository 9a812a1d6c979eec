"""The page of the performance benchmarks. Nothing here is timed."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from benchmarks.performance import __main__ as program
from benchmarks.performance import harness


def test_every_part_is_a_module_of_its_own() -> None:
    for part in program.PARTS:
        spec = importlib.util.find_spec(f"benchmarks.performance.{part}.part")
        assert spec is not None, part


def test_the_page_has_results_notes_and_where_they_are_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path
    (here / "notes").mkdir()
    (here / "notes" / "scoring.md").write_text("What limits it.\n")
    monkeypatch.setattr(program, "HERE", here)
    section = harness.Section("| a |\n|---|\n| 1 |\n", {"a": 1})
    program.keep("scoring", section, harness.Options(repeats=3), harness.machine(), 1.4)
    kept = json.loads((here / "results" / "scoring.json").read_text())
    assert kept["numbers"] == {"a": 1}
    text = program.page()
    assert re.search(
        r"## Scoring at genome scale\n\n\| a \|\n\|---\|\n\| 1 \|\n\n"
        r"\*`python -m benchmarks.performance scoring --repeats 3`, \d{4}-\d\d-\d\d, commit .*\n\nWhat limits it.\n",
        text,
    )
    assert text.count("Not measured yet.") == len(program.PARTS) - 1


def test_the_page_is_made_of_the_results_and_notes_beside_it() -> None:
    assert program.PAGE.read_text() == program.page()
