"""Distances and sums over subsets: against scipy, with nearly equal cells, and in another array library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.energy import matrix as module
from perturbscope.scoring.energy.matrix import Compute, DenseGroup, Points, Subsets, distances, sums, to_numpy
from perturbscope.scoring.energy.pool import Labels, Pool, moments_of
from perturbscope.scoring.results import ScoreOptions

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("tile", [1, 100, 2**18])
def test_distances_are_those_of_scipy(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    x, y = RNG.normal(size=(30, 7)), RNG.normal(size=(17, 7))
    np.testing.assert_allclose(distances(Points(x), Points(y)), cdist(x, y), rtol=1e-5)
    among = distances(Points(x))
    np.testing.assert_allclose(among, cdist(x, x), rtol=1e-5)
    assert (np.diag(among) == 0).all()
    some = np.array([3, 1, 20])
    np.testing.assert_array_equal(distances(Points(x).take(some), Points(y)), distances(Points(x[some]), Points(y)))


def test_near_and_equal_cells_keep_their_digits() -> None:
    x = RNG.normal(size=(20, 5))
    y = x + 1e-3 * RNG.normal(size=(20, 5))
    y[3] = x[8]
    found = distances(Points(x), Points(y))
    assert found[8, 3] == 0
    np.testing.assert_allclose(found, cdist(x, y), rtol=1e-4)
    assert (distances(Points(np.ones((6, 3)))) == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_sums_over_subsets(share: float) -> None:
    members = (RNG.random((50, 12)) < share).astype(np.float32)
    subsets, matrix = Subsets.of(members), RNG.random((50, 9)).astype(np.float32)
    assert subsets.sparse == (members.mean() < module.DENSE)
    np.testing.assert_array_equal(subsets.members, members)
    np.testing.assert_allclose(subsets.sums(matrix), members.T @ matrix, rtol=1e-5)
    rows = RNG.random((12, 50)).astype(np.float32)
    np.testing.assert_allclose(subsets.dots(rows), (members.T * rows).sum(axis=1), rtol=1e-6)


def test_another_array_library_gives_the_same_numbers() -> None:
    compute = Compute(torch.empty(0))
    x, y = RNG.normal(size=(40, 6)) + 0.3, RNG.normal(size=(90, 6))
    y[5] = x[0]
    members = (RNG.random((130, 25)) < 0.3).astype(np.float32)
    chosen = np.array([RNG.permutation(90)[:8] for _ in range(3)])
    found = {}
    for name, place in (("numpy", Compute()), ("torch", compute)):
        own, controls = (DenseGroup(rows, y.mean(axis=0), compute=place) for rows in (x, y))
        pool = Pool(own, controls, "U")
        labels = Labels.of(members[:40], members[40:], controls)
        found[name] = [
            pool.observed,
            *pool.exchanged(labels),
            *controls.inside(chosen),
            *controls.growing(chosen[:, :4]).ravel(),
            moments_of(controls).var_k,
        ]
        assert isinstance(own.matrix, torch.Tensor if name == "torch" else np.ndarray)
    np.testing.assert_allclose(found["torch"], found["numpy"], rtol=1e-5, atol=1e-6)
    assert to_numpy(distances(Points(x, compute), Points(y, compute)))[0, 5] == 0
    assert isinstance(sums(distances(Points(x, compute)), 0), np.ndarray)


@pytest.mark.parametrize("with_batches", [False, True])
def test_tensors_are_scored_as_arrays_are(with_batches: bool) -> None:
    labels = np.repeat(["control", "a", "b"], [90, 30, 40])
    values = RNG.normal(size=(160, 5)).astype(np.float32)
    values[120:] += 0.4
    batches = [str(i % 3) for i in range(160)] if with_batches else None
    options = ScoreOptions(permutations=60)
    tables = [
        score_perturbations(given, labels, control="control", batches=batches, options=options).table
        for given in (values, torch.from_numpy(values))
    ]
    numbers = ["distance", "null_mean", "null_sd", "z", "p", "q"]
    np.testing.assert_allclose(tables[1][numbers], tables[0][numbers], rtol=1e-5, atol=1e-6)
    assert list(tables[1]["perturbation"]) == list(tables[0]["perturbation"])
