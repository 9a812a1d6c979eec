from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.client import ChunkLimits, RetryPolicy
from perturbscope.client.conversation import Failure
from perturbscope.client.streams import Flight
from perturbscope.errors import (
    InferenceError,
    InvalidParameterError,
    LimitExceededError,
    MalformedMatrixError,
    NotRawCountsError,
    OverloadedError,
    ServerError,
    ServerUnreachableError,
    UnknownModelError,
)
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import Embeddings, join
from perturbscope.protocol import error_to_json
from tests.unit.client.fake_server import Abort, FakeServer

Connect = Callable[..., Any]


async def collect(stream: Any) -> list[Embeddings]:
    """Collect the results of a blocking or of an asynchronous client."""
    if hasattr(stream, "__aiter__"):
        return [found async for found in stream]
    return list(stream)


def cut(cells: CountMatrix, *sizes: int) -> Iterator[CountMatrix]:
    at = 0
    for size in sizes:
        yield cells[at : at + size]
        at += size


def rows_of(server: FakeServer) -> list[int]:
    """First row of each request that the server answered."""
    return [request.cells.first_row for request in server.requests if hasattr(request, "cells")]  # type: ignore[union-attr]


async def test_a_stream_gives_one_result_a_chunk_with_the_vectors_of_all(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    steps: list[int] = []
    client = connect(chunks=ChunkLimits(cells=4))
    found = await collect(client.embed_stream(cut(tiny_cells, 10, 1, 13), progress=steps.append))
    assert [len(part) for part in found] == [10, 1, 13]
    assert steps == [4, 4, 2, 1, 4, 4, 4, 1]
    whole, joined = fake_embedder.embed(tiny_cells), join(found)
    for name in ("values", "lengths", "n_detected", "known_share"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert (joined.maker, joined.coverage) == (whole.maker, whole.coverage)
    assert sorted(rows_of(server)) == [0, 4, 8, 10, 11, 15, 19, 23]


async def test_no_chunks_need_no_server(connect: Connect, server: FakeServer) -> None:
    assert await collect(connect().embed_stream(iter([]))) == []
    assert server.requests == []


async def test_the_next_chunk_is_taken_when_there_is_room(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    taken: list[int] = []

    def chunks() -> Iterator[CountMatrix]:
        for number in range(24):
            taken.append(number)
            yield tiny_cells[number : number + 1]

    stream = connect(chunks=ChunkLimits(at_a_time=3)).embed_stream(chunks())
    first = await anext(stream) if hasattr(stream, "__anext__") else next(stream)
    assert len(first) == 1
    assert len(taken) == 3
    assert len(await collect(stream)) == 23


async def test_a_bad_chunk_ends_the_stream_after_the_results_before_it(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    def refuse(answer: Embeddings) -> Embeddings:
        if rows_of(server)[-1] == 12:
            raise NotRawCountsError("the value in row 12 is negative", field="counts")
        return answer

    server.change = refuse
    results: list[Embeddings] = []
    stream = connect(chunks=ChunkLimits(at_a_time=1)).embed_stream(cut(tiny_cells, 6, 6, 6, 6))
    with pytest.raises(NotRawCountsError, match="row 12"):
        await _into(results, stream)
    assert len(results) == 2


async def _into(results: list[Embeddings], stream: Any) -> None:
    if hasattr(stream, "__aiter__"):
        async for found in stream:
            results.append(found)
    else:
        for found in stream:
            results.append(found)


async def test_chunks_of_other_genes_are_refused(connect: Connect, tiny_cells: CountMatrix) -> None:
    other = CountMatrix.from_matrix(np.ones((2, 2)), ["ENSG00000000003", "ENSG00000000005"])
    with pytest.raises(MalformedMatrixError, match="chunk that begins with row 24 has other genes"):
        await collect(connect().embed_stream(iter([tiny_cells, other])))
    with pytest.raises(MalformedMatrixError, match="has no cells"):
        await collect(connect().embed_stream(iter([tiny_cells[:0]])))


async def test_an_error_of_the_callers_own_iterable_comes_through(connect: Connect, tiny_cells: CountMatrix) -> None:
    def chunks() -> Iterator[CountMatrix]:
        yield tiny_cells
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await collect(connect().embed_stream(chunks()))


def overloaded(connect: Connect, request: pytest.FixtureRequest) -> Any:
    """The refusal of an overloaded server, over the client's transport."""
    if "grpc" in request.node.callspec.params["connect"]:
        return Abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "full",
            (("perturbscope-code", "overloaded"), ("retry-after", "0")),
        )
    error = OverloadedError("full", retry_after=0.0)
    return httpx.Response(429, content=error_to_json(error), headers={"retry-after": "0"})


def lost(connect: Connect, request: pytest.FixtureRequest) -> Any:
    if "grpc" in request.node.callspec.params["connect"]:
        return Abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    return httpx.ReadError("connection reset")


@pytest.mark.parametrize("failure", [overloaded, lost])
async def test_a_broken_stream_goes_on_where_it_was_not_answered(
    connect: Connect,
    server: FakeServer,
    tiny_cells: CountMatrix,
    fake_embedder: Embedder,
    failure: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    """The failure meets the third part; what was answered before is not embedded again."""
    fail = failure(connect, request)
    calls = 0

    def change(answer: Embeddings) -> Embeddings:
        nonlocal calls
        calls += 1
        if calls == 2:
            server.failures.append(fail)
        return answer

    server.change = change
    found = await collect(connect(chunks=ChunkLimits(at_a_time=1)).embed_stream(cut(tiny_cells, 6, 6, 6, 6)))
    np.testing.assert_array_equal(join(found).values, fake_embedder.embed(tiny_cells).values)
    assert rows_of(server) == [0, 6, 12, 18]
    assert server.failures == []


async def test_too_many_failures_without_progress_are_the_callers(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix, request: pytest.FixtureRequest
) -> None:
    server.failures += [lost(connect, request) for _ in range(3)]
    with pytest.raises(ServerUnreachableError):
        await collect(
            connect(retries=RetryPolicy(attempts=3, first=0.0), chunks=ChunkLimits(at_a_time=1)).embed_stream(
                cut(tiny_cells, 12, 12)
            )
        )
    assert server.requests == []


async def test_what_is_too_large_is_sent_in_smaller_parts(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    def refuse(answer: Embeddings) -> Embeddings:
        if len(answer) > 7:
            raise LimitExceededError("too many", field="cells")
        return answer

    server.change = refuse
    found = await collect(connect(chunks=ChunkLimits(at_a_time=1)).embed_stream(cut(tiny_cells, 12, 12)))
    assert [len(part) for part in found] == [12, 12]
    np.testing.assert_array_equal(join(found).values, fake_embedder.embed(tiny_cells).values)


async def test_a_forward_pass_that_fails_is_not_repeated(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    def fail(answer: Embeddings) -> Embeddings:
        raise InferenceError("no")

    server.change = fail
    with pytest.raises(InferenceError):
        await collect(connect(chunks=ChunkLimits(at_a_time=1)).embed_stream(cut(tiny_cells, 12, 12)))
    assert len(server.requests) == 1


async def test_another_model_half_way_is_an_error(
    connect: Connect, server: FakeServer, tiny_cells: CountMatrix, request: pytest.FixtureRequest
) -> None:
    """Over gRPC the stream that continues asks for the model of the first, which the server no longer has."""
    fail = lost(connect, request)

    def change(answer: Embeddings) -> Embeddings:
        if rows_of(server)[-1] == 0:
            server.failures.append(fail)
            server.model_id = "other-1.0"
        return answer

    server.change = change
    with pytest.raises((ServerError, UnknownModelError), match=r"fake-1.0-000000000000.*(other|no longer)"):
        await collect(connect(chunks=ChunkLimits(at_a_time=1)).embed_stream(cut(tiny_cells, 12, 12)))


def test_a_stream_takes_constant_memory_at_the_client(
    grpc_target: str, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    """Client and server, both in this process, hold a few of the 200 chunks at the peak."""
    from perturbscope.client import GrpcClient

    rows = np.arange(300) % len(tiny_cells)
    server.keep = False

    def chunks() -> Iterator[CountMatrix]:
        for _ in range(200):
            yield tiny_cells[rows]

    one = tiny_cells[rows]
    size = one.counts.data.nbytes + one.counts.indices.nbytes + one.counts.indptr.nbytes
    with GrpcClient(grpc_target, chunks=ChunkLimits(cells=100_000)) as client:
        next(iter(client.embed_stream(iter([one]))))
        tracemalloc.start()
        n_cells = sum(len(found) for found in client.embed_stream(chunks()))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert n_cells == 200 * 300
    assert peak < 30 * size


async def test_an_asynchronous_source_is_taken_too(grpc_target: str, tiny_cells: CountMatrix) -> None:
    from perturbscope.client import AsyncGrpcClient

    async def chunks() -> Any:
        for part in cut(tiny_cells, 12, 12):
            yield part

    async with AsyncGrpcClient(grpc_target) as client:
        assert [len(found) async for found in client.embed_stream(chunks())] == [12, 12]


def test_an_abandoned_stream_ends_its_call(grpc_target: str, server: FakeServer, tiny_cells: CountMatrix) -> None:
    from perturbscope.client import GrpcClient

    with GrpcClient(grpc_target) as client:
        stream = client.embed_stream(cut(tiny_cells, 8, 8, 8))
        assert len(next(stream)) == 8
        stream.close()  # type: ignore[attr-defined]
        assert server.stream_ended.wait(30)


def test_a_silent_server_is_given_up(grpc_target: str, server: FakeServer, tiny_cells: CountMatrix) -> None:
    from perturbscope.client import GrpcClient

    server.silent = True
    with (
        GrpcClient(grpc_target, timeout=0.3) as client,
        pytest.raises(ServerUnreachableError, match="in time"),
    ):
        list(client.embed_stream(cut(tiny_cells, 24)))


async def test_a_silent_server_is_given_up_asynchronously(
    grpc_target: str, server: FakeServer, tiny_cells: CountMatrix
) -> None:
    from perturbscope.client import AsyncGrpcClient

    server.silent = True
    async with AsyncGrpcClient(grpc_target, timeout=0.3) as client:
        with pytest.raises(ServerUnreachableError, match="in time"):
            await collect(client.embed_stream(cut(tiny_cells, 24)))


def test_after_a_lost_status_one_part_at_a_time_is_sent(tiny_cells: CountMatrix, fake_embedder: Embedder) -> None:
    """It costs no attempt: with nothing being written, the next status is heard."""
    policy = RetryPolicy(attempts=1)
    flight = Flight(model=None, limits=ChunkLimits(at_a_time=3), policy=policy, rng=np.random.default_rng(0))
    flight.add(tiny_cells[:12])
    flight.add(tiny_cells[12:])
    assert flight.part() is not None
    lost = Failure(ServerUnreachableError("Internal error from Core"))
    lost.unheard = True
    assert flight.retry(lost).seconds == 0.0
    part = flight.part()
    assert part is not None
    assert not flight.room
    flight.land(fake_embedder.embed(part))
    assert flight.part() is not None
    assert flight.room
    assert flight.retry(lost).seconds == 0.0
    with pytest.raises(ServerUnreachableError):
        flight.retry(lost)


def test_the_limits_are_checked() -> None:
    with pytest.raises(InvalidParameterError, match="at_a_time"):
        ChunkLimits(at_a_time=0)


def test_a_limit_beyond_the_offsets_of_a_matrix_is_no_limit(tiny_cells: CountMatrix) -> None:
    assert ChunkLimits(values=10**12).split(tiny_cells) == [(0, 24)]
