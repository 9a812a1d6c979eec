"""The queue under load: bounds of the wait, deadlines, and a model that hangs, fails or is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perturbscope.errors import DeadlineExceededError, InferenceError, OverloadedError, PerturbScopeError
from perturbscope.families.outputs import CELL_EMBEDDING
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Values
from serving.queue import Dispatcher
from tests.fakes import FakeEncoder
from tests.unit.serving.queue.test_dispatcher import (
    _FAMILY,
    PickyEncoder,
    assert_own,
    cells,
    embedder_of,
    settle,
    started,
)


class SteppedEncoder(FakeEncoder):
    """Runs a batch when the test says so, and remembers whose cells were in it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = threading.Semaphore(0)
        self.names: list[list[int]] = []

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        self.names.append(sorted({int(first) // 1000 for first in inputs["input_ids"][:, 0]}))
        assert self.steps.acquire(timeout=30), "the test never let the batch run"
        return super().run(inputs)

    async def step(self) -> None:
        """Let the batch that waits run, and wait for the next one or the end."""
        n = len(self.names)
        self.steps.release()
        async with asyncio.timeout(60):
            while len(self.batches) < n or (len(self.names) == n and self.busy()):
                await asyncio.sleep(0.0005)

    busy: Callable[[], bool] = staticmethod(lambda: False)


Make = Callable[..., Dispatcher]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Dispatchers over a fake encoder; closed at the end."""
    made: list[Dispatcher] = []

    def build(encoder: FakeEncoder, max_tokens: int = 1000, **options: Any) -> Dispatcher:
        dispatcher = Dispatcher(embedder_of(_FAMILY, encoder, BatchLimits(max_tokens=max_tokens)), **options)
        if isinstance(encoder, SteppedEncoder):
            encoder.busy = lambda: dispatcher.pending_callers > 0
        made.append(dispatcher)
        return dispatcher

    yield build
    for dispatcher in made:
        encoder = dispatcher.embedder.encoder
        if isinstance(encoder, SteppedEncoder):
            for _ in range(1000):
                encoder.steps.release()
        if isinstance(encoder, FakeEncoder) and encoder.gate is not None:
            encoder.gate.set()
        await dispatcher.close()


def submit(dispatcher: Dispatcher, name: int, *lengths: int, flow: str = "", **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(dispatcher.submit(cells(*lengths, name=name), flow=flow, **options))


async def test_a_newcomer_is_in_the_first_batch_that_is_begun_after_it_came(make: Make) -> None:
    encoder = SteppedEncoder()
    dispatcher = make(encoder)
    bulk = submit(dispatcher, 1, *[100] * 400)
    await started_batches(encoder, 1)
    for name in range(2, 12):  # whenever it comes
        await encoder.step()
        small = submit(dispatcher, name, 100, 90, 80)
        await settle()
        began = len(encoder.names)
        await encoder.step()
        assert encoder.names[began:] == [[1, name]]  # with it, the bulk caller's cells fill the batch
        await encoder.step()
        assert_own((await small)[0], [100, 90, 80], name)
    assert not bulk.done()


async def test_a_newcomer_waits_for_one_batch_however_many_bulk_callers_there_are(make: Make) -> None:
    encoder = SteppedEncoder()
    dispatcher = make(encoder)
    bulk = [submit(dispatcher, name, *[100] * 30, flow=f"key{name % 3}") for name in range(1, 10)]
    await started_batches(encoder, 1)
    for _ in range(4):
        await encoder.step()
    small = submit(dispatcher, 77, 50, flow="new")
    await settle()
    began = len(encoder.names)
    await encoder.step()
    await encoder.step()
    assert 77 in encoder.names[began] + encoder.names[began + 1]
    await small
    assert not any(task.done() for task in bulk)


@settings(deadline=None, max_examples=30)
@given(
    bulk=st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 3)), min_size=1, max_size=12),
    before=st.integers(0, 30),
    small=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    flow=st.integers(0, 3),
)
def test_the_stated_bound_holds(bulk: list[tuple[int, int]], before: int, small: list[int], flow: int) -> None:
    size = 1000

    async def run() -> None:
        encoder = SteppedEncoder()
        dispatcher = Dispatcher(embedder_of(_FAMILY, encoder, BatchLimits(max_tokens=size, max_cells=10**6)))
        encoder.busy = lambda: dispatcher.pending_callers > 0
        for name, (length, key) in enumerate(bulk, start=1):
            many = [length] * (80 * max(1, size // length))  # more batches than are looked at
            dispatcher._room.limit = 10**9
            submit(dispatcher, name % 900, *many, flow=str(key))
        await started_batches(encoder, 1)
        for _ in range(before):
            await encoder.step()
        rivals = dispatcher._share.rivals(str(flow))
        task = submit(dispatcher, 999, *small, flow=str(flow))
        await settle()
        began = len(encoder.names)
        while not any(999 in names for names in encoder.names[began:]):
            await encoder.step()
        others = sum(cells * longest for cells, longest in encoder.batches[began:])
        slots = max(small) * len(small)
        assert others <= (rivals - 1) * slots + size
        task.cancel()
        for open_task in asyncio.all_tasks() - {asyncio.current_task()}:
            if open_task.get_name() != "perturbscope-dispatcher":
                open_task.cancel()
        for _ in range(5):
            encoder.steps.release()
        await settle()
        await dispatcher.close()

    asyncio.run(run())


async def test_flows_share_the_model_whatever_they_send(make: Make) -> None:
    encoder = SteppedEncoder()
    dispatcher = make(encoder)
    for name in range(1, 6):
        submit(dispatcher, name, *[100] * 200, flow="greedy")
    submit(dispatcher, 9, *[100] * 200, flow="modest")
    await started_batches(encoder, 1)
    for _ in range(40):
        await encoder.step()
    modest = sum(9 in names for names in encoder.names[:40])
    assert modest == 20


async def test_long_cells_are_not_put_off_by_short_ones(make: Make) -> None:
    encoder = SteppedEncoder()
    dispatcher = make(encoder)
    long = submit(dispatcher, 1, *[900] * 5)
    chatter = [submit(dispatcher, name, *[100] * 100) for name in range(2, 6)]
    await started_batches(encoder, 1)
    for _ in range(30):
        await encoder.step()
    assert long.done()
    assert not any(task.done() for task in chatter)


async def test_a_deadline_drops_the_cells_that_wait(make: Make) -> None:
    gate, watch = threading.Event(), Watch()
    dispatcher = make(FakeEncoder(gate=gate), observer=watch)
    first = submit(dispatcher, 1, 5)
    await started(dispatcher.embedder.encoder)  # type: ignore[arg-type]
    late = submit(dispatcher, 2, 50, 60, deadline=time.monotonic() + 0.02)
    with pytest.raises(DeadlineExceededError, match="time that the caller allowed is over"):
        await late
    assert dispatcher.pending_tokens == 5
    gate.set()
    await first
    await dispatcher.close()
    assert dispatcher.embedder.encoder.batches == [(1, 5)]  # type: ignore[attr-defined]
    assert watch.drops == [(2, "deadline")]


async def test_a_deadline_that_has_passed_or_cannot_be_kept_is_refused_at_once(make: Make) -> None:
    watch = Watch()
    dispatcher = make(FakeEncoder(delay=0.05), observer=watch)
    with pytest.raises(DeadlineExceededError):
        await dispatcher.submit(cells(5), deadline=time.monotonic() - 1)
    await dispatcher.submit(cells(500, 500), deadline=time.monotonic() + 100)  # at most 20,000 tokens a second
    with pytest.raises(DeadlineExceededError, match=r"The 20,000 tokens of this request need \d+\.\d s"):
        await dispatcher.submit(cells(*[500] * 40), deadline=time.monotonic() + 0.5)
    assert watch.drops == [(1, "deadline"), (40, "deadline")]
    assert len(dispatcher.embedder.encoder.batches) == 1  # type: ignore[attr-defined]


async def test_a_small_request_beside_a_bulk_one_is_not_refused_for_the_bulk_ones_time(make: Make) -> None:
    dispatcher = make(FakeEncoder(delay=0.02))
    await dispatcher.submit(cells(500, 500))
    bulk = submit(dispatcher, 1, *[500] * 4000)  # 40 s
    await settle()
    assert_own((await dispatcher.submit(cells(10, name=2), deadline=time.monotonic() + 20))[0], [10], 2)
    assert not bulk.done()
    bulk.cancel()


async def test_a_wall_clock_that_jumps_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = make(FakeEncoder(delay=0.01))
    jumps = iter([1e9, -1e9] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    values, timings = await dispatcher.submit(cells(500, 400, 300), deadline=time.monotonic() + 20)
    assert_own(values, [500, 400, 300])
    assert 0 <= timings["queue"] < 10
    assert 0 < timings["inference"] < 10


def hangs(dispatcher: Dispatcher) -> bool:
    return dispatcher.stalled


async def test_a_forward_pass_that_hangs_is_told_and_recovered_from(make: Make) -> None:
    gate, watch = threading.Event(), Watch()
    dispatcher = make(FakeEncoder(gate=gate), max_batch_seconds=0.05, observer=watch)
    callers = [submit(dispatcher, 1, 5)]
    await started(dispatcher.embedder.encoder)  # type: ignore[arg-type]
    callers.append(submit(dispatcher, 2, 5))
    for answer in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(answer, InferenceError)
        assert "has not come back from a forward pass for 0.05 s" in answer.message
    assert hangs(dispatcher)
    assert dispatcher.last_batch_failed is True
    assert dispatcher.pending_callers == 0
    with pytest.raises(InferenceError, match="answers nobody until it does"):
        await dispatcher.submit(cells(3))
    gate.set()
    async with asyncio.timeout(60):
        while hangs(dispatcher):  # until it returns
            await asyncio.sleep(0.001)
    assert_own((await dispatcher.submit(cells(4)))[0], [4])
    assert len(watch.errors) == 1
    assert not vars(dispatcher)["_runner"].last_failed


async def test_a_model_that_hangs_does_not_hold_up_the_end(make: Make) -> None:
    gate = threading.Event()
    dispatcher = make(FakeEncoder(gate=gate), max_batch_seconds=0.05)
    caller = submit(dispatcher, 1, 5)
    await started(dispatcher.embedder.encoder)  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        await dispatcher.close()
    with pytest.raises(InferenceError):
        await caller


async def test_a_lost_model_is_told_to_all_at_once(make: Make) -> None:
    encoder = FakeEncoder()
    dispatcher = make(encoder)
    await dispatcher.submit(cells(7, 3))
    encoder.error = RuntimeError("the device fell off the bus")
    n = len(encoder.batches)
    answers = await asyncio.gather(*(submit(dispatcher, name, 5) for name in range(1, 50)), return_exceptions=True)
    assert all(isinstance(answer, InferenceError) and "fell off" in answer.message for answer in answers)
    assert encoder.batches[n:] == [(49, 5), (1, 3)]  # the batch, and a cell that was answered before
    assert dispatcher.last_batch_failed
    encoder.error = None
    assert_own((await dispatcher.submit(cells(5)))[0], [5])
    assert not dispatcher.last_batch_failed


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("bug"), SystemExit(1)])
async def test_whatever_a_forward_pass_raises_hits_its_caller_alone(make: Make, error: BaseException) -> None:
    class Raising(PickyEncoder):
        def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
            if 3001 in inputs["input_ids"]:
                raise error
            return FakeEncoder.run(self, inputs)

    dispatcher = make(Raising(poison=3001))
    await dispatcher.submit(cells(4))
    answers = await asyncio.gather(*(submit(dispatcher, name, 3, 4) for name in range(1, 6)), return_exceptions=True)
    assert isinstance(answers[2], InferenceError)
    assert type(error).__name__ in answers[2].message
    for name in (1, 2, 4, 5):
        answer = answers[name - 1]
        assert not isinstance(answer, BaseException)
        assert_own(answer[0], [3, 4], name)


class Watch:
    """Remembers what a dispatcher tells."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []
        self.waits: list[float] = []
        self.tags: list[Sequence[object]] = []
        self.errors: list[PerturbScopeError] = []
        self.drops: list[tuple[int, str]] = []

    def batch(
        self,
        *,
        n_cells: int,
        n_tokens: int,
        n_padded: int,
        seconds: float,
        waited: Sequence[float],
        tags: Sequence[object],
    ) -> None:
        assert seconds >= 0
        self.batches.append((n_cells, n_tokens, n_padded))
        self.waits.extend(waited)
        self.tags.append(tags)

    def failed(self, error: PerturbScopeError) -> None:
        self.errors.append(error)

    def dropped(self, *, n_cells: int, reason: str) -> None:
        self.drops.append((n_cells, reason))


async def test_the_observer_is_told_of_all(make: Make) -> None:
    gate, watch = threading.Event(), Watch()
    dispatcher = make(FakeEncoder(gate=gate), max_tokens=200, max_queued_tokens=300, observer=watch)
    gone = submit(dispatcher, 1, 100, 60, 100)
    kept = [submit(dispatcher, 2, 70, tag="two"), submit(dispatcher, 3, 80)]
    await started(dispatcher.embedder.encoder)  # type: ignore[arg-type]
    with pytest.raises(OverloadedError):
        await dispatcher.submit(cells(100, 100))
    gone.cancel()
    await settle()
    gate.set()
    await asyncio.gather(*kept)
    assert watch.batches == [(2, 150, 160)]
    assert len(watch.waits) == 2
    assert watch.tags == [["two"]]
    assert watch.drops == [(2, "overloaded"), (3, "cancelled")]
    assert watch.errors == []


async def started_batches(encoder: SteppedEncoder, n: int) -> None:
    async with asyncio.timeout(60):
        while len(encoder.names) < n:
            await asyncio.sleep(0.0005)


async def test_cells_of_real_lengths_are_packed_well(make: Make, fake_embedder: Embedder) -> None:
    """Many callers with cells of very different lengths cause little padding."""
    watch, rng = Watch(), np.random.default_rng(0)
    dispatcher = make(FakeEncoder(), max_tokens=16_384, observer=watch)
    lengths = [np.clip(rng.lognormal(6.3, 0.6, 8), 20, 2048).astype(int).tolist() for _ in range(100)]
    await asyncio.gather(*(submit(dispatcher, name, *mine) for name, mine in enumerate(lengths)))
    padded = sum(n_padded for _, _, n_padded in watch.batches)
    assert 1 - sum(sum(mine) for mine in lengths) / padded < 0.35
