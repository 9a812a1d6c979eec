from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import sparse, stats

from perturbscope.analysis.rank_test import RankTester, log_normalized
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, TooFewCellsError
from tests.unit.analysis.test_degs import values


@pytest.mark.parametrize(("n", "m"), [(40, 90), (7, 300), (2, 3), (150, 20)])
@pytest.mark.parametrize("shift", [1.0, 1.6])
def test_equals_scipy(rng: np.random.Generator, n: int, m: int, shift: float) -> None:
    group, controls = values(n, rng, shift=shift), values(m, rng)
    dense, base = group.toarray().astype(np.float64), controls.toarray().astype(np.float64)
    mine = RankTester(controls).test(group)
    reference = stats.mannwhitneyu(dense, base, method="asymptotic", use_continuity=False)
    defined = np.isfinite(reference.pvalue) & (np.ptp(np.vstack([dense, base]), axis=0) > 0)
    np.testing.assert_allclose(mine.p_normal[defined], reference.pvalue[defined], rtol=1e-9)
    assert (np.sign(mine.statistic) == np.sign(reference.statistic - n * m / 2))[defined].all()
    assert (mine.p_normal[~defined] == 1).all()
    assert (mine.constant == ~defined).all()
    np.testing.assert_array_equal(mine.p[~mine.from_exchanges], mine.p_normal[~mine.from_exchanges])


def test_equals_scanpy() -> None:
    """Scores and p of every fourth gene, as scanpy 1.11.5 gives them (wilcoxon, tie_correct)."""
    rng = np.random.default_rng(5)
    group, controls = values(60, rng, shift=1.5), values(200, rng)
    found = RankTester(controls).test(group)
    scores = [2.2605690956115723, 4.571311950683594, 3.903917074203491, 5.31998872756958, 5.070362091064453,
              6.605587005615234]  # fmt: skip
    p = [0.023785959068759528, 4.846798674203672e-06, 9.464826778126646e-05, 1.0377378316411411e-07,
         3.970594401444157e-07, 3.959456242192233e-11]  # fmt: skip
    np.testing.assert_allclose(found.statistic[2::4], scores, rtol=1e-6)
    np.testing.assert_allclose(found.p_normal[2::4], p, rtol=1e-5)


def _two_sided(observed: float, null: np.ndarray) -> float:
    return min(1.0, 2 * min((null >= observed - 1e-9).mean(), (null <= observed + 1e-9).mean()))


def test_sparse_genes_have_the_p_of_all_exchanges() -> None:
    """All 8,008 ways to call 6 of 16 cells the group's: one, two and three expressing cells, ties among them."""
    columns = np.zeros((16, 6), dtype=np.float32)
    columns[:1, 0] = 2
    columns[:2, 1] = [1, 2]
    columns[:3, 2] = [3, 1, 2]
    columns[[0, 1, 2, 9], 3] = [4, 3, 2, 1]
    columns[[0, 1, 2], 4] = 2
    columns[[0, 1, 2, 3, 4, 12], 5] = [1, 2, 3, 4, 6, 5]
    ways = np.array(list(combinations(range(16), 6)))
    ranks = stats.rankdata(columns, axis=0)
    true = [_two_sided(ranks[:6, gene].sum(), ranks[ways, gene].sum(axis=1)) for gene in range(6)]
    found = RankTester(sparse.csr_matrix(columns[6:])).test(sparse.csr_matrix(columns[:6]))
    chosen = found.from_exchanges
    assert chosen.sum() >= 3
    np.testing.assert_allclose(found.p[chosen], np.array(true)[chosen], rtol=0.12)


