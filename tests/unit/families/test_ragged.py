"""Rows of unequal length: cut into blocks, sorted alone or together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbscope.families._ragged import row_blocks, smallest


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), values=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_blocks_are_all_rows_once_and_in_order(sizes, values):
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    blocks = row_blocks(indptr, values)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(len(sizes)))
    assert all(indptr[block.stop] - indptr[block.start] < values + 2 * 40 for block in blocks)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_smallest_keys_of_each_row(data):
    """Rows of 1 to 300 keys, ties and the largest integer among them, sorted one by one and side by side."""
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 7, 16, 17, 70, 71, 300]), min_size=1, max_size=20))
    lengths = [data.draw(st.integers(1, size)) for size in sizes]
    seed, highest = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([3, 1000, 2**31 - 1]))
    keys = np.random.default_rng(seed).integers(0, highest, size=sum(sizes), endpoint=True, dtype=np.int32)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    expected = np.concatenate(
        [np.sort(keys[a:b])[:length] for a, b, length in zip(bounds, bounds[1:], lengths, strict=False)]
    )
    for together in (True, False, None):
        found = smallest(keys.copy(), bounds, np.array(lengths), together=together)
        np.testing.assert_array_equal(found, expected)
