"""An operation with a function of its own waits in the queue as an embed request does, and can be left at any time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import AsyncClient, AsyncGrpcClient
from perturbscope.errors import InvalidParameterError, LimitExceededError, RateLimitedError, ServerError
from perturbscope.inference.embedder import Embedder
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.fields import Meta, Vectors
from perturbscope.protocol.operations import Operation
from serving.access.limits import Admission
from serving.call import Call, Caller
from serving.engine.engine import Engine
from serving.engine.operations import served
from tests.apps import grpc_server_of, new_app_of
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import MakeEngine


@dataclass(frozen=True, kw_only=True, eq=False)
class TwiceRequest:
    """A request to embed cells twice.

    Attributes
    ----------
    cells
        Raw counts.
    model
        Name of a model.
    how
        What to do.
    """

    cells: CountMatrix
    model: str | None = None
    how: str = "embed"


@dataclass(frozen=True, kw_only=True, eq=False)
class TwiceAnswer:
    """The vectors.

    Attributes
    ----------
    sums
        Sum of both.
    meta
        The model.
    """

    sums: Vectors
    meta: Meta = field(default_factory=Meta)


BEGAN = threading.Event()
ENDED = threading.Event()


def twice(model: Embedder, request: TwiceRequest) -> TwiceAnswer:
    BEGAN.set()
    try:
        if request.how == "fail":
            raise InvalidParameterError("how is wrong.", field="how")
        if request.how == "bug":
            raise ZeroDivisionError("secret detail")
        tokens = model.tokenize(request.cells)
        values = model.embed_tokens(tokens)
        values = values + model.run(tokens, np.arange(len(tokens))).cell_embedding
        return TwiceAnswer(sums=values + model.embed(request.cells).values, meta=Meta(model_id=model.model_id))
    finally:
        ENDED.set()


TWICE = Operation(name="twice", summary="Twice.", request=TwiceRequest, answer=TwiceAnswer, run=twice, per_cell=True)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    BEGAN.clear()
    ENDED.clear()
    with OPERATIONS.added(TWICE):
        yield


def asked(engine: Engine, request: TwiceRequest, call: Call | None = None) -> Any:
    return served(TWICE).call(engine, request, call or Call("/v1/twice", "http"))


async def test_it_waits_in_the_queue_and_shares_batches(
    engine: Engine, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    expected = 3 * fake_embedder.embed(tiny_cells).values
    gate = encoder.gate = threading.Event()
    first = asyncio.create_task(engine.embed(protocol.EmbedRequest(cells=tiny_cells[:1])))
    while len(encoder.batches) < 2:
        await asyncio.sleep(0.001)
    parts = [asyncio.create_task(asked(engine, TwiceRequest(cells=tiny_cells[i : i + 4]))) for i in range(0, 24, 4)]
    dispatcher = engine.registry.default.dispatcher
    tokens = int(fake_embedder.tokenize(tiny_cells).offsets[-1])
    async with asyncio.timeout(60):
        while dispatcher.pending_tokens < tokens:
            await asyncio.sleep(0.001)
    before = len(encoder.batches)
    gate.set()
    answers = await asyncio.gather(*parts)
    await first
    np.testing.assert_array_equal(np.concatenate([answer.sums for answer in answers]), expected)
    # Six requests of three passes each: together in fewer batches than one by one.
    assert len(encoder.batches) - before < 18
    assert answers[0].meta.timings.keys() == {"tokenize", "queue", "inference"}


async def test_a_caller_that_leaves_costs_no_more(
    engine: Engine, fake_embedder: Embedder, tiny_cells: CountMatrix
) -> None:
    encoder = fake_embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    gate = encoder.gate = threading.Event()
    task = asyncio.create_task(asked(engine, TwiceRequest(cells=tiny_cells)))
    async with asyncio.timeout(60):
        while not encoder.batches:
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(ENDED.wait, 60), "the function still waits"
    gate.set()
    await engine.registry.default.dispatcher.close()
    assert len(encoder.batches) == 1


async def test_the_share_and_the_limits_of_a_caller_hold(make_engine: MakeEngine, tiny_cells: CountMatrix) -> None:
    engine = make_engine(max_cells=10, max_held_bytes=2**20, max_body_bytes=2**20)
    call = Call("/v1/twice", "http", caller=Caller("a", cells_per_minute=20))

    def charge(cells: int) -> None:
        raise RateLimitedError("Enough.")

    call.charge = charge
    with pytest.raises(RateLimitedError):
        await asked(engine, TwiceRequest(cells=tiny_cells), call)
    with pytest.raises(LimitExceededError, match="24 cells; this server takes 10"):
        await asked(engine, TwiceRequest(cells=tiny_cells))
    assert not BEGAN.is_set()
    admission = Admission(engine.settings)
    with admission.admit() as held:
        call = Call("/v1/twice", "http", held=held)
        await asked(engine, TwiceRequest(cells=tiny_cells[:10]), call)
        assert (call.cells, call.model) == (10, engine.registry.default.embedder)
        assert call.model_id == engine.registry.default.info.model_id
        # Tokens, one set of vectors at a time, and the answer encoded.
        assert 4 * 10 * 8 * (1 + call.growth) < held.n_reserved < 6000
    assert admission.held_bytes == 0


async def test_over_http_and_grpc(engine: Engine, tiny_cells: CountMatrix, caplog: pytest.LogCaptureFixture) -> None:
    transport = httpx.ASGITransport(new_app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for how, status, code in (("embed", 200, ""), ("fail", 422, "invalid_parameter"), ("bug", 500, "internal")):
            body = protocol.request_to_json(TwiceRequest(cells=tiny_cells, how=how))
            reply = await http.post("/v1/twice", content=body, headers={"content-type": protocol.JSON})
            assert reply.status_code == status, reply.text
            assert "secret" not in reply.text
            assert not code or reply.json()["error"]["code"] == code
        late = await http.post(
            "/v1/twice",
            content=protocol.request_to_json(TwiceRequest(cells=tiny_cells)),
            headers={"content-type": protocol.JSON, "x-request-timeout": "0.001"},
        )
        assert late.status_code == 504
    lines = [record.getMessage() for record in caplog.records]
    assert any("ZeroDivisionError" in str(record.exc_text) for record in caplog.records)
    assert not any("secret" in line for line in lines)


async def test_a_server_that_is_older_says_so(engine: Engine, tiny_cells: CountMatrix) -> None:
    del OPERATIONS._found["twice"]
    app, server = new_app_of(engine), grpc_server_of(engine)
    OPERATIONS.add(TWICE)
    port = await server.start()
    request = TwiceRequest(cells=tiny_cells)
    try:
        async with AsyncGrpcClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(ServerError, match="does not know this operation"):
                await client.ask(request)
    finally:
        await server.stop()
    async with AsyncClient("http://test", transport=httpx.ASGITransport(app)) as over_http:
        with pytest.raises(InvalidParameterError, match=r"nothing at '/v1/twice'. Operations are embed, score"):
            await over_http.ask(request)
