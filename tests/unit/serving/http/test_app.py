"""The HTTP interface over a fake model: bodies, errors, limits, disconnected clients."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import CompareRequest, EmbedRequest, ScoreRequest
from perturbscope.protocol.operations import COMPARE, EMBED, MODELS, SCORE
from perturbscope.scoring.results import COMPARE_COLUMNS, SCORE_COLUMNS, ScoreOptions
from serving.engine.engine import Engine
from serving.http import openapi, schemas
from tests.apps import app_of
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import FAST, LABELS, Connect, MakeEngine, write_h5ad

JSON = {"content-type": protocol.JSON}
ARROW = {"content-type": protocol.ARROW, "accept": protocol.ARROW}
HDF5 = {"content-type": protocol.HDF5}
OPTIONS = json.dumps(FAST)


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"code", "message", "field"}
    assert "Traceback" not in error["message"]
    return error


@pytest.fixture
def expected(fake_embedder: Embedder, tiny_cells: CountMatrix) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Vectors of the tiny cells, made offline."""
    return fake_embedder.embed(tiny_cells).values


async def test_embed_takes_and_gives_every_format(
    http: httpx.AsyncClient, tiny_cells: CountMatrix, h5ad: Path, expected: np.ndarray[Any, Any]
) -> None:
    request = EmbedRequest(cells=tiny_cells)
    file = h5ad.read_bytes()
    replies = [
        await http.post("/v1/embed", content=protocol.request_to_json(request), headers=JSON),
        await http.post("/v1/embed", content=protocol.request_to_arrow(request), headers={**ARROW, "accept": "*/*"}),
        await http.post("/v1/embed", content=file, headers=HDF5),
        await http.post("/v1/embed?layer=counts", content=file, headers={"content-type": "application/octet-stream"}),
        await http.post("/v1/embed", files={"file": ("cells.h5ad", file)}, data={"layer": "counts"}),
    ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == protocol.JSON
        schemas.given(EMBED).model_validate_json(reply.content)
        np.testing.assert_array_equal(protocol.answer_from_json(protocol.EmbedAnswer, reply.content).values, expected)
    for content, headers in (
        (protocol.request_to_arrow(request), ARROW),
        (protocol.request_to_json(request), {**JSON, "accept": protocol.ARROW}),
    ):
        reply = await http.post("/v1/embed", content=content, headers=headers)
        assert reply.headers["content-type"] == protocol.ARROW
        np.testing.assert_array_equal(protocol.answer_from_arrow(protocol.EmbedAnswer, reply.content).values, expected)


async def test_score_takes_and_gives_every_format(http: httpx.AsyncClient, tiny_cells: CountMatrix, h5ad: Path) -> None:
    options = ScoreOptions(**FAST)
    request = ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="control", options=options)
    parameters = {"perturbation_key": "perturbation", "control": "control", "options": OPTIONS}
    file = h5ad.read_bytes()
    replies = [
        await http.post("/v1/score", content=protocol.request_to_json(request), headers=JSON),
        await http.post(
            "/v1/score", content=protocol.request_to_arrow(request), headers={"content-type": protocol.ARROW}
        ),
        await http.post("/v1/score", params=parameters, content=file, headers=HDF5),
        await http.post("/v1/score", files={"file": ("cells.h5ad", file)}, data=parameters),
    ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        schemas.given(SCORE).model_validate_json(reply.content)
        answer = reply.json()
        assert answer["results"] == replies[0].json()["results"]
        assert tuple(answer["results"][0]) == SCORE_COLUMNS
        assert answer["meta"]["provenance"]["seed"] == 0
    reply = await http.post("/v1/score", content=protocol.request_to_arrow(request), headers=ARROW)
    assert pa.ipc.open_stream(reply.content).read_all().column_names == list(SCORE_COLUMNS)


async def test_score_of_an_embedding_in_the_file(http: httpx.AsyncClient, h5ad: Path) -> None:
    parameters = {
        "perturbation_key": "perturbation",
        "control": "control",
        "options": OPTIONS,
        "use_rep": "X_pca",
        "batch_key": "batch",
    }
    reply = await http.post("/v1/score", params=parameters, content=h5ad.read_bytes(), headers=HDF5)
    assert reply.status_code == 200, reply.text
    assert reply.json()["meta"]["model_id"] is None
    assert reply.json()["meta"]["coverage"] is None


async def test_compare_over_json_and_file(http: httpx.AsyncClient, tiny_cells: CountMatrix, h5ad: Path) -> None:
    request = CompareRequest(cells=tiny_cells, perturbations=LABELS, options=ScoreOptions(**FAST))
    first = await http.post("/v1/compare", content=protocol.request_to_json(request), headers=JSON)
    parameters = {"perturbation_key": "perturbation", "options": OPTIONS, "pairs": '[["KO", "control"]]'}
    second = await http.post("/v1/compare", params=parameters, content=h5ad.read_bytes(), headers=HDF5)
    for reply in (first, second):
        assert reply.status_code == 200, reply.text
        schemas.given(COMPARE).model_validate_json(reply.content)
        assert tuple(reply.json()["results"][0]) == COMPARE_COLUMNS


async def test_cells_without_a_label_are_left_out_with_a_warning(
    http: httpx.AsyncClient, tiny_cells: CountMatrix, tmp_path: Path
) -> None:
    path = write_h5ad(tiny_cells, tmp_path / "gaps.h5ad", labels=(None, *LABELS[1:-1], ""))
    parameters = {"perturbation_key": "perturbation", "control": "control", "options": OPTIONS}
    reply = await http.post("/v1/score", params=parameters, content=path.read_bytes(), headers=HDF5)
    assert reply.status_code == 200, reply.text
    (row,) = reply.json()["results"]
    assert (row["n_cells"], row["n_controls"]) == (11, 11)
    warnings = reply.json()["meta"]["warnings"]
    assert "2 of 24 cells have no value in obs['perturbation'] and were left out." in warnings


async def test_models(http: httpx.AsyncClient) -> None:
    reply = await http.get("/v1/models")
    schemas.given(MODELS).model_validate_json(reply.content)
    assert reply.json()["models"][0]["name"] == "fake"


Spoil = Callable[[dict[str, Any]], object]
BAD_JSON: dict[str, tuple[Spoil, str, str]] = {
    "negative": (lambda c: c["data"].__setitem__(0, -1), "not_raw_counts", "is negative"),
    "fractional": (lambda c: c["data"].__setitem__(0, 1.5), "not_raw_counts", "fractional"),
    "ragged": (lambda c: c["indptr"].__setitem__(-1, 10**6), "malformed_matrix", "561 values"),
    "column outside": (lambda c: c["indices"].__setitem__(0, 40), "malformed_matrix", "outside the 40"),
    "duplicate gene": (lambda c: c["gene_ids"].__setitem__(0, c["gene_ids"][1]), "duplicate_genes", "more than one"),
    "unknown genes": (lambda c: c.update(gene_ids=[f"x{i}" for i in range(40)]), "unknown_genes", "vocabulary"),
    "text for numbers": (lambda c: c["data"].__setitem__(0, "many"), "malformed_matrix", "data"),
    "genes no strings": (lambda c: c.update(gene_ids=list(range(40))), "malformed_matrix", "gene_ids"),
}


@pytest.mark.parametrize("case", BAD_JSON)
async def test_bad_cells_have_a_typed_error_and_the_server_goes_on(
    http: httpx.AsyncClient, embed_json: dict[str, Any], case: str
) -> None:
    good = json.dumps(embed_json)
    spoil, code, message = BAD_JSON[case]
    spoil(embed_json["cells"])
    bad, well = await asyncio.gather(
        http.post("/v1/embed", json=embed_json), http.post("/v1/embed", content=good, headers=JSON)
    )
    assert (bad.status_code, error_of(bad)["code"]) == (422, code)
    assert message in error_of(bad)["message"]
    assert well.status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", JSON, 422, "unreadable_file"),
        (b"[]", JSON, 422, "invalid_parameter"),
        (b"not arrow", ARROW, 422, "unreadable_file"),
        (b"not hdf5", HDF5, 422, "unreadable_file"),
        (b"", HDF5, 422, "unreadable_file"),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b"--x", {"content-type": "multipart/form-data"}, 422, "invalid_parameter"),
        (b"x", {"content-type": "multipart/form-data; boundary=y"}, 422, "invalid_parameter"),
    ],
    ids=["cut json", "a list", "arrow", "hdf5", "nothing", "text", "no type", "no boundary", "no form"],
)
async def test_bodies_that_cannot_be_read(
    http: httpx.AsyncClient, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    reply = await http.post("/v1/embed", content=content, headers=headers)
    assert (reply.status_code, error_of(reply)["code"]) == (status, code), reply.text


async def test_a_truncated_upload_is_refused_without_a_path_of_the_server(http: httpx.AsyncClient, h5ad: Path) -> None:
    reply = await http.post("/v1/embed", content=h5ad.read_bytes()[:-2000], headers=HDF5)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (422, "unreadable_file")
    assert tempfile.gettempdir() not in error["message"]
    assert "upload.h5ad" in error["message"]


@pytest.mark.parametrize(
    ("route", "parameters", "code", "message"),
    [
        ("embed", {"layer": "nope"}, "missing_column", "nope"),
        ("embed", {"perturbation_key": "x"}, "invalid_parameter", "Unknown parameter 'perturbation_key'"),
        ("embed", {"model": "nope"}, "unknown_model", "there is fake"),
        ("score", {"control": "control"}, "invalid_parameter", "perturbation_key is missing"),
        ("score", {"perturbation_key": "perturbation"}, "invalid_parameter", "control is missing"),
        ("score", {"perturbation_key": "pert", "control": "c"}, "missing_column", "there are: 'perturbation', 'batch'"),
        ("score", {"perturbation_key": "perturbation", "control": "c"}, "control_label_missing", "'c'"),
        (
            "score",
            {"perturbation_key": "perturbation", "control": "control", "options": "{"},
            "invalid_parameter",
            "JSON",
        ),
        (
            "score",
            {"perturbation_key": "perturbation", "control": "control", "options": "[]"},
            "invalid_parameter",
            "not an object",
        ),
        (
            "score",
            {"perturbation_key": "perturbation", "control": "control", "options": '{"metric": 1}'},
            "invalid_parameter",
            "Unknown option",
        ),
        (
            "score",
            {"perturbation_key": "perturbation", "control": "control", "use_rep": "X_umap"},
            "missing_column",
            "X_umap",
        ),
        ("compare", {"perturbation_key": "perturbation", "pairs": '[["a"]]'}, "invalid_parameter", "a pair has two"),
    ],
)
async def test_parameters_of_an_upload_are_checked(
    http: httpx.AsyncClient, h5ad: Path, route: str, parameters: dict[str, str], code: str, message: str
) -> None:
    reply = await http.post(f"/v1/{route}", params=parameters, content=h5ad.read_bytes(), headers=HDF5)
    assert error_of(reply)["code"] == code, reply.text
    assert message in error_of(reply)["message"]


async def test_a_form_needs_its_file(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/embed", files={"cells": ("cells.h5ad", b"x")})
    assert error_of(reply)["field"] == "file"


async def test_query_parameters_beside_a_json_body_are_not_ignored(
    http: httpx.AsyncClient, embed_json: dict[str, Any]
) -> None:
    reply = await http.post("/v1/embed?model=other", json=embed_json)
    assert (reply.status_code, error_of(reply)["field"]) == (422, "model")


async def test_uploads_are_deleted_whatever_happens(
    http: httpx.AsyncClient, h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    file = h5ad.read_bytes()
    for content in (file, file[:-2000], b"x"):
        await http.post("/v1/embed", content=content, headers=HDF5)
        await http.post("/v1/embed", files={"file": ("cells.h5ad", content)})
    (own,) = scratch.iterdir()
    assert [path.name for path in own.iterdir()] == ["lock"]


async def chunks(sent: list[int], size: int = 1000, count: int = 1000) -> AsyncIterator[bytes]:
    for _ in range(count):
        sent.append(size)
        yield bytes(size)


@pytest.mark.parametrize("kind", [protocol.JSON, protocol.ARROW, protocol.HDF5, "multipart/form-data; boundary=x"])
async def test_a_body_over_the_limit_is_refused_while_it_arrives(
    make_engine: MakeEngine, connect: Connect, kind: str
) -> None:
    http = connect(make_engine(max_body_bytes=50_000))
    sent: list[int] = []
    reply = await http.post("/v1/embed", content=chunks(sent), headers={"content-type": kind})
    if not kind.startswith("multipart"):  # zeros are no form, which is noticed even earlier
        assert (reply.status_code, error_of(reply)["code"]) == (413, "limit_exceeded")
        assert "50,000 bytes" in error_of(reply)["message"]
    assert sum(sent) <= 52_000


async def test_a_large_form_is_refused_while_it_arrives(
    make_engine: MakeEngine, connect: Connect, embed_json: dict[str, Any]
) -> None:
    http = connect(make_engine(max_body_bytes=50_000))
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    sent: list[int] = []

    async def form() -> AsyncIterator[bytes]:
        yield head
        async for part in chunks(sent):
            yield part

    kind = {"content-type": "multipart/form-data; boundary=x"}
    reply = await http.post("/v1/embed", content=form(), headers=kind)
    assert (reply.status_code, error_of(reply)["code"]) == (413, "limit_exceeded")
    assert sum(sent) <= 52_000


async def test_a_body_that_says_it_is_too_large_is_not_read(make_engine: MakeEngine, connect: Connect) -> None:
    http = connect(make_engine(max_body_bytes=10))
    reply = await http.post("/v1/embed", content=bytes(11), headers=JSON)
    assert (reply.status_code, error_of(reply)["field"]) == (413, "body")


async def test_a_body_that_does_not_come_is_given_up(make_engine: MakeEngine, connect: Connect) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)
        yield b"}"

    http = connect(make_engine(body_timeout=1))
    reply = await http.post("/v1/embed", content=trickle(), headers=JSON)
    assert reply.status_code == 413
    assert "within 1 seconds" in error_of(reply)["message"]


async def test_overload_says_when_to_come_back(
    make_engine: MakeEngine, connect: Connect, embed_json: dict[str, Any]
) -> None:
    engine = make_engine(max_requests=1)
    http = connect(engine)
    with engine.admission.admit():
        reply = await http.post("/v1/embed", json=embed_json)
    assert (reply.status_code, error_of(reply)["code"]) == (429, "overloaded")
    assert int(reply.headers["retry-after"]) >= 1
    assert (await http.post("/v1/embed", json=embed_json)).status_code == 200


async def test_a_failing_model_is_the_servers_fault(
    http: httpx.AsyncClient, embed_json: dict[str, Any], fake_embedder: Embedder
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    fake_embedder.encoder.error = RuntimeError("out of memory")
    reply = await http.post("/v1/embed", json=embed_json)
    assert (reply.status_code, error_of(reply)["code"]) == (500, "inference_failed")


async def test_a_bug_of_ours_tells_the_caller_where_it_is_logged(
    http: httpx.AsyncClient, engine: Engine, embed_json: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("serving.access.limits.check_shape", broken)
    reply = await http.post("/v1/embed", json=embed_json)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (500, "internal")
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"] in error["message"]
    assert any("ZeroDivisionError" in str(record.exc_text) for record in caplog.records)


async def test_a_request_is_one_line_of_log_without_data(
    http: httpx.AsyncClient, embed_json: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "perturbscope.serving"):
        reply = await http.post("/v1/embed", json=embed_json)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "perturbscope.serving"]
    assert line.startswith(
        f"request={reply.headers['x-request-id']} route=/v1/embed caller=- cells=24 status=200 code=ok"
    )
    assert "inference=" in line
    assert embed_json["cells"]["gene_ids"][0] not in line


async def test_a_client_that_goes_away_costs_no_compute(
    engine: Engine, fake_embedder: Embedder, embed_json: dict[str, Any]
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    gate = fake_embedder.encoder.gate = threading.Event()
    app = app_of(engine)
    gone = asyncio.Event()
    body = json.dumps(embed_json).encode()

    async def call(leave: bool) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        inbox = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop()
            await (gone.wait() if leave else asyncio.Event().wait())
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(dict(message))

        scope = {
            "type": "http", "method": "POST", "path": "/v1/embed", "raw_path": b"/v1/embed", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)
        return sent

    first = asyncio.create_task(call(leave=False))
    async with asyncio.timeout(60):
        while not fake_embedder.encoder.batches:
            await asyncio.sleep(0.001)
    leaving = asyncio.create_task(call(leave=True))
    dispatcher = engine.registry.default.dispatcher
    async with asyncio.timeout(60):
        alone = dispatcher.pending_tokens
        while dispatcher.pending_tokens == alone:
            await asyncio.sleep(0.001)
    gone.set()
    await leaving
    gate.set()
    assert (await first)[0]["status"] == 200
    await dispatcher.close()
    assert len(fake_embedder.encoder.batches) == 1


async def test_unknown_paths_and_methods(http: httpx.AsyncClient) -> None:
    reply = await http.get("/v1/embed")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert error_of(reply)["message"] == "GET is not what '/v1/embed' takes, but POST."
    reply = await http.options("/v1/embed")
    assert (reply.status_code, reply.headers["allow"], reply.content) == (204, "POST", b"")
    reply = await http.get("/v1/nothing")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "invalid_parameter")
    assert "Operations are embed, score, compare, models" in error_of(reply)["message"]
    assert reply.headers["x-request-id"]


async def test_the_openapi_document_is_true(http: httpx.AsyncClient) -> None:
    document = (await http.get("/v1/openapi.json")).json()
    routes = ("embed", "score", "compare", "report", "columns", "models")
    assert {path for path in document["paths"] if path.startswith("/v1")} >= {f"/v1/{name}" for name in routes}
    for name in ("embed", "score", "compare"):
        operation = document["paths"][f"/v1/{name}"]["post"]
        assert set(operation["requestBody"]["content"]) == {
            protocol.JSON,
            protocol.ARROW,
            protocol.HDF5,
            "application/octet-stream",
            "multipart/form-data",
        }
        assert {str(status) for status in (200, *openapi.refusals())} == set(operation["responses"])
        assert "$ref" not in json.dumps(operation["requestBody"])
        schema = operation["requestBody"]["content"][protocol.JSON]["schema"]
        if name != "embed":
            options = schema["properties"]["options"]["anyOf"][0]["properties"]
            assert set(options) == {item.name for item in fields(ScoreOptions)}
    score_row = document["components"]["schemas"]["ScoreRow"]["properties"]
    assert set(score_row) == set(SCORE_COLUMNS)
    assert set(document["components"]["schemas"]["CompareRow"]["properties"]) == set(COMPARE_COLUMNS)


async def test_what_the_document_calls_a_body_is_what_the_decoder_takes(
    http: httpx.AsyncClient, embed_json: dict[str, Any], tiny_cells: CountMatrix
) -> None:
    score = ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="control", batches=LABELS)
    compare = CompareRequest(cells=tiny_cells, perturbations=LABELS, pairs=(("KO", "control"),))
    schemas.taken(EMBED).model_validate(embed_json)
    schemas.taken(SCORE).model_validate_json(protocol.request_to_json(score))
    schemas.taken(COMPARE).model_validate_json(protocol.request_to_json(compare))
    smallest = schemas.taken(EMBED)(cells=schemas.Cells(**embed_json["cells"])).model_dump(exclude_none=True)
    assert (await http.post("/v1/embed", json=smallest)).status_code == 200
