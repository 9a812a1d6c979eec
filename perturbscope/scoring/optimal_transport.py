"""Exact optimal transport between groups of cells: one problem, or many on all cores."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import SolverError
from perturbscope.scoring.distances import Floats, check_pair, pairwise_distances
from perturbscope.threads import checkpoint, in_order

Pick = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Rows and columns of a matrix of distances."""
SMALL = 96
"""Cells up to which a problem takes less time (0.2 ms) than handing it to a thread."""
BATCH = 1600
"""Cells, over all problems, that a thread is handed at a time."""
MAX_TRANSPORT_CELLS = 2000
"""Most cells of a group in an exact transport problem (time grows with about the cube)."""
TRANSPORT_ITERATIONS = 10_000_000
"""Iteration limit of the network simplex; more than any problem of 2,000 cells needs."""
_POT_BACKENDS = ("PYTORCH", "JAX", "CUPY", "TENSORFLOW")


def wasserstein(x: Floats, y: Floats, *, max_cells: int = MAX_TRANSPORT_CELLS, seed: int = 0) -> float:
    """Return the Wasserstein-1 distance: exact transport between equal weights at unsquared Euclidean cost.

    Parameters
    ----------
    x, y
        Groups, [n, width] and [m, width].
    max_cells
        Size of the random sample that replaces a larger group.
    seed
        Seed of that sample.

    Raises
    ------
    InvalidEmbeddingError
        A value is not finite, or the widths differ.
    SolverError
        The network simplex did not reach the optimum.
    """
    x, y = check_pair(x, y)
    rng = np.random.default_rng(seed)
    x, y = (group if len(group) <= max_cells else group[rng.choice(len(group), max_cells, False)] for group in (x, y))
    return transport_cost(pairwise_distances(x, y))


def transport_cost(cost: Floats, *, max_iterations: int = TRANSPORT_ITERATIONS) -> float:
    """Return the least mean cost of moving rows onto columns, all of equal weight (POT's ``emd2``).

    Raises
    ------
    SolverError
        The solver stopped before the optimum, at its iteration limit or for another reason.
    """
    ot = _import_pot()
    n, m = cost.shape
    with warnings.catch_warnings():
        # POT warns and still returns a number at its limit; its log says so too, and is checked below.
        warnings.simplefilter("ignore")
        value, log = ot.emd2(
            np.full(n, 1 / n),
            np.full(m, 1 / m),
            np.ascontiguousarray(cost, dtype=np.float64),
            numItermax=max_iterations,
            log=True,
        )
    if log["warning"] is not None or not np.isfinite(value):
        raise SolverError(
            f"Optimal transport between {n} and {m} cells stopped before the optimum: {log['warning'] or value} "
            f"(limit {max_iterations:,} iterations). Score fewer cells at a time, or another metric."
        )
    return float(value)


def assignment_cost(cost: Floats) -> float:
    """Return :func:`transport_cost` of a square matrix, four times as fast.

    With equal weights an optimal plan is a permutation (Birkhoff), so the linear assignment has the same cost.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean(dtype=np.float64))


def picked_costs(
    distances: NDArray[np.float32] | Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.float32]],
    picks: Iterable[Pick],
    solve: Callable[[NDArray[np.float32]], float] = assignment_cost,
) -> Iterator[float]:
    """Yield the least mean cost between the cells of each pick, in order; the same for any number of cores.

    The solvers of scipy and POT let other threads run while they work.

    Parameters
    ----------
    distances
        Distances between all cells, [n, m]; or a function that returns those of a pick.
    picks
        Rows and columns of each problem, all of about the same size. They are taken in order, shortly before they are
        needed, so an iterator may draw them at random.
    solve
        Solver of one problem; the default needs as many rows as columns.

    Raises
    ------
    SolverError
        The solver did not reach the optimum.
    """

    def cost(pick: Pick) -> float:
        checkpoint()
        return solve(distances(*pick) if callable(distances) else distances[np.ix_(*pick)])

    def costs(batch: list[Pick]) -> list[float]:
        return [cost(pick) for pick in batch]

    source = iter(picks)
    first = next(source, None)
    if first is None:
        return
    source, size = chain([first], source), len(first[0])
    batches = iter(lambda: list(islice(source, max(1, BATCH // size))), [])
    for solved in map(costs, batches) if size <= SMALL else in_order(costs, batches):
        yield from solved


def _import_pot() -> Any:
    """Import POT without the other array libraries that it would load if they are installed."""
    names = [f"POT_BACKEND_DISABLE_{backend}" for backend in _POT_BACKENDS]
    unset = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))
    try:
        with warnings.catch_warnings():
            # Python warns of escapes in its docstrings when it first compiles them.
            warnings.simplefilter("ignore")
            return importlib.import_module("ot")
    finally:
        for name in unset:
            del os.environ[name]
