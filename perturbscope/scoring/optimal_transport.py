"""Many transport problems between parts of the same cells, on all cores; and a distance that needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from math import exp, lgamma, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError
from perturbscope.scoring.distances import Floats, assignment_cost, check_rows
from perturbscope.threads import in_order

Pick = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Rows and columns of a matrix of distances."""
SMALL = 96
"""Cells up to which a problem takes less time (0.2 ms) than handing it to a thread."""
BATCH = 1600
"""Cells of the problems that a thread is handed at a time."""


PROJECTIONS = 128
"""Directions of a sliced distance."""
_SORTED = 4_000_000
"""Projected values that are sorted at a time."""


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


def sliced_wasserstein(x: Floats, y: Floats, *, projections: int = PROJECTIONS, seed: int = 0) -> float:
    """Mean Wasserstein-1 distance along random directions, scaled so that a shift has its length.

    A distance of its own (Bonneel et al. 2015), never above the Wasserstein distance and not an estimate of it: in many
    dimensions most of what exact transport pays goes from cell to cell within equal groups, and this does not see it.
    Takes time ``n log n``, where exact transport takes about the cube.

    Parameters
    ----------
    x, y
        Groups, [n, width] and [m, width].
    projections
        Directions; orthogonal to each other as far as there are dimensions, which halves their noise or better.
    seed
        Of the directions.

    Raises
    ------
    InvalidEmbeddingError
        Values that are not finite, or widths that differ.
    InvalidParameterError
        No direction.
    """
    x, y = check_rows(x, name="x"), check_rows(y, name="y")
    n, m, width = len(x), len(y), x.shape[1]
    if y.shape[1] != width:
        raise InvalidEmbeddingError(f"x has {width} dimensions and y has {y.shape[1]}.", field="y")
    if projections < 1:
        raise InvalidParameterError(f"projections must be at least 1, not {projections!r}.", field="projections")
    directions = _directions(width, projections, np.random.default_rng(seed))
    cells = np.concatenate([x, y]).astype(np.float64)
    cells -= cells.mean(axis=0)
    total, step = 0.0, max(1, _SORTED // len(cells))
    for start in range(0, projections, step):
        values = directions[start : start + step] @ cells.T
        order = np.argsort(values, axis=1)
        # Along a line the distance is the area between the two distribution functions.
        ahead = np.cumsum(np.where(order < n, 1 / n, -1 / m), axis=1)[:, :-1]
        total += float((np.abs(ahead) * np.diff(np.take_along_axis(values, order, axis=1), axis=1)).sum())
    # A vector's mean length along a random direction, as a share of its length.
    share = exp(lgamma(width / 2) - lgamma((width + 1) / 2)) / sqrt(pi)
    return total / projections / share


def _directions(width: int, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Unit vectors [count, width], in orthogonal sets of `width`."""
    sets = [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(-(-count // width))]
    found: NDArray[np.float64] = np.concatenate(sets)[:count]
    return found
