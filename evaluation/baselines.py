"""Embeddings that need no foundation model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA

from perturbscope.counts import CountMatrix


def log_cp10k(cells: CountMatrix) -> sparse.csr_matrix:
    """log(1 + counts per 10,000), sparse float32 [n_cells, n_genes]; totals over all measured genes."""
    scaled = sparse.diags(1e4 / cells.totals) @ cells.counts
    normalised = sparse.csr_matrix(scaled, dtype=np.float32)
    np.log1p(normalised.data, out=normalised.data)
    return normalised


def pca(cells: CountMatrix, *, n_components: int = 50, seed: int = 0) -> NDArray[np.float32]:
    """Principal components of log CP10k over all expressed genes, without scaling, as scanpy computes them.

    Returns
    -------
    float32 [n_cells, n_components]; fewer columns where cells or genes allow no more.
    """
    normalised = log_cp10k(cells)
    normalised = normalised[:, np.flatnonzero(normalised.getnnz(axis=0))]
    n_components = min(n_components, min(normalised.shape) - 1)
    model = PCA(n_components=n_components, svd_solver="arpack", random_state=seed)
    scores: NDArray[np.float32] = model.fit_transform(normalised).astype(np.float32)
    return scores
