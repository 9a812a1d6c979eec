"""Many transport problems between parts of the same cells, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from perturbscope.distances import assignment_cost
from perturbscope.parallel import in_order

Pick = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Rows and columns of a matrix of distances."""
SMALL = 48
"""Cells up to which a problem takes less time than handing it to a thread (0.1 ms)."""


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

    def cost(pick: Pick) -> float:
        return solve(distances[np.ix_(*pick)])

    source = iter(picks)
    for first in source:
        every = chain([first], source)
        yield from map(cost, every) if len(first[0]) <= SMALL else in_order(cost, every)
