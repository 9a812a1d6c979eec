"""Keys and rates on both transports: without a key, only paths that are listed as open are answered."""

from __future__ import annotations

import ast
import logging
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.operations import OPERATIONS
from perturbscope.protocol import EmbedRequest
from perturbscope.protocol.descriptors import method_of
from perturbscope.protocol.proto import open_inference_pb2
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from serving.access.front import Front
from serving.access.keys import MESSAGE, keys_to_json, make_key
from serving.access.rates import FAILURES_PER_MINUTE
from serving.engine.engine import Engine
from serving.grpc import interceptors as grpc_guard
from serving.grpc.server import SERVICE
from serving.http import gate as http_guard
from serving.http.gate import Gate
from serving.telemetry.brake import PER_MINUTE, Brake, LibraryFilter
from serving.telemetry.log import logger
from tests.apps import app_of, grpc_server_of
from tests.unit.serving.conftest import MakeEngine

ROOT = Path(__file__).resolve().parents[4]


class Guarded:
    """An engine with three keys, and clients of both its transports."""

    def __init__(self, folder: Path, make_engine: MakeEngine, **settings: Any) -> None:
        entries = []
        self.keys: dict[str, str] = {}
        wanted: dict[str, dict[str, Any]] = {
            "pipeline": {},
            "scraper": {"rights": ("metrics",)},
            "slow": {"requests_per_minute": 2, "cells_per_minute": 30},
        }
        for name, options in wanted.items():
            key, self.keys[name] = make_key(name, **options)
            entries.append(key)
        self.path = folder / "keys.json"
        self.path.write_bytes(keys_to_json(tuple(entries)))
        self.engine = make_engine(keys=str(self.path), **settings)
        self.app = app_of(self.engine, beside_others=True)  # behind the same middleware

    def http(self, name: str | None = None, key: str = "") -> httpx.AsyncClient:
        """A client with the key of this name."""
        key = self.keys[name] if name else key
        guarded = Gate(self.app, front=lambda: self.engine.front)
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(guarded),
            base_url="http://test",
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.keys[name]}"),)


@pytest.fixture
def guarded(tmp_path: Path, make_engine: MakeEngine) -> Guarded:
    return Guarded(tmp_path, make_engine)


@pytest.fixture
async def channel(guarded: Guarded) -> Any:
    server = grpc_server_of(guarded.engine)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop()


def body(cells: CountMatrix) -> dict[str, Any]:
    return {
        "content": protocol.request_to_arrow(EmbedRequest(cells=cells)),
        "headers": {"content-type": protocol.ARROW},
    }


