"""Differentially expressed genes of each perturbation: the Mann-Whitney U test, all genes at once.

Two-sided, asymptotic, with tie and continuity correction, as ``scipy.stats.mannwhitneyu(method="asymptotic")``. A
screen has thousands of perturbations against the same controls, so the controls' non-zero values are sorted once; a
perturbation then costs a binary search for each of its own non-zero values. Zeros, most of the data, are only counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, special

from perturbscope.counts import CountMatrix
from perturbscope.errors import TooFewCellsError
from perturbscope.statistics import benjamini_hochberg
from training.config import DegConfig


def log_normalized(cells: CountMatrix) -> sparse.csr_matrix:
    """log(1 + counts per 10,000 of the cell's total), float32 [n_cells, n_genes]."""
    scale = np.repeat(10_000.0 / cells.totals, np.diff(cells.counts.indptr))
    return sparse.csr_matrix(
        (np.log1p(cells.counts.data * scale).astype(np.float32), cells.counts.indices, cells.counts.indptr),
        shape=cells.counts.shape,
    )


@dataclass(frozen=True)
class RankTest:
    """Mann-Whitney U of one group against the controls.

    Attributes
    ----------
    u
        U of the group, [n_genes].
    p
        Two-sided p, [n_genes]; 1 where all values are equal.
    expressed
        Larger share of cells, of the two groups, in which the gene is expressed, [n_genes].
    log2_fold_change
        Of the mean counts per 10,000 (plus 1e-9), group over controls, [n_genes].
    """

    u: NDArray[np.float64]
    p: NDArray[np.float64]
    expressed: NDArray[np.float64]
    log2_fold_change: NDArray[np.float64]


class RankTester:
    """Tests groups of cells against the same controls.

    Parameters
    ----------
    controls
        Non-negative values of the controls, [n_controls, n_genes].

    Raises
    ------
    TooFewCellsError
        There are no controls.
    """

    def __init__(self, controls: sparse.csr_matrix) -> None:
        self._n = int(controls.shape[0])
        self._n_genes = int(controls.shape[1])
        if self._n < 1:
            raise TooFewCellsError("There are no control cells to compare with.", field="control")
        keys = np.sort(_keys(controls))
        self._keys = keys
        genes = keys >> 32
        self._starts = np.searchsorted(genes, np.arange(self._n_genes + 1))
        self._nonzero = np.diff(self._starts)
        unique, counts = np.unique(keys, return_counts=True)
        self._ties = np.bincount(unique >> 32, weights=_tie(counts), minlength=self._n_genes)
        self._mean = _mean_counts(controls)

    def test(self, group: sparse.csr_matrix) -> RankTest:
        """Compare a group, [n_cells, n_genes], with the controls.

        Raises
        ------
        TooFewCellsError
            The group has no cells.
        """
        n, m = int(group.shape[0]), self._n
        if n < 1:
            raise TooFewCellsError("A perturbation without cells cannot be tested.", field="perturbation")
        unique, counts = np.unique(_keys(group), return_counts=True)
        genes = unique >> 32
        below = np.searchsorted(self._keys, unique, side="left")
        upto = np.searchsorted(self._keys, unique, side="right")
        zeros_m = m - self._nonzero
        nonzero_n = np.bincount(genes, weights=counts, minlength=self._n_genes)
        zeros_n = n - nonzero_n
        # A value beats the controls' zeros, the smaller non-zeros, and half of its equals.
        beaten = zeros_m[genes] + (below - self._starts[genes]) + (upto - below) / 2
        u = np.bincount(genes, weights=counts * beaten, minlength=self._n_genes) + zeros_n * zeros_m / 2
        equal = upto - below
        more_ties = np.bincount(genes, weights=_tie(counts + equal) - _tie(equal), minlength=self._n_genes)
        ties = self._ties + more_ties + _tie(zeros_n + zeros_m)
        total = n + m
        variance = n * m / 12 * ((total + 1) - ties / (total * (total - 1)))
        larger = np.maximum(u, n * m - u)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (larger - n * m / 2 - 0.5) / np.sqrt(variance)
        p = np.where(variance > 0, np.clip(2 * special.ndtr(-z), 0, 1), 1.0)
        fold = np.log2((_mean_counts(group) + 1e-9) / (self._mean + 1e-9))
        expressed = np.maximum(nonzero_n / n, self._nonzero / m)
        return RankTest(u, p, expressed, fold)


def count_degs(tester: RankTester, group: sparse.csr_matrix, config: DegConfig, *, target: int | None = None) -> int:
    """Differentially expressed genes of one perturbation.

    Parameters
    ----------
    tester
        Holds the controls.
    group
        Values of the perturbed cells, [n_cells, n_genes].
    config
        Thresholds.
    target
        Column of the perturbed gene, which is not counted if `config` says so.
    """
    result = tester.test(group)
    tested = result.expressed >= config.min_expressed
    if target is not None and config.exclude_target:
        tested[target] = False
    if not tested.any():
        return 0
    q = benjamini_hochberg(result.p[tested])
    changed = np.abs(result.log2_fold_change[tested]) >= config.min_log2_fold_change
    return int(((q < config.alpha) & changed).sum())


def _keys(values: sparse.csr_matrix) -> NDArray[np.int64]:
    """Each stored value as an integer that sorts by gene, then value: bits of positive floats sort as the floats do."""
    data = np.ascontiguousarray(values.data, dtype=np.float32)
    keys: NDArray[np.int64] = (values.indices.astype(np.int64) << 32) | data.view(np.int32).astype(np.int64)
    return keys[data > 0]


def _tie(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """t^3 - t."""
    t = counts.astype(np.float64)
    return t**3 - t


def _mean_counts(values: sparse.csr_matrix) -> NDArray[np.float64]:
    """Mean counts per 10,000 of log-normalised values."""
    totals = np.bincount(values.indices, weights=np.expm1(values.data.astype(np.float64)), minlength=values.shape[1])
    return totals / values.shape[0]
