"""One trace a request, over both transports, down to the batches that requests share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from perturbscope import __version__, protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InferenceError, InvalidParameterError
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest
from serving.access.front import Front
from serving.call import Call
from serving.engine.engine import Engine
from serving.models.registry import ModelRegistry
from serving.settings import Settings
from serving.telemetry import tracing
from serving.telemetry.metrics import ModelMetrics
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import FAST, LABELS, served

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
EMBED = "perturbscope.v1.PerturbScope/Embed"


class Spans:
    """The exported spans."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def __call__(self) -> list[ReadableSpan]:
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield Spans(exporter)
    tracing.use(None)


@pytest.fixture
async def engine(fake_embedder: Embedder) -> AsyncIterator[Engine]:
    """An engine whose batches are traced."""
    settings = Settings()
    model = served(fake_embedder, "traced", observer=ModelMetrics("traced", "1.0"))  # type: ignore[arg-type]
    engine = Engine(ModelRegistry(settings, [model]), settings)
    yield engine
    await engine.close()


def context(span: ReadableSpan) -> tuple[str, str]:
    found = span.get_span_context()
    assert found is not None
    return trace.format_trace_id(found.trace_id), trace.format_span_id(found.span_id)


def parent(span: ReadableSpan) -> str | None:
    return None if span.parent is None else trace.format_span_id(span.parent.span_id)


def check_tree(spans: Spans, root: ReadableSpan, stages: set[str]) -> None:
    """Check that there is one trace, with stages below the request and batches below their inference, in time."""
    everything = {context(span)[1]: span for span in spans()}
    assert {context(span)[0] for span in everything.values()} == {context(root)[0]}
    names = {span.name for span in everything.values()}
    assert names == {root.name, "batch", *stages}
    for span in everything.values():
        if span is root:
            continue
        above = everything[str(parent(span))]
        assert above.name == ("inference" if span.name == "batch" else root.name), span.name
        assert (above.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0) <= (above.end_time or 0)


async def test_http_is_one_trace_below_the_callers_span(
    http: httpx.AsyncClient, embed_json: dict[str, Any], spans: Spans
) -> None:
    reply = await http.post("/v1/embed", json=embed_json, headers={"traceparent": TRACEPARENT})
    root = spans.one("POST /v1/embed")
    assert context(root)[0] == TRACE
    assert parent(root) == PARENT
    assert root.kind is SpanKind.SERVER
    assert root.status.status_code is StatusCode.UNSET
    attributes = dict(root.attributes or {})
    assert attributes["http.request.method"] == "POST"
    assert attributes["http.route"] == "/v1/embed"
    assert attributes["url.scheme"] == "http"
    assert attributes["http.response.status_code"] == 200
    assert attributes["perturbscope.request_id"] == reply.headers["x-request-id"]
    assert attributes["perturbscope.cells"] == 24
    check_tree(spans, root, {"receive", "decode", "tokenize", "queue", "inference", "encode"})


async def test_grpc_is_one_trace_below_the_callers_span(
    engine: Engine, stub_of: Any, tiny_cells: CountMatrix, spans: Spans
) -> None:
    message = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    call = (await stub_of(engine)).Embed(message, metadata=(("traceparent", TRACEPARENT),))
    await call
    root = spans.one(EMBED)
    assert context(root)[0] == TRACE
    assert parent(root) == PARENT
    assert root.kind is SpanKind.SERVER
    attributes = dict(root.attributes or {})
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.method"] == EMBED
    assert attributes["rpc.response.status_code"] == "OK"
    assert attributes["perturbscope.request_id"] == dict(await call.trailing_metadata())["x-request-id"]
    check_tree(spans, root, {"receive", "decode", "tokenize", "queue", "inference", "encode"})


async def test_a_score_shows_where_its_time_went(
    http: httpx.AsyncClient, embed_json: dict[str, Any], spans: Spans
) -> None:
    body = {**embed_json, "perturbations": list(LABELS), "control": "control", "options": FAST}
    assert (await http.post("/v1/score", json=body)).status_code == 200
    stages = {"receive", "decode", "tokenize", "queue", "inference", "score_queue", "score", "encode"}
    check_tree(spans, spans.one("POST /v1/score"), stages)


async def test_requests_that_share_a_batch_are_linked(
    http: httpx.AsyncClient, engine: Engine, fake_embedder: Embedder, embed_json: dict[str, Any], spans: Spans
) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    encoder.gate = threading.Event()
    first = asyncio.ensure_future(http.post("/v1/embed", json=embed_json))
    while not encoder.batches:
        await asyncio.sleep(0.001)
    others = [asyncio.ensure_future(http.post("/v1/embed", json=embed_json)) for _ in range(2)]
    (model,) = engine.registry.models()
    while model.dispatcher.pending_callers < 3:
        await asyncio.sleep(0.001)
    encoder.gate.set()
    await asyncio.gather(first, *others)
    shared = [span for span in spans.named("batch") if span.links]
    assert shared
    inference = {context(span)[1]: span for span in spans.named("inference")}
    for span in shared:
        (link,) = span.links
        other = next(s for s in spans.named("POST /v1/embed") if s.get_span_context() == link.context)
        assert context(other)[0] != context(span)[0]
        (linked,) = [s for s in inference.values() if parent(s) == context(other)[1]]
        assert span.get_span_context() in [link.context for link in linked.links]
        assert dict(span.attributes or {})["perturbscope.traced_requests"] == 2


