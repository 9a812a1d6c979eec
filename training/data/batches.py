"""Padded batches of a corpus, as tensors.

A batch holds the inputs of a family by name, per token [B, L, ...] or per cell [B, ...], and ``attention_mask``,
int64 [B, L].

Shapes: B cells in the batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perturbscope.cells.genes import GeneCoverage
from perturbscope.families import Family
from perturbscope.families.tokens import InputSpec, TokenizedCells, pad
from training.data.shards import Corpus


def padded(corpus: Corpus, numbers: NDArray[np.integer[Any]], *, multiple: int = 1) -> dict[str, Tensor]:
    """Return the inputs of some cells, padded to the longest of them.

    Parameters
    ----------
    corpus
        Corpus that holds the cells.
    numbers
        Numbers of the cells in the corpus, in the order of the batch, [B].
    multiple
        Divisor of the padded length, which never exceeds the family's longest sequence.
    """
    family, cells = corpus.family, corpus.cells(numbers)
    longest = int(cells.lengths.max())
    length = min(-(-longest // multiple) * multiple, max(family.max_length, longest))
    arrays = pad(cells, np.arange(len(numbers)), family.inputs, length=length)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def by_length(corpus: Corpus, numbers: NDArray[np.integer[Any]], batch: int) -> list[NDArray[np.int64]]:
    """Cut cells into batches of similar length, longest first, as validation uses them."""
    order: NDArray[np.int64] = numbers.astype(np.int64)[
        np.argsort(-corpus.lengths[numbers].astype(np.int64), kind="stable")
    ]
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def gene_tokens(batch: Mapping[str, Tensor], family: Family) -> Tensor:
    """Return the id of the gene behind each token, -1 for special tokens and padding, int64 [B, L]."""
    present_BL = batch["attention_mask"].bool()
    real = present_BL.numpy()
    lengths = real.sum(axis=1)
    tokens = TokenizedCells(
        arrays={spec.name: batch[spec.name].numpy()[real] for spec in family.inputs if spec.per == "token"},
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)]),
        known_share=np.zeros(len(lengths), dtype=np.float32),
        n_detected=lengths.astype(np.int32),
        coverage=GeneCoverage(0, 0),
        per_cell={spec.name: batch[spec.name].numpy() for spec in family.inputs if spec.per == "cell"},
    )
    rows = family.gene_rows(tokens)
    ids = np.where(rows >= 0, family.vocabulary.tokens[rows], -1)
    found_BL = torch.full(present_BL.shape, -1, dtype=torch.int64)
    found_BL[present_BL] = torch.from_numpy(ids.astype(np.int64))
    return found_BL


def keep_tokens(batch: Mapping[str, Tensor], keep: Tensor, inputs: Sequence[InputSpec]) -> dict[str, Tensor]:
    """Return a batch of some of its tokens, which close up in their order, padded to the longest cell.

    Parameters
    ----------
    batch
        A padded batch; not modified.
    keep
        Tokens to keep, bool [B, L]; none of the padding.
    inputs
        Inputs of the family; none holds positions in the cell's own sequence.
    """
    order_BL = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)
    order_BL = order_BL[:, : int(keep.sum(dim=1).max())]
    present_BL = keep.gather(1, order_BL)
    kept = {"attention_mask": present_BL.to(batch["attention_mask"].dtype)}
    for spec in inputs:
        values = batch[spec.name]
        if spec.per == "token":
            wide = (*order_BL.shape, *(1 for _ in spec.trailing))
            values = values.gather(1, order_BL.view(wide).expand(*order_BL.shape, *spec.trailing))
            values = values.masked_fill(~present_BL.view(wide), spec.pad_value)
        kept[spec.name] = values
    return kept


def stacked(batches: Sequence[Mapping[str, Tensor]], inputs: Sequence[InputSpec]) -> dict[str, Tensor]:
    """Put batches one after the other, padded to the longest."""
    longest = max(batch["attention_mask"].shape[1] for batch in batches)
    fill = {spec.name: spec.pad_value for spec in inputs if spec.per == "token"} | {"attention_mask": 0}
    joined = {}
    for name in ("attention_mask", *(spec.name for spec in inputs)):
        parts = [batch[name] for batch in batches]
        if name in fill:
            behind = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
            parts = [nn.functional.pad(part, more, value=fill[name]) for part, more in zip(parts, behind, strict=True)]
        joined[name] = torch.cat(parts)
    return joined
