"""Prometheus metrics of requests, queues and batches.

All metrics live in one registry of this process, so they are read without files and cost no disk; BentoML's own
collection, a series for every path that anybody asks for, is off. Labels have few values: a route is the template of a
path, a caller is a name in the key file, and nothing that a request carries becomes a label.

States (queue depth, requests in progress) are read when Prometheus asks, by :mod:`serving.http.metrics_page`; events (a
request, a batch) are counted here.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.process_collector import ProcessCollector

from perturbscope.errors import InferenceError, PerturbScopeError
from serving.queue.observer import Reason
from serving.telemetry import tracing

if TYPE_CHECKING:
    from serving.call import Call

# The time at which each series began would be a series of its own: twice as much to read and keep.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry(auto_describe=False)
"""Registry of all metrics. It is not the default registry, which any import may add to."""
OTHER = "other"
"""Route label of unknown paths, and of routes above the limit."""
MAX_ROUTES = 100
"""Most routes with series of their own: more than the server has."""

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Buckets in seconds: from a millisecond (one cell on an accelerator) to ten minutes (a whole screen on a CPU)."""
COUNTS = tuple(float(2**power) for power in range(11))
"""Buckets of cells in a batch: 1 to 1,024."""
TOKENS = tuple(float(2**power) for power in range(6, 18))
"""Buckets of tokens in a batch: 64 to 131,072."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Buckets of a share of 1."""

_BY_ROUTE, _BY_MODEL = ("route", "transport"), ("model", "version")

REQUESTS = Counter(
    "perturbscope_requests_total",
    "Requests that were answered. The status is HTTP's number or gRPC's name; the code is ok or that of the error.",
    (*_BY_ROUTE, "status", "code"),
    registry=REGISTRY,
)
DURATION = Histogram(
    "perturbscope_request_duration_seconds",
    "Seconds from the arrival of a request to its answer.",
    _BY_ROUTE,
    buckets=SECONDS,
    registry=REGISTRY,
)
STAGE = Histogram(
    "perturbscope_stage_duration_seconds",
    "Seconds of each stage of a request: receive, decode, tokenize, queue, inference, score_queue, score, encode.",
    ("stage",),
    buckets=SECONDS,
    registry=REGISTRY,
)
REQUEST_BYTES = Counter(
    "perturbscope_request_bytes_total", "Bytes of the bodies of requests.", _BY_ROUTE, registry=REGISTRY
)
REQUEST_CELLS = Counter(
    "perturbscope_request_cells_total", "Cells that were asked for, answered or not.", _BY_ROUTE, registry=REGISTRY
)
REQUEST_TOKENS = Counter(
    "perturbscope_request_tokens_total", "Tokens of cells that were tokenized.", _BY_ROUTE, registry=REGISTRY
)
CALLER_REQUESTS = Counter(
    "perturbscope_caller_requests_total",
    "Requests by name of the API key; empty without keys, and if the key is unknown.",
    ("caller",),
    registry=REGISTRY,
)
CALLER_CELLS = Counter(
    "perturbscope_caller_cells_total", "Cells by name of the API key.", ("caller",), registry=REGISTRY
)
RATE_LIMITED = Counter(
    "perturbscope_rate_limited_total", "Requests above the rate of their API key.", ("caller",), registry=REGISTRY
)
UNAUTHENTICATED = Counter(
    "perturbscope_unauthenticated_total",
    "Requests with no key, an unknown one or an expired one, and of addresses that tried too many; on any path.",
    ("transport",),
    registry=REGISTRY,
)
STREAMS = Gauge("perturbscope_streams_open", "Streams of cells in progress.", ("transport",), registry=REGISTRY)

MODEL_CELLS = Counter("perturbscope_model_cells_total", "Cells that the model ran.", _BY_MODEL, registry=REGISTRY)
MODEL_TOKENS = Counter("perturbscope_model_tokens_total", "Tokens that the model ran.", _BY_MODEL, registry=REGISTRY)
MODEL_PADDED = Counter(
    "perturbscope_model_padded_tokens_total",
    "Slots that the model ran, padding included. The padding share is 1 - tokens / slots.",
    _BY_MODEL,
    registry=REGISTRY,
)
QUEUE_WAIT = Histogram(
    "perturbscope_queue_wait_seconds",
    "Seconds from a request's entry into the queue to its first batch.",
    _BY_MODEL,
    buckets=SECONDS,
    registry=REGISTRY,
)
BATCH_CELLS = Histogram("perturbscope_batch_cells", "Cells of one batch.", _BY_MODEL, buckets=COUNTS, registry=REGISTRY)
BATCH_TOKENS = Histogram(
    "perturbscope_batch_padded_tokens",
    "Slots of one batch, padding included.",
    _BY_MODEL,
    buckets=TOKENS,
    registry=REGISTRY,
)
BATCH_PADDING = Histogram(
    "perturbscope_batch_padding_ratio", "Padding share of one batch.", _BY_MODEL, buckets=SHARES, registry=REGISTRY
)
BATCH_SECONDS = Histogram(
    "perturbscope_batch_duration_seconds",
    "Seconds of the forward pass of one batch.",
    _BY_MODEL,
    buckets=SECONDS,
    registry=REGISTRY,
)
BATCH_FAILURES = Counter(
    "perturbscope_batch_failures_total", "Forward passes that failed.", (*_BY_MODEL, "code"), registry=REGISTRY
)
DROPPED_REQUESTS = Counter(
    "perturbscope_dropped_requests_total",
    "Requests that the queue refused (overloaded) or gave up (cancelled, deadline).",
    (*_BY_MODEL, "reason"),
    registry=REGISTRY,
)
DROPPED_CELLS = Counter(
    "perturbscope_dropped_cells_total",
    "Cells of those requests that had not been run.",
    (*_BY_MODEL, "reason"),
    registry=REGISTRY,
)
ProcessCollector(registry=REGISTRY)
for _transport in ("http", "grpc"):
    for _metric in (UNAUTHENTICATED, STREAMS):
        _metric.labels(_transport)

