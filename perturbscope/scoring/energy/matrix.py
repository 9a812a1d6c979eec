"""Groups of cells whose unsquared Euclidean distances are held as a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.energy.kernels import HOST, Compute, Points, Subsets, distances, to_numpy
from perturbscope.scoring.energy.kernels import sums as sums_of
from perturbscope.scoring.energy.null import Moments, moments_of

_ROWS = 512


class DenseGroup:
    """Group whose distance matrix is held; rows are float [n, width].

    Parameters
    ----------
    rows
        Vectors.
    origin
        Any point near the cells, [width]; their mean, if None. It only reduces rounding.
    compute
        Where the distances are computed and held.
    matrix
        The distances among the rows, if they are known already.
    """

    def __init__(
        self,
        rows: NDArray[np.float64],
        origin: NDArray[np.float64] | None = None,
        *,
        compute: Compute = HOST,
        matrix: Any = None,
    ) -> None:
        self.rows = rows
        self.size = len(rows)
        self.origin: NDArray[np.float64] = rows.mean(axis=0, dtype=np.float64) if origin is None else origin
        self.points = Points(rows - self.origin, compute)
        self.matrix = distances(self.points) if matrix is None else matrix
        self.row_sums = sums_of(self.matrix, 1)

    def mark(self, members: NDArray[np.float32] | Subsets) -> Subsets:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return Subsets.of(members)

    def within(self, marked: Subsets) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return marked.dots(marked.sums(self.matrix))

    def inside(self, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        if self.size <= _ROWS:
            counts = np.full(len(chosen), chosen.shape[1])
            return self.within(Subsets(chosen.ravel(), counts, self.size))
        # Computed again: to look up cells that lie apart in a large matrix takes twice as long.
        return np.array([float(sums_of(distances(self.points.take(cells)), 1).sum()) for cells in chosen])

    def part(self, a: NDArray[np.intp], b: NDArray[np.intp]) -> Any:
        """The distances between some cells and others, float32 [a, b]."""
        if self.points.compute.on_host:
            return self.matrix[np.ix_(a, b)]
        rows, columns = self.points.compute.put(a), self.points.compute.put(b)
        return self.matrix[rows[:, None], columns[None, :]]

    def growing(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        sums = np.zeros((len(orders), orders.shape[1] + 1))
        for order, row in zip(orders, sums, strict=True):
            # What a cell adds: its distances to those before it, in both directions.
            added = np.tril(to_numpy(self.part(order, order)), -1).sum(axis=1, dtype=np.float64)
            np.cumsum(2 * added, out=row[1:])
        return sums

    def moments(self) -> Moments:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        tiles = (to_numpy(self.matrix[i : i + _ROWS]).astype(np.float64) for i in range(0, self.size, _ROWS))
        return moments_of(self.row_sums, sum(float(np.vdot(tile, tile)) for tile in tiles))

    def link(self, other: DenseGroup) -> DenseLink:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        return DenseLink(self, other)


class DensePart(DenseGroup):
    """Some cells of a dense group: distances are looked up in it, not computed again."""

    def __init__(self, whole: DenseGroup, positions: NDArray[np.intp]) -> None:
        super().__init__(
            whole.rows[positions],
            whole.origin,
            compute=whole.points.compute,
            matrix=whole.part(positions, positions),
        )
        self.whole, self.positions = whole, positions

    def link(self, other: DenseGroup) -> DenseLink:
        """See :class:`perturbscope.scoring.energy.pool.Group`."""
        if isinstance(other, DensePart) and other.whole is self.whole:
            return DenseLink(self, other, self.whole.part(other.positions, self.positions))
        return DenseLink(self, other)


class DenseLink:
    """Distances between two dense groups, held as a matrix, float32 [cells of b, cells of a] (or given as one)."""

    def __init__(self, a: DenseGroup, b: DenseGroup, matrix: Any = None) -> None:
        if matrix is None:
            points = a.points if a.origin is b.origin else Points(a.rows - b.origin, b.points.compute)
            matrix = distances(b.points, points)
        self.matrix = matrix
        self.sums_a = sums_of(self.matrix, 0)
        self.sums_b = sums_of(self.matrix, 1)

    def between(self, marked_a: Subsets, marked_b: Subsets) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See :class:`perturbscope.scoring.energy.pool.Link`."""
        return marked_a.dots(marked_b.sums(self.matrix)), marked_b.sums(self.sums_b)
