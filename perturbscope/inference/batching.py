"""Grouping of cells of different length into padded batches.

A padded batch costs cells x longest length for the matrix products, and cells x longest length squared for attention.
Sorting a window by length before cutting it keeps padding low (Geneformer and text-embeddings-inference both batch by
length).

Kernels, plans and captured graphs of an accelerator are made for one shape: cuDNN plans an attention anew, and a CUDA
graph is captured anew, for each pair of cells and length. Padding up to a ladder of sizes (:class:`Buckets`) makes the
pairs few at the price of a little padding; on the CPU, where padding costs most, batches keep the length of their
longest cell.

All functions are pure.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError

_FEW = 64
"""Cells up to which their costs are asked one by one, which takes less time than to find equal lengths."""


@dataclass(frozen=True)
class Buckets:
    """Two ladders of sizes that batches are padded up to.

    Attributes
    ----------
    lengths
        Numbers of tokens, rising. Beyond the last, lengths are multiples of it.
    cells
        Numbers of cells in a batch, rising from 1. Beyond the last, they are multiples of it.

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
    """Eight sizes between one power of two and the next, in steps of a sixteenth to an eighth of the length."""
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
        """Return ladders without a length above `longest`, the number of positions of a model."""
        return Buckets((*(length for length in self.lengths if length < longest), longest), self.cells)

    def length(self, longest: int) -> int:
        """Return the length of a batch whose longest cell has `longest` tokens."""
        return _up(self.lengths, longest)

    def n_cells(self, n: int) -> int:
        """Return the size of a batch for `n` cells; at least n."""
        return _up(self.cells, n)

    def full(self, n: int) -> int:
        """Return the largest size that needs no filling up; at most the `n` cells that there is room for."""
        return self.cells[bisect_right(self.cells, n) - 1] if n < self.cells[-1] else n - n % self.cells[-1]

    def fill(self, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the rows of a batch, with the last one repeated up to the next size."""
        missing = self.n_cells(len(rows)) - len(rows)
        return np.concatenate([rows, np.repeat(rows[-1:], missing)]) if missing else rows


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """The budget of one padded batch.

    A single cell that exceeds a token limit still forms a batch of one: it must run, and the family's maximum length
    bounds it.

    Raises
    ------
    InvalidParameterError
        A limit is below 1.
    """

    max_tokens: int = 16_384
    """Padded tokens: cells x longest length."""
    max_attention: int = 16 * 2048 * 2048
    """Attention scores of one head: cells x longest length squared."""
    max_cells: int = 256
    """Cells in one batch of any length."""
    buckets: Buckets | None = None
    """Shapes that batches are padded up to; None: each to its longest cell."""
    cost: Callable[[int], int] | None = field(default=None, compare=False)
    """What a cell padded to a length counts in `max_tokens` (:meth:`perturbscope.families.Family.cost`); None: its
    length."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_attention", "max_cells"):
            if getattr(self, name) < 1:
                raise InvalidParameterError(f"{name} is {getattr(self, name)}; it must be at least 1.", field=name)

    def capacity(self, length: int) -> int:
        """Return how many cells fit in one batch padded to `length`; at least 1."""
        length = max(length, 1) if self.buckets is None else self.buckets.length(length)
        room = max(
            1,
            min(
                self.max_cells,
                self.max_tokens // self.cost_of(length),
                self.max_attention // (length * length),
            ),
        )
        return room if self.buckets is None else self.buckets.full(room)

    def shape(self, n_cells: int, longest: int) -> tuple[int, int]:
        """Return the numbers of cells and tokens of a batch, with padding."""
        if self.buckets is None:
            return n_cells, longest
        return self.buckets.n_cells(n_cells), self.buckets.length(longest)

    def cost_of(self, length: int) -> int:
        """Return what a cell of `length` tokens counts in the budget of tokens."""
        return length if self.cost is None else max(1, self.cost(length))

    def costs_of(self, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return :meth:`cost_of` of each length, int64."""
        if self.cost is None:
            return lengths.astype(np.int64, copy=False)
        if len(lengths) <= _FEW:
            return np.array([self.cost_of(length) for length in lengths.tolist()], dtype=np.int64)
        distinct, places = np.unique(lengths, return_inverse=True)
        return np.array([self.cost_of(int(length)) for length in distinct], dtype=np.int64)[places]


def cpu_limits() -> BatchLimits:
    """Return the budget of a batch on a CPU when no caller waits.

    1,024 tokens keep two cores busy, and a block's states stay in their cache; larger batches only pad more. Cells of
    over 512 tokens then run alone: without padding they need no mask, see :mod:`perturbscope.inference.cpu_graph`.
    """
    return BatchLimits(max_tokens=1024)


def form_batches(lengths: Sequence[int] | NDArray[np.integer], limits: BatchLimits) -> list[NDArray[np.intp]]:
    """Cut a window of cells into batches that stay within `limits`.

    Parameters
    ----------
    lengths
        Number of tokens of each cell, [n].
    limits
        Budget of a batch.

    Returns
    -------
    Index arrays, longest cells first. Every index 0..n-1 stands in exactly one of them; cells of equal length keep
    their order.
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
    """Return the smallest size of the ladder that is not below `value`."""
    if value > ladder[-1]:
        return -(-value // ladder[-1]) * ladder[-1]
    return ladder[bisect_left(ladder, value)]
