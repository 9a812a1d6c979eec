"""Large work does not hold up small, and long scores do not hold up short ones."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from serving.engine import threads
from serving.engine.engine import LARGE, SMALL, Engine
from serving.engine.threads import GoneError, Job, Turns


async def test_large_work_leaves_threads_to_small(engine: Engine) -> None:
    gate = threading.Event()

    def wait(_: bytes) -> bool:
        return gate.wait(30)

    large = [asyncio.ensure_future(engine.work(wait, bytes(LARGE))) for _ in range(50)]
    async with asyncio.timeout(60):
        assert await engine.work(len, b"123") == 3
    for task in large[1:]:
        task.cancel()
    gate.set()
    assert await large[0]
    await asyncio.gather(*large[1:], return_exceptions=True)


async def test_work_that_nobody_waits_for_any_more_is_never_begun(engine: Engine) -> None:
    gate = threading.Event()
    ran: list[int] = []
    blocking = [asyncio.ensure_future(engine.work(gate.wait, 30)) for _ in range(100)]
    gone = asyncio.ensure_future(engine.work(ran.append, 1))
    await asyncio.sleep(0)
    gone.cancel()
    # The thread pool hears of it one turn of the loop later.
    await asyncio.gather(gone, return_exceptions=True)
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*blocking)
    assert ran == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are handed on at every step."""
    monkeypatch.setattr(threads, "_SLICE", 0.0)


class Score:
    """A score on a thread, whose steps a test allows."""

    def __init__(self, turns: Turns, name: str, steps: int, log: list[str], flow: str = "") -> None:
        self.job: Job = turns.new()
        self.go = threading.Semaphore(0)
        self.at = threading.Semaphore(0)
        self.error: BaseException | None = None
        self._turns, self._name, self._steps, self._log, self._flow = turns, name, steps, log, flow
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._turns.turn(self.job, self._flow):
                for _ in range(self._steps):
                    self._log.append(self._name)
                    self.at.release()
                    assert self.go.acquire(timeout=30)
                    self.job.step()
        except GoneError as error:
            self.error = error

    def reached(self) -> None:
        """Wait until it computes a step."""
        assert self.at.acquire(timeout=30)

    def done(self) -> None:
        self.thread.join(30)
        assert not self.thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


@pytest.mark.usefixtures("quick")
def test_a_short_score_waits_for_one_step_of_a_long_one() -> None:
    turns, log = Turns(1), list[str]()
    long = Score(turns, "long", 5, log)
    long.reached()
    short = Score(turns, "short", 1, log)
    until(lambda: len(turns._waiting) == 1)
    long.go.release()
    short.reached()
    assert log == ["long", "short"]
    short.go.release()
    short.done()
    for _ in range(4):
        long.reached()
        long.go.release()
    long.done()
    assert log == ["long", "short", *["long"] * 4]


@pytest.mark.usefixtures("quick")
def test_scores_of_one_flow_have_one_flows_share() -> None:
    turns, log = Turns(1), list[str]()
    scores = [Score(turns, name, 30, log, flow=name[0]) for name in ("a1", "a2", "a3", "b1")]
    for score in scores:
        for _ in range(30):
            score.go.release()  # steps take no time to speak of: the order is what is tested, not the shares
    for score in scores:
        score.done()
    assert sorted(set(log)) == ["a1", "a2", "a3", "b1"]
    assert len(log) == 120


@pytest.mark.usefixtures("quick")
def test_a_score_ends_where_it_is_when_nobody_waits_for_it() -> None:
    turns, log = Turns(1), list[str]()
    computing = Score(turns, "computing", 5, log)
    computing.reached()
    waiting = Score(turns, "waiting", 5, log)
    until(lambda: len(turns._waiting) == 1)
    turns.cancel(waiting.job)
    waiting.done()
    assert waiting.error is not None
    turns.cancel(computing.job)
    computing.go.release()
    computing.done()
    assert computing.error is not None
    assert log == ["computing"]
    after = Score(turns, "after", 1, log)
    after.reached()
    after.go.release()
    after.done()
    assert log == ["computing", "after"]


def test_no_more_compute_than_are_allowed() -> None:
    turns, log = Turns(2), list[str]()
    scores = [Score(turns, str(at), 1, log) for at in range(4)]
    until(lambda: len(log) == 2 and len(turns._waiting) == 2)
    for score in scores:
        score.go.release()
    for score in scores:
        score.done()
    assert sorted(log) == ["0", "1", "2", "3"]
    assert all(score.job.computed() > 0 for score in scores)


async def test_small_work_is_done_at_once_and_other_work_on_threads(engine: Engine) -> None:
    here = threading.current_thread()

    def where(*_: object) -> threading.Thread:
        return threading.current_thread()

    assert await engine.work(where, b"x" * SMALL) is here
    assert await engine.work(where, b"x" * (SMALL + 1)) is not here
    assert await engine.work(where) is not here, "nothing tells how long it takes"
