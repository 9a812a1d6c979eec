"""The closed-form null and the quadratic forms against plain enumeration."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from perturbscope.scoring.distances import e_distance, unit_rows
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.pool import Pool, moments_of, null_moments

KINDS = ["euclidean", "sqeuclidean", "cosine"]


def make(rows, kind, origin=0.0):
    if kind == "euclidean":
        return DenseGroup(rows)
    return LinearGroup(unit_rows(rows), 1.0, origin) if kind == "cosine" else LinearGroup(rows, 2.0, origin)


def matrix(rows, kind):
    return cdist(rows, rows, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["U", "V"])
def test_pool_gives_the_number_of_e_distance_on_every_route(rng, kind, estimator):
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(20, 4)) + 0.4
    both = np.vstack([x, y])
    pool = Pool(make(x, kind), make(y, kind), estimator)
    direct = e_distance(x, y, distance=kind, estimator=estimator)
    assert pool.observed == pytest.approx(direct, abs=1e-6)
    members = np.zeros((32, 3), dtype=np.float32)
    members[:12, 0] = 1
    members[rng.choice(32, 12, replace=False), 1] = 1
    members[20:, 2] = 1
    expected = [
        e_distance(both[column > 0], both[column == 0], distance=kind, estimator=estimator) for column in members.T
    ]
    np.testing.assert_allclose(pool.split(members), expected, atol=2e-6)
    samples = np.array([np.arange(9), np.arange(5, 14)])
    expected = [e_distance(x, y[sample], distance=kind, estimator=estimator) for sample in samples]
    np.testing.assert_allclose(pool.sampled(samples), expected, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_row_sums_and_moments_of_both_kinds_of_group(rng, kind):
    rows = rng.normal(size=(15, 4)) + 2
    group, d = make(rows, kind, rng.normal(size=4)), matrix(rows, kind)
    np.testing.assert_allclose(group.row_sums, d.sum(axis=1), rtol=1e-5)
    found = moments_of(group)
    # Unbiased moments by enumeration of different cells.
    n = len(d)
    same = np.mean([d[i, j] ** 2 for i in range(n) for j in range(n) if i != j])
    sharing = np.mean([d[i, j] * d[i, k] for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3])
    apart = np.mean(
        [
            d[i, j] * d[k, m]
            for i in range(n)
            for j in range(n)
            for k in range(n)
            for m in range(n)
            if len({i, j, k, m}) == 4
        ]
    )
    assert found.mean == pytest.approx(d.sum() / (n * (n - 1)), rel=1e-6)
    assert found.var_g == pytest.approx(max(sharing - apart, 0), rel=1e-4, abs=1e-7)
    assert found.var_k == pytest.approx(same - 2 * sharing + apart, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 4), (4, 4)])
def test_u_null_is_exactly_that_of_all_pairs_of_disjoint_groups(rng, kind, n, m):
    controls = rng.normal(size=(8, 3))
    values = [
        e_distance(controls[list(x)], controls[list(y)], distance=kind)
        for x in combinations(range(8), n)
        for y in combinations(sorted(set(range(8)) - set(x)), m)
    ]
    mean, sd = null_moments(moments_of(make(controls, kind)), n, m, pool=m, repeats=1, estimator="U")
    assert np.mean(values) == pytest.approx(mean, abs=1e-7)
    assert np.std(values) == pytest.approx(sd, rel=1e-4)


@pytest.mark.parametrize("estimator", ["U", "V"])
@pytest.mark.parametrize(
    ("n", "m", "pool", "repeats"), [(20, 20, 60, 1), (20, 20, 60, 10), (30, 20, 20, 5), (9, 9, 200, 4)]
)
def test_null_of_averaged_distances_holds_for_fresh_cells(rng, estimator, n, m, pool, repeats):
    moments = moments_of(DenseGroup(rng.standard_t(6, size=(1500, 3))))
    mean, sd = null_moments(moments, n, m, pool=pool, repeats=repeats, estimator=estimator)
    values = []
    for _ in range(1500):
        x, controls = rng.standard_t(6, size=(n, 3)), rng.standard_t(6, size=(pool, 3))
        samples = np.array([np.sort(rng.choice(pool, m, replace=False)) for _ in range(repeats)])
        values.append(Pool(DenseGroup(x), DenseGroup(controls), estimator).sampled(samples).mean())
    assert np.mean(values) == pytest.approx(mean, abs=4 * sd / 1500**0.5 + 0.02 * mean)
    assert np.std(values) == pytest.approx(sd, rel=0.1)


def test_a_single_draw_null_would_be_too_wide_for_an_averaged_distance(rng):
    moments = moments_of(DenseGroup(rng.normal(size=(200, 5))))
    one, many = (null_moments(moments, 30, 30, pool=1000, repeats=r, estimator="U")[1] for r in (1, 1000))
    assert one / many == pytest.approx(2, rel=0.05)


def test_constant_controls_have_no_spread():
    rows = np.full((30, 4), 0.3, dtype=np.float32).astype(float)
    for kind in KINDS:
        moments = moments_of(make(rows, kind))
        assert null_moments(moments, 5, 5, pool=25, repeats=3, estimator="U") == (0.0, 0.0)
