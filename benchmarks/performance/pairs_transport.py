"""Wasserstein distances of real cells: solvers side by side, and what the fast ones miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ot
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.performance.harness import Options, race, table
from benchmarks.performance.pairs_small import CONTROL, TRANSPORTED, papalexi
from perturbscope.scoring.distances import assignment_cost, pairwise_distances, transport_cost, unit_rows
from perturbscope.scoring.optimal_transport import PROJECTIONS, picked_costs, sliced_wasserstein

REGULARIZATION = 0.02
"""Of Sinkhorn, as a share of the mean cost."""
NULLS = 40
"""Pairs of groups of controls behind a z."""


def sinkhorn(cost: NDArray[np.float32]) -> float:
    """POT's Sinkhorn: the cost of its plan."""
    n, m = cost.shape
    weight = REGULARIZATION * float(cost.mean())
    values = cost.astype(np.float64)
    plan = ot.sinkhorn(np.full(n, 1 / n), np.full(m, 1 / m), values, weight, method="sinkhorn_log", numItermax=1000)
    return float((plan * values).sum())


def transports(options: Options, peers: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Tables and numbers."""
    values, labels = papalexi(50 if options.quick else 2000)
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
            f"sliced, {PROJECTIONS} directions": lambda x=rows[a], y=rows[b]: sliced_wasserstein(x, y),
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
    words, numbers["sliced"] = _agreement(rows, labels, 30 if options.quick else 150, rng)
    text.append(words)
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


def _agreement(
    rows: NDArray[np.float64], labels: NDArray[np.str_], size: int, rng: np.random.Generator
) -> tuple[str, dict[str, float]]:
    """How far z of sliced distances goes with z of exact ones."""
    controls = np.flatnonzero(labels == CONTROL)
    names = [name for name in np.unique(labels) if name != CONTROL and (labels == name).sum() >= size]
    size = min(size, len(controls) // 2)
    picks = [(rng.permutation(np.flatnonzero(labels == name))[:size], rng.permutation(controls)[:size])
             for name in names]  # fmt: skip
    orders = [rng.permutation(controls) for _ in range(NULLS)]
    nulls = [(order[:size], order[size : 2 * size]) for order in orders]

    def scored(distance: Callable[[NDArray[np.float64], NDArray[np.float64]], float]) -> NDArray[np.float64]:
        drawn = [distance(rows[a], rows[b]) for a, b in nulls]
        values = np.array([distance(rows[a], rows[b]) for a, b in picks])
        found: NDArray[np.float64] = (values - np.mean(drawn)) / np.std(drawn)
        return found

    exact = scored(lambda x, y: assignment_cost(pairwise_distances(x, y)))
    fast = scored(sliced_wasserstein)
    strong = exact > 5
    facts = {
        "targets": len(names),
        "cells": size,
        "pearson": float(np.corrcoef(exact, fast)[0, 1]),
        "spearman": float(spearmanr(exact, fast)[0]),
        "ratio_of_strong": float(np.median(fast[strong] / exact[strong])) if strong.any() else float("nan"),
    }
    return (
        f"z of {len(names)} targets against control at {size} cells, {NULLS} null draws, sliced against exact: Pearson "
        f"{facts['pearson']:.3f}, Spearman {facts['spearman']:.3f}; where the exact z is above 5, the sliced one is "
        f"{facts['ratio_of_strong']:.1f} times as large (median).\n",
        facts,
    )
