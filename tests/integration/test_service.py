"""The real service over HTTP and gRPC: the same answers as offline, typed errors, health, an orderly end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import grpc
import httpx
import numpy as np
import pandas as pd
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from perturbscope import errors, protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import AsyncClient, AsyncGrpcClient, Client, GrpcClient, RetryPolicy
from perturbscope.families.tokens import pad
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from tests.bundles import write_tiny_bundle
from tests.integration.server import ROOT, RunningServer, environment
from tests.ports import free_ports

TOLERANCE = 1e-6
"""Largest difference of a value that is allowed between routes: a padded sum may be taken in another order."""
OPTIONS = ScoreOptions(permutations=99, min_cells=4, repeats=2)
LABELS = ["control"] * 12 + ["KO"] * 12
MAX_CELLS = 200


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    with RunningServer(folder, bundle=bundle, max_cells=MAX_CELLS, max_body_bytes=1_000_000) as running:
        yield running


@pytest.fixture(scope="module")
def embedder(bundle: Path) -> Embedder:
    return Embedder.from_bundle(Bundle.open(bundle), threads=1)


@pytest.fixture
def offline(embedder: Embedder, tiny_cells: CountMatrix) -> NDArray[np.float32]:
    return embedder.embed(tiny_cells).values


@pytest.fixture
def h5ad(tiny_cells: CountMatrix, tmp_path: Path) -> bytes:
    obs = pd.DataFrame({"perturbation": LABELS}, index=[f"cell{i}" for i in range(24)])
    var = pd.DataFrame(index=tiny_cells.gene_ids.astype(object))
    ad.AnnData(tiny_cells.counts.astype(np.float32), obs=obs, var=var).write_h5ad(tmp_path / "cells.h5ad")
    return (tmp_path / "cells.h5ad").read_bytes()


@pytest.fixture(params=["http-json", "http-arrow", "grpc"])
def client(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Client | GrpcClient]:
    retries = RetryPolicy(attempts=1)
    made: Client | GrpcClient
    if request.param == "grpc":
        made = GrpcClient(server.target, retries=retries)
    else:
        made = Client(server.url, body="json" if request.param == "http-json" else "arrow", retries=retries)
    yield made
    made.close()


def test_it_says_what_it_serves_and_where(server: RunningServer, bundle: Path) -> None:
    assert f"gRPC on {server.target}" in server.output
    assert f":{server.http_port}" in server.output
    assert f"Serving {Bundle.open(bundle).model_id} (fp32, cpu)" in server.output


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz", "/metrics"])
def test_bentoml_answers_its_probes(server: RunningServer, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/models/a%2Fb/load", 404),
        ("POST", "/v1/models//load", 404),
        ("POST", "/v1/models/../load", 404),
        ("GET", "/v1/models/a%00b%0A/vocabulary/", 404),
        ("GET", "/docs.json", 404),
        ("GET", "/schema.json", 404),
        ("GET", "/static_content/index.html", 404),
        ("DELETE", "/v1/embed", 405),
    ],
)
def test_paths_without_a_route_are_answered_in_json(server: RunningServer, method: str, path: str, status: int) -> None:
    """BentoML looks for a path before our routes do, and would answer with text, or send the caller elsewhere."""
    reply = httpx.request(method, f"{server.url}{path}", timeout=30)
    assert reply.status_code == status
    assert reply.headers["content-type"] == protocol.JSON
    assert reply.json()["error"]["code"] == "invalid_parameter"
    assert reply.headers["x-request-id"]


def test_the_documents_describe_the_routes(server: RunningServer) -> None:
    routes = {f"/v1/{name}" for name in ("embed", "score", "compare", "report", "columns", "models")}
    routes |= {"/v1/models/{name}/load", "/v1/models/{name}/unload", "/v1/repository"}
    assert routes <= set(httpx.get(f"{server.url}/v1/openapi.json").json()["paths"])


def test_the_open_inference_protocol_is_served_beside_bentomls_own_routes(
    server: RunningServer, embedder: Embedder, tiny_cells: CountMatrix, offline: NDArray[np.float32]
) -> None:
    tokens = embedder.tokenize(tiny_cells)
    arrays = pad(tokens, np.arange(len(tokens)), embedder.family.inputs)
    inputs = [
        {"name": name, "datatype": "INT64", "shape": values.shape, "parameters": {"binary_data_size": values.nbytes}}
        for name, values in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    with httpx.Client(base_url=f"{server.url}/v2") as http:
        assert http.get("/health/ready").json() == {"ready": True}
        assert http.get("/models/tiny").json()["outputs"][0]["shape"] == [-1, embedder.width]
        body = head + b"".join(values.astype("<i8").tobytes() for values in arrays.values())
        length = "inference-header-content-length"
        reply = http.post("/models/tiny/infer", content=body, headers={length: str(len(head))})
        values = np.frombuffer(reply.content[int(reply.headers[length]) :], "<f4")
        np.testing.assert_allclose(values.reshape(offline.shape), offline, rtol=0, atol=1e-5)
        reply = http.put("/models/tiny")
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET")


def test_models(client: Client | GrpcClient, bundle: Path) -> None:
    (model,) = client.models()
    assert model.model_id == Bundle.open(bundle).model_id
    assert (model.variant, model.device) == ("fp32", "cpu")


def test_vectors_are_those_of_offline(
    client: Client | GrpcClient, tiny_cells: CountMatrix, offline: NDArray[np.float32], embedder: Embedder
) -> None:
    answer = client.embed_cells(tiny_cells)
    np.testing.assert_allclose(answer.values, offline, rtol=0, atol=TOLERANCE)
    assert answer.model_id == embedder.model_id
    assert answer.vocabulary_hash == embedder.vocabulary_hash
    assert answer.coverage.n_matched == 40
    assert {"tokenize", "queue", "inference"} <= set(answer.timings)


def test_a_vector_is_the_same_alone_and_in_any_order(
    client: Client | GrpcClient, tiny_cells: CountMatrix, offline: NDArray[np.float32], rng: np.random.Generator
) -> None:
    order = rng.permutation(24)
    np.testing.assert_allclose(client.embed_cells(tiny_cells[order]).values, offline[order], rtol=0, atol=TOLERANCE)
    for row in (0, 11, 23):
        alone = client.embed_cells(tiny_cells[row : row + 1]).values
        np.testing.assert_allclose(alone[0], offline[row], rtol=0, atol=TOLERANCE)


async def test_a_vector_is_the_same_whoever_shares_its_batch(
    server: RunningServer, tiny_cells: CountMatrix, offline: NDArray[np.float32], rng: np.random.Generator
) -> None:
    """Forty concurrent callers over both transports, with random parts of the cells."""
    http, rpc = AsyncClient(server.url), AsyncGrpcClient(server.target)
    parts = [rng.choice(24, size=rng.integers(1, 24), replace=False) for _ in range(40)]
    answers = await asyncio.gather(*((http, rpc)[i % 2].embed_cells(tiny_cells[part]) for i, part in enumerate(parts)))
    for part, answer in zip(parts, answers, strict=True):
        np.testing.assert_allclose(answer.values, offline[part], rtol=0, atol=TOLERANCE)
    await http.close()
    await rpc.close()


def test_files_are_taken_as_body_and_as_form(server: RunningServer, h5ad: bytes, offline: NDArray[np.float32]) -> None:
    body = httpx.post(f"{server.url}/v1/embed", content=h5ad, headers={"content-type": protocol.HDF5})
    form = httpx.post(f"{server.url}/v1/embed", files={"file": ("cells.h5ad", h5ad)})
    for reply in (body, form):
        assert reply.status_code == 200, reply.text
        np.testing.assert_allclose(reply.json()["embeddings"], offline, rtol=0, atol=TOLERANCE)


def test_scores_are_those_of_offline(
    client: Client | GrpcClient, tiny_cells: CountMatrix, offline: NDArray[np.float32]
) -> None:
    expected = score_perturbations(offline, LABELS, control="control", options=OPTIONS)
    given = client.score(offline, LABELS, control="control", options=OPTIONS)
    pd.testing.assert_frame_equal(given.table, expected.table)
    assert given.provenance["seed"] == 0
    assert given.provenance["options"] == OPTIONS.to_dict()


def test_scores_of_a_file_are_those_of_its_cells(
    server: RunningServer, h5ad: bytes, offline: NDArray[np.float32]
) -> None:
    parameters = {
        "perturbation_key": "perturbation",
        "control": "control",
        "options": json.dumps(OPTIONS.to_dict()),
    }
    reply = httpx.post(
        f"{server.url}/v1/score", params=parameters, content=h5ad, headers={"content-type": protocol.HDF5}
    )
    assert reply.status_code == 200, reply.text
    expected = score_perturbations(offline, LABELS, control="control", options=OPTIONS).table.iloc[0]
    (row,) = reply.json()["results"]
    for name in ("distance", "z", "p", "q"):
        assert row[name] == pytest.approx(expected[name], abs=1e-4)
    meta = reply.json()["meta"]
    assert meta["coverage"]["n_matched"] == 40
    assert {"tokenize", "queue", "inference", "score"} == set(meta["timings"])
    for name in ("estimator", "null", "seed"):
        assert name in meta["provenance"] or name in meta["provenance"]["options"]


def test_comparisons_are_those_of_offline(client: Client | GrpcClient, offline: NDArray[np.float32]) -> None:
    labels = ["A"] * 8 + ["B"] * 8 + ["control"] * 8
    expected = compare_perturbations(offline, labels, options=OPTIONS)
    given = client.compare(offline, labels, options=OPTIONS)
    pd.testing.assert_frame_equal(given.table, expected.table)


Cells = dict[str, Any]


def empty_first_cell(cells: Cells) -> None:
    n_values = cells["indptr"][1]
    cells["data"][:n_values] = [0] * n_values


def unknown_from(cells: Cells, column: int) -> None:
    cells["gene_ids"][column:] = [f"x{i}" for i in range(40 - column)]


BAD_CELLS: dict[str, tuple[Callable[[Cells], object], type[errors.PerturbScopeError]]] = {
    "negative": (lambda c: c["data"].__setitem__(3, -1), errors.NotRawCountsError),
    "fractional": (lambda c: c["data"].__setitem__(3, 1.5), errors.NotRawCountsError),
    "log-normalised": (lambda c: c.update(data=np.log1p(c["data"]).tolist()), errors.NotRawCountsError),
    "NaN": (lambda c: c["data"].__setitem__(3, float("nan")), errors.NotRawCountsError),
    "empty cell": (lambda c: empty_first_cell(c), errors.EmptyCellError),
    "no known gene": (lambda c: unknown_from(c, 0), errors.UnknownGenesError),
    "low coverage": (lambda c: unknown_from(c, 2), errors.UnknownGenesError),
    "duplicate gene": (lambda c: c["gene_ids"].__setitem__(0, c["gene_ids"][1]), errors.DuplicateGenesError),
    "ragged": (lambda c: c["indptr"].__setitem__(-1, c["indptr"][-1] + 1), errors.MalformedMatrixError),
    "column outside": (lambda c: c["indices"].__setitem__(0, 40), errors.MalformedMatrixError),
}


def spoilt(cells: CountMatrix, spoil: Callable[[Cells], object]) -> Cells:
    body: dict[str, Any] = json.loads(protocol.request_to_json(EmbedRequest(cells=cells)))
    del body["cells"]["total_counts"]
    spoil(body["cells"])
    part: Cells = body["cells"]
    return part


def grpc_message(cells: Cells) -> Any:
    return pb.EmbedRequest(
        cells=pb.CountMatrix(
            gene_ids=cells["gene_ids"],
            indptr=np.asarray(cells["indptr"], "<i8").tobytes(),
            indices=np.asarray(cells["indices"], "<i4").tobytes(),
            data=np.asarray(cells["data"], "<f8").tobytes(),
            data_type=pb.COUNT_TYPE_FLOAT64,
        )
    )


@pytest.mark.parametrize("case", BAD_CELLS)
async def test_bad_cells_fail_alike_on_both_transports_and_harm_nobody(
    server: RunningServer, tiny_cells: CountMatrix, offline: NDArray[np.float32], case: str
) -> None:
    spoil, kind = BAD_CELLS[case]
    cells = spoilt(tiny_cells, spoil)
    mates = [AsyncClient(server.url), AsyncGrpcClient(server.target)]
    async with httpx.AsyncClient() as http, grpc.aio.insecure_channel(server.target) as channel:
        waiting = [asyncio.ensure_future(mate.embed_cells(tiny_cells)) for mate in mates]
        body = json.dumps({"cells": cells})
        reply = await http.post(f"{server.url}/v1/embed", content=body, headers={"content-type": protocol.JSON})
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await PerturbScopeStub(channel).Embed(grpc_message(cells))
    metadata = dict(raised.value.trailing_metadata() or ())
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert metadata["perturbscope-code"] == kind.code
    assert reply.status_code == 422
    assert reply.json()["error"]["code"] == kind.code
    assert reply.json()["error"]["message"] == raised.value.details()
    for mate, answer in zip(mates, await asyncio.gather(*waiting), strict=True):
        np.testing.assert_allclose(answer.values, offline, rtol=0, atol=TOLERANCE)
        await mate.close()


def test_bad_requests_raise_their_own_errors(
    client: Client | GrpcClient, tiny_cells: CountMatrix, offline: NDArray[np.float32]
) -> None:
    with pytest.raises(errors.ControlLabelMissingError, match="ctrl"):
        client.score(offline, LABELS, control="ctrl", options=OPTIONS)
    with pytest.raises(errors.TooFewControlsError):
        client.score(offline, LABELS, control="control", options=ScoreOptions(min_cells=20))
    with pytest.raises(errors.TooFewCellsError):
        client.score(offline, ["control"] * 21 + ["KO"] * 3, control="control", options=ScoreOptions(min_cells=20))
    with pytest.raises(errors.LimitExceededError, match="permutations"):
        client.score(offline, LABELS, control="control", options=ScoreOptions(permutations=1_000_000))
    client.model = "nope"
    with pytest.raises(errors.UnknownModelError, match="tiny"):
        client.embed_cells(tiny_cells)


def test_a_request_over_the_limits_is_refused_or_halved(server: RunningServer, tiny_cells: CountMatrix) -> None:
    many = CountMatrix.from_matrix(np.tile(tiny_cells.counts.toarray(), (10, 1)), tiny_cells.gene_ids)
    body = protocol.request_to_arrow(EmbedRequest(cells=many))
    reply = httpx.post(f"{server.url}/v1/embed", content=body, headers={"content-type": protocol.ARROW})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "limit_exceeded")
    assert f"this server takes {MAX_CELLS}" in reply.json()["error"]["message"]
    with Client(server.url) as client:
        assert len(client.embed_cells(many)) == 240


def test_a_body_over_the_limit_is_refused(server: RunningServer) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(100_000)

    try:
        reply = httpx.post(f"{server.url}/v1/embed", content=endless(), headers={"content-type": protocol.JSON})
    except httpx.WriteError:  # the server answered, and closed, before all was sent
        reply = httpx.post(f"{server.url}/v1/embed", content=bytes(1_000_001), headers={"content-type": protocol.JSON})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "limit_exceeded")


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"\x89HDF\r\n\x1a\n truncated", protocol.HDF5), (b"PK\x03\x04", protocol.HDF5), (b"ARROW1", protocol.ARROW)],
    ids=["truncated", "a zip", "no stream"],
)
def test_files_that_are_none_are_refused(server: RunningServer, content: bytes, kind: str) -> None:
    reply = httpx.post(f"{server.url}/v1/embed", content=content, headers={"content-type": kind})
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "unreadable_file")


def test_health_and_reflection(server: RunningServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", "perturbscope.v1.PerturbScope"):
            reply = check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        ask = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask)
        assert "perturbscope.v1.PerturbScope" in {item.name for item in listed.list_services_response.service}


def test_the_log_has_a_line_a_request_and_no_data(server: RunningServer, tiny_cells: CountMatrix) -> None:
    with Client(server.url) as client:
        client.embed_cells(tiny_cells)
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert any(
        (line.get("route"), line.get("cells"), line.get("status"), line.get("code")) == ("/v1/embed", 24, 200, "ok")
        for line in lines
    )
    assert str(tiny_cells.gene_ids[0]) not in server.log
    assert "Traceback" not in server.log


def test_it_finishes_what_it_accepted_when_told_to_stop(bundle: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((1200, 32)).astype(np.float32)
    labels = ["control"] * 600 + ["KO"] * 600
    slow = ScoreOptions(metrics=("wasserstein",), max_cells=600, wasserstein_permutations=300, repeats=2, seed=1)
    answers: dict[str, Any] = {}
    with RunningServer(tmp_path, bundle=bundle, score_workers=2) as running:
        clients = {"http": Client(running.url), "grpc": GrpcClient(running.target)}

        def ask(name: str) -> None:
            answers[name] = clients[name].score(vectors, labels, control="control", options=slow)

        threads = [threading.Thread(target=ask, args=[name]) for name in clients]
        for thread in threads:
            thread.start()
        while "perturbscope_score_jobs_in_progress 2" not in httpx.get(f"{running.url}/metrics").text:
            assert not answers, "the scores must still be in progress for this test to mean anything"
            time.sleep(0.05)
        assert running.stop() == 0
        for thread in threads:
            thread.join(60)
        for item in clients.values():
            item.close()
    assert set(answers) == {"http", "grpc"}
    pd.testing.assert_frame_equal(answers["http"].table, answers["grpc"].table)


def start(*arguments: str, module: str = "serving", **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a server that must not start."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment(**settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_absent_accelerator_keeps_it_from_starting(bundle: Path) -> None:
    http, rpc = free_ports(2)
    ended = start("--device", "cuda", "--http-port", str(http), "--grpc-port", str(rpc), bundle=bundle)
    assert ended.returncode == 1
    assert "'cuda' was asked for" in ended.stderr.splitlines()[-1]
    arguments = ["serve", "serving.service:PerturbScope", "--port", str(http)]
    ended = start(*arguments, module="bentoml", bundle=bundle, device="cuda", grpc_port=rpc)
    assert ended.returncode != 0
    assert ended.stderr.splitlines()[-1].startswith("perturbscope.errors.ProviderUnavailableError: The device 'cuda'")


def test_what_cannot_be_served_is_said_in_one_line(bundle: Path, tmp_path: Path) -> None:
    http, rpc = free_ports(2)
    ports = {"http_port": http, "grpc_port": rpc}
    damaged = write_tiny_bundle(tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:-1] + b"\0")
    for settings, code, message in (
        ({"bundle": tmp_path / "nothing"}, 2, "is not a bundle"),
        ({"bundle": damaged}, 2, "SHA-256"),
        ({"bundle": bundle, "variant": "int4"}, 2, "has no variant 'int4'"),
        ({"bundle": bundle, "max_cells": "many"}, 2, "PERTURBSCOPE_MAX_CELLS is 'many'"),
    ):
        ended = start(**{**ports, **settings})
        assert (ended.returncode, len(ended.stderr.splitlines())) == (code, 1), ended.stderr
        assert message in ended.stderr


def test_a_taken_port_is_said(server: RunningServer, bundle: Path) -> None:
    (free,) = free_ports(1)
    for ports in ((server.http_port, free), (free, server.grpc_port)):
        ended = start(bundle=bundle, host="127.0.0.1", http_port=ports[0], grpc_port=ports[1])
        assert ended.returncode == 2
        assert "Address already in use. Stop what listens there" in ended.stderr
