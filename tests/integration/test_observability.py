"""Metrics, traces and the log of the real service, and the files of deploy/, which must match them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import pytest
import yaml
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from prometheus_client.parser import text_string_to_metric_families

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import Client, GrpcClient, RetryPolicy
from perturbscope.inference.bundle import Bundle
from perturbscope.protocol import EmbedRequest
from perturbscope.scoring.results import ScoreOptions
from serving.access.keys import keys_to_json, make_key
from serving.telemetry import metrics
from tests.bundles import write_tiny_bundle
from tests.integration.server import ROOT, RunningServer

DEPLOY = ROOT / "deploy"
TARGET = frozenset({"job", "instance"})
"""Labels that Prometheus adds."""
WAIT = 60.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's name
        for group in request.resource_spans:
            self.resources.append({item.key: item.value.string_value for item in group.resource.attributes})
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: int, *, done: Callable[[list[Any]], bool]) -> list[Any]:
        """The spans of one trace, once `done` says that they are all there."""
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            found = [span for span in self.spans if span.trace_id == trace_id.to_bytes(16, "big")]
            if done(found):
                return found
            time.sleep(0.05)
        raise AssertionError(f"only {[span.name for span in found]} came")


class Watched(NamedTuple):
    """A running service, and who watches it."""

    server: RunningServer
    collector: Collector
    keys: dict[str, str]
    cells: CountMatrix
    folder: Path

    def page(self) -> httpx.Response:
        return httpx.get(f"{self.server.url}/metrics", headers={"authorization": f"Bearer {self.keys['prometheus']}"})


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    made = {
        "pipeline": make_key("pipeline"),
        "prometheus": make_key("prometheus", rights=("metrics",)),
        "eager": make_key("eager", requests_per_minute=1),
    }
    (folder / "keys.json").write_bytes(keys_to_json(tuple(key for key, _ in made.values())))
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_SERVICE_NAME": "perturbscope-test",
        "BENTOML_HOME": str(folder / "bentoml"),
    }
    bundle = write_tiny_bundle(folder / "tiny")
    genes = Bundle.open(bundle).vocabulary.gene_ids[:30]
    cells = CountMatrix.from_matrix(np.eye(4, 30, dtype=int) + 1, genes)
    with RunningServer(folder, environ=environ, bundle=bundle, keys=folder / "keys.json") as running:
        yield Watched(running, collector, {name: text for name, (_, text) in made.items()}, cells, folder)
    server.stop(None)


@pytest.fixture(scope="module")
def page(watched: Watched) -> str:
    """The metrics, after a request of every kind that is cheap to make."""
    server, keys = watched.server, watched.keys
    vectors = np.random.default_rng(0).standard_normal((24, 5)).astype(np.float32)
    with Client(server.url, api_key=keys["pipeline"]) as client:
        client.embed_cells(watched.cells)
        client.score(
            vectors,
            ["control"] * 12 + ["KO"] * 12,
            control="control",
            options=ScoreOptions(permutations=19, min_cells=4, repeats=2),
        )
    for _ in range(2):
        httpx.post(f"{server.url}/v1/embed", json={}, headers={"x-api-key": keys["eager"]})
    assert httpx.post(f"{server.url}/v1/embed", json={}, headers={"x-api-key": "psk_wrong"}).status_code == 401
    reply = watched.page()
    assert reply.status_code == 200, reply.text
    return reply.text


def shown(page: str) -> dict[str, set[str]]:
    """Labels of every series on the page by its name; of those that nothing has happened to, the labels in the code."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    for metric in vars(metrics).values():
        if isinstance(metric, (metrics.Counter, metrics.Gauge)):
            (described,) = metric.describe()
            assert f"# TYPE {described.name}" in page, described.name
            name = described.name + ("_total" if described.type == "counter" else "")
            found.setdefault(name, set(metric._labelnames))
    return found


def test_the_page_needs_a_key_and_shows_what_happened(watched: Watched, page: str) -> None:
    assert httpx.get(f"{watched.server.url}/metrics").status_code == 401
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples.get((name, *sorted(labels.items())), 0.0)

    http = {"route": "/v1/embed", "transport": "http"}
    assert value("perturbscope_requests_total", **http, status="200", code="ok") == 1
    assert value("perturbscope_requests_total", **http, status="429", code="rate_limited") == 1
    assert value("perturbscope_rate_limited_total", caller="eager") == 1
    assert value("perturbscope_unauthenticated_total", transport="http") >= 1
    assert value("perturbscope_caller_cells_total", caller="pipeline") == 4 + 24
    assert value("perturbscope_models_loaded") == 1
    assert value("process_resident_memory_bytes") > 2**20
    (info,) = [dict(key[1:]) for key in samples if key[0] == "perturbscope_model_info"]
    assert (info["device"], info["provider"], info["variant"]) == ("cpu", "CPUExecutionProvider", "fp32")
    # BentoML would have made a series for every path that was asked for.
    assert "bentoml" not in page
    assert not any(key.startswith("psk_") for key in page.split())