async def test_http_without_a_key(guarded: Guarded, tiny_cells: CountMatrix) -> None:
    async with guarded.http() as http:
        for path in ("/", "/readyz"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/metrics", "/docs.json", "/v1/openapi.json", "/nothing", "/readyz/", "/v1"):
            reply = await http.get(path)
            assert reply.status_code == 401, path
            assert reply.json()["error"] == {"code": "unauthenticated", "message": MESSAGE, "field": None}
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.headers["x-request-id"]
        reply = await http.post("/v1/embed", **body(tiny_cells))
        assert reply.status_code == 401
        assert (await http.post("/readyz")).status_code == 405


async def test_http_with_a_key(guarded: Guarded, tiny_cells: CountMatrix) -> None:
    async with guarded.http("pipeline") as http:
        assert (await http.post("/v1/embed", **body(tiny_cells))).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200
        reply = await http.get("/metrics")  # they show what all callers do
        assert reply.status_code == 403
        assert "--right metrics" in reply.json()["error"]["message"]
    async with guarded.http("scraper") as http:
        assert (await http.get("/metrics")).status_code == 200
        for reply in (await http.post("/v1/embed", **body(tiny_cells)), await http.get("/v1/models")):
            assert reply.status_code == 403
            assert reply.json()["error"]["message"] == "The API key 'scraper' does not have the right 'infer'."


async def test_metrics_need_a_right_for_them(tmp_path: Path, guarded: Guarded) -> None:
    key, text = make_key("operator", rights=("admin",))
    guarded.path.write_bytes(keys_to_json((key,)))
    async with guarded.http(key=text) as http:
        assert (await http.get("/metrics")).status_code == 403


async def test_the_routes_ask_for_themselves_too(guarded: Guarded, tiny_cells: CountMatrix) -> None:
    """The application is mounted alone, without the middleware."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded.app), base_url="http://test") as http:
        assert (await http.post("/v1/embed", **body(tiny_cells))).status_code == 401
        assert (await http.get("/v1/models")).status_code == 401


async def test_a_stranger_is_turned_away_before_its_body_is_read(guarded: Guarded) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/embed", "query_string": b"", "headers": []}
    await Gate(guarded.app, front=lambda: guarded.engine.front)(scope, receive, send)
    assert sent[0]["status"] == 401
    await Gate(guarded.app, front=lambda: guarded.engine.front)({**scope, "type": "websocket"}, receive, send)
    assert sent[-1] == {"type": "websocket.close", "code": 1008}


async def test_without_keys_everything_is_open(make_engine: MakeEngine) -> None:
    engine, app = make_engine(), FastAPI()
    app.get("/metrics")(lambda: "theirs")
    guard = Gate(app, front=lambda: engine.front)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as http:
        assert (await http.get("/metrics")).status_code == 200


async def status_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def reflected(channel: Any, metadata: Any = None) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request]), metadata=metadata):
        return [service.name for service in answer.list_services_response.service]
    return []


async def test_grpc_without_a_key(guarded: Guarded, channel: Any, tiny_cells: CountMatrix) -> None:
    stub = PerturbScopeStub(channel)
    request = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED, MESSAGE
    assert await status_of(stub.Embed(request)) == unauthenticated
    assert await status_of(stub.Models(pb.ModelsRequest())) == unauthenticated
    assert await status_of(reflected(channel)) == unauthenticated
    twice = (*guarded.metadata("pipeline"), *guarded.metadata("pipeline"))
    assert await status_of(stub.Models(pb.ModelsRequest(), metadata=twice)) == unauthenticated
    assert await status_of(channel.unary_unary("/no.such/Method")(b"")) == unauthenticated
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_grpc_with_a_key(guarded: Guarded, channel: Any, tiny_cells: CountMatrix) -> None:
    stub = PerturbScopeStub(channel)
    request = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    good = guarded.metadata("pipeline")
    answer = protocol.answer_from_proto(protocol.EmbedAnswer, await stub.Embed(request, metadata=good))
    assert len(answer) == len(tiny_cells)
    assert (await stub.Models(pb.ModelsRequest(), metadata=(("x-api-key", guarded.keys["pipeline"]),))).models
    assert SERVICE in await reflected(channel, good)
    code, _ = await status_of(stub.Embed(request, metadata=guarded.metadata("scraper")))
    assert code == grpc.StatusCode.PERMISSION_DENIED
    code, _ = await status_of(stub.Models(pb.ModelsRequest(), metadata=guarded.metadata("scraper")))
    assert code == grpc.StatusCode.PERMISSION_DENIED
    code, _ = await status_of(channel.unary_unary("/no.such/Method")(b"", metadata=good))
    assert code == grpc.StatusCode.UNIMPLEMENTED


async def test_many_bad_keys_over_grpc(guarded: Guarded, channel: Any) -> None:
    stub = PerturbScopeStub(channel)
    codes = [
        (await status_of(stub.Models(pb.ModelsRequest(), metadata=(("x-api-key", "psk_00000000_no"),))))[0]
        for _ in range(FAILURES_PER_MINUTE + 2)
    ]
    assert codes[:FAILURES_PER_MINUTE] == [grpc.StatusCode.UNAUTHENTICATED] * FAILURES_PER_MINUTE
    assert codes[-1] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.Models(pb.ModelsRequest(), metadata=guarded.metadata("pipeline"))).models


async def test_refusals_are_counted_and_not_all_logged(
    guarded: Guarded, channel: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of strangers over both transports, of a caller above its rate, and of libraries; a good request is logged."""
    now = 1e6
    monkeypatch.setattr("serving.access.front._brake", Brake(clock=lambda: now))
    stub, sent = PerturbScopeStub(channel), 50
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)

    def lines() -> list[Any]:
        unique = {id(item): item for item in caplog.records if hasattr(item, "fields")}
        return [item.fields for item in unique.values()]

    try:
        async with (
            guarded.http(key="psk_bad") as stranger,
            guarded.http("slow") as slow,
            guarded.http("pipeline") as ok,
        ):
            for _ in range(sent):
                await stranger.get("/v1/models")
                await slow.get("/v1/models")
                await ok.get("/nothing")
                await status_of(stub.Models(pb.ModelsRequest(), metadata=(("x-api-key", "psk_bad"),)))
            assert len(lines()) <= 2 + 4 * PER_MINUTE
            caplog.clear()
            now += 60
            await stranger.get("/v1/models")
            await ok.get("/v1/models")
    finally:
        logger.removeHandler(caplog.handler)
    first, last = lines()
    assert first["not_logged"] > 0
    assert (last["code"], last["not_logged"]) == ("ok", None)


