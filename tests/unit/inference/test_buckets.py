"""Few shapes: what is padded up to, and that it changes no vector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.batching import BatchLimits, form_batches
from perturbscope.inference.buckets import Buckets
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.gpu import gpu_limits

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
