"""OpenTelemetry traces: a span for each request, and below it one for each stage and for each batch that it shared.

Nothing is set up, and a request costs one look into its headers, unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or
``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``) is set. The other variables of OpenTelemetry hold too: ``OTEL_SERVICE_NAME``,
``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_SDK_DISABLED`` ...

A batch belongs to all requests that had cells in it, and a span has one parent. So the span of a batch stands below the
first of them and links to the others, and the inference span of each of those links to the batch.

BentoML has a middleware for traces of HTTP alone, which exports nothing unless told to; the service excludes every path
from it, and the caller's context is read from the headers here, so that no span is made twice.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from perturbscope import __version__
from perturbscope.errors import InvalidParameterError
from serving.call import Part

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from serving.call import Call

SERVICE = "perturbscope"
"""Default of ``OTEL_SERVICE_NAME``."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
MAX_SPANS = 128
"""Most spans below one request: a stream or a whole screen has thousands of batches. The rest are only counted."""
SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""gRPC codes that are the server's fault, by OpenTelemetry's semantic conventions."""

_PROPAGATOR = TraceContextTextMapPropagator()
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)


class State:
    """Provider, tracer and scheme of this process; one, as there is one environment."""

    provider: TracerProvider | None = None
    tracer: Tracer | None = None
    scheme = "http"


def wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether the environment says where to export traces to.

    Raises
    ------
    InvalidParameterError
        The environment asks for a protocol other than gRPC.
    """
    environ = os.environ if environ is None else environ
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if disabled or not any(environ.get(name) for name in ENDPOINTS):
        return False
    for name in PROTOCOLS:
        if environ.get(name, "grpc") not in ("", "grpc"):
            raise InvalidParameterError(
                f"{name} is {environ[name]!r}; this server exports traces over grpc only. Unset it, and give the "
                "collector's gRPC port, usually 4317.",
                field=name,
            )
    return True


def configure(environ: Mapping[str, str] | None = None, *, scheme: str = "http") -> bool:
    """Export traces if that is wanted; see :func:`wanted`, also for errors.

    Parameters
    ----------
    environ
        Environment variables; default: those of this process.
    scheme
        URL scheme of the HTTP server.

    Returns
    -------
    bool
        Whether traces are exported.
    """
    if not wanted(environ):
        return False
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource.create({"service.name": SERVICE, "service.version": __version__})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    State.scheme = scheme
    use(provider)
    return True


def use(provider: TracerProvider | None) -> None:
    """Make spans with `provider`, which does not become the global one; None: make none."""
    State.provider = provider
    State.tracer = None if provider is None else provider.get_tracer(SERVICE, __version__)


def close(seconds: float = 5.0) -> None:
    """Export the remaining spans, for at most `seconds`, and stop. Blocks."""
    provider, State.provider, State.tracer = State.provider, None, None
    if provider is None:
        return
    # A collector that does not answer must not hold up the end of the process; a daemon thread does not.
    thread = threading.Thread(target=provider.shutdown, name="perturbscope-tracing-close", daemon=True)
    thread.start()
    thread.join(seconds)


def begin(call: Call) -> None:
    """Open the span of a request, below the span that its headers name."""
    sent = call.headers.get("traceparent", "")
    if State.tracer is None:
        found = _TRACEPARENT.fullmatch(sent)
        call.trace_id = found[1] if found else ""
        return
    parent = _PROPAGATOR.extract(call.headers) if sent else trace.set_span_in_context(trace.INVALID_SPAN)
    span = State.tracer.start_span(_name(call), parent, SpanKind.SERVER, _attributes(call))
    call.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
    call.trace = Trace(State.tracer, span) if span.is_recording() else None


def finished(call: Call, status: str | int, code: str) -> None:
    """Close the span of a request."""
    if not isinstance(call.trace, Trace):
        return
    span = call.trace.span
    span.set_attributes(
        {
            "perturbscope.caller": call.caller.name,
            "perturbscope.model_id": call.model_id,
            "perturbscope.cells": call.cells,
            "perturbscope.tokens": call.tokens,
            "perturbscope.bytes": call.n_bytes,
            "perturbscope.batches": call.trace.batches,
            "http.response.status_code" if call.transport == "http" else "rpc.response.status_code": status,
        }
    )
    if code != "ok":
        span.set_attribute("perturbscope.code", code)
        if status in SERVER_ERRORS if isinstance(status, str) else status >= 500:
            span.set_attribute("error.type", code)
            span.set_status(StatusCode.ERROR, code)
    span.end()


