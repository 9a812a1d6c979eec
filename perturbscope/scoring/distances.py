"""Distances between two groups of cells.

The energy distance of groups X (n cells) and Y (m cells), for a ground distance d::

    D(X, Y) = 2 mean d(x_i, y_j) - B - C            no square root

    B, C    mean distance within X and within Y
            estimator U: over the n (n - 1) pairs of different cells; unbiased, may be negative
            estimator V: over all n^2 pairs, a cell with itself included; never negative

(Szekely and Rizzo 2013; for Perturb-seq Peidli et al. 2024 and Zhao et al. 2025.) Published programs differ in d and
in the estimator under one name: Zhao et al. 2025 and pertpy use the unsquared Euclidean distance, scPerturb the squared
one. Here both are arguments. Squared Euclidean and cosine distance need no pairwise matrix: with the V estimator::

    sqeuclidean    D = 2 |mean(X) - mean(Y)|^2
    cosine         D = |mean(x / |x|) - mean(y / |y|)|^2

which also shows that they see a shift of the mean and nothing else. The unsquared distance is zero only for equal
distributions.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, SolverError, TooFewCellsError

Distance = Literal["euclidean", "sqeuclidean", "cosine"]
Floats = NDArray[np.floating[Any]]

TILE_VALUES = 4_000_000
"""Values of a pairwise matrix computed at a time in float64 (32 MB)."""
LARGEST_VALUE = 1e15
"""Largest magnitude of a value: sums of squared distances of thousands of cells must stay within float32."""
CHECKED_ROWS = 65_536
"""Rows that are looked at together."""
MAX_TRANSPORT_CELLS = 2000
"""Most cells of a group in an exact transport problem (time grows with about the cube)."""
TRANSPORT_ITERATIONS = 10_000_000
"""Iteration limit of the network simplex; more than any problem of 2,000 cells needs."""
_POT_BACKENDS = ("PYTORCH", "JAX", "CUPY", "TENSORFLOW")


def unit_rows(
    values: Floats, *, name: str = "embeddings", numbers: NDArray[np.intp] | None = None
) -> NDArray[np.float64]:
    """Rows scaled to unit length, float64 [n, width]; `numbers`: what a message calls each row, if not by its place.

    Raises
    ------
    InvalidEmbeddingError
        A row is zero.
    """
    rows = np.asarray(values, dtype=np.float64)
    # Scaling by the largest value first keeps the square of very small or large values in range.
    largest = np.abs(rows).max(axis=1, initial=0.0)
    zero = np.flatnonzero(largest == 0)
    if len(zero):
        raise InvalidEmbeddingError(
            f"Row {_number(zero[0], numbers)} of {name} is all zero ({len(zero)} such rows); it has no direction, so "
            "it cannot be scaled to unit length. Leave these cells out, or score with normalize off and a Euclidean "
            "distance.",
            field=name,
        )
    rows = rows / largest[:, None]
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def check_rows(values: Any, *, name: str = "embeddings", numbers: NDArray[np.intp] | None = None) -> Floats:
    """A finite matrix [n, width] with n, width >= 1, as floats; `numbers` as of :func:`unit_rows`.

    Raises
    ------
    InvalidEmbeddingError
        Not a matrix of numbers, or a row with NaN, infinite or absurdly large values.
    """
    try:
        rows = np.asarray(values)
        if rows.dtype.kind in "iub":
            rows = rows.astype(np.float64)
    except ValueError as error:
        raise InvalidEmbeddingError(f"{name} is not a matrix of cells x dimensions: {error}.", field=name) from None
    if rows.ndim != 2 or rows.dtype.kind != "f" or 0 in rows.shape:
        raise InvalidEmbeddingError(
            f"{name} must be a matrix of numbers, cells x dimensions; got shape {rows.shape} of {rows.dtype}.",
            field=name,
        )
    # In parts: a mask and a copy of millions of cells would take more than the cells.
    parts = [rows[start : start + CHECKED_ROWS] for start in range(0, len(rows), CHECKED_ROWS)]
    bad = np.flatnonzero(np.concatenate([~np.isfinite(part).all(axis=1) for part in parts]))
    if len(bad):
        raise InvalidEmbeddingError(
            f"Row {_number(bad[0], numbers)} of {name} has a value that is not finite ({len(bad)} such rows of "
            f"{len(rows)}). Leave these cells out or embed them again.",
            field=name,
        )
    large = np.flatnonzero(np.concatenate([(np.abs(part) > LARGEST_VALUE).any(axis=1) for part in parts]))
    if len(large):
        raise InvalidEmbeddingError(
            f"Row {_number(large[0], numbers)} of {name} has a value above {LARGEST_VALUE:g} ({len(large)} such rows "
            f"of {len(rows)}), too large to measure distances with. Scale the vectors, or embed them again.",
            field=name,
        )
    return rows


def _number(row: np.intp, numbers: NDArray[np.intp] | None) -> int:
    return int(row) if numbers is None else int(numbers[row])


def pairwise_distances(x: Floats, y: Floats | None = None, *, distance: Distance = "euclidean") -> NDArray[np.float32]:
    """Distances between the rows of `x` and of `y` (or of `x` itself), float32 [n, m].

    Differences are formed in float64 a tile at a time, so equal rows are at distance 0 exactly.
    """
    out = np.empty((len(x), len(x) if y is None else len(y)), dtype=np.float32)
    for start, tile in _tiles(x, y, distance):
        out[start : start + len(tile)] = tile
    return out


def e_distance(x: Floats, y: Floats, *, estimator: Literal["U", "V"] = "U", distance: Distance = "euclidean") -> float:
    """Energy distance of two groups of vectors (see the module's head for the formula).

    Parameters
    ----------
    x, y
        Groups, [n, width] and [m, width]; used as they are (scale them first if wanted).
    estimator
        ``U`` (unbiased; needs two cells a group) or ``V``.
    distance
        Ground distance. ``sqeuclidean`` and ``cosine`` take time linear in the number of cells.

    Raises
    ------
    InvalidEmbeddingError
        Values that are not finite, widths that differ, or a zero row with cosine distance.
    TooFewCellsError
        One cell in a group, with the U estimator.
    """
    x, y = _pair(x, y)
    n, m = len(x), len(y)
    if estimator not in ("U", "V"):
        raise InvalidParameterError(f"estimator must be U or V, not {estimator!r}.", field="estimator")
    if estimator == "U" and min(n, m) < 2:
        raise TooFewCellsError(f"Groups of {n} and {m} cells: the U estimator needs two cells in each.", field="cells")
    own = 1 if estimator == "U" else 0
    if distance == "euclidean":
        between, within_x, within_y = (
            sum(float(tile.sum()) for _, tile in _tiles(a, b, distance)) for a, b in ((x, y), (x, None), (y, None))
        )
    elif distance in ("sqeuclidean", "cosine"):
        if distance == "cosine":
            x, y = unit_rows(x, name="x"), unit_rows(y, name="y")
        factor = 1.0 if distance == "cosine" else 2.0
        centre = x.mean(axis=0, dtype=np.float64)
        between, within_x, within_y = (
            factor * half_squared_sum(a - centre, b - centre) for a, b in ((x, y), (x, x), (y, y))
        )
    else:
        raise InvalidParameterError(
            f"distance must be euclidean, sqeuclidean or cosine, not {distance!r}.", field="distance"
        )
    return 2 * between / (n * m) - within_x / (n * (n - own)) - within_y / (m * (m - own))


def half_squared_sum(x: Floats, y: Floats) -> float:
    """Sum over all pairs of half the squared Euclidean distance, in time linear in the cells.

    Equal to the sum of cosine distances where all rows have unit length.
    """
    half_x, half_y = 0.5 * float((x * x).sum()), 0.5 * float((y * y).sum())
    return len(y) * half_x + len(x) * half_y - float(x.sum(axis=0) @ y.sum(axis=0))


def wasserstein(x: Floats, y: Floats, *, max_cells: int = MAX_TRANSPORT_CELLS, seed: int = 0) -> float:
    """Wasserstein-1 distance: exact optimal transport between equal weights at unsquared Euclidean cost.

    Parameters
    ----------
    x, y
        Groups, [n, width] and [m, width].
    max_cells
        A larger group is replaced by a random sample of this many cells.
    seed
        Of that sample.

    Raises
    ------
    InvalidEmbeddingError
        Values that are not finite, or widths that differ.
    SolverError
        The network simplex did not reach the optimum.
    """
    x, y = _pair(x, y)
    rng = np.random.default_rng(seed)
    x, y = (group if len(group) <= max_cells else group[rng.choice(len(group), max_cells, False)] for group in (x, y))
    return transport_cost(pairwise_distances(x, y))


def transport_cost(cost: Floats, *, max_iterations: int = TRANSPORT_ITERATIONS) -> float:
    """Least mean cost of moving rows onto columns, all rows and all columns weighing the same (POT's ``emd2``).

    Raises
    ------
    SolverError
        The solver stopped at its iteration limit, or for any other reason before the optimum.
    """
    ot = _import_pot()
    n, m = cost.shape
    with warnings.catch_warnings():
        # POT warns and returns a number when it hits the limit; its log says so too, and is what we act on.
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
    """As :func:`transport_cost` for as many rows as columns, four times as fast.

    With equal weights an optimal plan is a permutation (Birkhoff), so the linear assignment has the same cost.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean(dtype=np.float64))


def _pair(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    x, y = check_rows(x, name="x"), check_rows(y, name="y")
    if x.shape[1] != y.shape[1]:
        raise InvalidEmbeddingError(f"x has {x.shape[1]} dimensions and y has {y.shape[1]}.", field="y")
    return x, y


def _tiles(x: Floats, y: Floats | None, distance: Distance) -> Any:
    """Yield (first row, float64 tile) of the distances between the rows of `x` and `y` (or `x` itself)."""
    if distance == "cosine":
        x, y = unit_rows(x, name="x"), None if y is None else unit_rows(y, name="y")
    # Distances do not change with the origin; near it, least is lost to cancellation.
    centre = x.mean(axis=0, dtype=np.float64)
    a = np.asarray(x, dtype=np.float64) - centre
    b = a if y is None else np.asarray(y, dtype=np.float64) - centre
    squares_a, squares_b = (a * a).sum(axis=1), (b * b).sum(axis=1)
    step = max(1, TILE_VALUES // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        sizes = squares_a[rows, None] + squares_b
        tile = sizes - 2 * (a[rows] @ b.T)
        # What is left of equal rows is rounding noise, which the square root would blow up.
        tile[tile < 1e-14 * sizes] = 0.0
        if y is None:
            tile[np.arange(len(tile)), np.arange(start, start + len(tile))] = 0.0
        if distance == "euclidean":
            np.sqrt(tile, out=tile)
        elif distance == "cosine":
            tile *= 0.5
        yield start, tile


def _import_pot() -> Any:
    """POT, without the array libraries that it would import beside numpy if they are installed."""
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
