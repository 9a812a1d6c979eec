"""Genes hidden from a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perturbscope.errors import InvalidParameterError
from perturbscope.families import Family, load_family
from tests.models import small_vocabulary
from training.config.stages import PanelConfig
from training.data.augment import hide_genes


def family(n_genes: int = 198, **options: Any) -> Family:
    return load_family("rank", options, small_vocabulary(n_genes, ends=bool(options)))


def batch(n_cells: int = 40, length: int = 50) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    ids = torch.zeros((n_cells, length), dtype=torch.int64)
    for cell in range(n_cells):
        n = int(rng.integers(1, length + 1))
        ids[cell, :n] = torch.from_numpy(2 + rng.choice(198, n, replace=False))
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_cells_keep_the_order_of_their_genes_and_at_least_one() -> None:
    whole = batch()
    shown = hide_genes(whole, family(), PanelConfig(share=1.0, genes=(0.02, 0.02)), seed=3)
    assert shown["input_ids"].shape == shown["attention_mask"].shape
    assert shown["input_ids"].shape[1] < whole["input_ids"].shape[1]
    rows = (values.tolist() for values in (whole["input_ids"], shown["input_ids"], shown["attention_mask"]))
    for before, after, kept in zip(*rows, strict=True):
        n = sum(kept)
        assert n >= 1
        assert kept == [1] * n + [0] * (len(kept) - n)
        assert after[n:] == [0] * (len(kept) - n)
        places = [before.index(token) for token in after[:n]]
        assert places == sorted(places)


def test_the_panel_is_the_same_for_all_cells() -> None:
    whole = batch(n_cells=300)
    config = PanelConfig(share=1.0, genes=(0.3, 0.3), depth=(1.0, 1.0))
    found = hide_genes(whole, family(), config, seed=1)
    shown, present = found["input_ids"], found["attention_mask"]
    # A cell without a gene of the panel shows its first gene, which need not be on it: cells of one gene do not count.
    left = {token for after in shown[present.sum(dim=1) > 1].tolist() for token in after} - {0}
    for before, after in zip(whole["input_ids"], shown, strict=True):
        expected = [token for token in before.tolist() if token in left]
        assert after[after > 0].tolist() == expected or len(after[after > 0]) == 1
    assert 30 < len(left) < 120


def test_a_shallow_cell_shows_the_share_of_genes_asked_for() -> None:
    ids = torch.arange(2, 1002).repeat(50, 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = PanelConfig(share=1.0, genes=(1.0, 1.0), depth=(0.5, 0.5))
    shown = hide_genes(whole, family(1000), config, seed=0)
    assert shown["attention_mask"].sum(dim=1).float().mean().item() == pytest.approx(500, rel=0.02)
    assert not torch.equal(shown["input_ids"][0], shown["input_ids"][1])


def test_start_and_end_are_never_hidden() -> None:
    ids = torch.tensor([[2, 10, 11, 12, 13, 3], [2, 20, 21, 3, 0, 0]])
    whole = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    config = PanelConfig(share=1.0, genes=(0.02, 0.02))
    for seed in range(20):
        shown = hide_genes(whole, family(start="<cls>", end="<eos>"), config, seed=seed)
        for cell, length in zip(shown["input_ids"].tolist(), shown["attention_mask"].sum(dim=1).tolist(), strict=True):
            assert length >= 3
            assert (cell[0], cell[length - 1]) == (2, 3)


def test_batches_are_left_alone_with_the_share_asked_for_and_the_seed_decides() -> None:
    whole = batch()
    config = PanelConfig(share=0.5)
    untouched = [hide_genes(whole, family(), config, seed=seed) is whole for seed in range(200)]
    assert 70 < sum(untouched) < 130
    first, second = (hide_genes(whole, family(), PanelConfig(share=1.0), seed=7) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert (whole["input_ids"] > 0).long().equal(whole["attention_mask"])


@pytest.mark.parametrize("values", [{"share": 1.5}, {"genes": (0.0, 0.5)}, {"depth": (0.8, 0.2)}])
def test_shares_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError, match=r"share|panel"):
        PanelConfig(**values)  # type: ignore[arg-type]
