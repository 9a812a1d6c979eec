"""Embeddings that need no foundation model: expression of highly variable genes, and principal components."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError

LOESS_SPAN = 0.3
"""Share of the genes in each local fit of the variance, as in Seurat v3."""


def log_cp10k(cells: CountMatrix) -> sparse.csr_matrix:
    """Return log(1 + counts per 10,000), sparse float32 [n_cells, n_genes]; totals over all measured genes."""
    scaled = sparse.diags(1e4 / cells.totals) @ cells.counts
    normalised = sparse.csr_matrix(scaled, dtype=np.float32)
    np.log1p(normalised.data, out=normalised.data)
    return normalised


def pca(cells: CountMatrix, *, n_components: int = 50, seed: int = 0) -> NDArray[np.float32]:
    """Compute principal components of log CP10k over all expressed genes, without scaling, as scanpy does.

    Returns
    -------
    float32 [n_cells, n_components]; fewer columns if cells or genes allow no more.
    """
    normalised = log_cp10k(cells)
    normalised = normalised[:, np.flatnonzero(normalised.getnnz(axis=0))]
    n_components = min(n_components, min(normalised.shape) - 1)
    model = PCA(n_components=n_components, svd_solver="arpack", random_state=seed)
    scores: NDArray[np.float32] = model.fit_transform(normalised).astype(np.float32)
    return scores


def normalised_variance(cells: CountMatrix) -> NDArray[np.float64]:
    """Return each gene's variance of counts, standardised by the variance that its mean predicts, float64 [n_genes].

    This is the measure of Seurat v3 (Stuart et al. 2019): log10 of the variance is fitted to log10 of the mean by a
    local regression of degree 2; standardised counts are clipped at the square root of the number of cells.
    """
    from skmisc.loess import loess

    counts = sparse.csc_matrix(cells.counts, dtype=np.float64)
    n = counts.shape[0]
    if n < 2:
        raise InvalidParameterError("Highly variable genes need two cells or more.", field="cells")
    sums = np.asarray(counts.sum(axis=0)).ravel()
    squares = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
    # Sums of whole numbers, so that a constant gene has variance 0 and not a rounding error.
    mean, variance = sums / n, (n * squares - sums**2) / (n * (n - 1))
    varies = variance > 0
    standardised = np.zeros(len(mean))
    if np.count_nonzero(varies) < 10:
        raise InvalidParameterError(
            f"{np.count_nonzero(varies)} genes vary; the mean-variance trend needs 10 or more.", field="cells"
        )
    trend = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=LOESS_SPAN, degree=2)
    trend.fit()
    sd = np.ones(len(mean))
    sd[varies] = np.sqrt(10**trend.outputs.fitted_values)
    column = np.repeat(np.arange(len(mean)), np.diff(counts.indptr))
    clipped = np.minimum(counts.data, (mean + sd * np.sqrt(n))[column])
    total = np.bincount(column, clipped, minlength=len(mean))
    total_squares = np.bincount(column, clipped**2, minlength=len(mean))
    standardised[varies] = ((n * mean**2 + total_squares - 2 * mean * total) / ((n - 1) * sd**2))[varies]
    return standardised


def highly_variable(cells: CountMatrix, n_genes: int = 300) -> NDArray[np.intp]:
    """Return the columns of the genes with the largest normalised variance, ascending; all if there are fewer.

    Ties are broken by the order of the columns.
    """
    order = np.argsort(-normalised_variance(cells), kind="stable")
    return np.sort(order[:n_genes])


def hvg_expression(cells: CountMatrix, *, n_genes: int = 300) -> tuple[NDArray[np.float32], int]:
    """Return log CP10k of the most variable genes.

    A cell that expresses none of these genes has no direction. It gets the mean vector of the others, which is evidence
    neither for nor against an effect.

    Returns
    -------
    float32 [n_cells, n_genes], and the number of cells that got the mean.

    Raises
    ------
    InvalidParameterError
        There are fewer than two cells, or fewer than ten genes vary.
    """
    values: NDArray[np.float32] = log_cp10k(cells)[:, highly_variable(cells, n_genes)].toarray()
    silent = ~values.any(axis=1)
    if silent.any():
        values[silent] = values[~silent].mean(axis=0)
    return values, int(silent.sum())
