"""Padded batches of a corpus, as tensors.

Shapes: B cells in the batch, L tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perturbscope.families.tokens import pad
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

    Returns
    -------
    Inputs of the family by name, [B, L, ...] each, and ``attention_mask``, int64 [B, L].
    """
    family = corpus.family
    arrays = pad(corpus.cells(numbers), np.arange(len(numbers)), family.inputs)
    fill = {spec.name: spec.pad_value for spec in family.inputs} | {"attention_mask": 0}
    batch = {}
    for name, array in arrays.items():
        length = array.shape[1]
        more = min(-(-length // multiple) * multiple, max(family.max_length, length)) - length
        if more:
            widths = [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2)
            array = np.pad(array, widths, constant_values=fill[name])
        batch[name] = torch.from_numpy(array)
    return batch


def by_length(corpus: Corpus, numbers: NDArray[np.integer[Any]], batch: int) -> list[NDArray[np.int64]]:
    """Cut cells into batches of similar length, longest first, as validation uses them."""
    order: NDArray[np.int64] = numbers.astype(np.int64)[
        np.argsort(-corpus.lengths[numbers].astype(np.int64), kind="stable")
    ]
    return [order[start : start + batch] for start in range(0, len(order), batch)]
