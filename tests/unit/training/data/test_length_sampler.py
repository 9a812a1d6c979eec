from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError
from training.data.length_sampler import LengthGroupedSampler


def lengths_of(n: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(500, 2049, n).astype(np.int32)


@pytest.mark.parametrize("n", [1, 3, 43, 44, 45, 2200, 4999], ids=str)
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_cell_is_seen_once_an_epoch(n: int, world_size: int) -> None:
    sampler = LengthGroupedSampler(lengths_of(n), batch=11, world_size=world_size, megabatch=5)
    seen = np.concatenate(sampler.blocks(0))
    assert set(seen.tolist()) == set(range(n))
    assert len(seen) - n < world_size  # what fills up the last block
    assert len(sampler.blocks(0)) == len(sampler)


def test_blocks_hold_cells_of_similar_length() -> None:
    lengths = lengths_of(22_000)
    blocks = LengthGroupedSampler(lengths, batch=11, world_size=4, megabatch=50).blocks(0)
    spread = [int(np.ptp(lengths[block])) for block in blocks if len(block) == 44]
    assert np.median(spread) < 60  # of 1,548
    assert max(spread) < 150


@pytest.mark.parametrize("megabatch", [50, 1000])
def test_little_padding_and_no_trace_of_length_in_the_order(megabatch: int) -> None:
    lengths = lengths_of(50_000)
    blocks = LengthGroupedSampler(lengths, batch=11, world_size=4, megabatch=megabatch).blocks(0)
    slots = sum(int(lengths[block[rank::4]].max()) * len(block[rank::4]) for block in blocks for rank in range(4))
    pads = 1 - sum(int(lengths[block].sum()) for block in blocks) / slots
    means = np.array([lengths[block].mean() for block in blocks])
    assert pads < 0.05
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1


def test_processes_share_a_block_without_overlap() -> None:
    sampler = LengthGroupedSampler(lengths_of(1000), batch=5, world_size=3, megabatch=4)
    for step, block in enumerate(sampler.blocks(2)):
        shares = [sampler.batches(2, rank=rank)[step] for rank in range(3)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(block.tolist())
        assert len({len(share) for share in shares}) == 1
        if len(block) == 15:
            assert all(not set(a.tolist()) & set(b.tolist()) for a, b in itertools.combinations(shares, 2))


def test_processes_of_a_step_get_cells_of_equal_lengths() -> None:
    """A block goes from long to short cells; dealt out in turn, no process gets all of the long ones."""
    lengths = np.arange(1200, dtype=np.int32)
    sampler = LengthGroupedSampler(lengths, batch=10, world_size=3, megabatch=40)
    ranks = [sampler.batches(0, rank=rank) for rank in range(3)]
    for step, block in enumerate(sampler.blocks(0)):
        totals = [int(lengths[batches[step]].sum()) for batches in ranks]
        assert max(totals) - min(totals) <= np.ptp(lengths[block])


def test_the_order_is_a_function_of_seed_epoch_and_world_size() -> None:
    lengths = lengths_of(2000)

    def order(seed: int, epoch: int, world_size: int = 2) -> list[int]:
        sampler = LengthGroupedSampler(lengths, batch=8, world_size=world_size, seed=seed)
        return np.concatenate(sampler.blocks(epoch)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 0, 4)


def test_the_longest_cell_comes_first() -> None:
    lengths = lengths_of(3000)
    for epoch in range(3):
        first = LengthGroupedSampler(lengths, batch=8, world_size=2).blocks(epoch)[0]
        assert lengths[first].max() == lengths.max()
        assert len(first) == 16


def test_the_incomplete_block_is_last() -> None:
    blocks = LengthGroupedSampler(lengths_of(1003), batch=8, world_size=2, megabatch=3).blocks(0)
    assert [len(block) for block in blocks] == [16] * 62 + [12]


def test_no_cells_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="no cells"):
        LengthGroupedSampler(np.zeros(0, dtype=np.int32), batch=8)
