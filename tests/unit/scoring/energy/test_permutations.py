"""Shared exchanges of labels are as random as independent draws, and the same for both ways of summing distances."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chisquare, ks_2samp

from perturbscope.scoring.energy import permutations
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.permutations import Permutations
from perturbscope.scoring.energy.pool import Group, Pool
from perturbscope.scoring.statistics import Exchange


def group(kind: str, n: int, seed: int, shift: float = 0.0) -> Group:
    rows = np.random.default_rng(seed).standard_normal((n, 4)) + shift
    return DenseGroup(rows) if kind == "dense" else LinearGroup(rows, 2.0, np.zeros(4))


KINDS = pytest.mark.parametrize("kind", ["dense", "linear"])


def null_of(shuffled: Permutations, pool: Pool) -> np.ndarray:
    return pool.exchanged(shuffled.labels(pool.a.size))


@KINDS
def test_the_null_is_that_of_independent_exchanges(kind: str) -> None:
    pool = Pool(group(kind, 30, 0, shift=0.5), group(kind, 80, 1), "U")
    rng = np.random.default_rng(2)
    own = np.concatenate([pool.split(members) for members in Exchange.of(30, 80).draw(3000, rng)])
    shared = null_of(Permutations(pool.b, 3000, 0), pool)
    assert ks_2samp(own, shared).pvalue > 0.01
    assert shared.std() > 0


@KINDS
def test_sums_over_growing_subsets_equal_direct_sums(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    controls = group(kind, 60, 1)
    pools = [Pool(group(kind, n, n, shift=0.3), controls, "V") for n in (7, 20, 59, 90)]
    grown, direct = Permutations(controls, 50, 3), Permutations(controls, 50, 3)
    first = [null_of(grown, pool) for pool in pools]
    monkeypatch.setattr(permutations, "MAX_DEPTH", 0)
    for pool, expected in zip(reversed(pools), reversed(first), strict=True):
        np.testing.assert_allclose(null_of(direct, pool), expected, atol=2e-6)


def test_sums_over_growing_subsets_come_when_they_have_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    controls = group("dense", 600, 1)
    shuffled, direct = Permutations(controls, 20, 3), Permutations(controls, 20, 3)
    monkeypatch.setattr(direct, "_grows", lambda *_: False)
    for n in range(3, 40):
        one, other = shuffled.labels(n), direct.labels(n)
        np.testing.assert_allclose(one.within_b, other.within_b, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(one.rows_b, other.rows_b, rtol=1e-9)
        assert n > 3 or not shuffled._within.size
    assert shuffled._within.size
    assert not direct._within.size


def test_labels_are_exchanges_of_the_pool_each_equally_likely() -> None:
    controls = group("dense", 4, 1)
    chosen = dict.fromkeys(combinations(range(7), 3), 0)
    labels = Permutations(controls, 7000, 5).labels(3)
    members = np.concatenate([labels.a.members, labels.b.members])
    assert (members.sum(axis=0) == 3).all()
    np.testing.assert_allclose(labels.rows_b, controls.row_sums @ labels.b.members, rtol=1e-6)
    np.testing.assert_allclose(labels.within_b, controls.within(controls.mark(labels.b.members)), rtol=1e-6)
    for column in members.T:
        chosen[tuple(np.flatnonzero(column).tolist())] += 1
    assert sum(chosen.values()) == 7000
    assert chisquare(list(chosen.values())).pvalue > 0.001


def test_draws_depend_on_the_size_and_the_seed_alone() -> None:
    controls = group("dense", 40, 1)
    once, after_others = Permutations(controls, 20, 0), Permutations(controls, 20, 0)
    for n in (30, 3, 12):
        after_others.labels(n)
    a, b = once.labels(12), after_others.labels(12)
    np.testing.assert_array_equal(a.a.members, b.a.members)
    np.testing.assert_array_equal(a.b.members, b.b.members)
    for other in (Permutations(controls, 20, 1), Permutations(controls, 20, 0, 1)):
        assert (other.labels(12).b.members != a.b.members).any()
