"""Distances against their definitions, written out as plain loops and as published elsewhere."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group, wasserstein_distance

from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, SolverError, TooFewCellsError
from perturbscope.scoring.distances import check_rows, e_distance, pairwise_distances, unit_rows
from perturbscope.scoring.optimal_transport import assignment_cost, transport_cost, wasserstein

DISTANCES = ["euclidean", "sqeuclidean", "cosine"]


@pytest.fixture
def groups(rng):
    return rng.normal(size=(40, 6)), rng.normal(size=(55, 6)) * 1.2 + 0.3


def by_loops(x, y, distance, estimator):
    """2 A - B - C with every pair visited."""

    def d(a, b):
        if distance == "cosine":
            return 1 - sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5)
        squared = sum((a - b) ** 2)
        return squared if distance == "sqeuclidean" else squared**0.5

    def within(group):
        n = len(group)
        total = sum(d(group[i], group[j]) for i in range(n) for j in range(n) if i != j)
        return total / (n * (n - 1) if estimator == "U" else n * n)

    across = sum(d(a, b) for a in x for b in y) / (len(x) * len(y))
    return 2 * across - within(x) - within(y)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("estimator", ["U", "V"])
def test_e_distance_is_its_definition(rng, distance, estimator):
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(13, 4)) + 0.5
    assert e_distance(x, y, distance=distance, estimator=estimator) == pytest.approx(
        by_loops(x, y, distance, estimator), rel=1e-10
    )


def test_e_distance_worked_by_hand():
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])
    # across: (1 + 5 + 1 + 3) / 4 = 2.5; within V: 4/4 = 1 and 8/4 = 2; within U: 2 and 4
    assert e_distance(x, y, estimator="V") == pytest.approx(5 - 1 - 2)
    assert e_distance(x, y, estimator="U") == pytest.approx(5 - 2 - 4)


def test_published_definitions_disagree_and_ours_names_each(groups):
    x, y = groups

    def scperturb(x, y):
        """Peidli et al. 2024, `edist`: squared Euclidean, within-terms corrected by n / (n - 1)."""
        n, m = len(x), len(y)
        sigma_x = cdist(x, x, "sqeuclidean").mean() * n / (n - 1)
        sigma_y = cdist(y, y, "sqeuclidean").mean() * m / (m - 1)
        return 2 * cdist(x, y, "sqeuclidean").mean() - sigma_x - sigma_y

    def pertpy(x, y):
        """`Edistance`: Euclidean, pairs of different cells."""
        n, m = len(x), len(y)
        return 2 * cdist(x, y).mean() - cdist(x, x).sum() / (n * (n - 1)) - cdist(y, y).sum() / (m * (m - 1))

    assert e_distance(x, y, distance="sqeuclidean") == pytest.approx(scperturb(x, y))
    assert e_distance(x, y) == pytest.approx(pertpy(x, y))
    assert abs(scperturb(x, y) - pertpy(x, y)) > 0.1


def test_squared_e_distance_is_twice_the_squared_shift_of_the_mean(groups):
    x, y = groups
    shift = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum()
    assert e_distance(x, y, distance="sqeuclidean", estimator="V") == pytest.approx(2 * shift, rel=1e-12)


def test_cosine_e_distance_is_the_squared_shift_of_the_mean_direction(groups):
    x, y = groups
    shift = ((unit_rows(x).mean(axis=0) - unit_rows(y).mean(axis=0)) ** 2).sum()
    assert e_distance(x, y, distance="cosine", estimator="V") == pytest.approx(shift, rel=1e-11)
    squared = e_distance(unit_rows(x), unit_rows(y), distance="sqeuclidean")
    assert e_distance(x, y, distance="cosine") == pytest.approx(squared / 2, rel=1e-11)


def test_only_the_unsquared_distance_sees_a_change_of_spread(rng):
    x = rng.normal(size=(400, 3))
    x -= x.mean(axis=0)
    assert e_distance(x, 3 * x, distance="sqeuclidean", estimator="V") == pytest.approx(0, abs=1e-12)
    assert e_distance(x, 3 * x, estimator="V") > 0.5


@pytest.mark.parametrize("distance", DISTANCES)
def test_axioms(groups, distance):
    x, y = groups
    assert e_distance(x, x, distance=distance, estimator="V") == pytest.approx(0, abs=1e-12)
    assert e_distance(x, y, distance=distance, estimator="V") > 0
    for estimator in ("U", "V"):
        there = e_distance(x, y, distance=distance, estimator=estimator)
        assert there == pytest.approx(e_distance(y, x, distance=distance, estimator=estimator), rel=1e-12)
    assert e_distance(x, y, distance=distance) < e_distance(x, y, distance=distance, estimator="V")


def test_root_of_the_v_statistic_is_a_metric(rng):
    for _ in range(20):
        a, b, c = (rng.normal(size=(8, 3)) + rng.normal(size=3) for _ in range(3))
        ab, bc, ac = (e_distance(*pair, estimator="V") ** 0.5 for pair in ((a, b), (b, c), (a, c)))
        assert ac <= ab + bc + 1e-12


def test_u_estimator_is_unbiased_and_may_be_negative(rng):
    values = [e_distance(*rng.normal(size=(2, 12, 3))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert min(values) < 0
    biased = [e_distance(*rng.normal(size=(2, 12, 3)), estimator="V") for _ in range(100)]
    assert np.mean(biased) > 0.2


def test_invariance_to_rotation_translation_and_scale_of_rows(groups, rng):
    x, y = groups
    turn, move = ortho_group.rvs(6, random_state=1), rng.normal(size=6) * 50
    for function in (e_distance, wasserstein):
        assert function(x @ turn + move, y @ turn + move) == pytest.approx(function(x, y), rel=1e-5)
    scale_x, scale_y = rng.uniform(0.1, 10, size=(40, 1)), rng.uniform(0.1, 10, size=(55, 1))
    scaled = e_distance(x * scale_x, y * scale_y, distance="cosine")
    assert scaled == pytest.approx(e_distance(x, y, distance="cosine"), rel=1e-10)


def test_order_of_cells_does_not_matter(groups, rng):
    x, y = groups
    assert e_distance(rng.permutation(x), y) == pytest.approx(e_distance(x, y), rel=1e-12)
    assert wasserstein(rng.permutation(x), y) == pytest.approx(wasserstein(x, y), rel=1e-7)


@pytest.mark.parametrize("distance", DISTANCES)
def test_pairwise_matches_scipy_and_equal_rows_are_at_zero(rng, distance, monkeypatch):
    monkeypatch.setattr("perturbscope.scoring.distances.TILE_VALUES", 100)  # several tiles
    x = np.vstack([rng.normal(size=(30, 5)), np.zeros((0, 5))]) + 1000 * (distance != "cosine")
    y = np.vstack([x[:3], rng.normal(size=(17, 5)) + 1000 * (distance != "cosine")])
    found = pairwise_distances(x, y, distance=distance)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, cdist(x, y, distance), rtol=1e-4, atol=1e-6)
    assert (found[[0, 1, 2], [0, 1, 2]] == 0).all()
    assert (np.diag(pairwise_distances(x, distance=distance)) == 0).all()


def test_wasserstein_of_equal_sizes_is_the_linear_assignment(rng):
    x, y = rng.normal(size=(2, 60, 8))
    cost = cdist(x, y)
    rows, columns = linear_sum_assignment(cost)
    assert wasserstein(x, y) == pytest.approx(cost[rows, columns].mean(), rel=1e-6)
    assert assignment_cost(cost) == pytest.approx(transport_cost(cost), rel=1e-12)


def test_wasserstein_in_one_dimension_is_the_area_between_the_distributions(rng):
    x, y = rng.normal(size=(31, 1)), rng.exponential(size=(47, 1))
    assert wasserstein(x, y) == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-6)


def test_wasserstein_of_a_shift_is_its_length(rng):
    x = rng.normal(size=(25, 4))
    assert wasserstein(x, x + np.array([3.0, 0, 4.0, 0])) == pytest.approx(5, rel=1e-6)
    assert wasserstein(x, x) == pytest.approx(0, abs=1e-12)


def test_wasserstein_samples_large_groups_by_seed(rng):
    x, y = rng.normal(size=(80, 3)), rng.normal(size=(30, 3))
    sampled = wasserstein(x, y, max_cells=40, seed=1)
    assert sampled == wasserstein(x, y, max_cells=40, seed=1)
    assert sampled != wasserstein(x, y, max_cells=40, seed=2)
    assert sampled != wasserstein(x, y)


def test_solver_that_stops_early_raises_instead_of_giving_a_number(rng):
    cost = cdist(*rng.normal(size=(2, 50, 3)))
    with pytest.raises(SolverError, match="3 iterations"):
        transport_cost(cost, max_iterations=3)


def test_transport_imports_no_array_library_and_leaves_the_environment_alone():
    code = (
        "import os, sys, numpy as np; before = dict(os.environ); "
        "from perturbscope.scoring.optimal_transport import wasserstein; "
        "assert 'ot' not in sys.modules; wasserstein(np.eye(3), np.eye(3)); assert dict(os.environ) == before; "
        "print([m for m in ('torch', 'jax', 'tensorflow', 'cupy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_bad_input_names_the_row(groups):
    x, y = groups
    bad = x.copy()
    bad[7, 2] = np.nan
    with pytest.raises(InvalidEmbeddingError, match="Row 7 of x"):
        e_distance(bad, y)
    bad[7] = 0
    with pytest.raises(InvalidEmbeddingError, match="Row 7 of x is all zero"):
        e_distance(bad, y, distance="cosine")
    with pytest.raises(InvalidEmbeddingError, match="6 dimensions"):
        wasserstein(x, y[:, :3])
    for value in ([["a"]], np.zeros(3), np.zeros((0, 3)), [[1.0], [1.0, 2.0]]):
        with pytest.raises(InvalidEmbeddingError):
            check_rows(value)


def test_bad_parameters(groups):
    x, y = groups
    with pytest.raises(TooFewCellsError):
        e_distance(x[:1], y)
    assert e_distance(x[:1], y, estimator="V") > 0
    with pytest.raises(InvalidParameterError, match="estimator"):
        e_distance(x, y, estimator="W")
    with pytest.raises(InvalidParameterError, match="distance"):
        e_distance(x, y, distance="manhattan")


def test_unit_rows_survive_extreme_values():
    rows = unit_rows(np.array([[3e200, 4e200], [3e-200, 4e-200]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.6, 0.8]])
