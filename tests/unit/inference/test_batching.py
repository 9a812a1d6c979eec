"""Batches: every cell once, never over the budget, little padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.batching import BatchLimits, Buckets, cpu_limits, form_batches
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.gpu import gpu_limits


def padding_share(lengths, batches) -> float:
    """Share of the padded slots of batches that hold no token, in [0, 1)."""
    slots = sum(max(lengths[cell] for cell in batch) * len(batch) for batch in batches)
    return 1.0 - sum(lengths) / slots if slots else 0.0


LENGTHS = st.lists(st.integers(0, 2048), max_size=80)
LIMITS = st.builds(
    BatchLimits,
    max_tokens=st.integers(1, 20_000),
    max_attention=st.integers(1, 50_000_000),
    max_cells=st.integers(1, 64),
)


@given(LENGTHS, LIMITS)
def test_every_cell_stands_in_one_batch(lengths, limits):
    batches = form_batches(lengths, limits)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))


@given(LENGTHS, LIMITS)
def test_no_batch_of_several_cells_passes_the_budget(lengths, limits):
    for batch in form_batches(lengths, limits):
        longest = max(lengths[index] for index in batch)
        assert len(batch) <= limits.max_cells
        if len(batch) > 1:
            assert len(batch) * longest <= limits.max_tokens
            assert len(batch) * longest**2 <= limits.max_attention


@given(LENGTHS, LIMITS)
def test_batches_are_as_full_as_the_budget_allows(lengths, limits):
    for batch in form_batches(lengths, limits)[:-1]:
        assert len(batch) == limits.capacity(lengths[batch[0]])


@given(LENGTHS, LIMITS)
def test_longest_first_and_ties_in_order(lengths, limits):
    order = [index for batch in form_batches(lengths, limits) for index in batch.tolist()]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def test_a_cell_over_the_budget_runs_alone():
    batches = form_batches([10, 3000, 12], BatchLimits(max_tokens=100))
    assert [batch.tolist() for batch in batches] == [[1], [2, 0]]


def test_attention_limits_long_cells_more_than_tokens_do():
    limits = BatchLimits(max_tokens=16_384, max_attention=4 * 1024**2, max_cells=256)
    assert [limits.capacity(length) for length in (2048, 1024, 512, 64, 1, 0)] == [1, 4, 16, 256, 256, 256]


def test_the_cost_of_a_cell_is_the_familys():
    """A family may attend to more than a cell's own tokens: here a cell costs its length squared."""
    limits = BatchLimits(max_tokens=1000, cost=lambda length: length * length)
    assert [limits.capacity(length) for length in (1, 10, 20, 32, 100)] == [256, 10, 2, 1, 1]
    lengths = np.array([10, 20, 20, 20, 10, 31])
    assert [lengths[batch].tolist() for batch in form_batches(lengths, limits)] == [[31], [20, 20], [20, 10], [10]]
    np.testing.assert_array_equal(limits.costs_of(lengths), lengths**2)
    assert limits.costs_of(lengths).dtype == np.int64
    free = BatchLimits(max_tokens=1000, cost=lambda length: 0)
    assert (free.cost_of(5), free.capacity(5)) == (1, 256)


def test_nothing_to_batch():
    assert form_batches([], BatchLimits()) == []
    assert padding_share([], []) == 0.0


def test_padding_share_by_hand():
    batches = [np.array([0, 1]), np.array([2])]
    assert padding_share([4, 2, 3], batches) == pytest.approx(1 - 9 / 11)


def test_sorting_by_length_saves_padding(rng):
    lengths = rng.integers(50, 2049, size=500)
    limits = BatchLimits()
    unsorted = np.array_split(np.arange(500), len(form_batches(lengths, limits)))
    assert padding_share(lengths, form_batches(lengths, limits)) < 0.05 < padding_share(lengths, unsorted)


@pytest.mark.parametrize("name", ["max_tokens", "max_attention", "max_cells"])
def test_limits_are_positive(name):
    with pytest.raises(InvalidParameterError, match=f"{name} is 0") as caught:
        BatchLimits(**{name: 0})
    assert caught.value.field == name


def test_batches_of_a_cpu_leave_long_cells_alone_and_pad_little():
    lengths = [2048, 1024, 700, 513, 512, 512, 300, 300, 300, 70, 66]
    batches = form_batches(lengths, cpu_limits())
    assert [batch.tolist() for batch in batches] == [[0], [1], [2], [3], [4, 5], [6, 7, 8], [9, 10]]
    assert padding_share(lengths, batches) < 0.001


SIZES = st.integers(min_value=1, max_value=10_000)


@given(value=SIZES)
def test_a_size_holds_what_it_must_and_little_more(value: int) -> None:
    buckets = Buckets()
    assert value <= buckets.length(value) <= max(value * 1.125, value + 16) or value > 4096
    assert value <= buckets.n_cells(value) <= max(1.5 * value, value + 512)
    assert 0.5 * value < buckets.full(value) <= value
    assert buckets.n_cells(buckets.full(value)) == buckets.full(value)
    assert buckets.length(buckets.length(value)) == buckets.length(value)


@pytest.mark.parametrize(("longest", "length"), [(1, 16), (64, 64), (65, 72), (500, 512), (2047, 2048), (9000, 12288)])
def test_lengths(longest: int, length: int) -> None:
    assert Buckets().length(longest) == length


def test_no_length_is_beyond_the_model_s_positions() -> None:
    buckets = Buckets().up_to(500)
    assert buckets.lengths[-2:] == (480, 500)
    assert buckets.length(481) == 500


@pytest.mark.parametrize(
    ("field", "ladders"),
    [("lengths", ((), (1,))), ("lengths", ((8, 8), (1,))), ("lengths", ((0, 8), (1,))), ("cells", ((8,), (2, 4)))],
)
def test_ladders_that_are_none(field: str, ladders: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Buckets(*ladders)
    assert caught.value.field == field


@given(lengths=st.lists(st.integers(1, 2048), min_size=1, max_size=300), max_tokens=st.integers(2048, 70_000))
def test_batches_in_buckets_keep_the_budget(lengths: list[int], max_tokens: int) -> None:
    limits = gpu_limits("cuda", 2048, max_tokens=max_tokens)
    batches = form_batches(lengths, limits)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        n_cells, length = limits.shape(len(batch), max(lengths[cell] for cell in batch))
        assert n_cells >= len(batch)
        assert n_cells * length <= max_tokens


def test_full_batches_need_no_filling_up() -> None:
    limits = gpu_limits("cuda", 2048)
    for length in (64, 700, 1500, 2048):
        full = limits.capacity(length)
        assert limits.shape(full, length)[0] == full


def test_without_buckets_a_batch_has_its_own_shape() -> None:
    assert BatchLimits().shape(3, 77) == (3, 77)


def test_filling_up_repeats_the_last_row() -> None:
    np.testing.assert_array_equal(Buckets().fill(np.array([7, 3, 9, 1, 4])), [7, 3, 9, 1, 4, 4])
    np.testing.assert_array_equal(Buckets().fill(np.array([7])), [7])


def test_buckets_change_no_vector(tiny_bundle: Path, tiny_cells: CountMatrix) -> None:
    bundle = Bundle.open(tiny_bundle)
    plain = Embedder.from_bundle(bundle, threads=1)
    few = Embedder.from_bundle(bundle, threads=1, limits=BatchLimits(max_cells=9, buckets=Buckets((8, 24, 64), (1, 4))))
    np.testing.assert_allclose(few.embed(tiny_cells).values, plain.embed(tiny_cells).values, atol=1e-6, rtol=0)
