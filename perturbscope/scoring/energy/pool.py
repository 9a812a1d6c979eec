"""The energy distance of two groups of cells: observed, after exchanges of labels, and among controls.

The distances between cells are computed once; every grouping is then a column of zeros and ones, z, and the sum of
distances within the group it marks is the quadratic form ``z' K z``. So a thousand exchanges of labels are one matrix
product. With unsquared Euclidean distance K is held (float32; :mod:`perturbscope.scoring.energy.matrix`); with cosine
and squared Euclidean distance the same numbers come from sums of vectors, and K is never formed
(:mod:`perturbscope.scoring.energy.closed_form`).

The null, the distance between groups of controls, has a mean and a variance in closed form. Write a distance between
two control cells as ``d(i, j) = mean + g_i + g_j + k_ij`` (Hoeffding's decomposition), with uncorrelated parts of
variance ``var_g`` and ``var_k``. An energy distance is a weighted sum of distances, ``sum_ij A_ij d(i, j)``, hence over
random control groups::

    mean = mean distance * sum_ij A_ij        (0 for the U estimator)
    variance = 4 var_g sum_i (sum_j A_ij)^2 + 2 var_k sum_ij A_ij^2

For the U estimator every row of A sums to zero and only ``var_k`` counts; its unbiased estimate from the controls is
the U-centred distance variance of Szekely and Rizzo (2014). For one pair of disjoint control groups this is exactly
the mean and variance over ALL such pairs, which a finite number of random draws only approaches. For the V estimator
the rows do not sum to zero: its mean is ``mean distance * (1 / n + 1 / m)``, the share of the pairs of a cell with
itself, and ``var_g`` counts too. There the parts of the cells are taken as independent, as of a large population.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.scoring.energy.matrix import BlockSums, Subsets
from perturbscope.scoring.results import Estimator

Members = NDArray[np.float32]
"""Subsets of cells as the columns of a matrix [cells, R] of 0 and 1."""
RELATIVE_NOISE = 1e-6
"""Statistics closer than this share of the mean distance are equal: rounding of float32 sums must not break ties."""


class Group(Protocol):
    """The cells of one group and sums of the distances among them.

    Attributes
    ----------
    rows
        Vectors, float64 [n, width].
    size
        Number of cells, n.
    row_sums
        Sum of each cell's distances to all cells of the group, float64 [n].
    """

    rows: NDArray[np.float64]
    size: int
    row_sums: NDArray[np.float64]

    def mark(self, members: Members | Subsets) -> Any:
        """Return subsets of the cells, or `members` [n, R], in the form that sums of distances are made from."""

    def within(self, marked: Any) -> NDArray[np.float64]:
        """Sum all distances within each marked subset, [R]."""

    def inside(self, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """Sum all distances within each of a few subsets, given as positions [R, K] -> [R]."""

    def growing(self, orders: NDArray[np.intp]) -> NDArray[np.float64]:
        """Sum all distances within the first 0, 1, ..., K cells of each order, `orders` [R, K] -> [R, K + 1]."""

    def squares(self) -> float:
        """Sum the squared distances over all ordered pairs of cells."""

    def by_batch(self, codes: NDArray[np.intp], count: int) -> BlockSums:
        """Sum the distances by the batches of the cells, given as codes [n] below `count`."""

    def link(self, other: Any) -> Link:
        """Return the distances to the cells of another group of the same kind."""


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
        """Sum distances from marked cells of one group, and from all of its cells, to marked cells of the other."""

    def by_batch(self, codes_a: NDArray[np.intp], codes_b: NDArray[np.intp], count: int) -> BlockSums:
        """Sum the distances by the batches of the cells; rows are those of group a."""


@dataclass(frozen=True)
class Labels:
    """Exchanged labels of a pool: the cells of a and of b that are called a's, R times.

    Attributes
    ----------
    a, b
        Cells of a, and cells of b, that are called a's.
    marked
        Those of b, as :meth:`Group.mark` returns them.
    within_b, rows_b
        Sums of the distances among b's marked cells, and from them to all cells of b, [R].
    """

    a: Subsets
    b: Subsets
    marked: Any
    within_b: NDArray[np.float64]
    rows_b: NDArray[np.float64]

    @classmethod
    def of(cls, a: Members, b: Members, group_b: Group) -> Labels:
        """Return the labels that mark a's cells [n, R] and b's cells [m, R]."""
        subsets = Subsets.of(b)
        marked = group_b.mark(subsets)
        return cls(Subsets.of(a), subsets, marked, group_b.within(marked), subsets.sums(group_b.row_sums))


class Pool:
    """Two groups seen as one pool of cells, to be split again by exchanged labels.

    Attributes
    ----------
    total
        Sum of the distances over all ordered pairs of the pool.
    noise
        Difference up to which two statistics of the pool are equal (:data:`RELATIVE_NOISE`).
    """

    def __init__(self, a: Group, b: Group, estimator: Estimator, link: Link | None = None) -> None:
        self.a, self.b, self.estimator = a, b, estimator
        self.link = a.link(b) if link is None else link
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
        """Return the energy distance between marked cells and the rest, for each column of `members` [n + m, R]."""
        return self.exchanged(Labels.of(members[: self.a.size], members[self.a.size :], self.b))

    def exchanged(self, labels: Labels) -> NDArray[np.float64]:
        """Return the energy distance between the cells that are called a's and the rest, [R]."""
        inside, reach = self.sums(labels)
        rest = self.total - 2 * reach + inside
        return energy(reach - inside, inside, rest, self.a.size, self.b.size, self.estimator)

    def sums(self, labels: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return sums of the distances among marked cells, any number of them, and from them to all cells, [R]."""
        marked = self.a.mark(labels.a)
        between, reach_b = self.link.between(marked, labels.marked)
        inside = self.a.within(marked) + labels.within_b + 2 * between
        return inside, labels.a.sums(self.row_sums[: self.a.size]) + reach_b + labels.rows_b

    def sampled(self, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the energy distance between group a and each subset of group b, given as positions [R, K]: [R]."""
        between = self.link.sums_b[chosen].sum(axis=1)
        within_a, within_b = float(self.a.row_sums.sum()), self.b.inside(chosen)
        return energy(between, within_a, within_b, self.a.size, chosen.shape[1], self.estimator)

    def moments(
        self,
        codes_a: NDArray[np.intp] | None = None,
        codes_b: NDArray[np.intp] | None = None,
        count: int = 1,
        sums_b: BlockSums | None = None,
    ) -> tuple[float, float]:
        """Return mean and sd of the energy distance over ALL exchanges of labels within batches, in closed form.

        A distance that is left after the mean and the parts of its two cells are taken out is uncorrelated with the
        others over random subsets, so the variance is a sum over batches and pairs of batches (Hoeffding's
        decomposition; for one batch that of Szekely and Rizzo 2014).

        Parameters
        ----------
        codes_a, codes_b
            Batch of each cell, below `count`; None: all cells are in one batch.
        count
            Number of batches.
        sums_b
            Group b's own sums, if they are known.
        """
        n, m = self.a.size, self.b.size
        of_a = np.zeros(n, dtype=np.intp) if codes_a is None else codes_a
        of_b = np.zeros(m, dtype=np.intp) if codes_b is None else codes_b
        marked, others = np.bincount(of_a, minlength=count), np.bincount(of_b, minlength=count)
        live = np.flatnonzero(marked)
        if not others[live].all():
            raise ValueError("Cells of group a are in batches without cells of group b.")
        known = self.b.by_batch(of_b, count) if sums_b is None else sums_b
        in_b = np.isin(of_b, live)
        # The batches of group a alone, and one for the cells of all others.
        place = np.full(count, len(live))
        place[live] = np.arange(len(live))
        own = self.a.by_batch(place[of_a], len(live))
        between = self.link.by_batch(place[of_a], place[of_b], len(live) + (not in_b.all()))
        squares = known.squares[np.ix_(live, live)] + own.squares
        across = between.squares[: len(live), : len(live)]
        squares = squares + across + across.T
        rows = between.rows[:, : len(live)]
        columns = between.columns[in_b, : len(live)]
        sums = np.concatenate([own.rows + rows, columns + known.rows[np.ix_(in_b, live)]])
        codes = place[np.concatenate([of_a, of_b[in_b]])]
        reach = np.concatenate([self.row_sums[:n], self.row_sums[n:][in_b]])
        mean, variance = _exchange_moments(sums, squares, reach, codes, marked[live], n, m, self.estimator)
        mean -= self.total / (m * (m - (self.estimator == "U")))
        sd = float(np.sqrt(max(variance, 0.0)))
        return mean, sd if sd > self.noise else 0.0


def _exchange_moments(
    sums: NDArray[np.float64],
    squares: NDArray[np.float64],
    reach: NDArray[np.float64],
    codes: NDArray[np.intp],
    marked: NDArray[np.intp],
    n: int,
    m: int,
    estimator: Estimator,
) -> tuple[float, float]:
    """Return mean and variance of ``slope * R - weight * Q`` over exchanges of labels within batches.

    Q is the sum of the distances among the marked cells, R that of their distances to all cells of the pool; so is an
    energy distance, but for a constant.

    Parameters
    ----------
    sums
        Sum of each cell's distances to the cells of each batch, [N, S].
    squares
        Sum of the squared distances of each pair of batches, [S, S].
    reach
        Sum of each cell's distances to all cells of the pool, [N]; there may be cells without exchange beside the N.
    codes
        Batch of each cell, [N].
    marked
        Number of cells that are marked in each batch, [S].
    """
    own = 1 if estimator == "U" else 0
    weight = 2 / (n * m) + 1 / (n * (n - own)) + 1 / (m * (m - own))
    slope = 2 / (n * m) + 2 / (m * (m - own))
    size = np.bincount(codes, minlength=len(marked)).astype(np.float64)
    k = marked.astype(np.float64)
    share = k / size
    spread = share * (1 - share) * size / (size - 1)
    blocks, rows_squared = np.zeros((2, len(k), len(k)))
    np.add.at(blocks, codes, sums)
    np.add.at(rows_squared, codes, sums**2)
    inside = np.diagonal(blocks)
    mean = slope * float(share[codes] @ reach)
    both = np.outer(share, share)
    np.fill_diagonal(both, k * (k - 1) / (size * (size - 1)))
    mean -= weight * float((both * blocks).sum())
    # What one cell's label does, given the mean of the others.
    within = np.where(size > 2, (k - 1) / np.maximum(size - 2, 1), 0.0)
    places = np.arange(len(codes))
    own_batch = sums[places, codes]
    effects = slope * reach - 2 * weight * (sums @ share - share[codes] * own_batch + within[codes] * own_batch)
    effects -= (np.bincount(codes, effects) / size)[codes]
    variance = float(spread[codes] @ effects**2)
    # What is left to a pair of cells: in one batch, and in two.
    falling = np.ones((5, len(k)))
    for i in range(4):
        falling[i + 1] = falling[i] * (k - i) / np.maximum(size - i, 1)
    left = (
        np.diagonal(squares)
        - 2 * np.diagonal(rows_squared) / np.maximum(size - 2, 1)
        + inside**2 / (np.maximum(size - 1, 1) * np.maximum(size - 2, 1))
    )
    pairs = np.where(size > 3, 2 * np.maximum(left, 0) * (falling[2] - 2 * falling[3] + falling[4]), 0.0)
    by_row = rows_squared / size[None, :]
    across = squares - by_row - by_row.T + blocks**2 / np.outer(size, size)
    np.fill_diagonal(across, 0.0)
    cross = 2 * float(spread @ np.maximum(across, 0) @ spread)
    return mean, variance + weight**2 * (float(pairs.sum()) + cross)


def energy(
    between: ArrayLike, within_a: ArrayLike, within_b: ArrayLike, n: int, m: int, estimator: Estimator
) -> NDArray[np.float64]:
    """Return energy distances from sums of distances: between the groups, and over ordered pairs within each."""
    own = 1 if estimator == "U" else 0
    across, a, b = (np.asarray(sums, dtype=np.float64) for sums in (between, within_a, within_b))
    value: NDArray[np.float64] = 2 * across / (n * m) - a / (n * (n - own)) - b / (m * (m - own))
    return value


@dataclass(frozen=True)
class Moments:
    """Moments of the distances between controls, from which the null follows.

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


def moments_of(group: Group) -> Moments:
    """Return moments of the distances between two different cells of a group (needs four cells).

    Each is an unbiased U-statistic: of means over pairs, over pairs of pairs that share a cell, and over those that
    share none.
    """
    row_sums, n = group.row_sums, group.size
    pairs = n * (n - 1)
    mean = float(row_sums.sum()) / pairs
    rows = row_sums - (n - 1) * mean
    same = max(group.squares() - pairs * mean**2, 0.0)
    sharing = float(rows @ rows) - same
    apart = -4 * float(rows @ rows) + 2 * same
    e_same = same / pairs
    e_sharing = sharing / (pairs * (n - 2))
    e_apart = apart / (pairs * (n - 2) * (n - 3))
    var_g, var_k = max(e_sharing - e_apart, 0.0), max(e_same - 2 * e_sharing + e_apart, 0.0)
    # Below this, what varies is the rounding of the distances.
    floor = (RELATIVE_NOISE * mean) ** 2
    return Moments(mean, var_g if var_g > floor else 0.0, var_k if var_k > floor else 0.0)


def null_moments(
    moments: Moments, n: int, m: int, *, pool: int, repeats: int, estimator: Estimator
) -> tuple[float, float]:
    """Return mean and sd of the energy distance between a group of n controls and other controls.

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
