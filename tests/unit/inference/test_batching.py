"""Batches: every cell once, never over the budget, little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbscope.errors import InvalidParameterError
from perturbscope.inference.batching import BatchLimits, cpu_limits, form_batches, padding_share

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
