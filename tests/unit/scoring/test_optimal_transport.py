"""Many transport problems at once have the costs of one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from perturbscope import threads
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, SolverError
from perturbscope.scoring.distances import assignment_cost, pairwise_distances, transport_cost, wasserstein
from perturbscope.scoring.optimal_transport import BATCH, SMALL, Pick, picked_costs, sliced_wasserstein


@pytest.fixture(scope="module")
def distances():
    return pairwise_distances(np.random.default_rng(0).standard_normal((250, 4)))


@pytest.mark.parametrize("size", [5, SMALL + 12])
@pytest.mark.parametrize("cores", [1, 3])
def test_they_come_in_order_whatever_the_number_of_cores(distances, size, cores, monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    rng = np.random.default_rng(1)
    picks = [(rng.choice(200, size, False), rng.choice(200, size, False)) for _ in range(30)]
    found = list(picked_costs(distances, iter(picks)))
    assert found == [assignment_cost(distances[np.ix_(*pick)]) for pick in picks]
    exact = [transport_cost(distances[np.ix_(*pick)]) for pick in picks[:3]]
    assert found[:3] == pytest.approx(exact, rel=1e-6)
    assert list(picked_costs(distances, [])) == []


def test_they_are_drawn_shortly_before_they_are_solved(distances):
    drawn = []

    def picks() -> Iterator[Pick]:
        for number in range(4000):
            drawn.append(number)
            yield np.arange(SMALL + 1), np.arange(100, 101 + SMALL)

    costs = picked_costs(distances, picks())
    next(costs)
    assert len(drawn) <= (4 * threads.usable_cores() + 1) * BATCH // SMALL
    costs.close()


def test_an_error_of_the_solver_is_the_callers(distances):
    def fail(_: object) -> float:
        raise SolverError("no optimum")

    with pytest.raises(SolverError, match="no optimum"):
        list(picked_costs(distances, [(np.arange(100), np.arange(100))], fail))


def test_sliced_in_one_dimension_is_the_wasserstein_distance():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((31, 1)), 2 * rng.standard_normal((17, 1)) + 1
    assert sliced_wasserstein(x, y, projections=3) == pytest.approx(wasserstein(x, y), rel=1e-6)


def test_sliced_of_a_shift_is_about_its_length_and_never_above_exact(monkeypatch):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((60, 8))
    shift = 5 * np.eye(8)[0]
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x + shift, projections=4000) == pytest.approx(5, rel=0.02)
    y = rng.standard_normal((60, 8)) + 0.5
    whole = sliced_wasserstein(x, y, projections=4000)
    assert 0 < whole <= wasserstein(x, y)
    assert sliced_wasserstein(y, x, projections=4000) == pytest.approx(whole)
    monkeypatch.setattr("perturbscope.scoring.optimal_transport._SORTED", 500)
    assert sliced_wasserstein(x, y, projections=4000) == pytest.approx(whole)


def test_what_cannot_be_sliced_is_refused():
    x = np.eye(3)
    with pytest.raises(InvalidEmbeddingError, match="3 dimensions and y has 2"):
        sliced_wasserstein(x, x[:, :2])
    with pytest.raises(InvalidEmbeddingError, match="not finite"):
        sliced_wasserstein(x, x * np.nan)
    with pytest.raises(InvalidParameterError, match="at least 1"):
        sliced_wasserstein(x, x, projections=0)
