"""Small statistics: exchanges of labels, p-values with ties, corrections for many tests, uniformity, correlation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import lgamma
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.threads import checkpoint

CHUNK = 256
"""Exchanges of labels evaluated in one matrix product."""


def generator(seed: int, *names: object) -> np.random.Generator:
    """Return a generator for one named purpose, so that a perturbation's draws do not depend on the others scored."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def empirical_p(observed: float, null: ArrayLike, *, noise: float = 0.0) -> float:
    """Return the permutation p-value ``(1 + #{null >= observed}) / (1 + draws)``, which counts the observation itself.

    It is never 0, and valid with ties; `noise` is the difference up to which two values are equal.
    """
    values = np.asarray(null, dtype=np.float64)
    return float((1 + np.count_nonzero(values >= observed - noise)) / (1 + values.size))


def benjamini_hochberg(p: ArrayLike) -> NDArray[np.float64]:
    """Return p-values adjusted by Benjamini and Hochberg (1995), q; NaN stays NaN and is not counted."""
    values = np.asarray(p, dtype=np.float64)
    q = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    scaled = values[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def bonferroni(p: ArrayLike) -> NDArray[np.float64]:
    """Return p-values times their number, at most 1; NaN stays NaN and is not counted."""
    values = np.asarray(p, dtype=np.float64)
    adjusted: NDArray[np.float64] = np.minimum(values * np.count_nonzero(~np.isnan(values)), 1.0)
    return adjusted


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Return p-values adjusted by Holm (1979), step-down Bonferroni; NaN stays NaN and is not counted."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    scaled = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


@dataclass(frozen=True)
class Exchange:
    """The exchanges of labels that are allowed between two groups, pooled as [a, b].

    Attributes
    ----------
    size
        Number of cells of the pool.
    blocks
        Positions in the pool, and number of a's cells, of each batch with cells of both groups.
    fixed
        Positions of a's cells that are never exchanged.
    """

    size: int
    blocks: tuple[tuple[NDArray[np.intp], int], ...]
    fixed: NDArray[np.intp]

    @classmethod
    def of(cls, n: int, m: int, batches: Sequence[Any] | NDArray[Any] | None = None) -> Exchange:
        """Return the exchange between n cells of a and m of b, within `batches` of the pooled cells if given."""
        if batches is None:
            return cls(n + m, ((np.arange(n + m), n),), np.empty(0, dtype=np.intp))
        _, codes = np.unique(np.asarray(batches), return_inverse=True)
        blocks, fixed = [], []
        for code in range(int(codes.max()) + 1):
            cells = np.flatnonzero(codes == code)
            of_a = int((cells < n).sum())
            if 0 < of_a < len(cells):
                blocks.append((cells, of_a))
            else:
                fixed.append(cells[cells < n])
        return cls(n + m, tuple(blocks), np.concatenate([np.empty(0, dtype=np.intp), *fixed]))

    @property
    def log_count(self) -> float:
        """Natural logarithm of the number of distinct exchanges."""
        return sum(
            lgamma(len(cells) + 1) - lgamma(of_a + 1) - lgamma(len(cells) - of_a + 1) for cells, of_a in self.blocks
        )

    def every(self) -> NDArray[np.float32]:
        """Return ALL exchanges of labels as the columns of a matrix [size, R]; the observed labels are among them."""
        columns = np.zeros((1, self.size), dtype=np.float32)
        columns[:, self.fixed] = 1
        for cells, of_a in self.blocks:
            checkpoint()
            subsets = np.array(list(combinations(cells.tolist(), of_a)), dtype=np.intp)
            marks = np.zeros((len(subsets), self.size), dtype=np.float32)
            np.put_along_axis(marks, subsets, 1, axis=1)
            columns = (columns[:, None, :] + marks[None]).reshape(-1, self.size)
        return columns.T

    def draw(self, draws: int, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
        """Yield chunks of exchanged labels, float32 [size, R]: 1 for a cell that is called a's."""
        for start in range(0, draws, CHUNK):
            count = min(CHUNK, draws - start)
            members = np.zeros((count, self.size), dtype=np.float32)
            members[:, self.fixed] = 1
            for cells, of_a in self.blocks:
                checkpoint()
                np.put_along_axis(members, cells[random_subsets(len(cells), of_a, count, rng)], 1, axis=1)
            yield members.T


def random_subsets(size: int, chosen: int, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw `count` random subsets of `chosen` out of `size`, each without replacement: positions [count, chosen]."""
    if chosen == size:
        return np.tile(np.arange(size), (count, 1))
    # Taking the smallest random keys makes every subset equally likely. 64-bit keys, so that ties do not matter.
    return np.argpartition(rng.random((count, size)), chosen, axis=1)[:, :chosen]


@dataclass(frozen=True)
class Uniformity:
    """Kolmogorov-Smirnov test of p-values against the uniform distribution."""

    n: int
    statistic: float
    p: float


def uniformity(p: ArrayLike) -> Uniformity:
    """Test whether p-values are uniform (exact two-sided one-sample Kolmogorov-Smirnov)."""
    from scipy.stats import kstest

    values = np.asarray(p, dtype=np.float64)
    result = kstest(values, "uniform")
    return Uniformity(len(values), float(result.statistic), float(result.pvalue))


@dataclass(frozen=True)
class Correlation:
    """Correlation of two columns over the `n` rows that have both."""

    n: int
    pearson: float
    spearman: float


def correlation(a: ArrayLike, b: ArrayLike) -> Correlation:
    """Return Pearson's and Spearman's correlation, for example of distances with numbers of differential genes.

    Rows with NaN in either column are left out. Both are NaN if fewer than three rows remain or a column is constant.
    """
    from scipy.stats import rankdata

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    both = ~(np.isnan(x) | np.isnan(y))
    x, y = x[both], y[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(len(x), float("nan"), float("nan"))
    pearson = float(np.corrcoef(x, y)[0, 1])
    return Correlation(len(x), pearson, float(np.corrcoef(rankdata(x), rankdata(y))[0, 1]))
