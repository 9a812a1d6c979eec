"""Grouping cells of different length into padded batches.

Cost is what a padded batch costs: cells x longest length for the matrix products, and
cells x longest length squared for attention. Sorting a window by length before cutting it
keeps padding low (Geneformer and text-embeddings-inference both batch by length).

All functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError
from perturbscope.inference.buckets import Buckets


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """What one padded batch may cost.

    A single cell that exceeds a token limit on its own still forms a batch of one: it has to run
    somewhere, and the family's maximum length bounds it.
    """

    max_tokens: int = 16_384
    """Padded tokens: cells x longest length."""
    max_attention: int = 16 * 2048 * 2048
    """Attention scores of one head: cells x longest length squared."""
    max_cells: int = 256
    """Cells in one batch, whatever their length."""
    buckets: Buckets | None = None
    """Shapes that batches are padded up to; None: to their longest cell."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_attention", "max_cells"):
            if getattr(self, name) < 1:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must be at least 1.", field=name)

    def capacity(self, length: int) -> int:
        """How many cells fit in one batch padded to `length`; at least 1."""
        length = max(length, 1) if self.buckets is None else self.buckets.length(length)
        room = max(
            1,
            min(
                self.max_cells,
                self.max_tokens // length,
                self.max_attention // (length * length),
            ),
        )
        return room if self.buckets is None else self.buckets.full(room)

    def shape(self, n_cells: int, longest: int) -> tuple[int, int]:
        """Cells and tokens of a batch with its padding."""
        if self.buckets is None:
            return n_cells, longest
        return self.buckets.n_cells(n_cells), self.buckets.length(longest)


def cpu_limits() -> BatchLimits:
    """Budget of a batch where nobody waits and the processor is a CPU.

    1,024 tokens keep two cores busy, and a block's states stay in their cache; larger batches only pad more. Cells of
    over 512 tokens so run alone: without padding they need no mask, see :mod:`perturbscope.inference.cpu_graph`.
    """
    return BatchLimits(max_tokens=1024)


def form_batches(lengths: Sequence[int] | NDArray[np.integer], limits: BatchLimits) -> list[NDArray[np.intp]]:
    """Cut a window of cells into batches that stay within `limits`.

    Parameters
    ----------
    lengths
        Token count of each cell, shape [n].
    limits
        The budget of a batch.

    Returns
    -------
    Index arrays, longest cells first. Every index 0..n-1 stands in exactly one of them; cells of
    equal length keep their order.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        # Sorted: the first cell is the longest, so the whole batch pads to its length.
        stop = start + limits.capacity(int(lengths[order[start]]))
        batches.append(order[start:stop])
        start = stop
    return batches


def padding_share(lengths: Sequence[int] | NDArray[np.integer], batches: Sequence[NDArray[np.intp]]) -> float:
    """Share of padded slots that hold no token, in [0, 1)."""
    lengths = np.asarray(lengths)
    slots = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1.0 - float(lengths.sum()) / slots if slots else 0.0