async def test_a_failure_of_ours_is_an_error_and_names_its_code(
    http: httpx.AsyncClient, fake_embedder: Embedder, embed_json: dict[str, Any], spans: Spans
) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    encoder.error = InferenceError("no")
    assert (await http.post("/v1/embed", json=embed_json)).status_code == 500
    root = spans.one("POST /v1/embed")
    assert root.status.status_code is StatusCode.ERROR
    assert root.status.description == "inference_failed"
    assert dict(root.attributes or {})["error.type"] == "inference_failed"
    assert spans.one("queue").status.status_code is StatusCode.ERROR
    assert spans.one("decode").status.status_code is StatusCode.UNSET


async def test_bad_input_is_named_and_no_error_of_the_server(http: httpx.AsyncClient, spans: Spans) -> None:
    await http.post("/v1/embed", json={})
    root = spans.one("POST /v1/embed")
    assert root.status.status_code is StatusCode.UNSET
    assert dict(root.attributes or {})["perturbscope.code"] == "invalid_parameter"
    assert "error.type" not in dict(root.attributes or {})


@pytest.mark.parametrize("sent", ["", "00-zz", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000, "\x00"])
def test_a_bad_traceparent_begins_a_new_trace(spans: Spans, sent: str) -> None:
    call = Front.begin("/v1/embed", "http", {"traceparent": sent})
    Front.finish(call, 200)
    assert spans.one("POST /v1/embed").parent is None
    assert len(call.trace_id) == 32


def test_a_new_trace_is_not_put_below_a_span_of_the_process(spans: Spans) -> None:
    with trace.use_span(trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False))):
        Front.finish(Front.begin("/v1/embed", "http", {}), 200)
    assert spans.one("POST /v1/embed").parent is None


def test_what_the_caller_does_not_sample_is_not_traced(spans: Spans) -> None:
    call = Front.begin("/v1/embed", "http", {"traceparent": TRACEPARENT[:-2] + "00"})
    assert call.trace is None
    assert call.trace_id == TRACE
    Front.finish(call, 200)
    assert spans() == []


def test_without_an_endpoint_there_are_no_spans_but_the_log_has_the_callers_trace() -> None:
    assert not tracing.configure({})
    call = Front.begin("/v1/embed", "http", {"traceparent": TRACEPARENT})
    assert call.trace is None
    assert call.trace_id == TRACE
    assert Front.begin("/v1/embed", "http", {"traceparent": "nonsense"}).trace_id == ""


def test_a_request_of_thousands_of_batches_has_a_bounded_number_of_spans(spans: Spans) -> None:
    call = Front.begin("/v1/embed", "http", {})
    assert call.trace is not None
    turn = call.trace.turn()
    with call.stage("queue", turn):
        for _ in range(1000):
            tracing.batch([turn], model=("m", "1"), n_cells=1, n_tokens=1, n_padded=1, seconds=0.0)
    with call.stage("encode"):
        pass
    Front.finish(call, 200)
    assert len(spans()) <= tracing.MAX_SPANS + 1
    assert dict(spans.one("POST /v1/embed").attributes or {})["perturbscope.batches"] == 1000


def test_turns_of_one_stream_overlap_and_keep_their_own_spans(spans: Spans) -> None:
    call = Front.begin(EMBED, "grpc", {})
    assert call.trace is not None
    turns = [call.trace.turn(), call.trace.turn()]
    with call.stage("queue", turns[0]), call.stage("queue", turns[1]):
        tracing.batch(turns, model=("m", "1"), n_cells=2, n_tokens=2, n_padded=2, seconds=0.0)
    Front.finish(call, "OK")
    assert len(spans.named("inference")) == len(spans.named("queue")) == 2


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
    ],
)
def test_the_standard_variables_decide(environ: dict[str, str], expected: bool) -> None:
    assert tracing.wanted(environ) is expected


def test_another_protocol_is_refused() -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with pytest.raises(InvalidParameterError, match="over grpc only"):
        tracing.wanted(environ)


async def test_a_call_that_is_cancelled_ends_its_span(
    engine: Engine, fake_embedder: Embedder, stub_of: Any, tiny_cells: CountMatrix, spans: Spans
) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    encoder.gate = threading.Event()
    call = (await stub_of(engine)).Embed(protocol.request_to_proto(EmbedRequest(cells=tiny_cells)))
    while not encoder.batches:
        await asyncio.sleep(0.001)
    call.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await call
    while not spans.named(EMBED):  # it ends although its batch still runs
        await asyncio.sleep(0.001)
    encoder.gate.set()
    attributes = dict(spans.one(EMBED).attributes or {})
    assert attributes["perturbscope.code"] == "client_gone"
    assert attributes["rpc.response.status_code"] == "CANCELLED"


def test_a_collector_that_does_not_answer_holds_up_neither_requests_nor_the_end() -> None:
    class Stuck(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            stuck.set()
            release.wait(30)
            return SpanExportResult.SUCCESS

    stuck, release = threading.Event(), threading.Event()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Stuck(), schedule_delay_millis=1))
    tracing.use(provider)
    try:
        Front.finish(Front.begin("/v1/embed", "http", {}), 200)
        assert stuck.wait(30)
        Front.finish(Front.begin("/v1/embed", "http", {}), 200)
        tracing.close(0.01)
        assert Front.begin("/v1/embed", "http", {}).trace is None
    finally:
        tracing.use(None)
        release.set()
        provider.shutdown()


def test_the_resource_says_what_this_is_and_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=night")
    assert tracing.configure({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, scheme="https")
    try:
        provider = tracing.State.provider
        assert provider is not None
        found = provider.resource.attributes
        assert (found["service.name"], found["service.version"]) == ("mine", __version__)
        assert found["deployment.environment.name"] == "night"
        with_tls = tracing._attributes(Call("/v1/embed", "http"))
        assert with_tls["url.scheme"] == "https"
    finally:
        tracing.State.scheme = "http"
        tracing.close()
