"""Genes hidden from a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from perturbscope.errors import InvalidParameterError
from training.config.stages import PanelConfig
from training.data.augment import hide_genes


def batch(n_cells: int = 40, length: int = 50, n_tokens: int = 200) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    ids = torch.zeros((n_cells, length), dtype=torch.int64)
    for cell in range(n_cells):
        n = int(rng.integers(1, length + 1))
        ids[cell, :n] = torch.from_numpy(2 + rng.choice(n_tokens - 2, n, replace=False))
    return ids, (ids > 0).long()


def test_cells_keep_the_order_of_their_genes_and_at_least_one() -> None:
    ids, mask = batch()
    shown, present = hide_genes(ids, mask, PanelConfig(share=1.0, genes=(0.02, 0.02)), n_tokens=200, seed=3)
    assert shown.shape == present.shape
    assert shown.shape[1] < ids.shape[1]
    for before, after, kept in zip(ids.tolist(), shown.tolist(), present.tolist(), strict=True):
        n = sum(kept)
        assert n >= 1
        assert kept == [1] * n + [0] * (len(kept) - n)
        assert after[n:] == [0] * (len(kept) - n)
        places = [before.index(token) for token in after[:n]]
        assert places == sorted(places)


def test_the_panel_is_the_same_for_all_cells() -> None:
    ids, mask = batch(n_cells=300)
    config = PanelConfig(share=1.0, genes=(0.3, 0.3), depth=(1.0, 1.0))
    shown, present = hide_genes(ids, mask, config, n_tokens=200, seed=1)
    # A cell without a gene of the panel shows its first gene, which need not be on it: cells of one gene do not count.
    left = {token for after in shown[present.sum(dim=1) > 1].tolist() for token in after} - {0}
    for before, after in zip(ids, shown, strict=True):
        expected = [token for token in before.tolist() if token in left]
        assert after[after > 0].tolist() == expected or len(after[after > 0]) == 1
    assert 30 < len(left) < 120


def test_a_shallow_cell_shows_the_share_of_genes_asked_for() -> None:
    ids = torch.arange(2, 1002).repeat(50, 1)
    shown, present = hide_genes(
        ids, torch.ones_like(ids), PanelConfig(share=1.0, genes=(1.0, 1.0), depth=(0.5, 0.5)), n_tokens=1002, seed=0
    )
    assert present.sum(dim=1).float().mean().item() == pytest.approx(500, rel=0.02)
    assert not torch.equal(shown[0], shown[1])


def test_batches_are_left_alone_with_the_share_asked_for_and_the_seed_decides() -> None:
    ids, mask = batch()
    config = PanelConfig(share=0.5)
    untouched = [hide_genes(ids, mask, config, n_tokens=200, seed=seed)[0] is ids for seed in range(200)]
    assert 70 < sum(untouched) < 130
    first, second = (hide_genes(ids, mask, PanelConfig(share=1.0), n_tokens=200, seed=7) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert (ids > 0).long().equal(mask)


@pytest.mark.parametrize("values", [{"share": 1.5}, {"genes": (0.0, 0.5)}, {"depth": (0.8, 0.2)}])
def test_shares_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError, match=r"share|panel"):
        PanelConfig(**values)  # type: ignore[arg-type]
