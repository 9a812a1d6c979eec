"""Scores that cost too much are refused and charged; those that nobody waits for end; one that hangs is seen."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import (
    ControlLabelMissingError,
    DeadlineExceededError,
    LimitExceededError,
    RateLimitedError,
)
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import CompareRequest, ScoreRequest
from perturbscope.scoring.results import ScoreOptions
from perturbscope.threads import checkpoint
from serving.access.front import Front
from serving.access.rates import CELLS_A_SECOND
from serving.call import Call, Caller
from serving.engine import engine as engines
from serving.engine import scores
from serving.engine.engine import Engine
from serving.engine.reports import ReportRequest
from tests.unit.serving.conftest import FAST, LABELS, MakeEngine

MUCH = {"permutations": 100_000, "wasserstein_permutations": 100_000}
SOON = 2.0
"""Seconds for what takes a tenth of one where nothing else runs."""


def vectors(n: int, width: int = 4) -> Any:
    return np.random.default_rng(0).standard_normal((n, width)).astype(np.float32)


def long_score(n: int = 150, **options: Any) -> ScoreRequest:
    labels = ("c",) * n + ("x",) * n
    options = {"metrics": ("wasserstein",), **MUCH, **options}
    return ScoreRequest(embeddings=vectors(2 * n), perturbations=labels, control="c", options=ScoreOptions(**options))


def short_score() -> ScoreRequest:
    options = ScoreOptions(permutations=20)
    return ScoreRequest(embeddings=vectors(80), perturbations=("c", "x") * 40, control="c", options=options)


async def test_a_score_of_hours_is_refused_with_what_to_lower(engine: Engine) -> None:
    with pytest.raises(LimitExceededError) as caught:
        await engine.scores.score(long_score(1500))
    message = caught.value.message
    assert "hours of a processor core; this server takes 10 minutes (PERTURBSCOPE_MAX_SCORE_SECONDS)" in message
    assert "wasserstein_permutations (" in message
    assert (await engine.scores.score(short_score())).result.table["perturbation"].tolist() == ["x"]


async def test_a_costly_score_of_counts_embeds_nothing(
    make_engine: MakeEngine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    engine = make_engine(max_score_seconds=1)
    options = ScoreOptions(**{**FAST, **MUCH}, metrics=("wasserstein",))
    request = ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="control", options=options)
    with pytest.raises(LimitExceededError, match=r"takes 1\.0 seconds .* wasserstein_permutations \("):
        await engine.scores.score(request)
    with pytest.raises(LimitExceededError, match=r"stands for report \("):
        await engine.scores.report(
            ReportRequest(score=ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="control"))
        )
    assert fake_embedder.encoder.batches == []  # type: ignore[attr-defined]


async def test_pairs_are_counted_before_they_are_made(make_engine: MakeEngine) -> None:
    labels = ("a",) * 20 + tuple(f"p{i}" for i in range(20_000))
    every = CompareRequest(embeddings=vectors(len(labels)), perturbations=labels)
    began = time.process_time()
    with pytest.raises(
        LimitExceededError, match=r"compares 200,010,000 pairs .*takes 100,000 \(PERTURBSCOPE_MAX_PAIRS\)"
    ):
        await make_engine().scores.compare(every)
    assert time.process_time() - began < SOON
    few = CompareRequest(embeddings=vectors(60), perturbations=("a", "b", "c") * 20, pairs=(("a", "b"),) * 11)
    with pytest.raises(LimitExceededError, match=r"compares 11 pairs"):
        await make_engine(max_pairs=10).scores.compare(few)
    assert len((await make_engine(max_pairs=11).scores.compare(few)).result.table) == 11


async def test_the_memory_of_pairs_is_held(make_engine: MakeEngine) -> None:
    engine = make_engine(max_held_bytes=100_000_000, max_body_bytes=10**6, max_pairs=10**9)
    labels = ("a",) * 20 + tuple(f"p{i}" for i in range(1000))
    call = Call("/v1/compare", "http")
    with pytest.raises(LimitExceededError, match="compare fewer perturbations at a time"):
        async with engine.front.admitted(call):
            await engine.scores.compare(CompareRequest(embeddings=vectors(len(labels)), perturbations=labels), call)
    assert engine.admission.held_bytes == 0


async def test_score_work_is_charged_to_the_key(engine: Engine) -> None:
    caller = Caller("a", cells_per_minute=100 * CELLS_A_SECOND)

    class Door:
        def caller(self, headers: Any, peer: str) -> Caller:
            return caller

    front = Front(engine.admission, Door())  # type: ignore[arg-type]

    async def ask(request: ScoreRequest) -> None:
        call = Call("/v1/score", "http")
        async with front.admitted(call):
            await asyncio.wait_for(engine.scores.score(request, call), 0.2)

    with pytest.raises(
        LimitExceededError, match=r"needs about \d+ seconds of scoring, which count as [\d,]+ cells; the"
    ):
        await ask(long_score(150))
    some = long_score(100, wasserstein_permutations=10_000)  # about 14 seconds of the 100 that the key has
    refused: list[type[BaseException]] = []
    for _ in range(40):
        try:
            await ask(some)
        except (TimeoutError, RateLimitedError) as error:
            refused.append(type(error))
            if isinstance(error, RateLimitedError):
                break
    assert refused[0] is TimeoutError
    assert refused[-1] is RateLimitedError
    await engine.scores.score(short_score(), Call("/v1/score", "http", charge=None))


async def gone(engine: Engine) -> None:
    ends = time.monotonic() + SOON
    while engine.scores.abandoned or engine.scores._turns._joined:
        assert time.monotonic() < ends
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("ask", ["score", "compare", "report"])
async def test_a_score_ends_when_its_caller_goes(make_engine: MakeEngine, ask: str) -> None:
    engine = make_engine(max_score_seconds=10**6)
    score = long_score()
    request: Any = {
        "score": score,
        "compare": CompareRequest(
            embeddings=score.embeddings, perturbations=score.perturbations, options=score.options
        ),
        "report": ReportRequest(score=score),
    }[ask]
    task = asyncio.ensure_future(getattr(engine.scores, ask)(request))
    await asyncio.sleep(0.3)
    assert engine.scores.n_jobs == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(engine)
    assert engine.scores.stuck_seconds == 0


async def test_a_deadline_ends_the_work_and_gives_its_memory_back(make_engine: MakeEngine) -> None:
    engine = make_engine(max_score_seconds=10**6)
    call = Call("/v1/score", "http", {"x-request-timeout": "0.3"})
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        async with engine.front.admitted(call):
            await engine.scores.score(long_score(), call)
    assert time.monotonic() - began < 0.3 + SOON
    assert engine.admission.held_bytes == 0
    await gone(engine)


async def test_a_score_looks_at_the_deadline_itself(make_engine: MakeEngine) -> None:
    engine = make_engine(max_score_seconds=10**6)
    call = Call("/v1/score", "grpc", deadline=time.monotonic() + 0.3)  # and nobody cancels it
    with pytest.raises(DeadlineExceededError, match="ask for fewer permutations"):
        await engine.scores.score(long_score(), call)


async def test_one_long_perturbation_lets_short_scores_pass(make_engine: MakeEngine) -> None:
    engine = make_engine(max_score_seconds=10**6)
    long = asyncio.ensure_future(engine.scores.score(long_score(), Call("", "http", caller=Caller("a"))))
    await asyncio.sleep(0.3)
    for _ in range(3):
        async with asyncio.timeout(5 * SOON):
            await engine.scores.score(short_score(), Call("", "http", caller=Caller("b")))
    assert not long.done()
    assert await engine.ready()
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)


class Hung:
    """A computation that reaches no checkpoint until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go = threading.Event(), threading.Event()

        def hang(*_: Any, **__: Any) -> None:
            self.began.set()
            self.go.wait(60)
            checkpoint()

        monkeypatch.setattr("perturbscope.scoring.control.score_perturbations", hang)


