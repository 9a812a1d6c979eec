from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import DeadlineExceededError, NotRawCountsError, PerturbScopeError, ServerError
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import join
from perturbscope.protocol.streams import StreamChunk, StreamEnd, StreamOpened, StreamStart
from serving.engine.engine import Engine
from tests.apps import app_of
from tests.arrow_client import stream_answers_from_arrow, stream_request_to_arrow

MakeEngine = Callable[..., Engine]


class Exchange:
    """One request to the application, whose two bodies a test moves piece by piece."""

    def __init__(self, engine: Engine, **headers: str) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.body = bytearray()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.whole = False
        self.reads = asyncio.Event()
        """Cleared by a test that does not read."""
        self.reads.set()
        app = app_of(engine)
        given = {"content-type": protocol.ARROW, **{name.replace("_", "-"): value for name, value in headers.items()}}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/embed/stream",
            "raw_path": b"/v1/embed/stream",
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.done = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    def send(self, *pieces: bytes, more: bool = True) -> None:
        for piece in pieces:
            self._incoming.put_nowait({"type": "http.request", "body": piece, "more_body": True})
        if not more:
            self._incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.whole = not message.get("more_body", False)

    async def finish(self) -> None:
        async with asyncio.timeout(30):
            await self.done

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    def answers(self) -> list[Any]:
        return list(stream_answers_from_arrow(io.BytesIO(bytes(self.body))))

    def error(self) -> dict[str, Any]:
        """The error in place of the answer."""
        assert self.whole
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def pieces(cells: CountMatrix, size: int, **start: Any) -> list[bytes]:
    """A request: the schema, the batches, the end mark."""
    chunks = [cells[at : at + size] for at in range(0, len(cells), size)]
    return list(stream_request_to_arrow(StreamStart(gene_ids=cells.gene_ids, **start), chunks))


