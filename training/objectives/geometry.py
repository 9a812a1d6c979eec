"""The expression geometry: the position of each cell among the others of its data set, by its counts.

A loss that only pulls and pushes labelled groups keeps the differences between these groups and forgets all others: an
effect of a kind that it never saw disappears. The geometry is to be kept. Log-normalised expression is
reduced to principal components, fitted on the cells that are trained on, and every cell is scaled to unit length around
the mean cell, as scores scale their vectors. Two numbers shape it:

``power``
    Exponent of the variance of a component: 1 leaves principal components as they are, 0 whitens them. Below 1, cell
    cycle and other large variation that no perturbation causes no longer drown small effects.
``stretch``
    Stretch of the axes along which training perturbations differ. With b_j the eigenvalues of the between-perturbation
    covariance (less what sampling noise alone would give), axis j is scaled by sqrt(1 + stretch * b_j / max b).

The geometry of cells in a data set without perturbations is not stretched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from training.config.stages import GeometryConfig

_MIN_GENE_CELLS = 10
"""Fewest training cells that express a gene; a rarer one says nothing about other cells."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """A linear map from expression to the geometry.

    Attributes
    ----------
    genes
        Columns of the genes that take part, [g].
    mean
        Mean expression of these genes, [g].
    axes
        Matrix from expression to geometry, [g, K].
    """

    genes: NDArray[np.intp]
    mean: NDArray[np.float64]
    axes: NDArray[np.float64]

    def apply(self, expression: sparse.csr_matrix) -> NDArray[np.float32]:
        """Return the coordinates of cells: unit vectors around the mean of the training cells, float32 [n, K]."""
        measured = expression[:, self.genes]
        coordinates = np.asarray(measured @ self.axes - self.mean @ self.axes, dtype=np.float32)
        norms = np.linalg.norm(coordinates, axis=1, keepdims=True)
        unit: NDArray[np.float32] = coordinates / np.maximum(norms, np.float32(1e-12))
        return unit


def fit_geometry(
    expression: sparse.csr_matrix, classes: NDArray[np.int64] | None, config: GeometryConfig, *, seed: int = 0
) -> Geometry:
    """Fit the geometry of one data set.

    Parameters
    ----------
    expression
        Expression of the training cells, from :func:`training.data.sources.expression_of`, [n, n_genes].
    classes
        Class of each cell (its perturbation in its context), [n]; None for a data set without perturbations.
    config
        Components, power and stretch.
    seed
        Seed of the start vector of the decomposition.
    """
    from sklearn.decomposition import PCA

    genes = np.flatnonzero(expression.getnnz(axis=0) >= min(_MIN_GENE_CELLS, expression.shape[0]))
    measured = expression[:, genes]
    n_components = min(config.components, min(measured.shape) - 1)
    model = PCA(n_components=n_components, svd_solver="arpack", random_state=seed)
    scores = model.fit_transform(measured)
    axes = model.components_.T * model.explained_variance_ ** ((config.power - 1) / 2)
    scores = scores * model.explained_variance_ ** ((config.power - 1) / 2)
    if classes is not None and config.stretch and len(np.unique(classes)) > 1:
        axes = axes @ _stretch(scores, classes, config.stretch)
    return Geometry(genes, np.asarray(model.mean_, dtype=np.float64), axes)


def _stretch(scores: NDArray[np.floating], classes: NDArray[np.int64], stretch: float) -> NDArray[np.float64]:
    """Return the rotation to the axes between perturbations, scaled, [K, K]."""
    names, sizes = np.unique(classes, return_counts=True)
    groups = [scores[classes == name].astype(np.float64) for name in names]
    means = np.stack([group.mean(axis=0) for group in groups])
    within = sum(np.cov(group.T) * (len(group) - 1) for group in groups if len(group) > 1) / len(scores)
    between = np.cov(means.T) - within * np.mean(1 / sizes)
    values, vectors = np.linalg.eigh(between)
    values = np.maximum(values, 0)
    largest = values.max()
    scale = np.sqrt(1 + stretch * values / largest) if largest > 0 else np.ones_like(values)
    scaled: NDArray[np.float64] = vectors * scale
    return scaled
