"""One line a request, in a form that nobody outside can forge, with nothing secret in it."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from perturbscope.errors import InferenceError, InvalidParameterError, OverloadedError
from perturbscope.inference.embedder import Embedder
from serving.access.front import Front
from serving.call import Call, Caller
from serving.settings import Format, Settings
from serving.telemetry import log
from tests.fakes import FakeEncoder

KEY = "psk_0123abcd_" + "A" * 43


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The log of the test; loggers are put back afterwards."""
    root = logging.getLogger()
    names = [*log._LIBRARIES, "perturbscope"]
    before = [(logging.getLogger(n), logging.getLogger(n).handlers[:], logging.getLogger(n).level) for n in names]
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level
    for found, its, depth in before:
        found.handlers[:], found.level = its, depth


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def a_call(**fields: Any) -> Call:
    return Call("/v1/embed", "http", **{"caller": Caller("pipeline"), "cells": 3, "tokens": 9, "n_bytes": 70, **fields})


def fail(text: str) -> None:
    raise ValueError(text)


def test_a_request_is_one_json_line(stream: io.StringIO) -> None:
    log.configure("json", stream=stream)
    call = a_call(id="mine", trace_id="f" * 32, model_id="default-2")
    call.timings = {"decode": 0.25, "queue": 0.5}
    Front.finish(call, 200)
    (line,) = lines(stream)
    when = datetime.fromisoformat(line.pop("time"))
    assert when.tzinfo == UTC
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert 0 <= line.pop("seconds") < 60
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "mine",
        "trace_id": "f" * 32,
        "route": "/v1/embed",
        "transport": "http",
        "caller": "pipeline",
        "model": "default-2",
        "cells": 3,
        "tokens": 9,
        "bytes": 70,
        "status": 200,
        "code": "ok",
        "stages": {"decode": 0.25, "queue": 0.5},
    }


def test_a_request_is_one_line_of_text(stream: io.StringIO) -> None:
    log.configure("text", stream=stream)
    call = a_call(id="mine")
    call.timings = {"decode": 0.25}
    Front.finish(call, 200)
    (line,) = stream.getvalue().splitlines()
    assert " INFO request=mine route=/v1/embed caller=pipeline cells=3 status=200 code=ok tokens=9 bytes=70" in line
    assert line.endswith("decode=0.2500")


@pytest.mark.parametrize(
    ("status", "code", "level"),
    [
        (200, "ok", "info"),
        ("OK", "ok", "info"),
        (422, "invalid_input", "info"),
        (499, "client_gone", "info"),
        (401, "unauthenticated", "warning"),
        (429, "overloaded", "warning"),
        (504, "deadline_exceeded", "warning"),
        (500, "internal", "error"),
        ("INTERNAL", "inference_failed", "error"),
        ("INVALID_ARGUMENT", "invalid_input", "info"),
    ],
)
def test_the_level_says_whose_fault_it_is(stream: io.StringIO, status: str | int, code: str, level: str) -> None:
    log.configure("json", stream=stream)
    Front.finish(a_call(), status, code)
    assert lines(stream)[0]["level"] == level


def test_the_level_is_a_setting(stream: io.StringIO) -> None:
    log.configure("json", "warning", stream=stream)
    Front.finish(a_call(), 200)
    Front.finish(a_call(), 429, "overloaded")
    assert [line["code"] for line in lines(stream)] == ["overloaded"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_line_can_be_forged(stream: io.StringIO, form: Format) -> None:
    log.configure(form, stream=stream)
    forged = 'x\n{"event": "request"}\r\n2026-01-01T00:00:00Z INFO request=forged\x1b[2J\u2028\x85end'
    logging.getLogger("some.library").warning("%s", forged)
    try:
        fail(forged)
    except ValueError:
        log.bug(a_call(id="real"))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    if form == "json":
        assert len(lines(stream)) == 2
    else:
        # Whoever splits at line ends, of whatever kind, finds the lines that are ours and indented ones.
        began = [line for line in text.splitlines() if not line.startswith("    ")]
        assert len(began) == 2
        assert "some.library" in began[0]
        assert "request=real" in began[1]


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    "secret",
    [
        KEY,
        f"Bearer {KEY}",
        "authorization: Bearer abcdefgh",
        "{'authorization': 'Basic abcdefgh'}",
        "x-api-key=abcdefgh",
        '"X-API-Key": "abcdefgh"',
    ],
)
def test_keys_are_never_written(stream: io.StringIO, form: Format, secret: str) -> None:
    log.configure(form, stream=stream)
    logging.getLogger("uvicorn.error").error("headers: %s", secret)
    try:
        fail(secret)
    except ValueError:
        log.bug(a_call())
    log.event("odd", note=secret)
    assert KEY not in stream.getvalue()
    assert "abcdefgh" not in stream.getvalue()
    assert "[redacted]" in stream.getvalue()