@pytest.mark.parametrize("step", [1, 7, 1000, 10**9])
async def test_a_stream_has_the_vectors_of_one_request(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder, step: int
) -> None:
    """The bytes of the request may be cut anywhere."""
    exchange = Exchange(engine, x_request_id="mine")
    body = b"".join(pieces(tiny_cells, 5, first_row=100))
    exchange.send(*(body[at : at + step] for at in range(0, len(body), step)), more=False)
    await exchange.finish()
    assert (exchange.status, exchange.whole) == (200, True)
    assert exchange.headers == {"content-type": protocol.ARROW, "x-request-id": "mine"}
    opened, *chunks, end = exchange.answers()
    assert isinstance(opened, StreamOpened)
    assert [chunk.first_row for chunk in chunks] == [100, 105, 110, 115, 120]
    whole, found = fake_embedder.embed(tiny_cells), join([chunk.embeddings for chunk in chunks])
    for name in ("values", "lengths", "n_detected", "known_share"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert (found.maker, found.coverage) == (whole.maker, whole.coverage)
    assert isinstance(end, StreamEnd)
    assert (end.n_cells, list(end.meta.warnings)) == (24, whole.warnings())
    assert engine.admission.held_bytes == 0


async def test_any_arrow_reader_understands_the_answer(engine: Engine, tiny_cells: CountMatrix) -> None:
    exchange = Exchange(engine)
    exchange.send(*pieces(tiny_cells, 7), more=False)
    await exchange.finish()
    table = pa.ipc.open_stream(bytes(exchange.body)).read_all()
    assert table.column_names == ["row", "embedding", "length", "n_detected", "known_share"]
    assert table.column("row").to_pylist() == list(range(24))


async def test_the_body_of_an_embed_request_is_a_stream_too(engine: Engine, tiny_cells: CountMatrix) -> None:
    exchange = Exchange(engine)
    exchange.send(protocol.request_to_arrow(protocol.EmbedRequest(cells=tiny_cells, model="fake")), more=False)
    await exchange.finish()
    assert [type(answer) for answer in exchange.answers()] == [StreamOpened, StreamChunk, StreamEnd]


async def test_answers_come_while_the_body_still_arrives(engine: Engine, tiny_cells: CountMatrix) -> None:
    exchange = Exchange(engine)
    schema, *batches, end = pieces(tiny_cells, 8)
    exchange.send(schema)
    await exchange.until(lambda: exchange.status == 200)
    for batch in batches:
        before = len(exchange.body)
        exchange.send(batch)
        await exchange.until(lambda before=before: len(exchange.body) > before)  # type: ignore[misc]
    assert not exchange.whole
    exchange.send(end, more=False)
    await exchange.finish()
    assert exchange.whole
    assert len(exchange.answers()) == 5


async def test_a_bad_cell_is_named_by_its_row_and_the_transfer_breaks_off(
    engine: Engine, tiny_cells: CountMatrix
) -> None:
    bad = tiny_cells.counts.copy()
    bad.data[int(bad.indptr[13])] = -5
    spoilt = CountMatrix(bad, tiny_cells.gene_ids, tiny_cells.totals)
    exchange = Exchange(engine)
    exchange.send(*pieces(spoilt, 6, first_row=100), more=False)
    await exchange.finish()
    assert (exchange.status, exchange.whole) == (200, False)
    source = stream_answers_from_arrow(io.BytesIO(bytes(exchange.body)))
    assert isinstance(next(source), StreamOpened)
    assert [next(source).first_row, next(source).first_row] == [100, 106]  # type: ignore[union-attr]
    with pytest.raises(NotRawCountsError, match="in row 113 is negative"):
        next(source)
    last = list(_metadata(bytes(exchange.body)))[-1]
    assert last["row"] == 112
    assert last["error"]["code"] == "not_raw_counts"
    assert not exchange.body.endswith(b"\xff\xff\xff\xff\0\0\0\0")


def _metadata(body: bytes) -> list[dict[str, Any]]:
    reader = pa.ipc.open_stream(body)
    found = []
    while True:
        try:
            _, metadata = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            return found
        found.append(json.loads(metadata[b"perturbscope"]))


async def test_a_cut_off_answer_is_never_taken_for_a_whole_one(engine: Engine, tiny_cells: CountMatrix) -> None:
    exchange = Exchange(engine)
    exchange.send(*pieces(tiny_cells, 12), more=False)
    await exchange.finish()
    body = bytes(exchange.body)
    end = len(body) - len(b"\xff\xff\xff\xff\0\0\0\0")
    for length in range(0, end, 41):
        with pytest.raises(ServerError):
            list(stream_answers_from_arrow(io.BytesIO(body[:length])))
    assert len(list(stream_answers_from_arrow(io.BytesIO(body[:end])))) == 4


def compressed(cells: CountMatrix) -> list[bytes]:
    table = pa.ipc.open_stream(protocol.request_to_arrow(protocol.EmbedRequest(cells=cells))).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return [sink.getvalue().to_pybytes()]


def edited(body: bytes, at: int, value: bytes) -> bytes:
    return body[:at] + value + body[at + len(value) :]


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        pytest.param(lambda cells: [], "unreadable_file", "cut off", id="nothing"),
        pytest.param(lambda cells: [b"ARROW1\0\0" * 4], "unreadable_file", "not as a file", id="a file"),
        pytest.param(lambda cells: [b"\xff\xff\xff\xff\0\0\0\0"], "invalid_parameter", "is empty", id="only the end"),
        pytest.param(lambda cells: pieces(cells, 8)[1:], "unreadable_file", "begin with a schema", id="no schema"),
        pytest.param(lambda cells: pieces(cells, 8)[:1], "unreadable_file", "cut off", id="no batch and no end"),
        pytest.param(lambda cells: [pieces(cells, 8)[0][:-9]], "unreadable_file", "cannot be read", id="half a schema"),
        pytest.param(
            lambda cells: [edited(pieces(cells, 8)[0], 4, b"\xff\xff\xff\x7f")],
            "limit_exceeded",
            "Write smaller batches",
            id="long metadata",
        ),
        pytest.param(
            lambda cells: [edited(pieces(cells, 8)[0], 8, b"\xff" * 16)],
            "unreadable_file",
            "message",
            id="damaged flatbuffer",
        ),
        pytest.param(
            lambda cells: [pa.schema([("x", pa.int32())]).serialize().to_pybytes()],
            "invalid_parameter",
            "column 'x' is unknown",
            id="other columns",
        ),
        pytest.param(
            lambda cells: [pa.schema([("indices", pa.int32())]).serialize().to_pybytes()],
            "unreadable_file",
            "no key 'perturbscope'",
            id="no metadata",
        ),
        pytest.param(lambda cells: pieces(cells, 8, model="other"), "unknown_model", "No model 'other'", id="model"),
        pytest.param(lambda cells: pieces(cells, 8, first_row=-1), "invalid_parameter", "first_row", id="row"),
    ],
)
async def test_what_is_no_stream_is_refused(
    engine: Engine, tiny_cells: CountMatrix, body: Callable[..., list[bytes]], code: str, text: str
) -> None:
    exchange = Exchange(engine)
    exchange.send(*body(tiny_cells), more=False)
    await exchange.finish()
    if exchange.status == 200:
        with pytest.raises(PerturbScopeError, match=text) as caught:
            exchange.answers()
        assert (caught.value.code, exchange.whole) == (code, False)
    else:
        assert exchange.error()["code"] == code
        assert text in exchange.error()["message"]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        pytest.param(compressed, "is compressed", id="compressed"),
        pytest.param(
            lambda cells: [*pieces(cells, 8)[:2], pieces(cells, 8)[0]], "not a record batch", id="a second schema"
        ),
        pytest.param(lambda cells: [*pieces(cells, 8)[:1], pieces(cells, 8)[1][:-16]], "cut off|cannot", id="half"),
        pytest.param(lambda cells: pieces(cells, 8)[:-1], "cut off", id="no end mark"),
    ],
)
async def test_a_bad_message_ends_the_stream(
    engine: Engine, tiny_cells: CountMatrix, spoil: Callable[..., list[bytes]], text: str
) -> None:
    exchange = Exchange(engine)
    exchange.send(*spoil(tiny_cells), more=False)
    await exchange.finish()
    with pytest.raises(PerturbScopeError, match=text) as caught:
        exchange.answers()
    assert caught.value.code == "unreadable_file"
    assert engine.admission.held_bytes == 0


