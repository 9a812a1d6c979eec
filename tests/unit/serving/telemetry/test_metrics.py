"""The counters, and the page of metrics."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InferenceError
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest
from serving.access.front import Front
from serving.call import Call, Caller
from serving.engine.engine import Engine
from serving.http.metrics_page import memory, provider_of
from serving.models.registry import ModelRegistry
from serving.settings import Settings
from serving.telemetry import metrics
from serving.telemetry.metrics import OTHER, REGISTRY, ModelMetrics
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import FAST, LABELS, served

HTTP = {"route": "/v1/embed", "transport": "http"}
GRPC = {"route": "perturbscope.v1.PerturbScope/Embed", "transport": "grpc"}
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
MODEL = {"model": "watched", "version": "1.0"}


class Since:
    """Differences of the counters since this was made: all tests share one registry."""

    def __init__(self) -> None:
        self._before = self._all()

    @staticmethod
    def _all() -> dict[Any, float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return self._all().get(key, 0.0) - self._before.get(key, 0.0)


@pytest.fixture
def since() -> Since:
    return Since()


@pytest.fixture
async def engine(fake_embedder: Embedder) -> AsyncIterator[Engine]:
    """An engine whose queue is watched."""
    settings = Settings()
    model = served(fake_embedder, "watched", observer=ModelMetrics("watched", "1.0"), max_queued_tokens=5_000)  # type: ignore[arg-type]
    engine = Engine(ModelRegistry(settings, [model]), settings)
    yield engine
    await engine.close()


async def test_a_request_is_counted_over_http(
    http: httpx.AsyncClient, embed_json: dict[str, Any], since: Since
) -> None:
    reply = await http.post("/v1/embed", json=embed_json)
    assert reply.status_code == 200
    assert since("perturbscope_requests_total", **HTTP, status="200", code="ok") == 1
    assert since("perturbscope_request_duration_seconds_count", **HTTP) == 1
    assert since("perturbscope_request_bytes_total", **HTTP) == int(reply.request.headers["content-length"])
    assert since("perturbscope_request_cells_total", **HTTP) == 24
    assert since("perturbscope_request_tokens_total", **HTTP) > 24
    assert since("perturbscope_caller_requests_total", caller="") == 1
    assert since("perturbscope_caller_cells_total", caller="") == 24
    for stage in ("receive", "decode", "tokenize", "queue", "inference", "encode"):
        assert since("perturbscope_stage_duration_seconds_count", stage=stage) == 1, stage


async def test_a_request_is_counted_over_grpc(engine: Engine, stub_of: Any, tiny_cells: CountMatrix) -> None:
    stub, since = await stub_of(engine), Since()
    message = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    await stub.Embed(message)
    assert since("perturbscope_requests_total", **GRPC, status="OK", code="ok") == 1
    assert since("perturbscope_request_bytes_total", **GRPC) == message.ByteSize()
    assert since("perturbscope_request_cells_total", **GRPC) == 24
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Embed(protocol.request_to_proto(EmbedRequest(cells=tiny_cells, model="none")))
    assert since("perturbscope_requests_total", **GRPC, status="NOT_FOUND", code="unknown_model") == 1


async def test_a_refused_request_is_counted_by_its_code(http: httpx.AsyncClient, since: Since) -> None:
    await http.post("/v1/embed", json={})
    assert since("perturbscope_requests_total", **HTTP, status="422", code="invalid_parameter") == 1
    assert since("perturbscope_request_cells_total", **HTTP) == 0


async def test_the_wait_for_a_scorer_is_a_stage(
    http: httpx.AsyncClient, embed_json: dict[str, Any], since: Since
) -> None:
    body = {**embed_json, "perturbations": list(LABELS), "control": "control", "options": FAST}
    assert (await http.post("/v1/score", json=body)).status_code == 200
    for stage in ("score_queue", "score"):
        assert since("perturbscope_stage_duration_seconds_count", stage=stage) == 1


async def test_batches_are_counted_with_their_padding(
    http: httpx.AsyncClient, engine: Engine, fake_embedder: Embedder, embed_json: dict[str, Any], since: Since
) -> None:
    await http.post("/v1/embed", json=embed_json)
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    slots = sum(cells * longest for cells, longest in encoder.batches)
    assert since("perturbscope_model_cells_total", **MODEL) == 24
    assert since("perturbscope_model_padded_tokens_total", **MODEL) == slots
    assert since("perturbscope_model_tokens_total", **MODEL) == since("perturbscope_request_tokens_total", **HTTP)
    assert since("perturbscope_batch_cells_sum", **MODEL) == 24
    assert since("perturbscope_batch_padded_tokens_sum", **MODEL) == slots
    assert since("perturbscope_batch_duration_seconds_count", **MODEL) == len(encoder.batches)
    assert since("perturbscope_queue_wait_seconds_count", **MODEL) == 1


def test_the_padding_share_is_that_of_the_slots(since: Since) -> None:
    watched = ModelMetrics("watched", "1.0")
    watched.batch(n_cells=2, n_tokens=75, n_padded=100, seconds=0.5, waited=[0.1, 0.2], tags=[])
    assert since("perturbscope_batch_padding_ratio_sum", **MODEL) == pytest.approx(0.25)
    assert since("perturbscope_queue_wait_seconds_sum", **MODEL) == pytest.approx(0.3)
    assert since("perturbscope_batch_duration_seconds_sum", **MODEL) == pytest.approx(0.5)


async def test_failed_batches_and_dropped_cells_are_counted(
    http: httpx.AsyncClient, engine: Engine, fake_embedder: Embedder, embed_json: dict[str, Any], since: Since
) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    encoder.error = InferenceError("no")
    assert (await http.post("/v1/embed", json=embed_json)).status_code == 500
    assert since("perturbscope_batch_failures_total", **MODEL, code="inference_failed") == 1
    encoder.error = None
    encoder.gate = threading.Event()
    waiting = [asyncio.ensure_future(http.post("/v1/embed", json=embed_json)) for _ in range(9)]
    while not any(task.done() for task in waiting):  # the queue has room for fewer
        await asyncio.sleep(0.001)
    encoder.gate.set()
    statuses = [reply.status_code for reply in await asyncio.gather(*waiting)]
    refused = statuses.count(429)
    assert refused > 0
    assert since("perturbscope_dropped_requests_total", **MODEL, reason="overloaded") == refused
    assert since("perturbscope_requests_total", **HTTP, status="429", code="overloaded") == refused


async def test_the_page_says_how_the_server_is_now(
    http: httpx.AsyncClient, engine: Engine, fake_embedder: Embedder, embed_json: dict[str, Any]
) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    encoder.gate = threading.Event()
    waiting = asyncio.ensure_future(http.post("/v1/embed", json=embed_json))
    while not encoder.batches:
        await asyncio.sleep(0.001)
    busy = gauges((await http.get("/metrics")).text)
    encoder.gate.set()
    await waiting
    idle = gauges((await http.get("/metrics")).text)
    assert busy["perturbscope_queue_callers"] == 1
    assert busy["perturbscope_queue_tokens"] > 24
    assert busy["perturbscope_requests_in_progress"] == 1
    assert busy["perturbscope_held_bytes"] > 0
    for name in ("queue_callers", "queue_tokens", "requests_in_progress", "held_bytes", "score_jobs_in_progress"):
        assert idle[f"perturbscope_{name}"] == 0
    assert idle["perturbscope_queue_tokens_limit"] == 5_000
    assert idle["perturbscope_requests_in_progress_limit"] == engine.settings.max_requests
    assert idle["perturbscope_models_loaded"] == 1
    assert idle["perturbscope_model_ready"] == 1
    assert idle["perturbscope_memory_limit_bytes"] > 2**20


def gauges(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in parse(text) for sample in family.samples}


async def test_a_model_says_what_runs_it(http: httpx.AsyncClient, engine: Engine) -> None:
    text = (await http.get("/metrics")).text
    (info,) = [s.labels for f in parse(text) for s in f.samples if s.name == "perturbscope_model_info"]
    assert {**MODEL, "device": "cpu", "variant": "fp32", "golden": "absent"}.items() <= info.items()
    (model,) = engine.registry.models()
    model.embedder.encoder.provider = "CUDAExecutionProvider"  # type: ignore[attr-defined]
    assert provider_of(model) == "CUDAExecutionProvider"


async def test_every_metric_has_a_unit_a_text_and_few_labels(
    http: httpx.AsyncClient, embed_json: dict[str, Any]
) -> None:
    reply = await http.post("/v1/embed", json=embed_json, headers={"x-request-id": "my-very-own-id"})
    page = await http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=")
    allowed = {
        *("route", "transport", "status", "code", "stage", "caller", "reason", "model", "version", "le"),
        *("model_id", "family", "variant", "device", "provider", "golden", "python", "onnxruntime"),
    }
    for family in parse(page.text):
        assert family.name.startswith(("perturbscope_", "process_")), family.name
        assert family.documentation, family.name
        assert not family.name.endswith(("_ms", "_milliseconds", "_kb", "_mb")), family.name
        for sample in family.samples:
            assert set(sample.labels) <= allowed, sample
            assert family.type != "counter" or sample.name.endswith("_total"), sample
    for secret in (reply.headers["x-request-id"], embed_json["cells"]["gene_ids"][0]):
        assert secret not in page.text


async def test_openmetrics_for_who_asks_for_it(http: httpx.AsyncClient) -> None:
    reply = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert any(family.name == "perturbscope_requests" for family in openmetrics(reply.text))


def test_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_routes", set())
    labels = [metrics.route_label(f"/made/up/{n}") for n in range(metrics.MAX_ROUTES + 50)]
    assert labels.count(OTHER) == 50
    assert metrics.route_label("/made/up/0") == "/made/up/0"


def test_strangers_and_callers_above_their_rate_are_counted(since: Since) -> None:
    stranger = Call("/v1/embed", "http")
    Front.finish(stranger, 401, "unauthenticated")
    eager = Call("/v1/embed", "http", caller=Caller("pipeline"))
    Front.finish(eager, 429, "rate_limited")
    assert since("perturbscope_unauthenticated_total", transport="http") == 1
    assert since("perturbscope_rate_limited_total", caller="pipeline") == 1
    guessing = Call("/v1/embed", "http")  # an address that tried too many keys is limited before it has a name
    Front.finish(guessing, 429, "rate_limited")
    assert since("perturbscope_unauthenticated_total", transport="http") == 2
    assert since("perturbscope_rate_limited_total", caller="") == 0


def test_buckets_reach_from_a_millisecond_to_ten_minutes() -> None:
    assert (metrics.SECONDS[0], metrics.SECONDS[-1]) == (0.001, 600.0)
    assert list(metrics.SECONDS) == sorted(metrics.SECONDS)


def test_stages_of_one_name_add_up_and_a_failed_one_counts() -> None:
    call = Call("/v1/embed", "http")
    with call.stage("decode"):
        pass
    first = call.timings["decode"]
    with pytest.raises(ZeroDivisionError), call.stage("decode"):
        _ = 1 / 0
    assert call.timings["decode"] > first


def test_the_end_of_a_stage_can_be_another_stage() -> None:
    call = Call("/v1/embed", "http")
    with call.stage("queue") as stage:
        stage.ended_with("inference", 1e9)  # longer than all: nothing is left for the queue
    assert call.timings["queue"] == 0.0
    assert call.timings["inference"] >= 0.0


def test_the_series_of_a_model_go_with_its_last_dispatcher() -> None:
    labels = {"model": "passing", "version": "7"}
    first, second = ModelMetrics("passing", "7"), ModelMetrics("passing", "7")
    first.failed(InferenceError("no"))
    second.dropped(n_cells=1, reason="cancelled")
    first.close()
    first.close()
    assert REGISTRY.get_sample_value("perturbscope_model_cells_total", labels) == 0
    second.close()
    assert not any(
        sample.labels.get("model") == "passing" for family in REGISTRY.collect() for sample in family.samples
    )


def test_memory_is_that_of_all_processes_of_the_service() -> None:
    alone = memory()
    child = subprocess.Popen([sys.executable, "-c", "b = bytearray(2**27); print(); input()"], **PIPES)
    try:
        assert child.stdout is not None
        child.stdout.readline()  # the memory is taken
        assert memory() - alone > 2**26
    finally:
        child.communicate(b"\n")
    assert alone > 2**20


def test_series_that_alerts_watch_are_there_before_the_first_failure() -> None:
    watched = ModelMetrics("new", "1")
    labels = {"model": "new", "version": "1"}
    assert REGISTRY.get_sample_value("perturbscope_batch_failures_total", {**labels, "code": "inference_failed"}) == 0
    for reason in ("cancelled", "deadline", "overloaded"):
        assert REGISTRY.get_sample_value("perturbscope_dropped_requests_total", {**labels, "reason": reason}) == 0
    for transport in ("http", "grpc"):
        assert REGISTRY.get_sample_value("perturbscope_unauthenticated_total", {"transport": transport}) is not None
    watched.close()
