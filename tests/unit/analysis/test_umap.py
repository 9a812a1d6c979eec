"""The map of the cells: samples, neighbours, and UMAP itself."""

from __future__ import annotations

import numpy as np
import pytest

from perturbscope.analysis import umap
from perturbscope.analysis.umap import nearest, project, stratified_sample, umap_coordinates, umap_in_process
from perturbscope.errors import (
    InvalidEmbeddingError,
    InvalidParameterError,
    MalformedMatrixError,
    ProviderUnavailableError,
    TooFewCellsError,
)
from tests.reports import first_two


def test_two_clouds_are_two_clouds_and_the_seed_decides(rng):
    """UMAP itself, in a process of its own."""
    values = rng.normal(size=(60, 5)).astype(np.float32)
    values[30:, 0] += 40
    checks = []
    found = umap_in_process(values, n_neighbors=10, seed=3, check=lambda: checks.append(1))
    assert (found.shape, found.dtype) == ((60, 2), np.float32)
    assert np.isfinite(found).all()
    assert checks
    within = np.linalg.norm(found - nearest_mate(found), axis=1)
    assert np.linalg.norm(found[:30].mean(axis=0) - found[30:].mean(axis=0)) > 5 * within.max()


def nearest_mate(coordinates):
    """Return the nearest other cell of each cell."""
    return coordinates[nearest(coordinates, 2)[0][:, 1]]


@pytest.mark.parametrize("apart", [0, 50], ids=["one point", "clouds far apart"])
def test_a_graph_without_a_spectral_layout_gives_a_map_too(rng, apart):
    values = np.repeat([[0.0] * 5, [apart] * 5, [-apart] * 5], 30, axis=0) + (apart > 0) * rng.normal(size=(90, 5))
    found = umap_coordinates(values, seed=1)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, umap_coordinates(values, seed=1))
    if apart:
        clouds = found.reshape(3, 30, 2)
        centres = clouds.mean(axis=1)
        widest = np.linalg.norm(clouds - centres[:, None], axis=2).max()
        assert min(np.linalg.norm(centres[i] - centres[i - 1]) for i in range(3)) > 2 * widest


def test_who_waits_can_stop_it(rng):
    def gone():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        umap_in_process(rng.normal(size=(60, 5)), check=gone)


def test_what_the_process_says_is_said_here(rng):
    with pytest.raises(ProviderUnavailableError, match="more cells than neighbours: 9 cells, n_neighbors 15"):
        umap_in_process(rng.normal(size=(9, 5)))


def test_neighbours_are_exact_and_start_with_the_row_itself(rng, monkeypatch):
    monkeypatch.setattr(umap, "_ROWS", 7)
    values = rng.normal(size=(40, 3)).astype(np.float32)
    values[11] = values[5]
    rows, distances = nearest(values, 6)
    full = np.linalg.norm(values[:, None] - values[None], axis=2)
    assert rows[:, 0].tolist() == list(range(40))
    np.testing.assert_allclose(distances, np.sort(full, axis=1)[:, :6], atol=2e-3)
    assert rows[5, 1] == 11


def test_a_sample_keeps_small_groups_in_sight():
    labels = ["control"] * 5000 + ["large"] * 900 + ["small"] * 30
    rows = stratified_sample(labels, 300, seed=1)
    assert len(rows) <= 300
    assert len(rows) > 290
    assert (np.diff(rows) > 0).all()
    names, counts = np.unique(np.asarray(labels)[rows], return_counts=True)
    counts = dict(zip(names, counts, strict=True))
    assert counts["small"] == 30
    assert counts["control"] > counts["large"] > 50
    assert rows.tolist() == stratified_sample(labels, 300, seed=1).tolist()
    assert rows.tolist() != stratified_sample(labels, 300, seed=2).tolist()
    assert stratified_sample(labels[:10], 300).tolist() == list(range(10))


def test_a_projection_says_what_it_shows(rng):
    values = rng.normal(size=(50, 4))
    labels = ["a"] * 20 + ["b"] * 30
    found = project(values, labels, max_cells=20, seed=5, projector=first_two)
    assert found.labels == [labels[row] for row in found.rows]
    assert (found.provenance["n_cells"], found.provenance["n_shown"]) == (50, len(found.rows))
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    np.testing.assert_allclose(found.coordinates, unit[found.rows, :2], rtol=1e-5)
    assert list(found.to_frame().columns) == ["row", "perturbation", "umap1", "umap2"]
    plain = project(values, labels, normalize=False, projector=first_two)
    np.testing.assert_allclose(plain.coordinates, values[:, :2], rtol=1e-5)


def test_bad_input_is_named(rng, monkeypatch):
    values = rng.normal(size=(20, 3))
    with pytest.raises(MalformedMatrixError, match="20 cells, but 3 labels"):
        project(values, ["a"] * 3)
    with pytest.raises(InvalidEmbeddingError):
        project(np.full((20, 3), np.nan), ["a"] * 20)
    with pytest.raises(InvalidParameterError, match="max_cells is 0"):
        project(values, ["a"] * 20, max_cells=0)
    with pytest.raises(InvalidParameterError, match="n_neighbors is 1"):
        umap_coordinates(values, n_neighbors=1)
    with pytest.raises(InvalidParameterError, match="min_dist is 2"):
        umap_coordinates(values, min_dist=2)
    with pytest.raises(TooFewCellsError):
        umap_coordinates(values, n_neighbors=20)
    monkeypatch.setattr(umap, "is_available", lambda: False)
    with pytest.raises(ProviderUnavailableError, match=r"pip install 'perturbscope\[report\]'"):
        umap_coordinates(values)
