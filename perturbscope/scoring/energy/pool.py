"""Energy distances of many groupings of the same cells.

The distances between cells are computed once; every grouping is then a column of zeros and ones, z, and the sum of
distances within the group it marks is the quadratic form ``z' K z``. So a thousand exchanges of labels are one matrix
product. With unsquared Euclidean distance K is held (float32; :mod:`perturbscope.scoring.energy.matrix`); with cosine
and squared Euclidean distance the same numbers come from sums of vectors, and K is never formed
(:mod:`perturbscope.scoring.energy.closed_form`). The null of the statistic has a closed form:
:mod:`perturbscope.scoring.energy.null`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.kernels import Subsets
from perturbscope.scoring.energy.matrix import DenseGroup, DensePart
from perturbscope.scoring.energy.null import RELATIVE_NOISE, Estimator, Moments, null_moments

__all__ = [
    "RELATIVE_NOISE",
    "DenseGroup",
    "DensePart",
    "Estimator",
    "Group",
    "Labels",
    "LinearGroup",
    "Link",
    "Members",
    "Moments",
    "Pool",
    "energy",
    "null_moments",
]

Members = NDArray[np.float32]


class Group(Protocol):
    """The cells of one group, and the distances among them."""

    size: int
    row_sums: NDArray[np.float64]

    def mark(self, members: Members | Subsets) -> Any:
        """Subsets of the cells, or `members` [size, R] of 0 and 1, in the form that sums of distances are made from."""

    def within(self, marked: Any) -> NDArray[np.float64]:
        """Sum of all distances within each marked subset, [R]."""

    def inside(self, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """Sum of all distances within each of a few subsets, given as positions [R, K] -> [R]."""

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


@dataclass(frozen=True)
class Labels:
    """Exchanged labels of a pool: which cells of a and of b are called a's, R times.

    Attributes
    ----------
    own, others
        Of the cells of a, and of b.
    marked
        Those of b, as :meth:`Group.mark` makes it.
    within_b, rows_b
        Sums of the distances among b's marked cells, and of those from them to all cells of b, [R].
    """

    own: Subsets
    others: Subsets
    marked: Any
    within_b: NDArray[np.float64]
    rows_b: NDArray[np.float64]

    @classmethod
    def of(cls, a: Members, b: Members, group_b: Group) -> Labels:
        """Labels of a's cells [n, R] and of b's cells [m, R]."""
        others = Subsets.of(b)
        marked = group_b.mark(others)
        return cls(Subsets.of(a), others, marked, group_b.within(marked), others.sums(group_b.row_sums))

    @property
    def a(self) -> Members:
        """Labels of a's cells, float32 [n, R] of 0 and 1."""
        return self.own.members

    @property
    def b(self) -> Members:
        """Labels of b's cells, float32 [m, R] of 0 and 1."""
        return self.others.members


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
        marked = self.a.mark(labels.own)
        between, reach_b = self.link.between(marked, labels.marked)
        inside = self.a.within(marked) + labels.within_b + 2 * between
        reach = labels.own.sums(self.row_sums[: self.a.size]) + reach_b + labels.rows_b
        rest = self.total - 2 * reach + inside
        return energy(reach - inside, inside, rest, self.a.size, self.b.size, self.estimator)

    def sampled(self, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """Energy distance between group a and each subset of group b, given as positions [R, K]."""
        between = self.link.sums_b[chosen].sum(axis=1)
        within_a, within_b = float(self.a.row_sums.sum()), self.b.inside(chosen)
        return energy(between, within_a, within_b, self.a.size, chosen.shape[1], self.estimator)


def energy(
    between: ArrayLike, within_a: ArrayLike, within_b: ArrayLike, n: int, m: int, estimator: Estimator
) -> NDArray[np.float64]:
    """Energy distance from sums of distances: between the groups, and over ordered pairs within each."""
    own = 1 if estimator == "U" else 0
    across, a, b = (np.asarray(sums, dtype=np.float64) for sums in (between, within_a, within_b))
    value: NDArray[np.float64] = 2 * across / (n * m) - a / (n * (n - own)) - b / (m * (m - own))
    return value
