from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import RateLimitedError
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import Embeddings, join
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.protobuf_streams import (
    stream_answer_from_proto,
    stream_cells_to_proto,
    stream_start_to_proto,
)
from perturbscope.protocol.streams import StreamChunk, StreamEnd, StreamOpened, StreamStart
from serving.call import Call
from serving.engine.engine import Engine

MakeEngine = Callable[..., Engine]
StubOf = Callable[[Engine], Awaitable[Any]]


def start_of(cells: CountMatrix, **others: Any) -> pb.EmbedStreamRequest:
    return stream_start_to_proto(StreamStart(gene_ids=cells.gene_ids, **others))


def chunks_of(cells: CountMatrix, size: int) -> list[pb.EmbedStreamRequest]:
    return [stream_cells_to_proto(cells[at : at + size]) for at in range(0, len(cells), size)]


async def feed(messages: list[pb.EmbedStreamRequest]) -> AsyncIterator[pb.EmbedStreamRequest]:
    for message in messages:
        yield message


async def read(call: Any, rows: list[int] | None = None) -> tuple[StreamOpened, list[StreamChunk], StreamEnd]:
    """Read a whole answer; `rows` is called with the first row of each chunk as it comes."""
    opened, chunks, end = None, [], None
    while (message := await call.read()) is not grpc.aio.EOF:
        assert end is None
        match stream_answer_from_proto(message, opened):
            case StreamOpened() as opened:
                pass
            case StreamChunk() as chunk:
                chunks.append(chunk)
                if rows is not None:
                    rows.append(chunk.first_row)
            case StreamEnd() as end:
                pass
    assert opened is not None
    assert end is not None
    return opened, chunks, end


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_stream_has_the_vectors_of_one_request(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    stub = await stub_of(engine)
    call = stub.EmbedStream(feed([start_of(tiny_cells, first_row=100), *chunks_of(tiny_cells, 5)]))
    opened, chunks, end = await read(call)
    assert [chunk.first_row for chunk in chunks] == [100, 105, 110, 115, 120]
    whole, found = fake_embedder.embed(tiny_cells), join([chunk.embeddings for chunk in chunks])
    for name in ("values", "lengths", "n_detected", "known_share"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert (found.model_id, found.coverage) == (whole.model_id, whole.coverage)
    assert (opened.width, opened.chunks_in_progress) == (8, engine.settings.stream_chunks)
    assert end.n_cells == 24
    assert end.meta.warnings == tuple(whole.warnings())
    assert set(end.meta.timings) == {"tokenize", "queue", "inference"}
    assert await call.code() is grpc.StatusCode.OK


async def test_a_bad_cell_is_named_by_its_row_and_what_was_answered_stays(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix
) -> None:
    spoilt = chunks_of(tiny_cells, 6)
    data = np.frombuffer(spoilt[2].cells.data, dtype="<i4").copy()
    data[0] = -1
    spoilt[2].cells.data = data.tobytes()
    stub = await stub_of(engine)
    call = stub.EmbedStream(feed([start_of(tiny_cells, first_row=1000), *spoilt]))
    rows: list[int] = []
    with pytest.raises(grpc.aio.AioRpcError, match="in row 1012 is negative") as caught:
        await read(call, rows)
    assert rows == [1000, 1006]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("perturbscope-code", "not_raw_counts") in tuple(caught.value.trailing_metadata())


@pytest.mark.parametrize(
    ("messages", "code", "text"),
    [
        pytest.param(lambda cells: [], "invalid_parameter", "no message", id="nothing"),
        # One message: grpc.aio hides the status of a call that ends while it writes.
        pytest.param(lambda cells: chunks_of(cells, 5)[:1], "invalid_parameter", "no `start`", id="no start"),
        pytest.param(lambda cells: [start_of(cells)] * 2, "invalid_parameter", "no `cells`", id="two starts"),
        pytest.param(
            lambda cells: [pb.EmbedStreamRequest(start=pb.EmbedStreamStart())],
            "malformed_matrix",
            "no genes",
            id="genes",
        ),
        pytest.param(
            lambda cells: [pb.EmbedStreamRequest(start=pb.EmbedStreamStart(gene_ids=["x", "y"]))],
            "unknown_genes",
            "None of the 2",
            id="unknown genes",
        ),
        pytest.param(
            lambda cells: [start_of(cells, model="other")], "unknown_model", "No model 'other'", id="other model"
        ),
        pytest.param(
            lambda cells: [start_of(cells), pb.EmbedStreamRequest(cells=pb.CellChunk(data_type=1))],
            "malformed_matrix",
            "indptr",
            id="no cells in a chunk",
        ),
        pytest.param(
            lambda cells: [pb.EmbedStreamRequest(start=pb.EmbedStreamStart(gene_ids=cells.gene_ids, first_row=-1))],
            "invalid_parameter",
            "first_row",
            id="row",
        ),
    ],
)
async def test_what_is_no_stream_is_refused(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, messages: Any, code: str, text: str
) -> None:
    stub = await stub_of(engine)
    with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
        await read(stub.EmbedStream(feed(messages(tiny_cells))))
    assert ("perturbscope-code", code) in tuple(caught.value.trailing_metadata())


async def test_too_large_a_chunk_is_refused(make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix) -> None:
    stub = await stub_of(make_engine(max_chunk_bytes=1500))
    with pytest.raises(grpc.aio.AioRpcError, match="this server takes 1,500") as caught:
        await read(stub.EmbedStream(feed([start_of(tiny_cells), *chunks_of(tiny_cells, 24)])))
    assert ("perturbscope-code", "limit_exceeded") in tuple(caught.value.trailing_metadata())
    stub = await stub_of(make_engine(max_cells=5))
    with pytest.raises(grpc.aio.AioRpcError, match="has 6 cells; this server takes 5"):
        await read(stub.EmbedStream(feed([start_of(tiny_cells), *chunks_of(tiny_cells, 6)])))


async def test_a_fast_sender_is_held_up_while_the_model_works(
    make_engine: MakeEngine, stub_of: StubOf, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    """The server reads no more chunks of a long stream than it may have in progress."""
    gate = threading.Event()
    fake_embedder.encoder.gate = gate  # type: ignore[attr-defined]
    engine = make_engine(stream_chunks=2)
    stub = await stub_of(engine)
    large = big_chunk(tiny_cells, 10_000)  # so large that what is on its way is little beside a hundred of them
    sent = 0

    async def messages() -> AsyncIterator[pb.EmbedStreamRequest]:
        nonlocal sent
        yield start_of(tiny_cells)
        for _ in range(100):
            yield large
            sent += 1

    call = stub.EmbedStream(messages())
    encoder: Any = fake_embedder.encoder
    await until(lambda: bool(encoder.batches) and engine.admission.held_bytes >= 2 * large.ByteSize())
    await asyncio.sleep(0.5)
    assert sent < 30
    assert engine.admission.held_bytes <= 2 * 8 * large.ByteSize()
    call.cancel()
    await until(lambda: engine.admission.held_bytes == 0)


def big_chunk(cells: CountMatrix, n_cells: int) -> pb.EmbedStreamRequest:
    rows = np.arange(n_cells) % len(cells)
    return stream_cells_to_proto(cells[rows])


async def test_who_goes_away_costs_nothing_more(
    make_engine: MakeEngine, stub_of: StubOf, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    gate = threading.Event()
    fake_embedder.encoder.gate = gate  # type: ignore[attr-defined]
    engine = make_engine()
    stub = await stub_of(engine)
    call = stub.EmbedStream(feed([start_of(tiny_cells), *chunks_of(tiny_cells, 4)]))
    encoder: Any = fake_embedder.encoder
    await until(lambda: bool(encoder.batches))
    call.cancel()
    await until(lambda: engine.admission.in_progress == 0)
    await until(lambda: engine.registry.default.dispatcher.pending_tokens == 0)
    gate.set()
    assert await stub.Embed(pb.EmbedRequest(cells=_matrix(tiny_cells)))
    assert len(encoder.batches) == 2


def _matrix(cells: CountMatrix) -> pb.CountMatrix:
    from perturbscope.protocol import EmbedRequest, request_to_proto

    return request_to_proto(EmbedRequest(cells=cells)).cells


async def test_who_sends_nothing_is_let_go(make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix) -> None:
    engine = make_engine(body_timeout=1)
    stub = await stub_of(engine)
    call = stub.EmbedStream()
    await call.write(start_of(tiny_cells))
    await call.write(chunks_of(tiny_cells, 24)[0])
    with pytest.raises(grpc.aio.AioRpcError, match="No whole chunk arrived within 1 seconds") as caught:
        await read(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ("perturbscope-code", "deadline_exceeded") in tuple(caught.value.trailing_metadata())
    assert engine.admission.in_progress == 0


async def test_who_does_not_read_is_let_go(make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix) -> None:
    engine = make_engine(body_timeout=1)
    stub = await stub_of(engine)
    large = big_chunk(tiny_cells, 5000)

    async def messages() -> AsyncIterator[pb.EmbedStreamRequest]:
        yield start_of(tiny_cells)
        while True:
            yield large

    call = stub.EmbedStream(messages())
    await until(lambda: engine.admission.in_progress == 1)
    await until(lambda: engine.admission.in_progress == 0)
    with pytest.raises(grpc.aio.AioRpcError):
        await read(call)
    assert engine.admission.held_bytes == 0


async def test_the_callers_deadline_ends_a_stream(
    make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix
) -> None:
    engine = make_engine()
    stub = await stub_of(engine)
    call = stub.EmbedStream(metadata=(("x-request-timeout", "0.3"),))
    await call.write(start_of(tiny_cells))
    with pytest.raises(grpc.aio.AioRpcError, match="time that the caller allowed") as caught:
        await read(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_full_queue_holds_a_stream_up_and_does_not_end_it(
    make_engine: MakeEngine, stub_of: StubOf, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    gate = threading.Event()
    fake_embedder.encoder.gate = gate  # type: ignore[attr-defined]
    engine = make_engine(max_queued_tokens=300)
    stub = await stub_of(engine)
    reading = asyncio.ensure_future(
        read(stub.EmbedStream(feed([start_of(tiny_cells), *chunks_of(tiny_cells, 8), *chunks_of(tiny_cells, 8)])))
    )
    encoder: Any = fake_embedder.encoder
    await until(lambda: bool(encoder.batches))
    gate.set()
    _, chunks, end = await reading
    assert (len(chunks), end.n_cells) == (6, 48)


async def test_a_stopping_server_answers_what_it_took_and_says_when_to_come_back(
    make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix
) -> None:
    engine = make_engine()
    stub = await stub_of(engine)
    call = stub.EmbedStream()
    await call.write(start_of(tiny_cells))
    await call.write(chunks_of(tiny_cells, 24)[0])
    assert (await call.read()).WhichOneof("message") == "opened"
    assert (await call.read()).WhichOneof("message") == "chunk"
    engine.admission.closed = True
    with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("retry-after", "5") in tuple(caught.value.trailing_metadata())


async def test_every_kind_of_count_is_understood(
    engine: Engine, stub_of: StubOf, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    floats = chunks_of(tiny_cells, 24)[0]
    csr: sparse.csr_matrix = tiny_cells.counts
    floats.cells.data = csr.data.astype("<f4").tobytes()
    floats.cells.data_type = pb.COUNT_TYPE_FLOAT32
    floats.cells.ClearField("total_counts")
    stub = await stub_of(engine)
    _, chunks, _ = await read(stub.EmbedStream(feed([start_of(tiny_cells), floats])))
    found: Embeddings = chunks[0].embeddings
    np.testing.assert_array_equal(found.values, fake_embedder.embed(tiny_cells).values)


async def test_little_memory_holds_a_stream_up_and_does_not_end_it(
    make_engine: MakeEngine, stub_of: StubOf, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    """There is memory for two of the four chunks that may be in progress."""
    engine = make_engine(max_body_bytes=9000, max_held_bytes=9000)
    encoder: Any = fake_embedder.encoder
    encoder.gate = threading.Event()
    stub = await stub_of(engine)
    reading = asyncio.ensure_future(read(stub.EmbedStream(feed([start_of(tiny_cells), *chunks_of(tiny_cells, 4)]))))
    await until(lambda: bool(encoder.batches))
    await asyncio.sleep(0.2)
    assert 4 * 700 < engine.admission.held_bytes <= 9000
    encoder.gate.set()
    _, chunks, end = await reading
    assert (len(chunks), end.n_cells) == (6, 24)
    assert engine.admission.held_bytes == 0


async def test_a_callers_share_holds_a_stream_up(
    make_engine: MakeEngine, stub_of: StubOf, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks over the share of the caller wait for it to grow again."""
    engine = make_engine()
    refused = 0

    def take(call: Call, cells: int) -> None:
        nonlocal refused
        if call.cells and refused < 3:
            refused += 1
            raise RateLimitedError("enough for now", retry_after=0.01)
        call.cells += cells

    monkeypatch.setattr(Call, "take", take)
    stub = await stub_of(engine)
    _, _, end = await read(stub.EmbedStream(feed([start_of(tiny_cells), *chunks_of(tiny_cells, 4)])))
    assert (end.n_cells, refused) == (24, 3)
