"""The cost of counting, tracing and logging a request: ``python benchmarks/telemetry.py``; no service, no model."""

from __future__ import annotations

import io
import platform
import timeit
from collections.abc import Callable

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

from serving.access.front import Front
from serving.call import Call, Caller
from serving.telemetry import log, metrics, tracing

STAGES = ("receive", "decode", "tokenize", "queue", "inference", "encode")


def begin() -> Call:
    """Begin a request as the HTTP server does."""
    call = Front.begin("/v1/embed", "http", {"x-request-id": "benchmark"})
    call.caller, call.cells, call.tokens, call.n_bytes = Caller("pipeline"), 10, 100, 1000
    call.timings = dict.fromkeys(STAGES, 0.01)
    return call


def microseconds(work: Callable[[], object], times: int) -> float:
    """Time one call: the best of seven rounds, since a disturbance can only make a round longer."""
    return min(timeit.repeat(work, number=times, repeat=7)) / times * 1e6


def traced() -> None:
    """Trace a request with a span for each stage and one batch."""
    call = begin()
    assert call.trace is not None
    turn = call.trace.turn()
    for stage in STAGES[:3]:
        with call.stage(stage):
            pass
    with call.stage("queue", turn) as waiting:
        tracing.batch([turn], model=("m", "1"), n_cells=1, n_tokens=1, n_padded=1, seconds=0.0)
        waiting.ended_with("inference", 0.0)
    with call.stage("encode"):
        pass
    tracing.finished(call, 200, "ok")


def main() -> None:
    """Print the table."""
    log.configure("json", stream=io.StringIO())
    tracing.use(None)
    call, model = begin(), metrics.ModelMetrics("m", "1")

    def stages() -> None:
        for stage in STAGES:
            with call.stage(stage):
                pass

    rows = {
        "a request is counted": (lambda: metrics.finished(call, 200, "ok"), 5000),
        "a batch is counted": (
            lambda: model.batch(n_cells=8, n_tokens=90, n_padded=100, seconds=0.1, waited=[0.1], tags=[]),
            5000,
        ),
        "a request is begun and its stages timed, traces off": (lambda: (begin(), stages()), 2000),
        "a line of the log": (lambda: log.write(call, 200), 5000),
    }
    found = {name: microseconds(work, times) for name, (work, times) in rows.items()}
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    tracing.use(provider)
    found["a traced request, eight spans"] = microseconds(traced, 300)
    tracing.use(None)
    found["the page of metrics, without gauges"] = microseconds(lambda: generate_latest(metrics.REGISTRY), 20)
    print(f"Python {platform.python_version()}, microseconds\n")
    for name, value in found.items():
        print(f"| {name} | {value:,.1f} |")


if __name__ == "__main__":
    main()
