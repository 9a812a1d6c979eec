"""The page of the benchmarks: what is shared by all parts. Nothing here is timed."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.performance import __main__ as program
from benchmarks.performance import harness


def test_every_part_is_a_module_of_its_own() -> None:
    for part in program.PARTS:
        spec = importlib.util.find_spec(f"benchmarks.performance.{part}")
        assert spec is not None, part


def test_routes_take_turns() -> None:
    order: list[str] = []
    found = harness.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warm=1)
    assert order == ["a", "b"] * 4
    assert [len(turns.seconds) for turns in found.values()] == [3, 3]
    assert harness.Turns((3.0, 1.0, 2.0)).median == 2.0
    assert harness.Turns((3.0, 1.0, 2.0)).spread == 3.0


def test_memory_of_a_block_is_seen() -> None:
    with harness.Watch() as watch:
        held = np.ones(64 * 2**20 // 8)
    assert watch.above >= 0.9 * held.nbytes / 2**20


def test_a_process_of_its_own_gives_its_result_and_its_peak() -> None:
    result, peak = harness.in_child(pow, 2, 10)
    assert result == 1024
    assert peak > 1
    with pytest.raises(ChildProcessError, match="pow failed in its process: TypeError"):
        harness.in_child(pow, 2, "x")


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
