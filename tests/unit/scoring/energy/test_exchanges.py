"""The closed-form null holds for every exchange, and sequential exchanges count as Besag and Clifford do."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.exchanges import EnergyTest, EnergyTests
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.pool import Group, Pool
from perturbscope.scoring.statistics import Exchange


def group(kind: str, rows: NDArray[np.float64]) -> Group:
    zero = np.zeros(rows.shape[1])
    return DenseGroup(rows, zero) if kind == "dense" else LinearGroup(rows, 2.0, zero)


def everything(codes: NDArray[np.intp], marked: NDArray[np.intp]) -> NDArray[np.float32]:
    """Every exchange within batches, by plain enumeration."""
    parts = [combinations(np.flatnonzero(codes == code).tolist(), k) for code, k in enumerate(marked)]
    columns = []
    for picked in product(*parts):
        column = np.zeros(len(codes), dtype=np.float32)
        column[[cell for part in picked for cell in part]] = 1
        columns.append(column)
    return np.array(columns).T


@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.parametrize("estimator", ["U", "V"])
@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ([0, 0, 1, 1, 2], [0, 1, 1, 2, 2, 3]),
        ([2, 0, 0, 0], [2, 1, 0, 2, 2, 1]),
        ([1, 0], [0, 0, 1, 1]),
    ],
    ids=["one", "four", "unsorted", "pairs"],
)
def test_mean_and_sd_are_those_of_all_exchanges(kind: str, estimator: Any, of_a: Any, of_b: Any) -> None:
    a, b = np.array(of_a), np.array(of_b)
    rows = np.random.default_rng(0).normal(size=(len(a) + len(b), 3))
    pool = Pool(group(kind, rows[: len(a)]), group(kind, rows[len(a) :]), estimator)
    codes = np.concatenate([a, b])
    columns = everything(codes, np.bincount(a, minlength=4))
    values = pool.split(columns)
    mean, sd = pool.moments(a, b, 4)
    assert mean == pytest.approx(values.mean(), abs=1e-6)
    assert sd == pytest.approx(values.std(), rel=1e-5)
    if not codes.any():
        assert pool.moments() == pytest.approx((mean, sd), abs=1e-9)
    every = Exchange.of(len(a), len(b), codes).every()
    assert {column.tobytes() for column in every.T} == {column.tobytes() for column in columns.T}
    assert every.shape == columns.shape


def test_a_test_ends_at_the_exceedance_that_was_asked_for() -> None:
    test = EnergyTest(np.arange(3), None, observed=1.0, noise=0.0)
    test.count(np.array([0.0, 1.0, 0.5, 2.0]), 3)
    assert (test.exceeding, test.draws, test.source, test.p) == (2, 4, "", 3 / 5)
    test.count(np.array([0.0, 0.0, 3.0, 3.0]), 3)
    assert (test.exceeding, test.draws, test.source, test.p) == (3, 7, "sequential", 3 / 7)


def run_of(
    count: int, shifted: int, permutations: int | None, exceedances: int
) -> tuple[EnergyTests, list[EnergyTest]]:
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(60 + count * 12, 4))
    rows[60 : 60 + shifted * 12] += 3
    controls = group("dense", rows[:60])
    tests = [EnergyTest(np.arange(60 + 12 * i, 72 + 12 * i), None) for i in range(count)]

    def pool(cells: NDArray[np.intp]) -> Pool:
        return Pool(group("dense", rows[cells]), controls, "U")

    run = EnergyTests(controls, None, 1, pool, permutations=permutations, exceedances=exceedances, seed=3)
    run.run(tests)
    return run, tests


def test_exchanges_go_to_those_whose_p_is_small() -> None:
    run, tests = run_of(count=30, shifted=2, permutations=None, exceedances=20)
    assert [test.source for test in tests[:2]] == ["exchanges"] * 2
    assert all(test.draws >= 200 * 30 / 4 for test in tests[:2])  # at most two more are open
    assert np.median([test.draws for test in tests[2:]]) < 200
    # p is that of all draws, up to its own randomness.
    _, full = run_of(count=30, shifted=2, permutations=4000, exceedances=0)
    assert all(test.draws == 4000 for test in full)
    for one, other in zip(tests, full, strict=True):
        assert one.p == pytest.approx(other.p, abs=5 * np.sqrt(other.p / max(one.draws, 1)) + 1e-3)
    assert run.limit(10_000, 50) == 40_000
    assert run.limit(10_000, 10_000) == 1000
    assert run.limit(10_000, 1) == 200_000


def test_sequential_p_of_nothing_is_uniform() -> None:
    p = np.array([test.p for test in run_of(count=400, shifted=0, permutations=400, exceedances=20)[1]])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.1)  # they share their controls