def batch(
    tags: Iterable[object], *, model: tuple[str, str], n_cells: int, n_tokens: int, n_padded: int, seconds: float
) -> None:
    """Make the span of a batch that has just ended; `tags` are the turns of the requests that shared it."""
    turns = [tag for tag in tags if isinstance(tag, Turn)]
    if turns:
        attributes: dict[str, AttributeValue] = {
            "perturbscope.model": f"{model[0]}@{model[1]}",
            "perturbscope.cells": n_cells,
            "perturbscope.tokens": n_tokens,
            "perturbscope.padded_tokens": n_padded,
            "perturbscope.traced_requests": len(turns),
        }
        turns[0].batch(turns[1:], attributes, seconds)


class _Moment(NamedTuple):
    """One instant on two clocks: the monotonic one that times stages, and Unix time, which all spans share."""

    steady: float
    unix: int

    @classmethod
    def now(cls) -> _Moment:
        return cls(time.perf_counter(), time.time_ns())

    def at(self, steady: float) -> int:
        """Convert a reading of ``time.perf_counter`` to Unix nanoseconds."""
        return self.unix + round((steady - self.steady) * 1e9)


class Trace:
    """The spans of one request that is traced.

    Parameters
    ----------
    tracer
        Makes the spans.
    span
        Span of the request.

    Attributes
    ----------
    batches
        Number of batches with cells of the request.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self.span = span
        self.batches = 0
        self._tracer = tracer
        self._below = trace.set_span_in_context(span)
        self._start = _Moment.now()
        self._left = MAX_SPANS

    def turn(self) -> Turn:
        """Return the trace of cells that go to the model together; a stream has many, some at the same time."""
        return Turn(self)

    def parts(self, parts: Sequence[Part], *, failed: bool) -> None:
        """Make spans of parts that followed each other, the last of which `failed` or not."""
        for number, part in enumerate(parts, 1):
            span = self.open(part.name, part.started)
            if span is not None:
                self.end(span, part.ended, failed=failed and number == len(parts))

    def open(self, name: str, started: float, **options: Any) -> Span | None:
        """Open a span below that of the request, or below `parent` among the options; None if there are enough."""
        if self._left <= 0:
            return None
        self._left -= 1
        below = trace.set_span_in_context(parent) if (parent := options.pop("parent", None)) else self._below
        return self._tracer.start_span(name, below, start_time=self._start.at(started), **options)

    def end(self, span: Span, ended: float, *, failed: bool = False) -> None:
        """End a span of :meth:`open`."""
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(self._start.at(ended))


class Turn:
    """The way of some cells of a request through queue and model; the dispatcher carries it as a tag.

    Parameters
    ----------
    trace
        Trace of the request.
    """

    __slots__ = ("_inference", "_started", "trace")

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._inference: Span | None = None
        self._started = 0.0

    def batch(self, others: Sequence[Turn], attributes: Mapping[str, AttributeValue], seconds: float) -> None:
        """Note a batch that ends now and took `seconds`, shared with `others`."""
        now = time.perf_counter()
        links = [Link(other.trace.span.get_span_context()) for other in others]
        parent = self._computing(now - seconds)
        made = parent and self.trace.open("batch", now - seconds, parent=parent, attributes=attributes, links=links)
        if made is not None:
            self.trace.end(made, now)
        for other in others:
            span = other._computing(now - seconds)
            if span is not None and made is not None:
                span.add_link(made.get_span_context())

    def parts(self, parts: Sequence[Part], *, failed: bool) -> None:
        """End the turn. Its queue span ends where the first batch began, although waiting and batches alternate."""
        if self._inference is None:
            self.trace.parts(parts, failed=failed)
            return
        started, ended = parts[0].started, parts[-1].ended
        self.trace.parts([Part(parts[0].name, started, max(self._started, started))], failed=False)
        self.trace.end(self._inference, ended, failed=failed)

    def _computing(self, started: float) -> Span | None:
        """Return the inference span, which the first batch opens, and count the batch."""
        self.trace.batches += 1
        if self._inference is None:
            self._started = started
            self._inference = self.trace.open("inference", started)
        return self._inference


def _name(call: Call) -> str:
    return f"{call.method} {call.route}" if call.transport == "http" else call.route


def _attributes(call: Call) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {"perturbscope.request_id": call.id}
    if call.transport == "http":
        return {**found, "http.request.method": call.method, "http.route": call.route, "url.scheme": State.scheme}
    return {**found, "rpc.system.name": "grpc", "rpc.method": call.route}
