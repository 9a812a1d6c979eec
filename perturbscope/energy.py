"""Energy distances of many groupings of the same cells.

The distances between cells are computed once; every grouping is then a column of zeros and ones, z, and the sum of
distances within the group it marks is the quadratic form ``z' K z``. So a thousand exchanges of labels are one matrix
product. With unsquared Euclidean distance K is held (float32); with cosine and squared Euclidean distance the same
numbers come from sums of vectors, and K is never formed.

The null of the statistic has a closed form as well. Write a distance between two control cells as
``d(i, j) = mean + g_i + g_j + k_ij`` (Hoeffding's decomposition), with uncorrelated parts of variance ``var_g`` and
``var_k``. An energy distance is a weighted sum of distances, ``sum_ij A_ij d(i, j)``, hence over random control
groups::

    mean = mean distance * sum_ij A_ij        (0 for the U estimator)
    variance = 4 var_g sum_i (sum_j A_ij)^2 + 2 var_k sum_ij A_ij^2

For the U estimator every row of A sums to zero and only ``var_k`` counts; its unbiased estimate from the controls is
the U-centred distance variance of Szekely and Rizzo (2014). For one pair of disjoint control groups this is exactly
the mean and variance over ALL such pairs, which a finite number of random draws only approaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.distances import pairwise_distances

Members = NDArray[np.float32]
Estimator = Literal["U", "V"]

RELATIVE_NOISE = 1e-6
"""Statistics closer than this share of the mean distance are equal: rounding of float32 sums must not break ties."""
_TILE = 512


@dataclass(frozen=True)
class Moments:
    """What the null needs to know about the distances between controls.

    Attributes
    ----------
    mean
        Mean distance between two different cells.
    var_g
        Variance of a cell's mean distance to the others.
    var_k
        Variance of the part of a distance that its two cells' means do not explain.
    """

    mean: float
    var_g: float
    var_k: float


class Group(Protocol):
    """The cells of one group, and the distances among them."""

    size: int
    row_sums: NDArray[np.float64]

    def mark(self, members: Members) -> Any:
        """Subsets of the cells, `members` [size, R] of 0 and 1, in the form that sums of distances are made from."""

    def within(self, marked: Any) -> NDArray[np.float64]:
        """Sum of all distances within each marked subset, [R]."""

    def growing(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """Sum of all distances within the first 0, 1, ..., K cells of each order, `orders` [R, K] -> [R, K + 1]."""

    def moments(self) -> Moments:
        """Moments of the distances between two different cells (needs four cells)."""

    def link(self, other: Any) -> Link:
        """The distances to the cells of another group of the same kind."""


class Link(Protocol):
    """The distances between the cells of two groups.

    Attributes
    ----------
    sums_a, sums_b
        Sum of each cell's distances to all cells of the other group, float64 [n], [m].
    """

    sums_a: NDArray[np.float64]
    sums_b: NDArray[np.float64]

    def between(self, marked_a: Any, marked_b: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums of distances from marked cells of one group, and from all of its cells, to marked cells of the other."""


