"""Many transport problems at once have the costs of one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from perturbscope import threads
from perturbscope.errors import SolverError
from perturbscope.scoring.distances import pairwise_distances
from perturbscope.scoring.optimal_transport import BATCH, SMALL, Pick, assignment_cost, picked_costs, transport_cost


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
