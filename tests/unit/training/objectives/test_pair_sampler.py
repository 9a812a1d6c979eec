from __future__ import annotations

import numpy as np
import pytest

from perturbscope.errors import InvalidParameterError, TooFewCellsError, TooFewControlsError
from training.objectives.pair_sampler import Group, PairSampler, batch_bounds

CONTROLS = np.arange(1000, 1030)
GROUPS = [
    Group("a/GATA1", np.arange(0, 17), CONTROLS),
    Group("a/MYC", np.arange(100, 109), CONTROLS),
    Group("b/GATA1", np.arange(200, 245), np.arange(2000, 2012)),  # fewer controls than cells
]


def sampler(**options: int | bool) -> PairSampler:
    return PairSampler(GROUPS, **{"batch": 8, "seed": 1, **options})  # type: ignore[arg-type]


def test_batches_alternate_and_hold_one_perturbed_gene() -> None:
    batches = sampler().batches(0)
    assert [batch.similar for batch in batches] == [False, True] * (len(batches) // 2)
    assert len(batches) == len(sampler())
    of_cell = {cell: group for group in GROUPS for cell in group.cells.tolist()}
    for apart, together in zip(batches[::2], batches[1::2], strict=True):
        (group,) = {id(of_cell[cell]): of_cell[cell] for cell in apart.first.tolist()}.values()
        assert group.name == apart.name == together.name
        allowed = set(group.controls.tolist())
        assert set(apart.second.tolist()) <= allowed
        assert set(together.first.tolist()) | set(together.second.tolist()) <= allowed


def test_every_perturbed_cell_is_in_one_dissimilar_pair_and_similar_pairs_are_as_many() -> None:
    batches = sampler().batches(0)
    perturbed = np.concatenate([batch.first for batch in batches if not batch.similar])
    assert sorted(perturbed.tolist()) == sorted(np.concatenate([group.cells for group in GROUPS]).tolist())
    assert sum(len(batch.first) for batch in batches if batch.similar) == len(perturbed)


@pytest.mark.parametrize("epoch", range(5))
def test_similar_pairs_are_two_different_controls(epoch: int) -> None:
    for batch in sampler().batches(epoch):
        if batch.similar:
            assert (batch.first != batch.second).all()


def test_controls_are_size_matched_and_used_evenly() -> None:
    for number, group in enumerate(GROUPS):
        pool = sampler().pool(number, 0)
        assert len(pool) == len(group.cells)
        assert set(pool.tolist()) <= set(group.controls.tolist())
        _, counts = np.unique(pool, return_counts=True)
        assert counts.max() == -(-len(group.cells) // len(group.controls))


def test_groups_draw_their_controls_independently() -> None:
    groups = [Group("a/A", np.arange(10), CONTROLS), Group("a/B", np.arange(10, 20), CONTROLS)]
    made = PairSampler(groups, batch=4)
    assert set(made.pool(0, 0).tolist()) != set(made.pool(1, 0).tolist())


def test_controls_stay_for_the_run_unless_redrawn() -> None:
    assert set(sampler().pool(0, 0).tolist()) == set(sampler().pool(0, 5).tolist())
    assert set(sampler(redraw=True).pool(0, 0).tolist()) != set(sampler(redraw=True).pool(0, 5).tolist())


def test_pairing_and_order_change_every_epoch_and_repeat_with_the_seed() -> None:
    def told(made: PairSampler, epoch: int) -> list[tuple[str, list[int], list[int]]]:
        return [(batch.name, batch.first.tolist(), batch.second.tolist()) for batch in made.batches(epoch)]

    assert told(sampler(), 0) == told(sampler(), 0)
    assert told(sampler(), 0) != told(sampler(), 1)
    assert told(sampler(), 0) != told(sampler(seed=2), 0)
    orders = {tuple(name for name, _, _ in told(sampler(), epoch)) for epoch in range(5)}
    assert len(orders) > 1, "the genes follow each other in the same order in every epoch"


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_have_equally_many_pairs_of_the_same_kind_and_gene(world_size: int) -> None:
    made = sampler(world_size=world_size, batch=4)
    ranks = [made.batches(0, rank=rank) for rank in range(world_size)]
    seen: list[int] = []
    for parts in zip(*ranks, strict=True):
        assert len({(part.similar, part.name, len(part.first)) for part in parts}) == 1
        if not parts[0].similar:
            seen.extend(cell for part in parts for cell in part.first.tolist())
    assert set(seen) == {cell for group in GROUPS for cell in group.cells.tolist()}


@pytest.mark.parametrize(
    ("n", "sizes"), [(8, [8]), (9, [7, 2]), (10, [8, 2]), (16, [8, 8]), (17, [8, 7, 2]), (5, [5]), (2, [2])]
)
def test_a_batch_is_never_a_single_pair(n: int, sizes: list[int]) -> None:
    assert np.diff(batch_bounds(n, 8)).tolist() == sizes


def test_too_little_to_pair_is_refused() -> None:
    with pytest.raises(TooFewCellsError, match="no perturbation"):
        PairSampler([], batch=4)
    with pytest.raises(TooFewCellsError, match="a/X has 1 cell"):
        PairSampler([Group("a/X", np.arange(1), CONTROLS)], batch=4)
    with pytest.raises(TooFewControlsError, match="a/X has 2 controls"):
        PairSampler([Group("a/X", np.arange(9), CONTROLS[:2])], batch=4)
    with pytest.raises(InvalidParameterError, match="at least 3"):
        sampler(batch=2)


def test_three_controls_suffice_for_any_number_of_cells() -> None:
    for n in range(2, 40):
        made = PairSampler([Group("a/X", np.arange(n), CONTROLS[:3])], batch=4)
        for batch in made.batches(0):
            assert not batch.similar or (batch.first != batch.second).all()
