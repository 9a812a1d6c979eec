"""The expression geometry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tests.training_data import data_set, write_data_set
from training.config.stages import GeometryConfig, SourceConfig
from training.data.sources import expression_of, open_source
from training.objectives.geometry import fit_geometry


def cloud(n: int = 400, seed: int = 0) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """Ten genes: gene 0 varies most without a meaning, gene 1 varies little and tells two classes apart."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, n)
    values = rng.normal(0, 0.1, (n, 10)) + 2
    values[:, 0] += rng.normal(0, 1.0, n)
    values[:, 1] += 0.3 * classes
    return sparse.csr_matrix(values.astype(np.float32)), classes.astype(np.int64)


def share_between(coordinates: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Share of the variance that lies between the two classes."""
    means = [coordinates[classes == name].mean(axis=0) for name in (0, 1)]
    return float(((means[0] - means[1]) ** 2).sum() / 4 / coordinates.var(axis=0).sum())


def test_power_one_keeps_principal_components_and_power_zero_whitens() -> None:
    values, _ = cloud()
    dense = values.toarray() - values.toarray().mean(axis=0)
    left, singular, _ = np.linalg.svd(dense, full_matrices=False)
    for power in (1.0, 0.0):
        found = fit_geometry(values, None, GeometryConfig(components=5, power=power)).apply(values)
        expected = left[:, :5] * singular[:5] ** power
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        # Axes may point either way.
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-3)


def test_stretching_favours_the_axis_between_perturbations() -> None:
    values, classes = cloud()
    shares = []
    for stretch in (0.0, 3.0, 30.0):
        geometry = fit_geometry(values, classes, GeometryConfig(components=9, stretch=stretch))
        shares.append(share_between(geometry.apply(values), classes))
    assert shares[0] < shares[1] < shares[2]


def test_without_labels_nothing_is_stretched() -> None:
    values, _ = cloud()
    with_stretch = fit_geometry(values, None, GeometryConfig(components=5, stretch=9.0)).apply(values)
    without = fit_geometry(values, None, GeometryConfig(components=5, stretch=0.0)).apply(values)
    np.testing.assert_array_equal(with_stretch, without)


def test_no_axis_is_stretched_beyond_the_limit() -> None:
    """Labels without a meaning stretch an axis of noise, by no more than was asked for."""
    rng = np.random.default_rng(1)
    values = sparse.csr_matrix(rng.normal(2, 0.1, (2000, 10)).astype(np.float32))
    classes = rng.integers(0, 4, 2000)
    stretched = fit_geometry(values, classes, GeometryConfig(components=9, power=0.0, stretch=3.0)).apply(values)
    variances = np.linalg.eigvalsh(np.cov(stretched.T))
    assert 1.0 < variances.max() / np.median(variances) < 4.2


def test_expression_is_read_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write_data_set(tmp_path / "perturbed.h5ad")
    counts = data_set().X.toarray().astype(float)
    rows = np.array([5, 2, 90])
    with open_source(SourceConfig(path=str(path))) as cells:
        found = expression_of(cells, rows).toarray()
    expected = np.log1p(counts[rows] / counts[rows].sum(axis=1, keepdims=True) * 1e4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