def test_lines_of_libraries_are_braked_too() -> None:
    now, said = 0.0, []
    limit = LibraryFilter(Brake(per_minute=3, clock=lambda: now))
    for number in range(10):
        now = 60.0 if number == 9 else 0.0
        record = logging.LogRecord("uvicorn.error", logging.WARNING, "a.py", 7, "Not HTTP: %d.", (number,), None)
        if limit.filter(record):
            said.append(record.getMessage())
    assert said == [*(f"Not HTTP: {n}." for n in range(3)), "Not HTTP: 9. (6 such lines before it were left out)"]
    own = logging.LogRecord("perturbscope.serving", logging.WARNING, "a.py", 7, "ours", (), None)
    assert all(limit.filter(own) for _ in range(10))


async def test_requests_over_the_share(guarded: Guarded) -> None:
    async with guarded.http("slow") as http:
        replies = [await http.get("/v1/models") for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[2].json()["error"]["code"] == "rate_limited"
    assert 1 <= int(replies[2].headers["retry-after"]) <= 30


async def test_cells_over_the_share_cost_no_compute(
    guarded: Guarded, channel: Any, tiny_cells: CountMatrix, fake_embedder: Any
) -> None:
    """24 cells fit into 30 a minute, once; the second 24 are refused over the other transport, before tokens."""
    async with guarded.http("slow") as http:
        assert (await http.post("/v1/embed", **body(tiny_cells))).status_code == 200
    n_batches = len(fake_embedder.encoder.batches)
    request = protocol.request_to_proto(EmbedRequest(cells=tiny_cells))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await PerturbScopeStub(channel).Embed(request, metadata=guarded.metadata("slow"))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    sent = dict(refused.value.trailing_metadata() or ())
    assert sent["perturbscope-code"] == "rate_limited"
    assert 1 <= int(sent["retry-after"]) <= 60
    assert len(fake_embedder.encoder.batches) == n_batches


async def test_a_key_is_nowhere_but_in_the_request(
    guarded: Guarded, tiny_cells: CountMatrix, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key is in the log, even of a bug, in an answer, in what a debugger prints, or in a request's id."""

    async def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    key = guarded.keys["pipeline"]
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG)
    try:
        async with guarded.http("pipeline") as http:
            bad = {**body(tiny_cells)["headers"], "x-request-id": key}
            replies = [
                await http.post("/v1/embed", content=b"no arrow", headers=bad),
                await http.post("/v1/embed", headers={"x-request-timeout": "-1"}),
                await http.get("/v1/models", headers={"x-api-key": key}),
                await http.get("/v1/nothing"),
            ]
            monkeypatch.setattr(Engine, "embed", broken)
            replies.append(await http.post("/v1/embed", **body(tiny_cells)))
    finally:
        logger.removeHandler(caplog.handler)
    assert [reply.status_code for reply in replies[1:4]] == [422, 401, 404]
    assert "caller=pipeline" in caplog.text or '"pipeline"' in caplog.text
    call = Front.begin("/v1/embed", "http", {"authorization": f"Bearer {key}", "x-request-id": key})
    for text in (caplog.text, repr(call), *(reply.text + repr(reply.headers) for reply in replies)):
        assert key not in text
        assert key[13:] not in text


def sources() -> list[Path]:
    return [path for folder in ("perturbscope", "serving", "export") for path in (ROOT / folder).rglob("*.py")]


def test_nothing_is_ever_unpickled() -> None:
    """No module imports what can run code from data, and no call allows it."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            elif isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if given.get("allow_pickle", "False") != "False" or function in ("eval", "exec", "yaml.load"):
                    wrong.append(f"{path}:{node.lineno} {function}")
                if function == "torch.load" and given.get("weights_only") != "True":
                    wrong.append(f"{path}:{node.lineno} {function}")
                if function.rpartition(".")[2] in ("read_pickle", "to_pickle"):
                    wrong.append(f"{path}:{node.lineno} {function}")
            wrong += [f"{path} imports {name}" for name in names if name in forbidden]
    assert wrong == []


def test_the_search_for_pickles_reads_every_module() -> None:
    assert len(sources()) > 100
    assert ROOT / "serving" / "uploads" / "requests.py" in sources()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity"])
async def test_a_compressed_body_is_refused_unread(http: httpx.AsyncClient, encoding: str) -> None:
    bomb = zlib.compress(bytes(2**24))
    for path in ("/v1/embed", "/v1/score", "/v1/embed/stream"):
        headers = {"content-type": protocol.ARROW, "content-encoding": encoding}
        reply = await http.post(path, content=bomb, headers=headers)
        assert reply.status_code == 415, (path, reply.text)
        assert "content encoding" in reply.json()["error"]["message"]
    good = await http.post(
        "/v1/embed", content=b"{}", headers={"content-type": protocol.JSON, "content-encoding": "identity"}
    )
    assert good.status_code == 422


async def test_a_packed_message_over_grpc_is_refused_unread(make_engine: MakeEngine) -> None:
    server = grpc_server_of(make_engine(max_body_bytes=2**20))
    port = await server.start()
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/Embed")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(bytes(2**28), compression=grpc.Compression.Gzip)
    await server.stop()
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "'gzip' is disabled" in (refused.value.details() or "")


async def test_forms_of_a_thousand_fields_or_files(http: httpx.AsyncClient) -> None:
    many = {f"field{number}": "x" for number in range(1000)}
    reply = await http.post("/v1/embed", files={"file": ("a.h5ad", b"x")}, data=many)
    assert (reply.status_code, "Too many fields" in reply.text) == (422, True)
    reply = await http.post("/v1/embed", files=[("file", (f"{number}.h5ad", b"x")) for number in range(1000)])
    assert (reply.status_code, "Too many files" in reply.text) == (422, True)
    reply = await http.post("/v1/embed", files={"file": ("a.h5ad", b"x")}, data={"layer": "x" * (2**20 + 1)})
    assert (reply.status_code, "maximum size" in reply.text) == (422, True)


async def test_a_body_without_a_length_is_counted_as_it_comes(make_engine: MakeEngine, connect: Any) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**16
            yield bytes(2**16)

    http = connect(make_engine(max_body_bytes=2**20))
    for kind in (protocol.ARROW, protocol.JSON, protocol.HDF5):
        sent = 0
        reply = await http.post("/v1/embed", content=endless(), headers={"content-type": kind})
        assert reply.status_code == 413
        assert sent <= 2**20 + 2**17


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\x00b", "x" * 500, "\u202e"])
async def test_names_of_files_and_models_are_never_paths(http: httpx.AsyncClient, h5ad: Path, name: str) -> None:
    """Names of models are looked up among the loaded ones; the name of an uploaded file is ignored."""
    parameters = {"model": name}
    reply = await http.post("/v1/embed", params=parameters, files={"file": (name, h5ad.read_bytes())})
    assert reply.status_code == 404, reply.text
    assert reply.json()["error"]["code"] == "unknown_model"
    reply = await http.post("/v1/embed", files={"file": (name, h5ad.read_bytes())})
    assert reply.status_code == 200, reply.text


async def test_the_page_asks_for_a_key_where_there_are_keys(guarded: Guarded, make_engine: MakeEngine) -> None:
    """The page itself is open, and may load nothing and keep nothing."""
    pages = {}
    for asks, app in (("yes", guarded.app), ("no", app_of(make_engine()))):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            reply = await http.get("/")
        assert reply.status_code == 200
        assert f'asksForKey = "{asks}"' in reply.text
        pages[asks] = reply
    policy = pages["yes"].headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert pages["yes"].headers["cache-control"] == "no-store"
    for word in ("localStorage", "sessionStorage", "document.cookie", "indexedDB", "http://", "https://"):
        assert word not in pages["yes"].text
    assert not any(key in pages["yes"].text for key in guarded.keys.values())


def test_the_threat_model_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    names = {item for item in re.findall(r"`([^`\s]+)`", text) if item.startswith("tests/") or "test_" in item}
    assert len(names) > 10
    for name in names:
        assert list(ROOT.glob(name)) or list(ROOT.glob(f"tests/*/**/{name}")), name


async def test_no_http_route_is_open_but_those_listed(guarded: Guarded) -> None:
    """Whatever routes there are, those of models, streams and the Open Inference Protocol among them."""
    asked = 0
    async with guarded.http() as http:
        for route in _routes(guarded.app.routes):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            for method in sorted(getattr(route, "methods", None) or {"POST"}):
                reply = await http.request(method, path)
                # After some dozens without a key the rest is 429: that is a refusal, too.
                refused = reply.status_code in (401, 429)
                assert refused is (path not in http_guard.OPEN), (method, path, reply.status_code)
                asked += 1
    assert asked > 15


def _routes(routes: Any) -> Iterator[Any]:
    for route in routes:
        if hasattr(route, "path"):
            yield route
        yield from _routes(getattr(route, "routes", None) or [])


async def test_no_grpc_method_is_open_but_those_listed(guarded: Guarded, channel: Any) -> None:
    files = (pb.DESCRIPTOR, open_inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    } | {f"/{method_of(operation)}" for operation in OPERATIONS.values()}
    served = await reflected(channel, guarded.metadata("pipeline"))
    assert {method.split("/")[1] for method in methods} == set(served)
    assert methods >= grpc_guard.OPEN
    for method in sorted(methods - grpc_guard.OPEN):
        code, _ = await status_of(channel.unary_unary(method)(b""))
        assert code == grpc.StatusCode.UNAUTHENTICATED, method
