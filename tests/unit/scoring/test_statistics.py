from __future__ import annotations

from itertools import combinations
from math import comb, log

import numpy as np
import pytest
from scipy.stats import false_discovery_control, pearsonr, spearmanr

from perturbscope.scoring.statistics import (
    Exchange,
    benjamini_hochberg,
    bonferroni,
    correlation,
    empirical_p,
    generator,
    random_subsets,
    uniformity,
)


def test_empirical_p_counts_ties_and_itself():
    assert empirical_p(2.0, [1, 2, 3, 0]) == 3 / 5
    assert empirical_p(9.0, [1, 2, 3, 0]) == 1 / 5
    assert empirical_p(1.0, [1.0] * 9) == 1.0


def test_rounding_does_not_break_ties():
    assert empirical_p(0.1 + 0.2, [0.3], noise=1e-12) == 1.0
    assert empirical_p(0.1 + 0.2, [0.3]) == 0.5


def test_benjamini_hochberg_by_hand_and_against_scipy(rng):
    np.testing.assert_allclose(benjamini_hochberg([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5])
    p = rng.uniform(size=50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p))


def test_missing_p_values_stay_missing_and_are_not_counted():
    q = benjamini_hochberg([0.01, np.nan, 0.02])
    np.testing.assert_allclose(q, [0.02, np.nan, 0.02])
    np.testing.assert_allclose(bonferroni([0.01, np.nan, 0.6]), [0.02, np.nan, 1.0])
    assert np.isnan(benjamini_hochberg([np.nan])).all()


def test_random_subsets_are_subsets_and_uniform():
    drawn = random_subsets(5, 2, 20_000, np.random.default_rng(0))
    pairs = [frozenset(row) for row in drawn.tolist()]
    counts = [pairs.count(frozenset(pair)) for pair in combinations(range(5), 2)]
    assert sum(counts) == 20_000  # every row holds two different numbers
    assert max(abs(count - 2000) for count in counts) < 5 * 2000**0.5
    np.testing.assert_array_equal(random_subsets(3, 3, 2, np.random.default_rng(0)), [[0, 1, 2]] * 2)


def test_exchange_keeps_the_number_of_each_label(rng):
    members = np.concatenate(list(Exchange.of(7, 12).draw(600, rng)), axis=1)
    assert members.shape == (19, 600)
    assert (members.sum(axis=0) == 7).all()
    np.testing.assert_allclose(members.mean(axis=1), 7 / 19, atol=0.1)


def test_exchange_within_batches_keeps_each_batch(rng):
    batches = np.array(["x"] * 3 + ["y"] * 2 + ["lone"] + ["x"] * 4 + ["y"] * 5 + ["other"] * 2)
    exchange = Exchange.of(6, 11, batches)
    members = np.concatenate(list(exchange.draw(300, rng)), axis=1)
    assert (members[batches == "x"].sum(axis=0) == 3).all()
    assert (members[batches == "y"].sum(axis=0) == 2).all()
    assert (members[batches == "lone"] == 1).all()
    assert (members[batches == "other"] == 0).all()
    assert exchange.fixed.tolist() == [5]
    assert exchange.log_count == pytest.approx(log(comb(7, 3) * comb(7, 2)))


def test_exchange_of_confounded_batches_has_no_blocks():
    assert Exchange.of(2, 3, ["a", "a", "b", "b", "b"]).blocks == ()


def test_generators_are_named():
    assert generator(0, "a").random() == generator(0, "a").random()
    assert generator(0, "a").random() != generator(0, "b").random()
    assert generator(0, "a").random() != generator(1, "a").random()


def test_uniformity(rng):
    assert uniformity(rng.uniform(size=300)).p > 0.01
    assert uniformity(rng.uniform(size=300) ** 2).p < 1e-6


def test_correlation_of_distances_with_counts(rng):
    a = rng.normal(size=30)
    b = a**3 + rng.normal(size=30)
    found = correlation([*a, np.nan, 1.0], [*b, 1.0, np.nan])
    assert found.n == 30
    assert found.pearson == pytest.approx(pearsonr(a, b).statistic)
    assert found.spearman == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(correlation([1, 1, 1], [1, 2, 3]).pearson)