def test_made_up_paths_make_no_series(watched: Watched, page: str) -> None:
    headers = {"x-api-key": watched.keys["pipeline"]}
    for number in range(20):
        reply = httpx.get(f"{watched.server.url}/made/up/{number}", headers=headers)
        assert (reply.status_code, len(reply.headers["x-request-id"])) == (404, 16)
    assert httpx.get(f"{watched.server.url}/v1/embed", headers=headers).status_code == 405
    text = watched.page().text
    assert "/made/up" not in text
    assert "/made/up" not in watched.server.log
    for status, times in ((404, 20), (405, 1)):
        labels = f'code="invalid_parameter",route="other",status="{status}",transport="http"'
        assert f"perturbscope_requests_total{{{labels}}} {times}.0" in text


def test_counting_writes_no_files(watched: Watched, page: str) -> None:
    """A full disk would kill a process that keeps its numbers in mapped files."""
    assert (watched.folder / "bentoml").is_dir()
    assert [path.name for path in watched.folder.rglob("*.db")] == []


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_trace_of_the_caller_reaches_the_collector_whole(watched: Watched, kind: str) -> None:
    retries = RetryPolicy(attempts=1)
    client: Client | GrpcClient = (
        Client(watched.server.url, api_key=watched.keys["pipeline"], retries=retries)
        if kind == "http"
        else GrpcClient(watched.server.target, api_key=watched.keys["pipeline"], retries=retries)
    )
    mine = SpanContext({"http": 0xC0FFEE, "grpc": 0xCAFE}[kind], 0xBEEF, is_remote=False, trace_flags=TraceFlags(1))
    with client, trace.use_span(NonRecordingSpan(mine)):
        client.embed_cells(watched.cells)
    name = "POST /v1/embed" if kind == "http" else "perturbscope.v1.PerturbScope/Embed"
    found = watched.collector.trace(mine.trace_id, done=lambda spans: any(span.name == name for span in spans))
    (root,) = [span for span in found if span.name == name]
    assert root.parent_span_id == mine.span_id.to_bytes(8, "big")
    stages = {"receive", "decode", "tokenize", "queue", "inference", "encode"}
    assert {span.name for span in found if span.parent_span_id == root.span_id} == stages
    (inference,) = [span for span in found if span.name == "inference"]
    assert {span.name for span in found if span.parent_span_id == inference.span_id} == {"batch"}
    # One span a request: BentoML's own middleware makes none.
    assert sum(span.kind == root.kind for span in found) == 1
    attributes = {item.key: item.value for item in root.attributes}
    assert attributes["perturbscope.caller"].string_value == "pipeline"
    assert watched.collector.resources[0]["service.name"] == "perturbscope-test"


def test_a_stream_is_one_trace_with_a_turn_for_every_chunk(watched: Watched) -> None:
    mine = SpanContext(0x57AEA, 0xBEEF, is_remote=False, trace_flags=TraceFlags(1))
    with (
        GrpcClient(watched.server.target, api_key=watched.keys["pipeline"]) as client,
        trace.use_span(NonRecordingSpan(mine)),
    ):
        answers = list(client.embed_stream(iter([watched.cells] * 3)))
    assert [len(answer.values) for answer in answers] == [4, 4, 4]
    name = "perturbscope.v1.PerturbScope/EmbedStream"
    found = watched.collector.trace(mine.trace_id, done=lambda spans: any(span.name == name for span in spans))
    (root,) = [span for span in found if span.name == name]
    below = [span.name for span in found if span.parent_span_id == root.span_id]
    assert below.count("decode") == below.count("queue") == below.count("inference") == 3
    assert {item.key: item.value.int_value for item in root.attributes}["perturbscope.cells"] == 12
    series = 'perturbscope_streams_open{transport="grpc"} 0.0'
    assert series in watched.page().text


def test_the_log_is_json_and_keeps_secrets(watched: Watched, page: str) -> None:
    lines = [json.loads(line) for line in watched.server.log.splitlines()]
    assert all({"time", "level", "event"} <= set(line) for line in lines)
    events = {line["event"] for line in lines}
    assert {"started", "request"} <= events
    asked = [line for line in lines if line["event"] == "request"]
    assert {"pipeline", "eager"} <= {line.get("caller") for line in asked}
    assert {"unauthenticated", "rate_limited", "ok"} <= {line["code"] for line in asked}
    assert any(line.get("logger") == "bentoml.serve" for line in lines)
    for text in watched.keys.values():
        assert text not in watched.server.log
        assert text not in watched.server.output


def test_probes_answer_without_a_key(watched: Watched) -> None:
    for probe in ("livez", "readyz", "healthz"):
        assert httpx.get(f"{watched.server.url}/{probe}").status_code == 200