@pytest.mark.parametrize("batches", [1, 3])
def test_sparse_genes_have_the_p_of_random_exchanges(batches: int) -> None:
    """The normal p of the rarest genes is a hundred times too small; within batches, labels are exchanged there."""
    rng = np.random.default_rng(batches)
    n, m, genes, draws = 20, 400, 24, 20_000
    data = np.where(rng.random((n + m, genes)) < np.geomspace(0.01, 0.3, genes), rng.lognormal(size=(n + m, genes)), 0)
    batch = rng.integers(batches, size=n + m)
    # A few more cells of the group express each gene than by chance, so that p is small.
    for gene in range(genes):
        data[rng.choice(n, 2 + gene // 4, replace=False), gene] = rng.lognormal(size=2 + gene // 4)
    data = data.astype(np.float32)
    scores = np.zeros((n + m, genes))
    for name in range(batches):
        of = batch == name
        scores[of] = stats.rankdata(data[of], axis=0) / (of.sum() + 1)
    null = np.zeros((draws, genes))
    for draw in range(draws):
        order = np.arange(n + m)
        for name in range(batches):
            of = np.flatnonzero(batch == name)
            order[of] = rng.permutation(of)
        null[draw] = scores[order[:n]].sum(axis=0)
    true = np.array([_two_sided(scores[:n, gene].sum(), null[:, gene]) for gene in range(genes)])
    own = None if batches == 1 else batch
    found = RankTester(sparse.csr_matrix(data[n:]), None if own is None else own[n:]).test(
        sparse.csr_matrix(data[:n]), None if own is None else own[:n]
    )
    known = found.from_exchanges & (true * draws > 60)
    assert known.sum() >= 8
    assert np.abs(np.log2(found.p[known] / true[known])).max() < np.log2(1.5)
    assert (found.p_normal[known] / true[known]).min() < 0.3


def test_van_elteren_is_the_weighted_sum_of_the_batches(rng: np.random.Generator) -> None:
    group, controls = values(70, rng, shift=1.3), values(130, rng)
    own, theirs = rng.integers(3, size=70), rng.integers(3, size=130)
    found = RankTester(controls, theirs).test(group, own, exchanges=False)
    excess, variance = np.zeros(25), np.zeros(25)
    for batch in range(3):
        a, b = group[own == batch].toarray().astype(float), controls[theirs == batch].toarray().astype(float)
        n, m = len(a), len(b)
        both = np.vstack([a, b])
        ranks = stats.rankdata(both, axis=0)
        excess += (ranks[:n].sum(axis=0) - n * (n + m + 1) / 2) / (n + m + 1)
        variance += n * m / (n + m) * ranks.var(axis=0, ddof=1) / (n + m + 1) ** 2
    defined = variance > 1e-12
    np.testing.assert_allclose(found.statistic[defined], excess[defined] / np.sqrt(variance[defined]), rtol=1e-9)
    one = RankTester(controls, np.zeros(130)).test(group, np.zeros(70))
    np.testing.assert_allclose(one.p, RankTester(controls).test(group).p, rtol=1e-12)


def test_controls_are_weighted_as_the_group_is_divided() -> None:
    group = sparse.csr_matrix(np.log1p([[8.0], [8.0], [8.0], [2.0]]).astype(np.float32))
    controls = sparse.csr_matrix(np.log1p([[8.0], [2.0], [2.0], [2.0]]).astype(np.float32))
    found = RankTester(controls, ["x", "y", "y", "y"]).test(group, ["x", "x", "x", "y"])
    assert found.mean_control[0] == pytest.approx(0.75 * 8 + 0.25 * 2)
    assert found.log2_fold_change[0] == pytest.approx(0, abs=1e-6)
    assert found.constant[0]


def test_what_the_tester_refuses(rng: np.random.Generator) -> None:
    with pytest.raises(TooFewCellsError, match="no control cells"):
        RankTester(values(0, rng))
    with pytest.raises(TooFewCellsError, match="without cells"):
        RankTester(values(5, rng)).test(values(0, rng))
    within = RankTester(values(5, rng), ["a"] * 5)
    with pytest.raises(TooFewCellsError, match="in a batch with controls"):
        within.test(values(2, rng), ["b", "b"])
    with pytest.raises(InvalidParameterError, match="or of neither"):
        within.test(values(2, rng))
    with pytest.raises(InvalidParameterError, match="2 cells, but batches"):
        within.test(values(2, rng), ["b"])


def test_normalisation_uses_the_totals_given() -> None:
    cells = CountMatrix.from_matrix(np.array([[1, 3], [0, 5]]), ["A", "B"], totals=[100.0, 10.0])
    expected = np.log1p([[100.0, 300.0], [0.0, 5000.0]])
    np.testing.assert_allclose(log_normalized(cells).toarray(), expected, rtol=1e-6)