class DenseGroup:
    """Group whose distance matrix is held; rows are float [n, width].

    Give `matrix` if the distances among the rows are already known.
    """

    def __init__(self, rows: NDArray[np.float64], matrix: NDArray[np.float32] | None = None) -> None:
        self.rows = rows
        self.size = len(rows)
        self.matrix = pairwise_distances(rows) if matrix is None else matrix
        self.row_sums = self.matrix.sum(axis=1, dtype=np.float64)

    def mark(self, members: Members) -> Members:
        """See :class:`Group`."""
        return members

    def within(self, marked: Members) -> NDArray[np.float64]:
        """See :class:`Group`."""
        return _column_dots(marked, self.matrix @ marked)

    def growing(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`Group`."""
        sums = np.zeros((len(orders), orders.shape[1] + 1))
        for order, row in zip(orders, sums, strict=True):
            # What a cell adds: its distances to those before it, in both directions.
            added = np.tril(self.matrix[np.ix_(order, order)], -1).sum(axis=1, dtype=np.float64)
            np.cumsum(2 * added, out=row[1:])
        return sums

    def moments(self) -> Moments:
        """See :class:`Group`."""
        tiles = (self.matrix[i : i + _TILE].astype(np.float64) for i in range(0, self.size, _TILE))
        return _moments(self.row_sums, sum(float(np.vdot(tile, tile)) for tile in tiles))

    def link(self, other: DenseGroup) -> DenseLink:
        """See :class:`Group`."""
        return DenseLink(self, other)


class DensePart(DenseGroup):
    """Some cells of a dense group: distances are looked up in it, not computed again."""

    def __init__(self, whole: DenseGroup, positions: NDArray[np.intp]) -> None:
        super().__init__(whole.rows[positions], whole.matrix[np.ix_(positions, positions)])
        self.whole, self.positions = whole, positions

    def link(self, other: DenseGroup) -> DenseLink:
        """See :class:`Group`."""
        if isinstance(other, DensePart) and other.whole is self.whole:
            return DenseLink(self, other, self.whole.matrix[np.ix_(self.positions, other.positions)])
        return DenseLink(self, other)


class DenseLink:
    """Distances between two dense groups, held as a matrix (`matrix`, if it is known already)."""

    def __init__(self, a: DenseGroup, b: DenseGroup, matrix: NDArray[np.float32] | None = None) -> None:
        self.matrix = pairwise_distances(a.rows, b.rows) if matrix is None else matrix
        self.sums_a = self.matrix.sum(axis=1, dtype=np.float64)
        self.sums_b = self.matrix.sum(axis=0, dtype=np.float64)

    def between(self, marked_a: Members, marked_b: Members) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See :class:`Link`."""
        reach = self.matrix @ marked_b
        return _column_dots(marked_a, reach), reach.sum(axis=0, dtype=np.float64)


class LinearMarks(NamedTuple):
    """Marked subsets of a linear group: cells, sum of half squared lengths, sum of vectors; [R], [R], [R, width]."""

    n: NDArray[np.float64]
    half: NDArray[np.float64]
    total: NDArray[np.float64]


class LinearGroup:
    """Group with the distance ``factor / 2 * |u - v|^2``: cosine on unit rows (factor 1), squared Euclidean (2).

    `origin` is any point near the cells, the same for all groups that meet; it only reduces rounding.
    """

    def __init__(self, rows: NDArray[np.float64], factor: float, origin: NDArray[np.float64]) -> None:
        self.rows = (rows - origin) * np.sqrt(factor)
        self.half = 0.5 * (self.rows * self.rows).sum(axis=1)
        self.size = len(rows)
        self.row_sums = self._sums_to(self)

    def _sums_to(self, other: LinearGroup) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = other.size * self.half + other.half.sum() - self.rows @ other.rows.sum(axis=0)
        return sums

    def mark(self, members: Members) -> LinearMarks:
        """See :class:`Group`."""
        z = members.T.astype(np.float64)
        return LinearMarks(z.sum(axis=1), z @ self.half, z @ self.rows)

    def within(self, marked: LinearMarks) -> NDArray[np.float64]:
        """See :class:`Group`."""
        sums: NDArray[np.float64] = 2 * marked.n * marked.half - (marked.total * marked.total).sum(axis=1)
        return sums

    def growing(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`Group`."""
        sums = np.zeros((len(orders), orders.shape[1] + 1))
        n = np.arange(1, orders.shape[1] + 1)
        for order, row in zip(orders, sums, strict=True):
            total = np.cumsum(self.rows[order], axis=0)
            row[1:] = 2 * n * np.cumsum(self.half[order]) - (total * total).sum(axis=1)
        return sums

    def moments(self) -> Moments:
        """See :class:`Group`."""
        # sum_ij (h_i + h_j - u_i.u_j)^2, multiplied out; (u_i.u_j)^2 sums to the squared norm of the Gram matrix.
        h, u = self.half, self.rows
        gram = u.T @ u
        squares = (
            2 * self.size * float(h @ h)
            + 2 * float(h.sum()) ** 2
            + float((gram * gram).sum())
            - 4 * float((h @ u) @ u.sum(axis=0))
        )
        return _moments(self.row_sums, squares)

    def link(self, other: LinearGroup) -> LinearLink:
        """See :class:`Group`."""
        return LinearLink(self, other)


class LinearLink:
    """Distances between two linear groups, never formed."""

    def __init__(self, a: LinearGroup, b: LinearGroup) -> None:
        self.a, self.b = a, b
        self.sums_a, self.sums_b = a._sums_to(b), b._sums_to(a)

    def between(self, marked_a: LinearMarks, marked_b: LinearMarks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See :class:`Link`."""
        a, b = marked_a, marked_b
        some: NDArray[np.float64] = b.n * a.half + a.n * b.half - (a.total * b.total).sum(axis=1)
        own = self.a
        every: NDArray[np.float64] = b.n * own.half.sum() + own.size * b.half - b.total @ own.rows.sum(axis=0)
        return some, every


@dataclass(frozen=True)
class Labels:
    """Exchanged labels of a pool: which cells of a and of b are called a's, R times.

    Attributes
    ----------
    a
        Of the cells of a, float32 [n, R] of 0 and 1.
    b
        Of the cells of b, as :meth:`Group.mark` makes it.
    within_b, rows_b
        Sums of the distances among b's marked cells, and of those from them to all cells of b, [R].
    """

    a: Members
    b: Any
    within_b: NDArray[np.float64]
    rows_b: NDArray[np.float64]

    @classmethod
    def of(cls, a: Members, b: Members, group_b: Group) -> Labels:
        """Labels of a's cells [n, R] and of b's cells [m, R]."""
        marked = group_b.mark(b)
        return cls(a, marked, group_b.within(marked), group_b.row_sums @ b.astype(np.float64))


class Pool:
    """Two groups seen as one pool of cells, to be split again by exchanged labels."""

    def __init__(self, a: Group, b: Group, estimator: Estimator) -> None:
        self.a, self.b, self.estimator = a, b, estimator
        self.link = a.link(b)
        self.row_sums = np.concatenate([a.row_sums + self.link.sums_a, self.link.sums_b + b.row_sums])
        self.total = float(self.row_sums.sum())
        cells = a.size + b.size
        self.noise = RELATIVE_NOISE * self.total / (cells * (cells - 1))

    @property
    def observed(self) -> float:
        """The energy distance of the two groups."""
        within_a, within_b = float(self.a.row_sums.sum()), float(self.b.row_sums.sum())
        between = float(self.link.sums_a.sum())
        return float(energy(between, within_a, within_b, self.a.size, self.b.size, self.estimator))

    def split(self, members: Members) -> NDArray[np.float64]:
        """Energy distance between the marked cells and the rest, for each column of `members` [n + m, R]."""
        return self.exchanged(Labels.of(members[: self.a.size], members[self.a.size :], self.b))

    def exchanged(self, labels: Labels) -> NDArray[np.float64]:
        """Energy distance between the cells that are called a's and the rest, [R]."""
        marked = self.a.mark(labels.a)
        between, reach_b = self.link.between(marked, labels.b)
        inside = self.a.within(marked) + labels.within_b + 2 * between
        reach = self.row_sums[: self.a.size] @ labels.a.astype(np.float64) + reach_b + labels.rows_b
        rest = self.total - 2 * reach + inside
        return energy(reach - inside, inside, rest, self.a.size, self.b.size, self.estimator)

    def samples(self, members: Members) -> NDArray[np.float64]:
        """Energy distance between group a and each marked subset (equal sizes) of group b, `members` [m, R]."""
        size = int(members[:, 0].sum())
        between = self.link.sums_b @ members.astype(np.float64)
        within = self.b.within(self.b.mark(members))
        return energy(between, float(self.a.row_sums.sum()), within, self.a.size, size, self.estimator)


def energy(
    between: ArrayLike, within_a: ArrayLike, within_b: ArrayLike, n: int, m: int, estimator: Estimator
) -> NDArray[np.float64]:
    """Energy distance from sums of distances: between the groups, and over ordered pairs within each."""
    own = 1 if estimator == "U" else 0
    across, a, b = (np.asarray(sums, dtype=np.float64) for sums in (between, within_a, within_b))
    value: NDArray[np.float64] = 2 * across / (n * m) - a / (n * (n - own)) - b / (m * (m - own))
    return value


def null_moments(
    moments: Moments, n: int, m: int, *, pool: int, repeats: int, estimator: Estimator
) -> tuple[float, float]:
    """Mean and sd of the energy distance between a group of n controls and other controls.

    The statistic is the mean of D(X, Y_r) over `repeats` groups Y_r of m cells, each drawn from the same `pool` cells;
    with ``repeats=1`` it is D of two disjoint groups. Averaging narrows the null, since only Y varies between repeats:
    comparing an averaged distance with single draws would make z too small by up to a half.
    """
    own = 1 if estimator == "U" else 0
    # Expected squares of the share of the repeats that a cell of the pool, and a pair of them, is drawn in.
    one, two = m / pool, m * (m - 1) / (pool * max(pool - 1, 1))
    cell = one / repeats + (1 - 1 / repeats) * one**2
    pair = two / repeats + (1 - 1 / repeats) * two**2
    squares = (
        (n - 1) / (n * (n - own) ** 2) + 2 * pool * cell / (n * m**2) + pool * (pool - 1) * pair / (m * (m - own)) ** 2
    )
    variance = 2 * moments.var_k * squares
    if estimator == "U":
        return 0.0, float(np.sqrt(variance))
    variance += 4 * moments.var_g * (1 / n**3 + pool * cell / m**4)
    return moments.mean * (1 / n + 1 / m), float(np.sqrt(variance))


def _moments(row_sums: NDArray[np.float64], squares: float) -> Moments:
    """Moments from the row sums of a distance matrix and the sum of its squared values.

    Each is an unbiased U-statistic: of means over pairs, pairs of pairs that share a cell, and those that do not.
    """
    n = len(row_sums)
    pairs = n * (n - 1)
    mean = float(row_sums.sum()) / pairs
    rows = row_sums - (n - 1) * mean
    same = max(squares - pairs * mean**2, 0.0)
    sharing = float(rows @ rows) - same
    apart = -4 * float(rows @ rows) + 2 * same
    e_same = same / pairs
    e_sharing = sharing / (pairs * (n - 2))
    e_apart = apart / (pairs * (n - 2) * (n - 3))
    var_g, var_k = max(e_sharing - e_apart, 0.0), max(e_same - 2 * e_sharing + e_apart, 0.0)
    # Below this, what varies is the rounding of the distances.
    floor = (RELATIVE_NOISE * mean) ** 2
    return Moments(mean, var_g if var_g > floor else 0.0, var_k if var_k > floor else 0.0)


def _column_dots(a: Members, b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Dot products of the columns of two float32 matrices, summed in float64."""
    sums: NDArray[np.float64] = np.einsum("nr,nr->r", a, b, dtype=np.float64)
    return sums
