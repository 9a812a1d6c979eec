"""Streams over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import AsyncGrpcClient, ChunkLimits, Client, GrpcClient, RetryPolicy
from perturbscope.errors import DeadlineExceededError, NotRawCountsError, UnauthenticatedError
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import join
from perturbscope.protocol.streams import StreamChunk, StreamEnd, StreamOpened, StreamStart
from tests.apps import grpc_server_of
from tests.arrow_client import stream_answers_from_arrow, stream_request_to_arrow
from tests.integration.in_process import Running, running
from tests.unit.serving.conftest import make_engine  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), body_timeout=2) as found:
        yield found


class Upload:
    """A request with a body of chunks; the answer can be read while they are sent, or only after that."""

    def __init__(self, server: Running, cells: CountMatrix, chunks: Iterable[CountMatrix]) -> None:
        self._connection = http.client.HTTPConnection(server.http, timeout=60)
        self._connection.connect()
        self._connection.auto_open = 0  # else a sender would open a closed connection anew
        self._connection.putrequest("POST", "/v1/embed/stream")
        for name, value in {
            **server.headers,
            "content-type": protocol.ARROW,
            "transfer-encoding": "chunked",
        }.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()
        self._pieces = stream_request_to_arrow(StreamStart(gene_ids=cells.gene_ids), chunks)

    def send(self) -> None:
        try:
            for piece in self._pieces:
                self._connection.send(b"%x\r\n" % len(piece) + piece + b"\r\n")
            self._connection.send(b"0\r\n\r\n")
        except (OSError, http.client.NotConnected):
            pass  # the answer says why

    def answers(self) -> Iterator[Any]:
        with contextlib.closing(self._connection), self._connection.getresponse() as response:
            assert response.status == 200
            yield from stream_answers_from_arrow(response)


def test_answers_are_read_while_cells_are_sent(server: Running, tiny_cells: CountMatrix) -> None:
    """The sender waits for the first answer before it sends the second chunk."""
    first = threading.Event()

    def chunks() -> Iterator[CountMatrix]:
        yield tiny_cells
        assert first.wait(30)
        yield tiny_cells

    upload = Upload(server, tiny_cells, chunks())
    sender = threading.Thread(target=upload.send)
    sender.start()
    rows = []
    for answer in upload.answers():
        if isinstance(answer, StreamChunk):
            rows.append(answer.first_row)
            first.set()
    sender.join(30)
    assert rows == [0, 24]
    assert isinstance(answer, StreamEnd)


def test_a_refused_cell_reaches_the_caller_while_it_still_sends(server: Running, tiny_cells: CountMatrix) -> None:
    counts = tiny_cells.counts.copy()
    counts.data[0] = -1
    bad = CountMatrix(counts, tiny_cells.gene_ids, tiny_cells.totals)
    upload = Upload(server, tiny_cells, [tiny_cells, bad, *([tiny_cells] * 500)])
    sender = threading.Thread(target=upload.send)
    sender.start()
    answers = upload.answers()
    assert [type(next(answers)) for _ in range(2)] == [StreamOpened, StreamChunk]
    with pytest.raises(NotRawCountsError, match="in row 24 is negative"):
        next(answers)
    sender.join(30)
    assert not sender.is_alive()


def test_who_reads_only_after_sending_all_is_not_stuck(server: Running, tiny_cells: CountMatrix) -> None:
    """Little is answered whole; of much, what the connection holds is answered, and then why no more."""
    few = Upload(server, tiny_cells, [tiny_cells] * 3)
    few.send()
    assert list(few.answers())[-1].n_cells == 72
    large = tiny_cells[np.arange(20_000) % 24]
    many = Upload(server, large, [large] * 60)
    many.send()
    answers = many.answers()
    assert [type(next(answers)) for _ in range(2)] == [StreamOpened, StreamChunk]
    with pytest.raises(DeadlineExceededError, match="were not read for 2 seconds"):
        deque(answers)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_file_of_any_length_is_embedded_through_a_server(server: Running, tiny_cells: CountMatrix, kind: str) -> None:
    cls: Any = Client if kind == "http" else GrpcClient
    where = f"http://{server.http}" if kind == "http" else server.grpc
    with cls(where, api_key=server.key, chunks=ChunkLimits(cells=7)) as client:
        found = join(list(client.embed_stream([tiny_cells[:10], tiny_cells[10:]])))
        whole = client.embed_cells(tiny_cells)
    np.testing.assert_allclose(found.values, whole.values, rtol=0, atol=1e-5)


def test_no_stream_without_a_key(server: Running, tiny_cells: CountMatrix) -> None:
    with GrpcClient(server.grpc, api_key="") as client, pytest.raises(UnauthenticatedError):
        list(client.embed_stream([tiny_cells]))
    with Client(f"http://{server.http}", api_key="") as client, pytest.raises(UnauthenticatedError):
        list(client.embed_stream([tiny_cells]))
    body = b"".join(stream_request_to_arrow(StreamStart(gene_ids=tiny_cells.gene_ids), [tiny_cells]))
    reply = httpx.post(f"http://{server.http}/v1/embed/stream", content=body, headers={"content-type": protocol.ARROW})
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthenticated")


async def test_a_client_goes_on_with_a_server_that_was_restarted(
    make_engine: Any,  # noqa: F811
    tiny_cells: CountMatrix,
    fake_embedder: Embedder,
) -> None:
    """On the same port; what the first one answered is not asked again."""
    first = grpc_server_of(make_engine(shutdown_grace=1))
    port = await first.start()
    chunks = [tiny_cells[at : at + 4] for at in range(0, 24, 4)]
    policy = RetryPolicy(attempts=20, first=0.05, longest=0.5)
    async with AsyncGrpcClient(f"127.0.0.1:{port}", retries=policy, chunks=ChunkLimits(at_a_time=1)) as client:
        stream = client.embed_stream(chunks)
        results = [await anext(stream), await anext(stream)]
        await first.stop()
        second = grpc_server_of(make_engine(shutdown_grace=1), port=port)
        await second.start()
        async for result in stream:
            results.append(result)
        await second.stop()
    encoder: Any = fake_embedder.encoder
    assert sum(n_cells for n_cells, _ in encoder.batches) <= 24 + 4  # at most the part that was on its way, twice
    np.testing.assert_array_equal(join(results).values, fake_embedder.embed(tiny_cells).values)


async def test_a_client_that_paused_too_long_goes_on(
    make_engine: Any,  # noqa: F811
    tiny_cells: CountMatrix,
    fake_embedder: Embedder,
) -> None:
    """The server gave the stream up while the caller worked with a result."""
    engine = make_engine(body_timeout=1)
    server = grpc_server_of(engine)
    port = await server.start()
    chunks = [tiny_cells[at : at + 8] for at in range(0, 24, 8)]
    policy = RetryPolicy(attempts=2, first=0.01)
    async with AsyncGrpcClient(f"127.0.0.1:{port}", retries=policy, chunks=ChunkLimits(at_a_time=1)) as client:
        results = []
        async for result in client.embed_stream(chunks):
            results.append(result)
            async with asyncio.timeout(30):
                while engine.admission.in_progress:
                    await asyncio.sleep(0.01)
    await server.stop()
    np.testing.assert_array_equal(join(results).values, fake_embedder.embed(tiny_cells).values)
