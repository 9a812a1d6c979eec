from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from perturbscope.counts import CountMatrix
from perturbscope.errors import TooFewCellsError
from training.config import DegConfig
from training.degs import RankTester, count_degs, log_normalized


def values(n: int, rng: np.random.Generator, *, shift: float = 1.0) -> sparse.csr_matrix:
    """Log-normalised counts with many zeros and ties; column 0 is all zero, column 1 is constant."""
    rates = np.linspace(0.05, 6.0, 25) * shift
    counts = rng.poisson(rates, size=(n, 25)).astype(float)
    counts[:, 0] = 0
    counts[:, 1] = 2
    return sparse.csr_matrix(np.log1p(counts).astype(np.float32))


@pytest.mark.parametrize(("n", "m"), [(40, 90), (7, 300), (2, 3), (150, 20)])
@pytest.mark.parametrize("shift", [1.0, 1.6])
def test_equals_scipy(rng: np.random.Generator, n: int, m: int, shift: float) -> None:
    group, controls = values(n, rng, shift=shift), values(m, rng)
    dense, base = group.toarray().astype(np.float64), controls.toarray().astype(np.float64)
    mine = RankTester(controls).test(group)
    reference = stats.mannwhitneyu(dense, base, method="asymptotic", use_continuity=True)
    np.testing.assert_allclose(mine.u, reference.statistic)
    defined = np.isfinite(reference.pvalue) & (np.ptp(np.vstack([dense, base]), axis=0) > 0)
    np.testing.assert_allclose(mine.p[defined], reference.pvalue[defined], rtol=1e-9)
    assert (mine.p[~defined] == 1).all()


def test_degs_equal_a_count_by_scipy(rng: np.random.Generator) -> None:
    group, controls = values(80, rng, shift=1.5), values(200, rng)
    dense, base = group.toarray(), controls.toarray()
    tested = np.maximum((dense > 0).mean(0), (base > 0).mean(0)) >= 0.3
    tested[7] = False
    q = stats.false_discovery_control(stats.mannwhitneyu(dense, base, method="asymptotic").pvalue[tested])
    found = count_degs(RankTester(controls), group, DegConfig(min_expressed=0.3), target=7)
    assert found == int((q < 0.05).sum())
    assert found > 0


def test_the_target_and_small_changes_are_not_counted() -> None:
    rng = np.random.default_rng(1)
    controls = sparse.csr_matrix(np.log1p(rng.poisson(5.0, (100, 3))).astype(np.float32))
    group = sparse.csr_matrix(np.log1p(rng.poisson((5.0, 1.0, 2.5), (100, 3))).astype(np.float32))
    tester = RankTester(controls)
    everything = count_degs(tester, group, DegConfig())
    assert count_degs(tester, group, DegConfig(), target=1) == everything - 1
    assert count_degs(tester, group, DegConfig(exclude_target=False), target=1) == everything
    assert count_degs(tester, group, DegConfig(min_log2_fold_change=2.0)) == 1
    rare, silent = sparse.csr_matrix(np.pad(group.toarray(), ((0, 4000), (0, 0)))), sparse.csr_matrix((4000, 3))
    assert count_degs(RankTester(silent), rare, DegConfig(min_expressed=0.0)) == 3
    assert count_degs(RankTester(silent), rare, DegConfig()) == 0


def test_normalisation_uses_the_totals_given() -> None:
    cells = CountMatrix.from_matrix(np.array([[1, 3], [0, 5]]), ["A", "B"], totals=[100.0, 10.0])
    expected = np.log1p([[100.0, 300.0], [0.0, 5000.0]])
    np.testing.assert_allclose(log_normalized(cells).toarray(), expected, rtol=1e-6)


def test_empty_groups_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(TooFewCellsError, match="no control cells"):
        RankTester(values(0, rng))
    with pytest.raises(TooFewCellsError, match="without cells"):
        RankTester(values(5, rng)).test(values(0, rng))
