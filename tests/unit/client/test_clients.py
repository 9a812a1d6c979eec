"""Behaviour that all clients share."""

from __future__ import annotations

import asyncio
import inspect
import threading
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anndata as ad
import grpc
import httpx
import numpy as np
import pandas as pd
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import AsyncClient, AsyncGrpcClient, ChunkLimits, Client, GrpcClient, RetryPolicy
from perturbscope.errors import (
    EmptyCellError,
    InferenceError,
    InvalidEmbeddingError,
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    ServerError,
    ServerUnreachableError,
    TooFewControlsError,
    UnknownModelError,
)
from perturbscope.inference.embedder import Embedder
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import ScoreOptions
from tests.ports import free_ports
from tests.unit.client.conftest import done
from tests.unit.client.fake_server import Abort, FakeServer
from tests.unit.protocol.messages import same

Connect = Callable[..., Any]
LABELS = ["a"] * 25 + ["b"] * 25 + ["c"] * 50
OPTIONS = ScoreOptions(permutations=20, repeats=2, seed=3)


def overloaded(kind: Any, hint: str = "0") -> Any:
    """The refusal of an overloaded server, over HTTP or gRPC."""
    if isinstance(kind, (Client, AsyncClient)):
        error = {"error": {"code": "overloaded", "message": "The queue is full.", "field": None}}
        return httpx.Response(429, json=error, headers={"Retry-After": hint})
    return Abort(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "The queue is full.",
        (("perturbscope-code", "overloaded"), ("retry-after", hint)),
    )


def coded(kind: Any, code: str, status: int = 422) -> Any:
    if isinstance(kind, (Client, AsyncClient)):
        return httpx.Response(status, json={"error": {"code": code, "message": "So it is.", "field": "x"}})
    return Abort(grpc.StatusCode.INTERNAL, "So it is.", (("perturbscope-code", code), ("perturbscope-field", "x")))


