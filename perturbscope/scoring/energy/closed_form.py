"""Groups of cells whose distances follow from sums of vectors and are never formed: squared Euclidean and cosine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.distances import STEP_VALUES, product
from perturbscope.scoring.energy.matrix import BlockSums, Subsets, block_sums
from perturbscope.threads import checkpoint

WHOLE_GRAM = 6 * 10**9
"""Multiplications up to which the products of all dimensions are one call (a tenth of a second): it does half of them,
and rounds in another order than parts would."""
GRAM_ROWS = 256
"""Dimensions whose products with all others are held at a time; with vectors of 10,000 dimensions all take 800 MB."""


MAX_GRAM = 2048
"""Most dimensions whose products with each other are kept (32 MiB)."""


class LinearMarks(NamedTuple):
    """Marked subsets of a linear group: cells [R], sums of half squared lengths [R], sums of vectors [R, width]."""

    n: NDArray[np.float64]
    half: NDArray[np.float64]
    total: NDArray[np.float64]


class LinearGroup:
    """A group with the distance ``factor / 2 * |u - v|^2``: cosine on unit rows (factor 1), squared Euclidean (2).

    `origin` is any point near the cells, the same for all groups that are compared; it only reduces rounding.
    """

    def __init__(self, rows: NDArray[np.float64], factor: float, origin: NDArray[np.float64]) -> None:
        self.rows = (rows - origin) * np.sqrt(factor)
        self.half = 0.5 * np.einsum("nw,nw->n", self.rows, self.rows)
        self.size = len(rows)
        self.total = self.rows.sum(axis=0)
        self.row_sums = self._sums_to(self)

    def _sums_to(self, other: LinearGroup) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = other.size * self.half + other.half.sum() - self.rows @ other.total
        return sums

    def mark(self, members: NDArray[np.float32] | Subsets) -> LinearMarks:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        subsets = Subsets.of(members)
        return LinearMarks(subsets.counts, subsets.sums(self.half), subsets.sums(self.rows))

    def within(self, marked: LinearMarks) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return _within(marked.n, marked.half, marked.total)

    def inside(self, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        totals = np.empty((len(chosen), self.rows.shape[1]))
        for cells, total in zip(chosen, totals, strict=True):
            checkpoint()
            self.rows[cells].sum(axis=0, out=total)
        return _within(np.full(len(chosen), chosen.shape[1]), self.half[chosen].sum(axis=1), totals)

    def growing(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        sums = np.zeros((len(orders), orders.shape[1] + 1))
        n = np.arange(1, orders.shape[1] + 1)
        for order, row in zip(orders, sums, strict=True):
            checkpoint()
            row[1:] = _within(n, np.cumsum(self.half[order]), np.cumsum(self.rows[order], axis=0))
        return sums

    def squares(self) -> float:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        # sum_ij (h_i + h_j - u_i.u_j)^2, multiplied out; (u_i.u_j)^2 sums to the squared norm of the Gram matrix.
        h, u = self.half, self.rows
        checkpoint()
        step = u.shape[1] if u.size * u.shape[1] <= WHOLE_GRAM else GRAM_ROWS
        squares = 0.0
        for start in range(0, u.shape[1], step):
            gram = u.T @ u if step == u.shape[1] else product(u.T[start : start + step], u)
            squares += float((gram * gram).sum())
        return 2 * self.size * float(h @ h) + 2 * float(h.sum()) ** 2 + squares - 4 * float((h @ u) @ self.total)

    def by_batch(self, codes: NDArray[np.intp], count: int) -> BlockSums:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        if count == 1:
            return BlockSums(self.row_sums[:, None], self.row_sums[:, None], np.array([[self.squares()]]))
        return block_sums(_tiles(self, self), codes, codes, count)

    @cached_property
    def gram(self) -> NDArray[np.float64]:
        """Products of the dimensions with each other, [width, width]."""
        found: NDArray[np.float64] = product(self.rows.T, self.rows)
        return found

    def link(self, other: LinearGroup) -> LinearLink:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return LinearLink(self, other)


class LinearLink:
    """Distances between two linear groups, never formed."""

    def __init__(self, a: LinearGroup, b: LinearGroup) -> None:
        self.a, self.b = a, b
        self.sums_a, self.sums_b = a._sums_to(b), b._sums_to(a)

    def between(self, marked_a: LinearMarks, marked_b: LinearMarks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See :class:`perturbscope.scoring.energy.pool.Link`."""
        a, b = marked_a, marked_b
        some: NDArray[np.float64] = b.n * a.half + a.n * b.half - np.einsum("rw,rw->r", a.total, b.total)
        whole = self.a
        every: NDArray[np.float64] = b.n * whole.half.sum() + whole.size * b.half - b.total @ whole.total
        return some, every

    def by_batch(self, codes_a: NDArray[np.intp], codes_b: NDArray[np.intp], count: int) -> BlockSums:
        """See :class:`perturbscope.scoring.energy.pool.Link`."""
        a, b = self.a, self.b
        if count > 1 or a.rows.shape[1] > MAX_GRAM:
            return block_sums(_tiles(a, b), codes_a, codes_b, count)
        squares = b.size * float(a.half @ a.half) + a.size * float(b.half @ b.half)
        squares += 2 * float(a.half.sum()) * float(b.half.sum())
        squares -= 2 * float((a.half @ a.rows) @ b.total) + 2 * float((b.half @ b.rows) @ a.total)
        squares += float(np.vdot(product(a.rows, b.gram), a.rows))
        return BlockSums(self.sums_a[:, None], self.sums_b[:, None], np.array([[squares]]))


def _tiles(a: LinearGroup, b: LinearGroup) -> Iterator[NDArray[np.float64]]:
    """Yield the distances from a's cells to b's, some of a's at a time; a cell is at distance 0 of itself."""
    step = max(1, STEP_VALUES // b.size)
    for start in range(0, a.size, step):
        part = slice(start, start + step)
        tile = a.half[part, None] + b.half - product(a.rows[part], b.rows.T)
        if a is b:
            places = np.arange(len(tile))
            tile[places, start + places] = 0.0
        yield tile


def _within(n: NDArray[Any], half: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sums of distances within groups of n cells, from sums of half squared lengths and of vectors."""
    sums: NDArray[np.float64] = 2 * n * half - np.einsum("rw,rw->r", total, total)
    return sums