_PER_MODEL = (
    *(MODEL_CELLS, MODEL_TOKENS, MODEL_PADDED, QUEUE_WAIT, BATCH_CELLS, BATCH_TOKENS, BATCH_PADDING, BATCH_SECONDS),
    *(BATCH_FAILURES, DROPPED_REQUESTS, DROPPED_CELLS),
)
_watched: collections.Counter[tuple[str, str]] = collections.Counter()
"""Number of open dispatchers, by name and version of the model."""
_routes: set[str] = set()
_lock = threading.Lock()


def route_label(route: str) -> str:
    """Return the label of a route, a template and not a path; routes above the limit are all ``other``."""
    if route not in _routes:
        with _lock:
            if len(_routes) >= MAX_ROUTES:
                return OTHER
            _routes.add(route)
    return route


def finished(call: Call, status: str | int, code: str) -> None:
    """Count an answered request; `code` is that of its error, or ok."""
    labels = (route_label(call.route), call.transport)
    REQUESTS.labels(*labels, str(status), code).inc()
    DURATION.labels(*labels).observe(time.perf_counter() - call.started)
    for counter, amount in ((REQUEST_BYTES, call.n_bytes), (REQUEST_CELLS, call.cells), (REQUEST_TOKENS, call.tokens)):
        if amount:
            counter.labels(*labels).inc(amount)
    for stage, seconds in call.timings.items():
        STAGE.labels(stage).observe(seconds)
    CALLER_REQUESTS.labels(call.caller.name).inc()
    if call.cells:
        CALLER_CELLS.labels(call.caller.name).inc(call.cells)
    if code == "rate_limited" and call.caller.name:
        RATE_LIMITED.labels(call.caller.name).inc()
    elif code in ("unauthenticated", "rate_limited"):  # who has no name is limited for trying keys
        UNAUTHENTICATED.labels(call.transport).inc()


class ModelMetrics:
    """Counts what the dispatcher of one model does; see :class:`serving.queue.DispatchObserver`.

    Parameters
    ----------
    name, version
        Name and version of the model.
    """

    def __init__(self, name: str, version: str) -> None:
        self._labels = (name, version)
        # A series that begins with its first failure has no increase that an alert could see.
        BATCH_FAILURES.labels(name, version, InferenceError.code)
        for reason in get_args(Reason):
            for dropped in (DROPPED_REQUESTS, DROPPED_CELLS):
                dropped.labels(name, version, reason)
        self._closed = False
        with _lock:
            _watched[self._labels] += 1
        self._cells, self._tokens, self._padded = (
            counter.labels(name, version) for counter in (MODEL_CELLS, MODEL_TOKENS, MODEL_PADDED)
        )
        self._wait, self._batch_cells, self._batch_tokens, self._batch_padding, self._batch_seconds = (
            histogram.labels(name, version)
            for histogram in (QUEUE_WAIT, BATCH_CELLS, BATCH_TOKENS, BATCH_PADDING, BATCH_SECONDS)
        )

    def batch(
        self,
        *,
        n_cells: int,
        n_tokens: int,
        n_padded: int,
        seconds: float,
        waited: Sequence[float],
        tags: Sequence[object],
    ) -> None:
        """Count a forward pass that succeeded; `tags` are the turns of traced requests whose cells it held."""
        self._cells.inc(n_cells)
        self._tokens.inc(n_tokens)
        self._padded.inc(n_padded)
        self._batch_cells.observe(n_cells)
        self._batch_tokens.observe(n_padded)
        self._batch_padding.observe(1 - n_tokens / n_padded if n_padded else 0.0)
        self._batch_seconds.observe(seconds)
        for wait in waited:
            self._wait.observe(wait)
        if tags:
            tracing.batch(
                tags, model=self._labels, n_cells=n_cells, n_tokens=n_tokens, n_padded=n_padded, seconds=seconds
            )

    def failed(self, error: PerturbScopeError) -> None:
        """Count a forward pass that failed."""
        BATCH_FAILURES.labels(*self._labels, error.code).inc()

    def dropped(self, *, n_cells: int, reason: Reason) -> None:
        """Count cells that will not be run."""
        DROPPED_REQUESTS.labels(*self._labels, reason).inc()
        DROPPED_CELLS.labels(*self._labels, reason).inc(n_cells)

    def close(self) -> None:
        """Remove the series of a model that is freed, unless another of its name and version is served.

        A service that runs for long serves many versions. May be called twice.
        """
        with _lock:
            if self._closed:
                return
            self._closed = True
            _watched[self._labels] -= 1
            if _watched[self._labels] > 0:
                return
            del _watched[self._labels]
            for metric in _PER_MODEL:
                metric.remove_by_labels(dict(zip(_BY_MODEL, self._labels, strict=True)))
