"""The audit writes what was found, when, and with what; and never takes silence for a clean bill."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FLAW = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"], "description": "long"}
ANSWERS = {
    "clean": ({"dependencies": [{"name": "one", "version": "1.0", "vulns": []}]}, 0, "clean"),
    "a vulnerability": ({"dependencies": [{"name": "one", "version": "1.0", "vulns": [FLAW]}]}, 1, "vulnerable"),
    "not looked up": ({"dependencies": [{"name": "one", "skip_reason": "not found"}]}, 3, "incomplete"),
    "no answer": (None, 3, "incomplete"),
    "an empty answer": ({"dependencies": []}, 3, "incomplete"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_result_report_and_exit_code(what, tmp_path):
    answer, code, result = ANSWERS[what]
    pins = tmp_path / "pins.txt"
    pins.write_text("one==1.0 --hash=sha256:00\n")
    # A stand-in for an interpreter with pip-audit: all else is run by the real one.
    stand_in = tmp_path / "python"
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    reply = f"cat {tmp_path / 'answer.json'}" if answer is not None else "echo 'no such host' >&2; exit 1"
    stand_in.write_text(
        f'#!/bin/sh\ncase "$*" in\n"-m pip_audit --version") echo "pip-audit 9.9";;\n'
        f'"-m pip_audit "*) {reply};;\n*) exec {sys.executable} "$@";;\nesac\n'
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    report = tmp_path / "audit" / "report.json"
    run = subprocess.run(
        [ROOT / "scripts" / "audit.sh", pins],
        env={**os.environ, "PYTHON": str(stand_in), "REPORT": str(report), "SERVICE": "osv"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == code, run.stderr
    document = json.loads(report.read_text())
    assert document["result"] == result
    assert (document["tool"], document["service"]) == ("pip-audit 9.9", "osv")
    when = datetime.fromisoformat(document["date"])
    assert timedelta(0) <= datetime.now(UTC) - when < timedelta(minutes=5)
    (entry,) = document["files"]
    assert len(entry["sha256"]) == 64
    assert f"{document['date']}, pip-audit 9.9, osv: {result}" in run.stdout
    assert ("no clean bill" in run.stdout) == (result == "incomplete")
    if result == "vulnerable":
        assert entry["found"] == [
            {"name": "one", "version": "1.0", "id": FLAW["id"], "aliases": FLAW["aliases"], "fix_versions": ["1.1"]}
        ]
        assert "one 1.0: PYSEC-2026-1, fixed in 1.1" in run.stdout
    if what == "no answer":
        assert entry["error"] == "no such host"
