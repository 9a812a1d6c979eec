"""Every request carries the trace of its caller, if there is one."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from perturbscope.cells.counts import CountMatrix
from perturbscope.client import ChunkLimits, Client
from perturbscope.client.trace import trace_headers
from perturbscope.client.transports import http_call
from perturbscope.errors import InvalidInputError
from perturbscope.protocol import ModelsRequest

SPAN = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1))
PARENT = f"00-{0xABC:032x}-{0xDEF:016x}-01"


def test_the_current_span_becomes_a_header() -> None:
    with trace.use_span(NonRecordingSpan(SPAN)):
        assert trace_headers() == {"traceparent": PARENT}
        assert http_call(ModelsRequest(), "json").headers["traceparent"] == PARENT


def test_the_state_of_other_vendors_is_handed_on() -> None:
    span = SpanContext(0xABC, 0xDEF, is_remote=False, trace_state=TraceState([("vendor", "x")]))
    with trace.use_span(NonRecordingSpan(span)):
        assert trace_headers() == {"traceparent": PARENT[:-1] + "0", "tracestate": "vendor=x"}


def test_without_a_span_there_is_no_header() -> None:
    assert trace_headers() == {}
    assert "traceparent" not in http_call(ModelsRequest(), "json").headers


def test_without_opentelemetry_there_is_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    with trace.use_span(NonRecordingSpan(SPAN)):
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
        assert trace_headers() == {}


def test_a_client_does_not_load_opentelemetry() -> None:
    code = (
        "import sys; from perturbscope.client import Client; from perturbscope.client.trace import trace_headers; "
        "Client('http://localhost'); trace_headers(); sys.exit('opentelemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_requests_of_several_threads_are_in_the_callers_span(tiny_cells: CountMatrix) -> None:
    seen: list[str | None] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("traceparent"))
        return httpx.Response(422, json={"error": {"code": "invalid_input", "message": "no"}})

    client = Client("http://test", transport=httpx.MockTransport(refuse), chunks=ChunkLimits(cells=4))
    with client, trace.use_span(NonRecordingSpan(SPAN)), pytest.raises(InvalidInputError):
        client.embed_cells(tiny_cells)
    assert seen
    assert set(seen) == {PARENT}