async def test_damaged_bytes_are_answered_whatever_they_are(engine: Engine, tiny_cells: CountMatrix) -> None:
    """Any byte of the request changed: an answer or a typed error, and the server lives on."""
    body = b"".join(pieces(tiny_cells, 12))
    rng = np.random.default_rng(7)
    codes = set()
    for at in rng.choice(len(body), size=150, replace=False):
        exchange = Exchange(engine)
        exchange.send(edited(body, int(at), bytes([int(rng.integers(256))])), more=False)
        await exchange.finish()
        if exchange.status != 200:
            codes.add(exchange.error()["code"])
            continue
        try:
            exchange.answers()
            codes.add("ok")
        except PerturbScopeError as error:
            codes.add(error.code)
    assert "ok" in codes
    assert "unreadable_file" in codes
    assert not codes & {"internal", "server_error"}
    assert engine.admission.held_bytes == engine.admission.in_progress == 0


async def test_a_message_is_refused_before_it_is_kept(make_engine: MakeEngine, tiny_cells: CountMatrix) -> None:
    engine = make_engine(max_chunk_bytes=5000, body_timeout=1)
    large = CountMatrix(
        tiny_cells[np.arange(3000) % 24].counts, tiny_cells.gene_ids, tiny_cells[np.arange(3000) % 24].totals
    )
    schema, batch, _ = pieces(large, 3000)
    exchange = Exchange(engine)
    exchange.send(schema, batch[:2000])  # the rest never comes
    await exchange.finish()
    with pytest.raises(PerturbScopeError, match=r"has [\d,]+ bytes; this server takes 5,000") as caught:
        exchange.answers()
    assert caught.value.code == "limit_exceeded"