async def test_embeddings_are_those_of_the_library(
    connect: Connect, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    client = connect()
    found = await done(client.embed_cells(tiny_cells))
    assert same(replace(found, timings={}), replace(fake_embedder.embed(tiny_cells), timings={}))
    assert set(found.timings) == {"tokenize", "inference"}
    await done(client.close())


async def test_chunks_are_put_together_in_order(
    connect: Connect, server: FakeServer, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    client = connect(chunks=ChunkLimits(cells=7), model="second")
    steps: list[int] = []
    found = await done(client.embed_cells(tiny_cells, progress=steps.append))
    assert sorted(steps) == [3, 7, 7, 7]
    assert np.array_equal(found.values, fake_embedder.embed(tiny_cells).values)
    assert sorted(request.cells.first_row for request in server.requests) == [0, 7, 14, 21]  # type: ignore[union-attr]
    assert {request.model for request in server.requests} == {"second"}  # type: ignore[union-attr]
    await done(client.close())


async def test_a_request_over_the_limits_is_halved(
    connect: Connect, server: FakeServer, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    def refuse(answer: Any) -> Any:
        if len(answer) > 5:
            raise LimitExceededError(f"{len(answer)} cells; at most 5 are allowed.", field="cells")
        return answer

    server.change = refuse
    client = connect()
    steps: list[int] = []
    found = await done(client.embed_cells(tiny_cells, progress=steps.append))
    assert steps == [24]
    assert {len(request.cells) for request in server.requests} == {24, 12, 6, 3}  # type: ignore[union-attr]
    assert np.array_equal(found.values, fake_embedder.embed(tiny_cells).values)
    await done(client.close())


async def test_chunks_learn_the_limit_from_each_other(
    connect: Connect, server: FakeServer, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    refused = []

    def refuse(answer: Any) -> Any:
        if len(answer) > 2:
            refused.append(answer)
            raise LimitExceededError("Too large.", field="cells")
        return answer

    server.change = refuse
    client = connect(chunks=ChunkLimits(cells=4, at_a_time=2))
    found = await done(client.embed_cells(tiny_cells))
    assert np.array_equal(found.values, fake_embedder.embed(tiny_cells).values)
    assert len(refused) <= 2, "six chunks, two of them in flight when the limit shows"
    await done(client.close())


async def test_anndata_is_embedded_as_its_counts(connect: Connect, tiny_cells: CountMatrix) -> None:
    adata = ad.AnnData(tiny_cells.counts, var=pd.DataFrame(index=list(tiny_cells.gene_ids)))
    client = connect()
    wanted = (await done(client.embed_cells(tiny_cells))).values
    assert np.array_equal((await done(client.embed_cells(adata))).values, wanted)
    stream = client.embed_stream(adata)
    parts = [part async for part in stream] if hasattr(stream, "__aiter__") else list(stream)
    assert np.array_equal(np.concatenate([part.values for part in parts]), wanted)
    labels = ["control", "KO"] * 12
    options = ScoreOptions(permutations=9, min_cells=4)
    scored = await done(client.score_cells(adata, labels, control="control", options=options))
    assert scored.result.table["n_cells"].tolist() == [12]
    for wrong in ("cells.h5ad", np.ones((2, 2)), None):
        with pytest.raises(InvalidParameterError, match="a CountMatrix or an AnnData object is needed"):
            await done(client.embed_cells(wrong))
    await done(client.close())


@pytest.mark.parametrize("connect", ["http-arrow", "grpc", "async-grpc"], indirect=True)
async def test_chunks_are_in_flight_together(connect: Connect, server: FakeServer, tiny_cells: CountMatrix) -> None:
    both = threading.Barrier(2, timeout=20)

    def meet(answer: Any) -> Any:
        both.wait()
        return answer

    server.change = meet
    client = connect(chunks=ChunkLimits(cells=6, at_a_time=2))
    assert len(await done(client.embed_cells(tiny_cells))) == 24
    await done(client.close())


async def test_an_error_of_one_chunk_ends_the_others(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    def refuse(answer: Any) -> Any:
        raise EmptyCellError("Row 0 is empty.", field="counts")

    server.change = refuse
    client = connect(chunks=ChunkLimits(cells=1, at_a_time=2))
    with pytest.raises(EmptyCellError, match=r"^Row 0 is empty\.$"):
        await done(client.embed_cells(tiny_cells))
    assert len(server.requests) <= 3, "two were in flight"
    await done(client.close())


async def test_an_error_of_the_progress_callback_reaches_the_caller(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    def interrupt(cells: int) -> None:
        raise KeyError("stop")

    client = connect(chunks=ChunkLimits(cells=1, at_a_time=1))
    with pytest.raises(KeyError):
        await done(client.embed_cells(tiny_cells, progress=interrupt))
    await done(client.close())


async def test_a_cancelled_caller_sends_nothing_more(
    server: FakeServer, grpc_target: str, tiny_cells: CountMatrix
) -> None:
    arrived, release = threading.Event(), threading.Event()

    def hold(answer: Any) -> Any:
        arrived.set()
        assert release.wait(20)
        return answer

    server.change = hold
    async with AsyncGrpcClient(grpc_target, chunks=ChunkLimits(cells=1, at_a_time=1)) as client:
        task = asyncio.ensure_future(client.embed_cells(tiny_cells))
        await asyncio.to_thread(arrived.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
    assert len(server.requests) == 1


async def test_one_cell_over_the_limits_is_an_error(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    def refuse(answer: Any) -> Any:
        raise LimitExceededError("Too large.", field="cells")

    server.change = refuse
    client = connect()
    with pytest.raises(LimitExceededError, match=r"^Too large\.$"):
        await done(client.embed_cells(tiny_cells))
    assert [len(request.cells) for request in server.requests] == [24, 12, 6, 3, 1]  # type: ignore[union-attr]
    await done(client.close())


async def test_vectors_of_two_models_are_never_mixed(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    names = iter("abcd")
    server.change = lambda answer: replace(answer, model_id=next(names))
    client = connect(chunks=ChunkLimits(cells=10))
    with pytest.raises(ServerError, match="went from the model"):
        await done(client.embed_cells(tiny_cells))
    await done(client.close())


async def test_an_answer_for_fewer_cells_is_refused(
    connect: Connect, server: FakeServer, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    server.change = lambda answer: fake_embedder.embed(tiny_cells[:3])
    client = connect()
    with pytest.raises(ServerError, match="3 rows for 24 cells"):
        await done(client.embed_cells(tiny_cells))
    await done(client.close())


async def test_scores_are_those_of_the_library(connect: Connect, rng: np.random.Generator) -> None:
    values = rng.normal(size=(100, 4)).astype(np.float32)
    batches = ["1", "2"] * 50
    client = connect()
    found = await done(client.score(values, LABELS, control="c", batches=batches, options=OPTIONS))
    direct = score_perturbations(values, LABELS, control="c", batches=batches, options=OPTIONS)
    pd.testing.assert_frame_equal(found.table, direct.table, check_exact=True)
    assert found.warnings == direct.warnings
    assert found.provenance["options"] == direct.provenance["options"]
    await done(client.close())


async def test_comparisons_are_those_of_the_library(connect: Connect, rng: np.random.Generator) -> None:
    values = rng.normal(size=(100, 4))
    client = connect()
    found = await done(client.compare(values, pd.Series(LABELS), pairs=[("a", "b")], options=OPTIONS))
    direct = compare_perturbations(values.astype(np.float32), LABELS, pairs=[("a", "b")], options=OPTIONS)
    pd.testing.assert_frame_equal(found.table, direct.table, check_exact=True)
    await done(client.close())


async def test_cells_are_scored_and_compared_in_one_request(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    client = connect()
    options = ScoreOptions(permutations=10, repeats=1, min_cells=2)
    labels = ["a"] * 8 + ["c"] * 16
    scored = await done(client.score_cells(tiny_cells, labels, control="c", options=options))
    assert scored.result.table["perturbation"].tolist() == ["a"]
    compared = await done(client.compare_cells(tiny_cells, labels, options=options))
    assert compared.result.table[["a", "b"]].values.tolist() == [["a", "c"]]
    assert [type(request) for request in server.requests] == [protocol.ScoreRequest, protocol.CompareRequest]
    await done(client.close())


async def test_models(connect: Connect) -> None:
    client = connect(model="second")
    assert [model.name for model in await done(client.models())] == ["first", "second"]
    if not inspect.iscoroutinefunction(client.close):
        assert client.model_id == "second-1-0123456789ab"
        assert connect().model_id == "first-1-0123456789ab"
        assert connect(model="second@1").model_id == "second-1-0123456789ab"
        with pytest.raises(UnknownModelError, match="it has first, second"):
            _ = connect(model="third").model_id
    await done(client.close())


async def test_errors_of_the_server_are_those_of_the_library(connect: Connect) -> None:
    client = connect()
    with pytest.raises(TooFewControlsError) as caught:
        await done(client.score(np.eye(3), ["a", "a", "c"], control="c"))
    assert caught.value.field == "control"
    await done(client.close())


async def test_a_row_in_a_message_is_the_row_of_all_cells(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    matrix = np.zeros((24, 41), dtype=np.int32)
    matrix[:, :40] = tiny_cells.counts.toarray()
    matrix[17] = 0
    matrix[17, 40] = 1
    cells = CountMatrix.from_matrix(matrix, [*tiny_cells.gene_ids, "no-such-gene"])
    client = connect(chunks=ChunkLimits(cells=5))
    with pytest.raises(EmptyCellError, match=r"\b17\b"):
        await done(client.embed_cells(cells))
    await done(client.close())


@pytest.mark.parametrize(
    ("values", "labels", "kind"),
    [
        ([[1.0, np.nan]], ["a"], InvalidEmbeddingError),
        ([["1"]], ["a"], InvalidEmbeddingError),
        ([1.0], ["a"], InvalidEmbeddingError),
        ([[1.0]], ["a", "b"], InvalidParameterError),
        ([[1.0]], [1], InvalidParameterError),
        ([[1.0]], "a", InvalidParameterError),
    ],
    ids=["nan", "text", "flat", "labels", "numbers", "string"],
)
async def test_bad_input_does_not_leave_the_client(
    connect: Connect, server: FakeServer, values: Any, labels: Any, kind: type[Exception]
) -> None:
    client = connect()
    if labels == "a":
        labels = "ab"
    with pytest.raises(kind):
        await done(client.score(np.array(values), labels, control="c"))
    assert not server.requests
    await done(client.close())


async def test_overload_is_retried(connect: Connect, server: FakeServer, tiny_cells: CountMatrix) -> None:
    client = connect()
    server.failures = [overloaded(client), overloaded(client)]
    assert len(await done(client.embed_cells(tiny_cells))) == 24
    assert len(server.requests) == 1
    await done(client.close())


async def test_overload_that_stays_is_told(connect: Connect, server: FakeServer, tiny_cells: CountMatrix) -> None:
    client = connect(retries=RetryPolicy(attempts=2, first=0.0))
    server.failures = [overloaded(client), overloaded(client, hint="7.5"), overloaded(client)]
    with pytest.raises(OverloadedError, match=r"^The queue is full\.$") as caught:
        await done(client.embed_cells(tiny_cells))
    assert caught.value.retry_after == 7.5
    assert len(server.failures) == 1, "two attempts"
    await done(client.close())


@pytest.mark.parametrize(
    ("code", "kind"), [("inference_failed", InferenceError), ("empty_cell", EmptyCellError), ("from_2031", ServerError)]
)
async def test_other_errors_are_not_retried(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix, code: str, kind: type[Exception]
) -> None:
    client = connect()
    server.failures = [coded(client, code), coded(client, code)]
    with pytest.raises(kind, match=r"^So it is\.$") as caught:
        await done(client.embed_cells(tiny_cells))
    assert caught.value.field == "x"  # type: ignore[attr-defined]
    assert len(server.failures) == 1
    await done(client.close())


@pytest.mark.parametrize(
    "make",
    [
        lambda port, **options: Client(f"http://127.0.0.1:{port}", **options),
        lambda port, **options: AsyncClient(f"http://127.0.0.1:{port}", **options),
        lambda port, **options: GrpcClient(f"grpc://127.0.0.1:{port}", **options),
        lambda port, **options: AsyncGrpcClient(f"127.0.0.1:{port}", **options),
    ],
    ids=["http", "async-http", "grpc", "async-grpc"],
)
async def test_a_refused_connection(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    port = free_ports(1)[0]
    client = make(port, retries=RetryPolicy(attempts=2, first=0.0))
    with pytest.raises(ServerUnreachableError, match=str(port)):
        await done(client.models())
    await done(client.close())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Client("localhost:3000"),
        lambda: Client("ftp://localhost"),
        lambda: AsyncClient("http://"),
        lambda: Client("http://localhost", timeout=0),
        lambda: Client("http://localhost", body="pickle"),  # type: ignore[arg-type]
        lambda: GrpcClient("http://localhost:3001"),
        lambda: GrpcClient(""),
        lambda: GrpcClient("localhost:3001", timeout=-1),
        lambda: RetryPolicy(attempts=0),
        lambda: RetryPolicy(first=float("nan")),
        lambda: ChunkLimits(cells=0),
    ],
)
def test_bad_parameters(make: Any) -> None:
    with pytest.raises(InvalidParameterError):
        make()


def test_clients_are_context_managers(server: FakeServer, tiny_cells: CountMatrix) -> None:
    with Client("http://server", transport=httpx.MockTransport(server.http)) as client:
        assert len(client.embed_cells(tiny_cells)) == 24
    with pytest.raises(RuntimeError, match="closed"):
        client.models()


async def test_async_clients_are_context_managers(grpc_target: str, tiny_cells: CountMatrix) -> None:
    async with AsyncGrpcClient(grpc_target) as client:
        assert len(await client.embed_cells(tiny_cells)) == 24


def test_grpc_message_above_the_limit_of_the_server_is_halved(
    server: FakeServer, grpc_target: str, rng: np.random.Generator, tiny_cells: CountMatrix
) -> None:
    cells = tiny_cells[np.tile(np.arange(24), 400)]
    with GrpcClient(grpc_target, chunks=ChunkLimits(cells=10_000)) as client:
        steps: list[int] = []
        found = client.embed_cells(cells, progress=steps.append)
    assert len(found) == len(cells) == sum(steps)
    assert len(server.requests) > 1


def test_grpc_too_late(server: FakeServer, grpc_target: str, tiny_cells: CountMatrix) -> None:
    server.embedder.encoder.delay = 0.5  # type: ignore[attr-defined]
    with (
        GrpcClient(grpc_target, timeout=0.1) as client,
        pytest.raises(ServerUnreachableError, match="longer timeout"),
    ):
        client.embed_cells(tiny_cells)
    assert len(server.requests) == 1, "a server that may still be computing is not given the same work again"


def test_blocking_and_asynchronous_methods_have_one_signature() -> None:
    for name in ("models", "embed_cells", "score", "score_cells", "compare", "compare_cells"):
        method, awaited = getattr(Client, name), getattr(AsyncClient, name)
        assert inspect.signature(method) == inspect.signature(awaited)
        assert method.__doc__ == awaited.__doc__
        assert inspect.iscoroutinefunction(awaited)
        assert "Conversation" not in str(inspect.signature(method))
        assert typing.get_type_hints(method)["return"] is not None
