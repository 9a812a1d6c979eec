"""The page of faults: a row is made anew, and the others stay as they are."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.reliability import page
from benchmarks.reliability.__main__ import MODULES
from benchmarks.reliability.trial import Row


def test_a_row_anew_leaves_the_others_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        importlib.import_module(f"benchmarks.reliability.{name}")
    before = page.PAGE.read_text()
    known = page.parts_of(before)
    assert len(known) >= 16
    assert all(part.line in before and part.section in before for part in known.values())
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(before)
    row = Row("keys", "Keys | bars", done="Something.", checks=[("it holds", True)], seconds=61, commit="abc1234")
    row.date, row.clients = "2026-12-01 03:00", {"ok": 1000}
    page.write([row])
    after = page.parts_of(page.PAGE.read_text())
    assert set(after) == set(known)
    assert {name for name in known if after[name] != known[name]} == {"keys"}
    assert (after["keys"].held, after["keys"].seconds, after["keys"].commit) == (True, 61, "abc1234")
    assert f"{sum(part.held for part in after.values())} of {len(after)} rows hold" in page.PAGE.read_text()
    # Written once more, the page is the same.
    text = page.PAGE.read_text()
    page.write([row])
    assert page.PAGE.read_text() == text
