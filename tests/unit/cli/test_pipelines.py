"""What a pipeline sees of a command: exit codes, progress without a terminal, a summary; and a server that restarts."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perturbscope.cli import console
from perturbscope.cli.app import _interrupt, run
from perturbscope.client.conversation import Failure, Pause, RetryPolicy, ask
from perturbscope.errors import InvalidParameterError, OverloadedError, ServerUnreachableError, UnknownModelError
from perturbscope.protocol import ModelsRequest
from tests.screens import make_screen

RESTART = 18.0
"""Seconds that a server was measured to take to start again."""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    make_screen().write_h5ad(tmp_path / "in.h5ad")
    keys = ["--perturbation-key", "perturbation", "--control", "control", "--use-rep", "X_pca", "--permutations", "20"]
    return ["score", str(tmp_path / "in.h5ad"), str(tmp_path / "out.csv"), *keys]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["control-c", "terminate"]
)
def test_a_signal_has_its_exit_code(
    command: list[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        _interrupt(number, None)

    monkeypatch.setattr("perturbscope.tasks.screen.Screen.of", interrupted)
    assert run(command) == code
    monkeypatch.undo()
    assert run(command) == 0


def test_the_summary_tells_what_came_of_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--summary", str(tmp_path / "s.json"), *command]) == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["exit_code"], summary["error"]) == (0, None)
    assert any("1 of 3 perturbations have fewer" in text for text in summary["warnings"])
    assert summary["stages"]["score"] == {"done": 2, "total": 2}
    capsys.readouterr()
    assert run(["--summary", "-", *command[:-4], "--use-rep", "X_no"]) == 2
    summary = json.loads(capsys.readouterr().out)
    assert (summary["exit_code"], summary["error"]["code"], summary["warnings"]) == (2, "missing_column", [])
    assert run(["--summary", "-", *command]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 0
    assert run(["--summary", str(tmp_path / "none" / "s.json"), *command]) == 2


@pytest.mark.parametrize("kind", ["auto", "json", "none"])
def test_progress_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    now = [0.0]
    monkeypatch.setattr(console, "_clock", lambda: now[0])
    console.begin()
    console.report_to(kind, None)
    with console.progress_bars() as show:
        for done in range(1, 101):
            now[0] = float(done)
            show("embed", done, 100)
    lines = capsys.readouterr().err.splitlines()
    if kind == "auto":
        assert lines == ["Embedding: 30 of 100", "Embedding: 60 of 100", "Embedding: 90 of 100"]
    elif kind == "json":
        assert [json.loads(line)["done"] for line in lines] == list(range(1, 101))
        assert json.loads(lines[-1]) == {"stage": "embed", "done": 100, "total": 100, "seconds": 100.0}
    else:
        assert lines == []
    console.begin()


def waits(policy: RetryPolicy, back: float, error: Exception, seed: int) -> tuple[bool, float]:
    """Ask a server that is back after some seconds of a clock that only pauses move: answered, and the seconds."""
    conversation = ask(ModelsRequest(), policy, np.random.default_rng(seed))
    next(conversation)
    clock = 0.0
    while True:
        try:
            if clock >= back:
                conversation.send("answer")
            step = conversation.throw(Failure(error))  # type: ignore[arg-type]
            assert isinstance(step, Pause)
            clock += step.seconds
            next(conversation)
        except StopIteration:
            return True, clock
        except type(error):
            return False, clock


@pytest.mark.parametrize("seed", range(20))
def test_retries_outlast_a_restart(seed: int) -> None:
    gone = ServerUnreachableError("gone")
    assert waits(RetryPolicy(), RESTART, gone, seed)[0]
    assert not waits(RetryPolicy(), 60.0, gone, seed)[0]
    assert waits(RetryPolicy(wait=300.0), 290.0, gone, seed)[0]
    assert waits(RetryPolicy(wait=10.0), 11.0, gone, seed) == (False, pytest.approx(10.0))
    assert waits(RetryPolicy(wait=0.0), 1.0, gone, seed) == (False, 0.0)
    assert waits(RetryPolicy(wait=20.0), 19.0, OverloadedError("full", retry_after=7.0), seed)[0]
    assert waits(RetryPolicy(wait=20.0), 1.0, UnknownModelError("none"), seed) == (False, 0.0)


def test_a_wait_is_a_number_of_seconds() -> None:
    with pytest.raises(InvalidParameterError, match="wait is -1"):
        RetryPolicy(wait=-1.0)


def test_an_absent_server_means_try_again(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--server", "http://127.0.0.1:1", "--wait", "0"]
    assert run([*command, *address]) == 75
    assert "Error [server_unreachable]" in capsys.readouterr().err
    assert run([*command, "--bundle", "bundle", "--wait", "3"]) != 75