async def test_another_content_type_or_a_query_is_refused(engine: Engine) -> None:
    exchange = Exchange(engine, content_type="text/plain")
    await exchange.finish()
    assert exchange.status == 415
    assert "application/vnd.apache.arrow.stream" in exchange.error()["message"]


async def test_who_sends_nothing_is_let_go(make_engine: MakeEngine, tiny_cells: CountMatrix) -> None:
    engine = make_engine(body_timeout=1)
    silent, halted = Exchange(engine), Exchange(engine)
    halted.send(*pieces(tiny_cells, 8)[:2])
    await silent.finish()
    assert (silent.status, silent.error()["code"]) == (504, "deadline_exceeded")
    await halted.finish()
    with pytest.raises(PerturbScopeError, match="No whole chunk arrived within 1 seconds"):
        halted.answers()
    assert engine.admission.in_progress == 0


async def test_who_does_not_read_is_let_go(make_engine: MakeEngine, tiny_cells: CountMatrix) -> None:
    """A client that sends everything before it reads is ended once the answers fill the connection."""
    engine = make_engine(body_timeout=1)
    exchange = Exchange(engine)
    exchange.send(pieces(tiny_cells, 2)[0])
    await exchange.until(lambda: exchange.status == 200)
    exchange.reads.clear()
    exchange.send(*pieces(tiny_cells, 2)[1:], more=False)
    await exchange.until(lambda: engine.admission.in_progress == 0)
    exchange.reads.set()
    await exchange.finish()
    with pytest.raises(PerturbScopeError, match="answers of the stream were not read for 1 seconds"):
        exchange.answers()


async def test_the_callers_time_ends_a_stream(
    make_engine: MakeEngine, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    encoder: Any = fake_embedder.encoder
    encoder.gate = threading.Event()
    exchange = Exchange(make_engine(), x_request_timeout="1")
    exchange.send(*pieces(tiny_cells, 8), more=False)
    await exchange.finish()
    if exchange.status != 200:  # a slow machine, which did not get so far in a second
        assert exchange.error()["code"] == "deadline_exceeded"
        return
    with pytest.raises(DeadlineExceededError, match="time that the caller allowed"):
        exchange.answers()


@pytest.mark.parametrize("all_sent", [True, False])
async def test_who_goes_away_costs_nothing_more(
    make_engine: MakeEngine, fake_embedder: Embedder, tiny_cells: CountMatrix, all_sent: bool
) -> None:
    gate = threading.Event()
    encoder: Any = fake_embedder.encoder
    encoder.gate = gate
    engine = make_engine()
    exchange = Exchange(engine)
    exchange.send(*pieces(tiny_cells, 12)[: None if all_sent else 2], more=not all_sent)
    await exchange.until(lambda: bool(encoder.batches))
    exchange.leave()
    await exchange.finish()
    assert engine.admission.in_progress == engine.registry.default.dispatcher.pending_tokens == 0
    gate.set()


async def test_a_stream_takes_constant_memory_at_the_server(
    make_engine: MakeEngine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    """The server reads no more of 200 fast chunks than may be in progress."""
    gate = threading.Event()
    encoder: Any = fake_embedder.encoder
    engine = make_engine(stream_chunks=3)
    exchange = Exchange(engine)
    schema, batch, end = pieces(tiny_cells, 24)
    encoder.gate = gate
    exchange.send(schema, *([batch] * 200))
    await exchange.until(lambda: exchange._incoming.qsize() == 201 - 4)
    await asyncio.sleep(0.2)
    assert exchange._incoming.qsize() == 201 - 4  # the schema and three batches were taken
    assert 3 * len(batch) <= engine.admission.held_bytes <= 3 * 8 * len(batch)
    gate.set()
    exchange.send(end, more=False)
    await exchange.finish()
    assert exchange.answers()[-1].n_cells == 200 * 24
