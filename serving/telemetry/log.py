"""The log, on stderr: one line a request, as JSON for machines or as text for a terminal. Never the data.

The line of a request has its route, size, caller (the name of the key), outcome and the seconds of each stage. Lines of
BentoML, uvicorn, gRPC and other libraries have the same form. No line can be forged from outside: JSON escapes what is
not printable, and in text every line after the first of a message is indented.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from serving.settings import Format, Level
from serving.telemetry.brake import Brake, LibraryFilter

if TYPE_CHECKING:
    from serving.call import Call

logger = logging.getLogger("perturbscope.serving")

SERVER_FAULTS = frozenset({"UNKNOWN", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""gRPC codes that are logged at the level error, like HTTP statuses from 500 on."""
WARNINGS = frozenset({"overloaded", "rate_limited", "deadline_exceeded", "unauthenticated", "permission_denied"})
"""Error codes that are logged at the level warning."""
MAX_MESSAGE = 4_000
"""Most characters of one message; a traceback may be long, and its last lines matter most."""
MAX_LINE = 200
"""Most characters of one line of a traceback."""

_SECRET = re.compile(
    r"(?:authorization|x-api-key)\W{1,4}[^\r\n,;'\"}\]]+|\b(?:bearer|basic)\s+[^\s,;'\"]+|psk_[\w-]+", re.IGNORECASE
)
_LIBRARIES = ("bentoml", "bentoml.serve", "bentoml.access", "uvicorn", "uvicorn.error", "uvicorn.access", "circus")
"""Loggers of libraries that bring handlers of their own."""


def configure(form: Format = "auto", level: Level = "info", *, stream: TextIO | None = None) -> None:
    """Send all log lines of this process to stderr, in one form; called at start, not at import.

    Parameters
    ----------
    form
        ``auto``: text on a terminal, JSON elsewhere.
    level
        Least level of the server's own lines; libraries are heard from warning on, BentoML from info.
    stream
        Stream to write to; default: stderr.
    """
    stream = sys.stderr if stream is None else stream
    text = form == "text" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    handler.addFilter(LibraryFilter(Brake()))
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("perturbscope").setLevel(level.upper())
    logging.captureWarnings(True)


def write(call: Call, status: str | int, code: str = "ok") -> None:
    """Log a finished request; `code` is that of its error, if there was one."""
    fault = status in SERVER_FAULTS if isinstance(status, str) else status >= 500
    level = logging.WARNING if code in WARNINGS else logging.ERROR if fault else logging.INFO
    if not logger.isEnabledFor(level):
        return
    seconds = time.perf_counter() - call.started
    fields = {
        "request_id": call.id,
        "trace_id": call.trace_id or None,
        "route": call.route,
        "transport": call.transport,
        "caller": call.caller.name or None,
        "model": call.model_id or None,
        "cells": call.cells,
        "tokens": call.tokens,
        "bytes": call.n_bytes,
        "status": status,
        "code": code,
        "message": call.message or None,
        "not_logged": call.not_logged or None,
        "seconds": round(seconds, 6),
        "stages": {stage: round(spent, 6) for stage, spent in call.timings.items()},
    }
    logger.log(level, "%s", _Request(fields), extra={"event": "request", "fields": fields})


def event(name: str, /, level: Level = "info", **fields: object) -> None:
    """Log an event of the server, such as ``started`` or ``model_loaded``; its fields must hold no data of a caller."""
    text = " ".join((name, *(f"{key}={value}" for key, value in fields.items() if value is not None)))
    logger.log(getattr(logging, level.upper()), "%s", text, extra={"event": name, "fields": fields})


def bug(call: Call) -> None:
    """Log the traceback of an unexpected exception; called in an except block."""
    logger.exception(
        "request=%s route=%s failed unexpectedly",
        call.id,
        call.route,
        extra={"event": "bug", "fields": {"request_id": call.id, "trace_id": call.trace_id or None}},
    )


class _Request:
    """The fields of a request as text, which is made only if a handler reads it."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __str__(self) -> str:
        fields = self._fields
        parts = [f"request={fields['request_id']}"]
        parts += [f"{name}={fields[name] or '-'}" for name in ("route", "caller")]
        parts += [f"{name}={fields[name]}" for name in ("cells", "status", "code")]
        parts += [f"{name}={fields[name]}" for name in ("tokens", "bytes")]
        parts += [f"{name}={fields[name]}" for name in ("model", "trace_id") if fields[name]]
        parts += [f"total={fields['seconds']:.4f}", *(f"{k}={v:.4f}" for k, v in fields["stages"].items())]
        parts += [f"not_logged={fields['not_logged']}"] if fields["not_logged"] else []
        return " ".join((*parts, *([f"message={fields['message']!r}"] if fields["message"] else [])))


class JsonFormatter(logging.Formatter):
    """Formats each record as one JSON object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON, its time as RFC 3339 in UTC."""
        fields = getattr(record, "fields", None)
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
        }
        if fields is None:
            line["logger"] = record.name
        if fields is None or record.exc_info:
            line["message"] = _clean(record.getMessage())
        for name, value in (fields or {}).items():
            if value is not None:
                line[name] = _clean(value) if isinstance(value, str) else value
        if record.exc_info:
            line["traceback"] = _traceback(record)
        return json.dumps(line, ensure_ascii=True, default=str)


class TextFormatter(logging.Formatter):
    """Formats each record as one line of text; further lines, such as those of a traceback, are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text, with its time in UTC."""
        text = _clean(record.getMessage())
        if record.exc_info:
            text = f"{text}\n{_traceback(record)}"
        name = "" if record.name == logger.name else f" {record.name}:"
        return f"{_time(record)} {record.levelname}{name} " + "\n    ".join(map(_printable, text.split("\n")))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _traceback(record: logging.LogRecord) -> str:
    text = "".join(traceback.format_exception(*(record.exc_info or ()))).rstrip("\n")
    # A line of a traceback that is longer is the message of an exception, which may quote what a caller sent.
    return _clean("\n".join(line[:MAX_LINE] for line in text.split("\n")), keep_end=True)


def _clean(text: str, *, keep_end: bool = False) -> str:
    """Return the text without keys, cut to the longest message."""
    text = _SECRET.sub("[redacted]", text)
    if len(text) <= MAX_MESSAGE:
        return text
    return f"[...]{text[-MAX_MESSAGE:]}" if keep_end else f"{text[:MAX_MESSAGE]}[...]"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
