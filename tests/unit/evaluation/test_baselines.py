"""Baselines against the packages that define them."""

import warnings

import numpy as np
import pytest

from evaluation.baselines import highly_variable, hvg_expression, log_cp10k, normalised_variance, pca
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError


def matrix(counts):
    return CountMatrix.from_matrix(counts, [f"g{i}" for i in range(np.shape(counts)[1])])


@pytest.fixture
def cells(rng):
    return matrix(rng.poisson(3.0, (60, 30)) + np.eye(60, 30, dtype=int))


@pytest.fixture
def skewed(rng):
    """400 cells x 200 genes of widely different means and dispersions, a few without any count."""
    rates = rng.gamma(0.3, 4.0, size=200) * rng.gamma(rng.uniform(0.3, 5.0, size=200), size=(400, 200))
    counts = rng.poisson(rates)
    counts[:, :3] = 0
    counts[:, 3] = 1
    return matrix(counts)


def test_log_cp10k_uses_the_totals_of_all_measured_genes():
    cells = CountMatrix.from_matrix([[1, 3], [0, 2]], ["A", "B"], totals=[10, 2])
    np.testing.assert_allclose(log_cp10k(cells).toarray(), np.log1p([[1000, 3000], [0, 10_000]]), rtol=1e-6)


def test_pca_equals_the_singular_value_decomposition_of_centred_values(cells):
    scores = pca(cells, n_components=5)
    centred = log_cp10k(cells).toarray() - log_cp10k(cells).toarray().mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :5] * values[:5]), atol=1e-3)


def test_pca_takes_as_many_components_as_there_are(cells):
    assert pca(cells, n_components=500).shape == (60, 29)


def test_variable_genes_are_those_of_scanpy(skewed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anndata
        import scanpy

        table = scanpy.pp.highly_variable_genes(
            anndata.AnnData(skewed.counts.astype(np.float32)), flavor="seurat_v3", n_top_genes=50, inplace=False
        )
    np.testing.assert_allclose(normalised_variance(skewed), table["variances_norm"].to_numpy(), rtol=1e-6)
    np.testing.assert_array_equal(highly_variable(skewed, 50), np.flatnonzero(table["highly_variable"]))


def test_a_cell_without_variable_genes_gets_the_mean_of_the_others(skewed):
    counts = skewed.counts.toarray()
    counts[5] = np.arange(200) == 3  # a gene that does not vary
    lacking = matrix(counts)
    values, n_silent = hvg_expression(lacking, n_genes=20)
    assert n_silent == 1
    assert values.shape == (400, 20)
    np.testing.assert_allclose(values[5], np.delete(values, 5, axis=0).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(values[6], log_cp10k(lacking).toarray()[6, highly_variable(lacking, 20)])


def test_more_genes_than_there_are_means_all_of_them(cells):
    assert hvg_expression(cells, n_genes=300)[0].shape == (60, 30)


def test_too_little_to_fit_a_trend_is_an_error():
    with pytest.raises(InvalidParameterError, match="10 or more"):
        normalised_variance(matrix(np.eye(4, dtype=int) + 1))
