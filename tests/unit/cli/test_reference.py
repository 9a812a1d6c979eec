from __future__ import annotations

from pathlib import Path

import pytest

from perturbscope.cli.app import run

PAGE = Path(__file__).resolve().parents[3] / "docs" / "operations-reference.md"


def test_the_page_in_docs_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["operations"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "perturbscope operations > docs/operations-reference.md"