async def test_a_failed_request_names_the_code_and_no_data(
    stream: io.StringIO, http: httpx.AsyncClient, embed_json: dict[str, Any], fake_embedder: Embedder
) -> None:
    log.configure("json", stream=stream)
    embed_json["cells"]["gene_ids"][0] = "PATIENT-17"
    await http.post("/v1/embed", json=embed_json)
    await http.post("/v1/embed", json={**embed_json, "model": "PATIENT-17"})
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    encoder.error = InferenceError("The graph has no memory left.")
    await http.post("/v1/embed", json=embed_json)
    found = lines(stream)
    assert "PATIENT" not in stream.getvalue()
    assert found[1]["code"] == "unknown_model"
    assert "message" not in found[1]
    assert (found[2]["code"], found[2]["message"]) == ("inference_failed", "The graph has no memory left.")


def test_the_message_of_an_overload_is_written_but_not_that_of_bad_input() -> None:
    from serving.engine.status import explain

    call = a_call()
    explain(InvalidParameterError("'PATIENT-17' is no gene."), call)
    assert call.message == ""
    explain(OverloadedError("The queue is full."), call)
    assert call.message == "The queue is full."


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_bug_comes_with_its_traceback_cut_to_what_is_ours(stream: io.StringIO, form: Format) -> None:
    log.configure(form, stream=stream)
    try:
        fail("x" * 10_000)
    except ValueError:
        log.bug(a_call(id="mine"))
    text = stream.getvalue()
    assert "test_a_bug_comes_with_its_traceback" in text
    assert "ValueError: xxx" in text
    assert "mine" in text
    assert len(text) < 3 * log.MAX_MESSAGE
    assert "x" * (log.MAX_LINE + 1) not in text


def test_an_event_has_a_name_and_fields(stream: io.StringIO) -> None:
    log.configure("json", stream=stream)
    log.event("model_loaded", model="default", version="2")
    (line,) = lines(stream)
    assert (line["event"], line["model"], line["version"]) == ("model_loaded", "default", "2")


def test_libraries_are_heard_in_the_same_form(stream: io.StringIO) -> None:
    noisy = logging.getLogger("uvicorn.error")
    noisy.setLevel(logging.INFO)  # whatever a uvicorn in this process, of another test, has set
    noisy.addHandler(logging.NullHandler())
    log.configure("json", stream=stream)
    noisy.error("broken pipe")
    logging.getLogger("bentoml.serve").warning("hello")
    warnings.showwarning("old", UserWarning, "a.py", 1)
    assert [(line["event"], line["logger"]) for line in lines(stream)] == [
        ("log", "uvicorn.error"),
        ("log", "bentoml.serve"),
        ("log", "py.warnings"),
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_auto_is_text_on_a_terminal_and_json_elsewhere(stream: io.StringIO) -> None:
    terminal = _Terminal()
    log.configure("auto", stream=terminal)
    Front.finish(a_call(id="mine"), 200)
    log.configure("auto", stream=stream)
    Front.finish(a_call(id="mine"), 200)
    assert " INFO request=mine" in terminal.getvalue()
    assert lines(stream)[0]["request_id"] == "mine"


@pytest.mark.parametrize("name", ["log_format", "log_level"])
def test_a_setting_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"PERTURBSCOPE_{name.upper()} is 'loud'"):
        Settings.from_env({f"PERTURBSCOPE_{name.upper()}": "loud"})


class _FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_fails_no_request(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", _FullDisk())
    log.configure("json")
    Front.finish(a_call(), 200)
    log.event("started")
