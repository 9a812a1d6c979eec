"""The queue between callers and the model: order, isolation, back-pressure, cancellation, shutdown."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InferenceError, InvalidParameterError, OverloadedError
from perturbscope.families import Family, load_family
from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING, Outputs
from perturbscope.families.rank import RankFamily
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Values
from serving.queue import MAX_RETRY, MIN_RETRY, Dispatcher
from tests.bundles import TINY_OUTPUTS
from tests.fakes import FakeEncoder

COVERAGE = GeneCoverage(n_genes=1, n_matched=1)


def cells(*lengths: int, name: int = 1) -> TokenizedCells:
    """Cells of these lengths; the first token of cell i is ``1000 * name + i``, so a vector tells whose it is."""
    ids = [np.concatenate([[1000 * name + i], np.full(n - 1, 7)]) for i, n in enumerate(lengths)]
    return TokenizedCells(
        arrays={"input_ids": np.concatenate(ids).astype(np.int32)},
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        known_share=np.ones(len(lengths), dtype=np.float32),
        n_detected=np.asarray(lengths, dtype=np.int32),
        coverage=COVERAGE,
    )


def assert_own(outputs: Outputs, lengths: Sequence[int], name: int = 1) -> None:
    """These are the vectors of ``cells(*lengths, name=name)``, in order."""
    np.testing.assert_array_equal(outputs.cell_embedding[:, 0], lengths)
    np.testing.assert_array_equal(outputs.cell_embedding[:, 1], 1000 * name + np.arange(len(lengths)))


class PickyEncoder(FakeEncoder):
    """Fails every batch that holds a cell whose first token is `poison`."""

    def __init__(self, poison: int, error: Exception | None = None) -> None:
        super().__init__()
        self.poison = poison
        self.cause = error or InferenceError("poisoned")

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        values = super().run(inputs)
        if self.poison in values[CELL_EMBEDDING][:, 1]:
            raise self.cause
        return values


class ManyOutputs(FakeEncoder):
    """Also gives the token ids, halved, and the first values of each cell's vector as classes.

    `asked` has the outputs that each batch was asked for.
    """

    def __init__(self, gate: threading.Event | None = None) -> None:
        super().__init__(gate=gate)
        self.outputs = tuple(spec for spec in TINY_OUTPUTS if spec.name != GENE_EMBEDDING)
        self.asked: list[list[str]] = []

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] = (CELL_EMBEDDING,)) -> Values:
        self.asked.append(list(outputs))
        values = dict(super().run(inputs))
        values["gene_value"] = inputs["input_ids"][..., None].astype(np.float32) / 2
        values["cell_logits"] = values[CELL_EMBEDDING][:, :3]
        return {name: values[name] for name in outputs}


class CostlyFamily(RankFamily):
    """A family of which a token counts for ten."""

    def cost(self, length: int) -> int:
        return 10 * length


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


Make = Callable[..., Dispatcher]


@pytest.fixture
async def make(fake_embedder: Embedder) -> AsyncIterator[Make]:
    """Dispatchers over a fake encoder; closed at the end."""
    made: list[Dispatcher] = []

    def build(encoder: FakeEncoder | None = None, limits: BatchLimits | None = None, **options: Any) -> Dispatcher:
        dispatcher = Dispatcher(embedder_of(fake_embedder.family, encoder or FakeEncoder(), limits), **options)
        made.append(dispatcher)
        return dispatcher

    yield build
    for dispatcher in made:
        gate = getattr(dispatcher.embedder.encoder, "gate", None)
        if gate is not None:
            gate.set()
        await dispatcher.close()


def embedder_of(family: Family, encoder: FakeEncoder, limits: BatchLimits | None = None) -> Embedder:
    return Embedder(family, encoder, model_id="fake", vocabulary_hash="0", limits=limits)


def encoder_of(dispatcher: Dispatcher) -> FakeEncoder:
    encoder = dispatcher.embedder.encoder
    assert isinstance(encoder, FakeEncoder)
    return encoder


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def started(encoder: FakeEncoder, batches: int = 1) -> None:
    """Wait until that many batches reached the encoder."""
    async with asyncio.timeout(60):
        while len(encoder.batches) < batches:
            await asyncio.sleep(0.001)


async def test_a_lone_caller_gets_its_cells_in_order(make: Make) -> None:
    values, timings = await make().submit(cells(5, 2, 9, 1))
    assert values.cell_embedding.dtype == np.float32
    assert_own(values, [5, 2, 9, 1])
    assert set(timings) == {"queue", "inference"}


async def test_callers_that_come_together_share_a_batch_and_get_their_own_cells(make: Make) -> None:
    dispatcher = make()
    lengths = {name: [name + 1, 3 * name + 2, 1] for name in range(1, 9)}
    answers = await asyncio.gather(*(dispatcher.submit(cells(*lengths[name], name=name)) for name in lengths))
    for name, (values, _) in zip(lengths, answers, strict=True):
        assert_own(values, lengths[name], name)
    assert [shape[0] for shape in encoder_of(dispatcher).batches] == [24]


async def test_a_large_caller_runs_from_its_longest_cells_on(make: Make) -> None:
    dispatcher = make(limits=BatchLimits(max_tokens=400))
    values, _ = await dispatcher.submit(cells(100, 200, 100, 200, 80, 90))
    assert encoder_of(dispatcher).batches == [(2, 200), (4, 100)]
    assert_own(values, [100, 200, 100, 200, 80, 90])


async def test_callers_who_want_other_outputs_share_a_batch(make: Make, gate: threading.Event) -> None:
    encoder = ManyOutputs(gate)
    dispatcher = make(encoder)
    busy = asyncio.create_task(dispatcher.submit(cells(1)))
    await started(encoder)
    wanted = [None, ["gene_value"], ["cell_logits", "gene_value"], ["cell_logits"]]
    lengths = [[3, 5], [4, 2], [2], [6, 1]]
    waiting = [
        asyncio.create_task(dispatcher.submit(cells(*lengths[name], name=name + 2), outputs=wanted[name]))
        for name in range(4)
    ]
    await settle()
    gate.set()
    await busy
    answers = [(await task)[0] for task in waiting]
    assert [shape[0] for shape in encoder.batches] == [1, 7]
    assert encoder.asked == [[CELL_EMBEDDING], [CELL_EMBEDDING, "gene_value", "cell_logits"]]
    for name, (outputs, names) in enumerate(zip(answers, wanted, strict=True)):
        assert set(outputs.values) == {CELL_EMBEDDING, *(names or ())}
        assert_own(outputs, lengths[name], name + 2)
        if names and "gene_value" in names:
            ids = cells(*lengths[name], name=name + 2).arrays["input_ids"]
            np.testing.assert_array_equal(outputs["gene_value"], ids[:, None] / 2)
        if names and "cell_logits" in names:
            np.testing.assert_array_equal(outputs["cell_logits"], outputs.cell_embedding[:, :3])


async def test_values_per_token_of_many_batches_are_put_together(make: Make) -> None:
    encoder = ManyOutputs()
    dispatcher = make(encoder, BatchLimits(max_tokens=20))
    lengths = [7, 3, 12, 1, 9, 3, 20]
    outputs, _ = await dispatcher.submit(cells(*lengths), outputs=["gene_value"])
    assert len(encoder.batches) > 3
    assert_own(outputs, lengths)
    np.testing.assert_array_equal(outputs["gene_value"][:, 0], cells(*lengths).arrays["input_ids"] / 2)


async def test_an_output_that_the_model_does_not_have(make: Make) -> None:
    dispatcher = make(ManyOutputs())
    with pytest.raises(InvalidParameterError, match="no output 'gene_embedding'; it has cell_embedding, gene_value"):
        await dispatcher.submit(cells(3), outputs=["gene_embedding"])
    assert encoder_of(dispatcher).batches == []
    assert dispatcher.pending_tokens == 0


async def test_the_cost_of_a_family_counts_in_batches_and_in_the_queue(gate: threading.Event) -> None:
    family = CostlyFamily(_FAMILY.config, _FAMILY.vocabulary, _FAMILY.resolver)
    encoder = FakeEncoder(gate=gate)
    embedder = embedder_of(family, encoder, BatchLimits(max_tokens=100))
    dispatcher = Dispatcher(embedder, max_queued_tokens=480)
    first = asyncio.create_task(dispatcher.submit(cells(5, 5, 4, 2)))
    await started(encoder)
    assert dispatcher.pending_tokens == 160
    waiting = [asyncio.create_task(dispatcher.submit(cells(12))) for _ in range(4)]
    await settle()
    refused = [task for task in waiting if task.done()]
    assert refused  # the queue has room for 64 tokens, but not for what they cost
    for task in refused:
        error = task.exception()
        assert isinstance(error, OverloadedError)
        assert "tokens, and this request would add 120; the limit is 480" in str(error)
    gate.set()
    assert_own((await first)[0], [5, 5, 4, 2])
    for task in waiting:
        if task not in refused:
            assert_own((await task)[0], [12])
    # Two cells of five tokens count for 100, and a batch has no room for more.
    assert encoder.batches == [(2, 5), *[(1, 12)] * (4 - len(refused)), (2, 4)]
    assert dispatcher.pending_tokens == 0
    await dispatcher.close()


@settings(deadline=None, max_examples=40)
@given(
    callers=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=8),
    max_tokens=st.integers(1, 200),
)
def test_no_batch_passes_the_budget_and_every_cell_is_answered(callers: list[list[int]], max_tokens: int) -> None:
    encoder = FakeEncoder()
    family = _FAMILY
    limits = BatchLimits(max_tokens=max_tokens)

    async def run() -> None:
        dispatcher = Dispatcher(embedder_of(family, encoder, limits))
        answers = await asyncio.gather(
            *(dispatcher.submit(cells(*lengths, name=name)) for name, lengths in enumerate(callers))
        )
        for name, (values, _) in enumerate(answers):
            assert_own(values, callers[name], name)
        assert dispatcher.pending_tokens == 0
        await dispatcher.close()

    asyncio.run(run())
    assert sum(n for n, _ in encoder.batches) == sum(len(lengths) for lengths in callers)
    assert all(n == 1 or n * longest <= max_tokens for n, longest in encoder.batches)


_FAMILY = cast("RankFamily", load_family("rank", {"max_length": 2048}, GeneVocabulary.geneformer_gc30m()))


async def test_batches_grow_only_while_the_worker_is_busy(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate))
    first = asyncio.create_task(dispatcher.submit(cells(3)))
    await started(encoder_of(dispatcher))
    rest = [asyncio.create_task(dispatcher.submit(cells(3, name=name))) for name in range(2, 7)]
    await settle()
    gate.set()
    await asyncio.gather(first, *rest)
    assert encoder_of(dispatcher).batches == [(1, 3), (5, 3)]


async def test_a_small_request_does_not_wait_for_the_whole_of_a_large_one(make: Make) -> None:
    dispatcher = make(FakeEncoder(delay=0.001), limits=BatchLimits(max_tokens=20))
    large = asyncio.create_task(dispatcher.submit(cells(*[10] * 200)))
    await started(encoder_of(dispatcher))
    values, _ = await dispatcher.submit(cells(4, name=2))
    assert_own(values, [4], 2)
    assert not large.done()
    assert len(encoder_of(dispatcher).batches) < 8
    values, _ = await large
    assert_own(values, [10] * 200)


async def test_a_large_request_is_not_starved_by_small_ones(make: Make) -> None:
    dispatcher = make(limits=BatchLimits(max_tokens=20))
    large = asyncio.create_task(dispatcher.submit(cells(*[10] * 30)))
    finished = 0

    async def chatter(name: int) -> None:
        nonlocal finished
        while not large.done():
            await dispatcher.submit(cells(10, name=name))
            finished += 1

    async with asyncio.timeout(60):
        await asyncio.gather(large, *(chatter(name) for name in range(2, 6)))
    assert finished > 0


async def test_a_caller_is_answered_before_those_with_more_to_run(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate), limits=BatchLimits(max_cells=1))
    longer = asyncio.create_task(dispatcher.submit(cells(9)))
    shorter = asyncio.create_task(dispatcher.submit(cells(2, name=2)))
    await started(encoder_of(dispatcher))
    assert encoder_of(dispatcher).batches == [(1, 2)]
    gate.set()
    await shorter
    assert not longer.done()
    await longer


async def test_timings_tell_waiting_from_computing(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate, delay=0.05))
    first = asyncio.create_task(dispatcher.submit(cells(3)))
    await started(encoder_of(dispatcher))
    began = time.perf_counter()
    second = asyncio.create_task(dispatcher.submit(cells(3, name=2)))
    await asyncio.sleep(0.1)
    gate.set()
    _, timings = await second
    elapsed = time.perf_counter() - began
    assert timings["inference"] >= 0.05
    assert timings["queue"] >= 0.15  # until the gate opened, and the batch of the first
    assert timings["queue"] + timings["inference"] <= elapsed
    await first


async def test_a_cancelled_caller_costs_no_compute(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate))
    first = asyncio.create_task(dispatcher.submit(cells(3)))
    await started(encoder_of(dispatcher))
    gone = asyncio.create_task(dispatcher.submit(cells(*[50] * 20, name=2)))
    kept = asyncio.create_task(dispatcher.submit(cells(4, name=3)))
    await settle()
    assert dispatcher.pending_tokens == 3 + 1000 + 4
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert dispatcher.pending_tokens == 3 + 4
    gate.set()
    assert_own((await kept)[0], [4], 3)
    await first
    assert encoder_of(dispatcher).batches == [(1, 3), (1, 4)]


async def test_a_caller_cancelled_half_way_is_left_out_of_later_batches(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate), limits=BatchLimits(max_tokens=10))
    gone = asyncio.create_task(dispatcher.submit(cells(10, 5, 5, 4)))
    await started(encoder_of(dispatcher))
    kept = asyncio.create_task(dispatcher.submit(cells(5, name=2)))
    await settle()
    gone.cancel()
    await settle()
    gate.set()
    assert_own((await kept)[0], [5], 2)
    await dispatcher.close()
    assert encoder_of(dispatcher).batches == [(1, 10), (1, 5)]


async def test_all_callers_cancelled_leaves_a_working_dispatcher(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate))
    tasks = [asyncio.create_task(dispatcher.submit(cells(3, name=name))) for name in range(1, 4)]
    await started(encoder_of(dispatcher))
    late = asyncio.create_task(dispatcher.submit(cells(8)))
    await settle()
    for task in [*tasks, late]:
        task.cancel()
    await asyncio.gather(*tasks, late, return_exceptions=True)
    gate.set()
    assert_own((await dispatcher.submit(cells(2, 6)))[0], [2, 6])
    assert (1, 8) not in encoder_of(dispatcher).batches


async def test_a_failing_model_tells_every_caller_why(make: Make) -> None:
    cause = RuntimeError("CUDA error: an illegal memory access")
    dispatcher = make(FakeEncoder(error=cause))
    answers = await asyncio.gather(
        *(dispatcher.submit(cells(3, name=name)) for name in range(1, 5)), return_exceptions=True
    )
    for answer in answers:
        assert isinstance(answer, InferenceError)
        assert "illegal memory access" in answer.message
        assert answer.__cause__ is cause
    assert dispatcher.last_batch_failed
    assert dispatcher.pending_tokens == 0
    encoder_of(dispatcher).error = None
    assert_own((await dispatcher.submit(cells(4)))[0], [4])
    assert not dispatcher.last_batch_failed


async def test_only_the_caller_with_the_poisoned_cell_fails(make: Make) -> None:
    dispatcher = make(PickyEncoder(poison=3001))
    answers = await asyncio.gather(
        *(dispatcher.submit(cells(3, 4, name=name)) for name in range(1, 6)), return_exceptions=True
    )
    assert isinstance(answers[2], InferenceError)
    for name in (1, 2, 4, 5):
        answer = answers[name - 1]
        assert not isinstance(answer, BaseException)
        assert_own(answer[0], [3, 4], name)


async def test_a_failed_caller_costs_nothing_more(make: Make) -> None:
    dispatcher = make(PickyEncoder(poison=1000), limits=BatchLimits(max_tokens=10))
    with pytest.raises(InferenceError, match="poisoned"):
        await dispatcher.submit(cells(10, 9, 8, 7, 6, 5))
    await dispatcher.close()
    assert encoder_of(dispatcher).batches == [(1, 10)]


async def test_a_full_queue_refuses_and_says_when_to_come_back(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate), max_queued_tokens=12)
    first = asyncio.create_task(dispatcher.submit(cells(3)))
    second = asyncio.create_task(dispatcher.submit(cells(3, name=2)))
    third = asyncio.create_task(dispatcher.submit(cells(3, name=3)))
    await settle()
    with pytest.raises(OverloadedError, match=r"holds 9 tokens.* add 3; the limit is 12") as refused:
        await dispatcher.submit(cells(3, name=4))
    assert MIN_RETRY <= refused.value.retry_after <= MAX_RETRY
    gate.set()
    assert_own((await first)[0], [3])
    assert_own((await second)[0], [3], 2)
    assert_own((await third)[0], [3], 3)
    assert_own((await dispatcher.submit(cells(3, name=4)))[0], [3], 4)


async def test_bulk_callers_leave_room_for_small_ones(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate), max_queued_tokens=1000)
    accepted = []
    for name in range(1, 4):  # each counts for a quarter
        accepted.append(asyncio.create_task(dispatcher.submit(cells(*[500] * 10, name=name))))
        await settle()
    with pytest.raises(OverloadedError):
        dispatcher.check_room(5000)
    small = asyncio.create_task(dispatcher.submit(cells(80, 80, name=100)))
    await settle()
    assert dispatcher.pending_callers == 4
    gate.set()
    assert_own((await small)[0], [80, 80], 100)
    await asyncio.gather(*accepted)


async def test_one_flow_leaves_room_for_another(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate), max_queued_tokens=1000)
    accepted = []
    for name in range(37):  # 740 tokens: three quarters
        dispatcher.check_room(20, "many")
        accepted.append(asyncio.create_task(dispatcher.submit(cells(20, name=name), flow="many")))
        await settle()
    with pytest.raises(OverloadedError):
        dispatcher.check_room(20, "many")
    dispatcher.check_room(20, "other")
    gate.set()
    await asyncio.gather(*accepted)
    assert dispatcher.pending_tokens == 0
    dispatcher.check_room(20, "many")


async def test_the_retry_hint_follows_the_measured_speed(make: Make) -> None:
    limits = BatchLimits(max_tokens=1000)
    dispatcher = make(FakeEncoder(delay=0.05), limits=limits, max_queued_tokens=4000)
    await dispatcher.submit(cells(*[500] * 2))  # at most 20,000 tokens a second
    busy = [asyncio.create_task(dispatcher.submit(cells(*[500] * 40, name=name))) for name in range(1, 4)]
    await settle()
    assert dispatcher.pending_tokens == 60_000
    with pytest.raises(OverloadedError) as refused:
        await dispatcher.submit(cells(*[500] * 2))
    # A third of a thousand too little is free, of three thousand that stand for 60,000 tokens.
    assert 0.3 <= refused.value.retry_after < 30
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)


async def test_an_idle_dispatcher_takes_a_request_over_its_queue_budget(make: Make) -> None:
    values, _ = await make(max_queued_tokens=5).submit(cells(9, 9))
    assert_own(values, [9, 9])


async def test_close_finishes_accepted_work_and_refuses_more(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate))
    accepted = [asyncio.create_task(dispatcher.submit(cells(3, name=name))) for name in range(1, 4)]
    await started(encoder_of(dispatcher))
    closing = asyncio.create_task(dispatcher.close())
    await settle()
    with pytest.raises(OverloadedError, match="shutting down"):
        await dispatcher.submit(cells(1))
    assert not closing.done()
    gate.set()
    await closing
    for name, (values, _) in enumerate(await asyncio.gather(*accepted), start=1):
        assert_own(values, [3], name)
    await dispatcher.close()


async def test_callers_hear_of_it_when_the_queue_itself_is_killed(make: Make, gate: threading.Event) -> None:
    dispatcher = make(FakeEncoder(gate=gate))
    running = asyncio.create_task(dispatcher.submit(cells(3)))
    await started(encoder_of(dispatcher))
    waiting = asyncio.create_task(dispatcher.submit(cells(3, name=2)))
    await settle()
    (worker,) = [task for task in asyncio.all_tasks() if task.get_name() == "perturbscope-dispatcher"]
    worker.cancel()
    for answer in await asyncio.gather(running, waiting, return_exceptions=True):
        assert isinstance(answer, InferenceError)


async def test_no_cells_need_no_model(make: Make) -> None:
    dispatcher = make()
    empty = TokenizedCells(
        arrays={"input_ids": np.zeros(0, dtype=np.int32)},
        offsets=np.zeros(1, dtype=np.int64),
        known_share=np.zeros(0, dtype=np.float32),
        n_detected=np.zeros(0, dtype=np.int32),
        coverage=COVERAGE,
    )
    values, _ = await dispatcher.submit(empty)
    assert values.cell_embedding.shape == (0, dispatcher.embedder.width)
    assert encoder_of(dispatcher).batches == []


@pytest.mark.parametrize("option", ["max_queued_tokens", "max_batch_seconds"])
async def test_budgets_must_be_positive(make: Make, option: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"{option} is 0"):
        make(**{option: 0})


async def test_real_cells_come_back_as_offline(fake_embedder: Embedder, tiny_cells: CountMatrix) -> None:
    dispatcher = Dispatcher(fake_embedder)
    parts = [tiny_cells[rows] for rows in (slice(0, 5), slice(5, 6), slice(6, 24))]
    answers = await asyncio.gather(*(dispatcher.submit(fake_embedder.tokenize(part)) for part in parts))
    together = np.concatenate([values.cell_embedding for values, _ in answers])
    np.testing.assert_array_equal(together, fake_embedder.embed(tiny_cells).values)
    await dispatcher.close()
