"""The engine under load: cancelled callers in every stage, fair waiting, shutdown."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import DeadlineExceededError, InferenceError, OverloadedError, PerturbScopeError
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest, ScoreRequest
from perturbscope.scoring.results import ScoreOptions
from serving.access.front import Front
from serving.call import Call
from serving.engine import engine as engine_module
from serving.engine.engine import Engine
from tests.apps import app_of
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import FAST, LABELS, MakeEngine

OPTIONS = ScoreOptions(**FAST)  # type: ignore[arg-type]
StubOf = Callable[[Engine], Awaitable[Any]]


def encoder_of(embedder: Embedder) -> FakeEncoder:
    assert isinstance(embedder.encoder, FakeEncoder)
    return embedder.encoder


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


class Stage:
    """A stage that holds a request until the test lets it go on, and counts its steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.gate = threading.Event()
        self.ended = threading.Event()

    def step(self) -> None:
        self.steps += 1
        assert self.gate.wait(30), "the test never opened the gate"


@pytest.fixture
def stage(request: pytest.FixtureRequest, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Hold the stage that the test is about, which has three steps."""
    held = Stage()
    if request.param == "tokenizing":
        monkeypatch.setattr(engine_module, "TOKENIZED", 8)
        whole = fake_embedder.tokenize

        def tokenize(cells: CountMatrix) -> TokenizedCells:
            held.step()
            return whole(cells)

        monkeypatch.setattr(fake_embedder, "tokenize", tokenize)
    elif request.param == "inferring":
        object.__setattr__(fake_embedder.limits, "max_cells", 8)
        run = encoder_of(fake_embedder).run

        def stepped(inputs: Any, outputs: Any) -> Any:
            held.step()
            return run(inputs, outputs)

        monkeypatch.setattr(encoder_of(fake_embedder), "run", stepped)
    else:

        def score(*_: Any, progress: Callable[[str, int, int], None], **__: Any) -> None:
            try:
                for done in range(3):
                    held.step()
                    progress("score", done, 3)
            finally:
                held.ended.set()

        monkeypatch.setattr("perturbscope.scoring.control.score_perturbations", score)
    return held


STAGES = pytest.mark.parametrize("stage", ["tokenizing", "inferring", "scoring"], indirect=True)


def request_of(cells: CountMatrix) -> ScoreRequest:
    return ScoreRequest(cells=cells, perturbations=LABELS, control="control", options=OPTIONS)


async def assert_ended(engine: Engine, stage: Stage) -> None:
    """Check that the step which was running was the last."""
    await until(lambda: engine.admission.in_progress == 0)
    stage.gate.set()
    await until(lambda: engine.scores.n_jobs == 0 and engine.registry.default.dispatcher.pending_callers == 0)
    await engine.registry.default.dispatcher.close()  # waits for the batch that runs
    await asyncio.to_thread(engine.scores._threads.shutdown)
    assert stage.steps == 1
    assert engine.admission.held_bytes == 0


@STAGES
async def test_a_client_of_http_that_disconnects_ends_its_work(
    engine: Engine, stage: Stage, tiny_cells: CountMatrix
) -> None:
    app = app_of(engine)
    gone, sent = asyncio.Event(), list[Any]()
    inbox = [{"type": "http.request", "body": protocol.request_to_json(request_of(tiny_cells)), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip
    call = asyncio.ensure_future(app(scope, receive, send))
    await until(lambda: stage.steps == 1)
    gone.set()
    await call
    await assert_ended(engine, stage)


@STAGES
async def test_a_caller_of_grpc_that_cancels_ends_its_work(
    engine: Engine, stub_of: StubOf, stage: Stage, tiny_cells: CountMatrix
) -> None:
    stub = await stub_of(engine)
    call = stub.Score(protocol.request_to_proto(request_of(tiny_cells)))
    waiting = asyncio.ensure_future(call.code())
    await until(lambda: stage.steps == 1)
    call.cancel()
    assert await waiting is grpc.StatusCode.CANCELLED
    await assert_ended(engine, stage)


@STAGES
async def test_a_deadline_ends_the_work(engine: Engine, stage: Stage, tiny_cells: CountMatrix) -> None:
    call = Front.begin("/v1/score", "http", {"x-request-timeout": "0.2"})

    async def ask() -> None:
        async with engine.front.admitted(call):
            await engine.scores.score(request_of(tiny_cells), call)

    with pytest.raises(DeadlineExceededError):
        await ask()
    if stage.steps:  # a slow machine may not have come so far
        await assert_ended(engine, stage)


async def test_an_answer_that_nobody_waits_for_is_not_encoded(
    engine: Engine, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All threads are busy when the answer is there; then the client goes."""
    encoded: list[int] = []
    reached = asyncio.Event()
    work = engine.work

    async def held(function: Callable[..., Any], *args: Any) -> Any:
        if function is protocol.answer_to_json:
            reached.set()
            await asyncio.sleep(60)
            encoded.append(1)
        return await work(function, *args)

    monkeypatch.setattr(engine, "work", held)
    app = app_of(engine)
    inbox = [{"type": "http.request", "body": protocol.request_to_json(EmbedRequest(cells=tiny_cells))}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await reached.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/v1/embed", "raw_path": b"/v1/embed", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip
    async with asyncio.timeout(60):
        await app(scope, receive, send)
    assert encoded == []
    assert engine.admission.in_progress == engine.admission.held_bytes == 0


async def test_tokens_made_in_parts_are_those_of_the_whole(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fake_embedder.tokenize(tiny_cells)
    monkeypatch.setattr(engine_module, "TOKENIZED", 5)
    parts, _ = await engine.tokenize(fake_embedder, tiny_cells)
    np.testing.assert_array_equal(parts.arrays["input_ids"], whole.arrays["input_ids"])
    np.testing.assert_array_equal(parts.offsets, whole.offsets)
    np.testing.assert_array_equal(parts.known_share, whole.known_share)
    np.testing.assert_array_equal(parts.n_detected, whole.n_detected)


async def test_flow_and_deadline_reach_the_queue(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = engine.registry.default.dispatcher
    seen: dict[str, Any] = {}
    submit = dispatcher.submit

    async def noted(tokens: TokenizedCells, **options: Any) -> Any:
        seen.update(options)
        return await submit(tokens, **options)

    monkeypatch.setattr(dispatcher, "submit", noted)
    call = Front.begin("/v1/embed", "grpc", {}, remaining=50.0)
    async with engine.front.admitted(call):
        await engine.embed(EmbedRequest(cells=tiny_cells), call)
    assert seen["flow"] == call.caller.name
    assert seen["deadline"] == call.deadline


async def test_an_answer_that_would_not_fit_into_memory_is_refused_before_it_is_computed(
    make_engine: MakeEngine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    engine = make_engine(max_body_bytes=2000, max_held_bytes=3000)
    call = Front.begin("/v1/embed", "http", {})

    async def ask() -> None:
        async with engine.front.admitted(call) as hold:
            hold(1000)
            await engine.embed(EmbedRequest(cells=tiny_cells), call)

    with pytest.raises(PerturbScopeError, match="bytes of memory"):
        await ask()
    assert encoder_of(fake_embedder).batches == []
    assert engine.admission.held_bytes == 0


async def test_a_wall_clock_that_jumps_changes_no_deadline(
    engine: Engine, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = iter([1e9, -1e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    call = Front.begin("/v1/embed", "http", {"x-request-timeout": "60"})
    async with engine.front.admitted(call):
        answer = await engine.embed(EmbedRequest(cells=tiny_cells), call)
    assert len(answer) == 24
    remaining = call.remaining()
    assert remaining is not None
    assert 0 < remaining <= 60
    assert all(0 <= seconds < 60 for seconds in call.timings.values())


async def admitted(engine: Engine, work: Callable[[Call], Awaitable[Any]]) -> Any:
    call = Front.begin("/v1/embed", "http", {})
    async with engine.front.admitted(call):
        return await work(call)


@pytest.mark.parametrize("stage", ["tokenizing", "inferring"], indirect=True)
async def test_shutdown_finishes_what_was_let_in_and_refuses_the_rest(
    engine: Engine, stage: Stage, tiny_cells: CountMatrix
) -> None:
    accepted = asyncio.ensure_future(admitted(engine, lambda call: engine.embed(EmbedRequest(cells=tiny_cells), call)))
    await until(lambda: stage.steps == 1)
    closing = asyncio.ensure_future(engine.close())
    await asyncio.sleep(0)
    assert not await engine.ready()
    with pytest.raises(OverloadedError, match="shutting down"):
        await admitted(engine, lambda call: engine.embed(EmbedRequest(cells=tiny_cells), call))
    stage.gate.set()
    await closing
    assert len(await accepted) == 24


async def test_a_score_that_was_let_in_is_finished_at_shutdown(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, gate, steps = threading.Event(), threading.Event(), list[int]()

    def slow(*_: Any, progress: Callable[[str, int, int], None], **__: Any) -> Any:
        reached.set()
        gate.wait(30)
        for done in range(3):
            progress("score", done, 3)
            steps.append(done)
        raise InferenceError("as far as this test needs it")

    monkeypatch.setattr("perturbscope.scoring.control.score_perturbations", slow)
    request = ScoreRequest(
        embeddings=np.ones((24, 2), dtype=np.float32), perturbations=LABELS, control="control", options=OPTIONS
    )
    accepted = asyncio.ensure_future(admitted(engine, lambda call: engine.scores.score(request, call)))
    await until(reached.is_set)
    closing = asyncio.ensure_future(engine.close())
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(InferenceError, match="as far as"):
        await accepted
    await closing
    assert steps == [0, 1, 2]


async def test_what_is_not_done_in_time_is_ended_and_told_so(
    make_engine: MakeEngine, tiny_cells: CountMatrix, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = encoder_of(fake_embedder).gate = threading.Event()
    engine = make_engine(shutdown_grace=1)
    accepted = asyncio.ensure_future(admitted(engine, lambda call: engine.embed(EmbedRequest(cells=tiny_cells), call)))
    await until(lambda: bool(encoder_of(fake_embedder).batches))
    closing = asyncio.ensure_future(engine.close())
    async with asyncio.timeout(60):
        with pytest.raises(OverloadedError, match=r"was not done in time\. Send it to another server") as told:
            await accepted
    assert told.value.retry_after > 0
    gate.set()
    await closing


async def test_a_model_that_hangs_is_not_ready_and_comes_back(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    gate = encoder_of(fake_embedder).gate = threading.Event()
    dispatcher = engine.registry.default.dispatcher
    dispatcher._runner._max_seconds = 0.05
    with pytest.raises(InferenceError, match="has not come back"):
        await engine.embed(EmbedRequest(cells=tiny_cells))
    assert not await engine.ready()
    tokenized = fake_embedder.tokenize
    fake_embedder.tokenize = None  # type: ignore[assignment,method-assign]
    with pytest.raises(InferenceError, match="answers nobody"):
        await engine.embed(EmbedRequest(cells=tiny_cells))  # at once, without tokenizing
    fake_embedder.tokenize = tokenized  # type: ignore[method-assign]
    gate.set()
    await until(lambda: not dispatcher.stalled)
    assert await engine.ready()
    assert len(await engine.embed(EmbedRequest(cells=tiny_cells))) == 24


async def test_errors_in_tokenizing_and_memory_hit_their_caller_alone(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fake_embedder.tokenize

    def tokenize(cells: CountMatrix) -> TokenizedCells:
        if len(cells) == 3:
            raise MemoryError("no room for this one")
        return whole(cells)

    monkeypatch.setattr(fake_embedder, "tokenize", tokenize)
    requests = [EmbedRequest(cells=tiny_cells[:n]) for n in (1, 2, 3, 4, 5)]
    answers = await asyncio.gather(*map(engine.embed, requests), return_exceptions=True)
    assert isinstance(answers[2], MemoryError)
    assert [len(answer) for at, answer in enumerate(answers) if at != 2] == [1, 2, 4, 5]  # type: ignore[arg-type]


async def test_json_of_more_than_its_limit_is_refused_as_it_arrives(
    make_engine: MakeEngine, connect: Any, embed_json: dict[str, Any]
) -> None:
    body = json.dumps(embed_json).encode()
    http = connect(make_engine(max_json_bytes=len(body) - 1))

    async def parts() -> Any:
        yield body[:50]
        yield body[50:]

    for content in (body, parts()):
        reply = await http.post("/v1/embed", content=content, headers={"content-type": protocol.JSON})
        assert reply.status_code == 413
        assert "or as Arrow, which may have more" in reply.json()["error"]["message"]
