"""Grouping cells of different length into padded batches.

Cost is what a padded batch costs: cells x longest length for the matrix products, and
cells x longest length squared for attention. Sorting a window by length before cutting it
keeps padding low (Geneformer and text-embeddings-inference both batch by length).

Kernels, plans and captured graphs of an accelerator are made for one shape: cuDNN plans an attention anew, and a CUDA
graph is captured anew, for each pair of cells and length. Padding up to a ladder of sizes (:class:`Buckets`) buys few
pairs with a little padding; on the CPU, where padding is what costs, batches keep the length of their longest cell.

All functions are pure.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError


@dataclass(frozen=True)
class Buckets:
    """Two ladders of sizes.

    Attributes
    ----------
    lengths
        Tokens, rising. Beyond the last, lengths are multiples of it.
    cells
        Cells of a batch, rising, from 1. Beyond the last, multiples of it.

    Raises
    ------
    InvalidParameterError
        A ladder is empty, does not rise, or starts below 1; or `cells` does not start with 1.
    """

    lengths: tuple[int, ...] = (
        *range(16, 64, 16),
        *(start + step * start // 8 for start in (64, 128, 256, 512, 1024, 2048) for step in range(8)),
        4096,
    )
    """Eight between a power of two and the next: steps of a sixteenth to an eighth of the length."""
    cells: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    """Steps of at most a half, for the last batch of a window; full batches have one of these sizes anyway."""

    def __post_init__(self) -> None:
        for name in ("lengths", "cells"):
            ladder = getattr(self, name)
            if not ladder or ladder[0] < 1 or any(b <= a for a, b in pairwise(ladder)):
                raise InvalidParameterError(f"The {name} of buckets must be rising numbers, not {ladder}.", field=name)
        if self.cells[0] != 1:
            raise InvalidParameterError("The cells of buckets must start with 1.", field="cells")

    def up_to(self, longest: int) -> Buckets:
        """The same, but no length above `longest`: a model has only so many positions."""
        return Buckets((*(length for length in self.lengths if length < longest), longest), self.cells)

    def length(self, longest: int) -> int:
        """Length of a batch whose longest cell has `longest` tokens."""
        return _up(self.lengths, longest)

    def n_cells(self, n: int) -> int:
        """Cells of a batch that has `n`: at least n."""
        return _up(self.cells, n)

    def full(self, n: int) -> int:
        """Cells of a full batch where `n` have room: at most n, and a size that needs no filling up."""
        return self.cells[bisect_right(self.cells, n) - 1] if n < self.cells[-1] else n - n % self.cells[-1]

    def fill(self, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """Rows of a batch, the last one repeated up to the next number of cells."""
        missing = self.n_cells(len(rows)) - len(rows)
        return np.concatenate([rows, np.repeat(rows[-1:], missing)]) if missing else rows


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


def _up(ladder: tuple[int, ...], value: int) -> int:
    """Least size of the ladder that holds `value`."""
    if value > ladder[-1]:
        return -(-value // ladder[-1]) * ladder[-1]
    return ladder[bisect_left(ladder, value)]