async def test_a_score_that_hangs_is_gauged_and_makes_the_server_not_ready(
    make_engine: MakeEngine, connect: Callable[[Engine], httpx.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    http = connect(engine)

    async def gauge(name: str) -> float:
        lines = (await http.get("/metrics")).text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"perturbscope_{name} ")))

    hung = Hung(monkeypatch)
    monkeypatch.setattr(scores, "_LAST_STEP", 0.05)
    task = asyncio.ensure_future(engine.scores.score(short_score()))
    await asyncio.to_thread(hung.began.wait, 60)
    assert await gauge("score_jobs_abandoned") == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await gauge("score_jobs_in_progress") == 0
    assert await gauge("score_jobs_abandoned") == 1
    assert await gauge("score_step_seconds") > 0
    assert await engine.ready()
    monkeypatch.setattr(engines, "STUCK", 0.0)
    assert not await engine.ready()
    hung.go.set()
    await gone(engine)
    assert await engine.ready()
    assert await gauge("score_jobs_abandoned") == await gauge("score_step_seconds") == 0


async def test_an_unknown_control_among_many_labels_is_answered_at_once(engine: Engine) -> None:
    letters = list("ab" * 32)
    order = np.random.default_rng(1)
    labels = tuple("".join(order.permutation(letters)) for _ in range(8000))
    request = ScoreRequest(embeddings=vectors(8000, 1), perturbations=labels, control="ab" * 31 + "a")
    began = time.process_time()
    with pytest.raises(ControlLabelMissingError):
        await engine.scores.score(request)
    assert time.process_time() - began < SOON


async def test_many_abandoned_scores_leave_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(max_score_seconds=10**6, max_requests=64)
    tasks = [asyncio.ensure_future(engine.scores.score(long_score())) for _ in range(40)]
    await asyncio.sleep(0.3)
    for task in tasks:
        task.cancel()
    assert {type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)} == {asyncio.CancelledError}
    await gone(engine)
    assert (await engine.scores.score(short_score())).result.table["perturbation"].tolist() == ["x"]
