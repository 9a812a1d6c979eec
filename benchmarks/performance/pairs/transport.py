"""Wasserstein distances of real cells: solvers side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ot
from numpy.typing import NDArray

from benchmarks.performance.harness import Options, race, table
from benchmarks.performance.pairs.small import CONTROL, TRANSPORTED, papalexi
from perturbscope.scoring.distances import pairwise_distances, unit_rows
from perturbscope.scoring.optimal_transport import assignment_cost, picked_costs, transport_cost

REGULARIZATION = 0.02
"""Regularization of Sinkhorn, as a share of the mean cost."""


def sinkhorn(cost: NDArray[np.float32]) -> float:
    """Return the cost of the plan of POT's Sinkhorn."""
    n, m = cost.shape
    weight = REGULARIZATION * float(cost.mean())
    values = cost.astype(np.float64)
    plan = ot.sinkhorn(np.full(n, 1 / n), np.full(m, 1 / m), values, weight, method="sinkhorn_log", numItermax=1000)
    return float((plan * values).sum())


def transports(options: Options, peers: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Return the tables and numbers."""
    values, _ = papalexi(50 if options.quick else 2000)
    rows = unit_rows(values)
    rng = np.random.default_rng(0)
    text, numbers = [], {}
    for size in (50,) if options.quick else (200, 1000):
        a, b = (rng.choice(len(rows), size, replace=False) for _ in range(2))
        cost = pairwise_distances(rows[a], rows[b])
        solvers: dict[str, Callable[[], float]] = {
            "assignment (ours)": lambda c=cost: assignment_cost(c),
            "POT, network simplex": lambda c=cost: transport_cost(c),
            f"POT, Sinkhorn {REGULARIZATION}": lambda c=cost: sinkhorn(c),
        }
        turns = race(solvers, min(options.repeats, 3))
        found = {name: solve() for name, solve in solvers.items()}
        many = 4 if options.quick else max(4, 3200 // size)
        picks = [(rng.permutation(size), np.arange(size)) for _ in range(many)]
        threads = race({"one": lambda c=cost, p=picks: [assignment_cost(c[np.ix_(*q)]) for q in p],
                        "all": lambda c=cost, p=picks: list(picked_costs(c, p))}, min(options.repeats, 3))  # fmt: skip
        exact = found["assignment (ours)"]
        lines = [
            [name, f"{1e3 * turns[name].median:.2f}", f"{value:.5f}", f"{value / exact - 1:+.1e}"]
            for name, value in found.items()
        ]
        lines.append(["assignment, each of many on all cores", f"{1e3 * threads['all'].median / many:.2f}", "", ""])
        lines.append(["assignment, each of many on one core", f"{1e3 * threads['one'].median / many:.2f}", "", ""])
        text.append(f"Two groups of {size} real cells (PCA-50, unit length).\n")
        text.append(table(["solver", "ms", "distance", "against exact"], lines))
        numbers[str(size)] = {
            "ms": {name: 1e3 * each.median for name, each in turns.items()},
            "ms_of_many": {name: 1e3 * each.median / many for name, each in threads.items()},
            "value": found,
        }
    if peers:
        small, names = papalexi(50 if options.quick else 200)
        lines = []
        for name, each in peers["maps"]["wasserstein"].items():
            own, controls = small[names == name].astype(np.float64), small[names == CONTROL].astype(np.float64)
            squared = transport_cost(pairwise_distances(own, controls, distance="sqeuclidean"))
            ours = transport_cost(pairwise_distances(own, controls))
            lines.append(
                [name, f"{1e3 * each['seconds']:.0f}", f"{each['value']:.2f}", f"{squared:.2f}", f"{ours:.3f}"]
            )
        text.append(
            f"pertpy {peers['versions']['pertpy']} (ott's Sinkhorn at squared cost, no unit length), "
            f"{', '.join(TRANSPORTED)} against control. Its value is another quantity than exact transport at either "
            "cost.\n"
        )
        text.append(table(["target", "ms", "pertpy", "exact, squared cost", "exact, unsquared (ours)"], lines))
        numbers["pertpy"] = peers["maps"]["wasserstein"]
    return "\n".join(text), numbers