def test_liveness_does_not_fail_under_load(watched: Watched) -> None:
    body = protocol.request_to_json(EmbedRequest(cells=watched.cells))
    headers = {"x-api-key": watched.keys["pipeline"], "content-type": protocol.JSON}

    def ask(_: int) -> int:
        return httpx.post(f"{watched.server.url}/v1/embed", content=body, headers=headers, timeout=WAIT).status_code

    with ThreadPoolExecutor(16) as callers:
        load = [callers.submit(ask, number) for number in range(64)]
        probes = 0
        while not all(future.done() for future in load):
            assert httpx.get(f"{watched.server.url}/livez", timeout=WAIT).status_code == 200
            probes += 1
    assert probes > 0
    assert {future.result() for future in load} <= {200, 429}


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DEPLOY / "grafana/perturbscope.json").read_text())
    return document


def expressions() -> list[str]:
    """All that is asked of Prometheus."""
    asked = [rule["expr"] for rule in rules()]
    document = dashboard()
    asked += [target["expr"] for panel in document["panels"] for target in panel.get("targets", [])]
    asked += [item["expr"] for item in document["annotations"]["list"]]
    return asked + [item["query"]["query"] for item in document["templating"]["list"] if item["type"] == "query"]


METRIC = re.compile(r"\b(up|(?:perturbscope|process)_\w+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


def test_alerts_and_dashboard_ask_for_what_a_running_service_shows(page: str) -> None:
    known = {**shown(page), "up": set()}
    for expression in expressions():
        found = METRIC.findall(expression)
        assert found, expression
        assert expression.count("(") == expression.count(")"), expression
        possible: set[str] = set(TARGET)
        for name, matchers in found:
            assert name in known, f"{name} in {expression}"
            labels = known[name] | TARGET
            possible |= labels
            assert set(MATCHER.findall(matchers)) <= labels, f"{matchers} of {name}"
        for group in GROUPING.findall(expression):
            assert {label.strip() for label in group.split(",")} <= possible, expression


def test_values_that_expressions_look_for_are_real(page: str) -> None:
    asked = set(re.findall(r'code="(\w+)"', " ".join(expressions())))
    from perturbscope.errors import error_classes

    assert asked
    assert asked <= set(error_classes())
    routes = re.findall(r'route=~"([^"]+)"', " ".join(expressions()))
    assert all(set(text.split("|")) == {"/v1/embed", "perturbscope.v1.PerturbScope/Embed"} for text in routes)


def test_what_is_put_into_texts_is_a_label_of_the_answer(page: str) -> None:
    known = {**shown(page), "up": set()}
    texts = [(rule["expr"], json.dumps(rule["annotations"])) for rule in rules()]
    for panel in dashboard()["panels"]:
        texts += [(target["expr"], target["legendFormat"]) for target in panel.get("targets", [])]
    for expression, text in texts:
        wanted = set(re.findall(r"\$labels\.(\w+)", text)) | set(re.findall(r"\{\{(\w+)\}\}", text))
        grouped = re.findall(r"\bby\s*\(([^)]*)\)", expression)
        there = {label.strip() for group in grouped for label in group.split(",")}
        if not grouped:
            there = TARGET.union(*(known[name] for name, _ in METRIC.findall(expression)))
        assert wanted <= there, f"{text}: {wanted - there} is not in {expression}"


def test_every_alert_says_what_to_do_and_where_it_is_written() -> None:
    headings = re.findall(r"^#+ (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["runbook"].endswith(f"docs/operations.md#{rule['alert'].lower()}")
        assert rule["alert"] in headings


def test_links_within_the_document_lead_somewhere() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    there = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ ([\w ]+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= there


def test_the_documents_table_of_metrics_is_complete(page: str) -> None:
    text = (ROOT / "docs/operations.md").read_text()
    families = {family.name for family in text_string_to_metric_families(page)}
    for name in (name for name in families if name.startswith("perturbscope_")):
        assert f"`{name}" in text, name
    for name in re.findall(r"`(perturbscope_[a-z_]+)", text):
        assert any(name.startswith(family) for family in families), name


def test_the_scrape_and_the_containers_fit_the_service() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert (job["job_name"], job["metrics_path"], job["authorization"]["type"]) == (
        "perturbscope",
        "/metrics",
        "Bearer",
    )
    services = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    assert set(services) == {"perturbscope", "prometheus", "grafana", "collector"}
    assert services["perturbscope"]["read_only"] is True
    mounted = [Path(volume.split(":")[0]) for service in services.values() for volume in service.get("volumes", [])]
    for path in (path for path in mounted if str(path).startswith(".") or "/" in str(path)):
        assert str(path).startswith("keys") or (DEPLOY / path).exists(), path
    collector = yaml.safe_load((DEPLOY / "collector/collector.yml").read_text())
    port = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    assert services["perturbscope"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"].endswith(f":{port}")
    for path in sorted((DEPLOY / "grafana/provisioning").rglob("*.yml")):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1


def test_panels_have_units_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        for target in panel.get("targets", []):
            seconds = "_seconds" in target["expr"] and "_seconds_sum" not in target["expr"]
            unit = panel["fieldConfig"]["defaults"]["unit"]
            assert (unit == "s") == (seconds and "cpu_seconds" not in target["expr"]), panel["title"]
            assert unit != "bytes" or "_bytes" in target["expr"]
