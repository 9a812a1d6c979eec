"""Many transport problems between parts of the same cells, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.distances import assignment_cost
from perturbscope.threads import in_order

Pick = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Rows and columns of a matrix of distances."""
SMALL = 96
"""Cells up to which a problem takes less time (0.2 ms) than handing it to a thread."""
BATCH = 1600
"""Cells of the problems that a thread is handed at a time."""


def picked_costs(
    distances: NDArray[np.float32],
    picks: Iterable[Pick],
    solve: Callable[[NDArray[np.float32]], float] = assignment_cost,
) -> Iterator[float]:
    """Least mean cost between the cells of each pick, in their order; the same whatever the number of cores.

    The solvers of scipy and POT let other threads run while they work.

    Parameters
    ----------
    distances
        Between all cells, [n, m].
    picks
        Rows and columns of each problem, all of about the same size. They are taken in order, so they may draw at
        random, and shortly before they are needed.
    solve
        The solver; by default for as many rows as columns.

    Raises
    ------
    SolverError
        As the solver raises.
    """

    def costs(batch: list[Pick]) -> list[float]:
        return [solve(distances[np.ix_(*pick)]) for pick in batch]

    source = iter(picks)
    first = next(source, None)
    if first is None:
        return
    source, size = chain([first], source), len(first[0])
    batches = iter(lambda: list(islice(source, max(1, BATCH // size))), [])
    for found in map(costs, batches) if size <= SMALL else in_order(costs, batches):
        yield from found
