"""Checks of vectors, and distances between two groups of cells.

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

which also shows that they detect a shift of the mean and nothing else. The unsquared distance is zero only for equal
distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, TooFewCellsError
from perturbscope.scoring.results import Estimator
from perturbscope.threads import checkpoint

Distance = Literal["euclidean", "sqeuclidean", "cosine"]
Floats = NDArray[np.floating[Any]]
Array = TypeVar("Array", bound=NDArray[Any])

TILE_VALUES = 4_000_000
"""Values of a pairwise matrix computed at a time in float64 (32 MB)."""
LARGEST_VALUE = 1e15
"""Largest magnitude of a value: sums of squared distances of thousands of cells must stay within float32."""
CHECKED_VALUES = 2**23
"""Values that are checked together."""
STEP_PRODUCTS = 2**30
"""Multiplications of a matrix product between two checkpoints: 25 ms of a core in float32, 50 ms in float64."""
STEP_VALUES = 2**18
"""Values that are sorted, scaled or measured between two checkpoints: some 20 ms of a core."""
_ROWS, _COLUMNS = 96, 64
"""OpenBLAS gives the same bits if it gets a multiple of so many rows (float64) or columns (float32) at a time."""


def unit_rows(
    values: Floats, *, name: str = "embeddings", numbers: NDArray[np.intp] | None = None
) -> NDArray[np.float64]:
    """Return rows scaled to unit length, float64 [n, width].

    Parameters
    ----------
    values
        Rows, [n, width].
    name
        Name of the argument in messages.
    numbers
        Number of each row in messages; default its position.

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
    """Return values as a finite matrix of floats [n, width], n and width >= 1; parameters as :func:`unit_rows`.

    Raises
    ------
    InvalidEmbeddingError
        The values are not a matrix of numbers, or a row has NaN, infinite or absurdly large values.
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
    # In parts, since a mask and a copy of millions of cells would take more memory than the cells.
    step = max(1, CHECKED_VALUES // rows.shape[1])
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    bad = np.flatnonzero(np.concatenate([~np.isfinite(part).all(axis=1) for part in _steps(parts)]))
    if len(bad):
        raise InvalidEmbeddingError(
            f"Row {_number(bad[0], numbers)} of {name} has a value that is not finite ({len(bad)} such rows of "
            f"{len(rows)}). Leave these cells out or embed them again.",
            field=name,
        )
    large = np.flatnonzero(np.concatenate([(np.abs(part) > LARGEST_VALUE).any(axis=1) for part in _steps(parts)]))
    if len(large):
        raise InvalidEmbeddingError(
            f"Row {_number(large[0], numbers)} of {name} has a value above {LARGEST_VALUE:g} ({len(large)} such rows "
            f"of {len(rows)}), too large to measure distances with. Scale the vectors, or embed them again.",
            field=name,
        )
    return rows


def _number(row: np.intp, numbers: NDArray[np.intp] | None) -> int:
    return int(row) if numbers is None else int(numbers[row])


def _steps(parts: Iterable[Array]) -> Iterator[Array]:
    for part in parts:
        checkpoint()
        yield part


def product(a: Floats, b: Floats, out: Floats | None = None) -> Any:
    """Return ``a @ b`` of two matrices; a large product is computed in blocks, with a checkpoint before each."""
    n, k, m = *a.shape, b.shape[1]
    checkpoint()
    if n * k * m <= STEP_PRODUCTS:
        return np.matmul(a, b, out=out)
    result = np.empty((n, m), dtype=np.result_type(a, b)) if out is None else out
    if result.dtype == np.float32:
        step = _multiple(STEP_PRODUCTS // (n * k), _COLUMNS)
        for start in range(0, m, step):
            checkpoint()
            np.matmul(a, b[:, start : start + step], out=result[:, start : start + step])
    else:
        step = _multiple(STEP_PRODUCTS // (k * m), _ROWS)
        for start in range(0, n, step):
            checkpoint()
            np.matmul(a[start : start + step], b, out=result[start : start + step])
    return result


def _multiple(step: int, of: int) -> int:
    return max(1, step - step % of if step > of else step)


def row_by_row(function: Callable[[NDArray[Any]], Array], values: NDArray[Any]) -> Array:
    """Return ``function(values)``, computed some rows at a time; each row of the result depends on its row alone."""
    step = max(1, STEP_VALUES // max(1, values.shape[1]))
    if len(values) <= step:
        checkpoint()
        return function(values)
    parts = _steps(values[start : start + step] for start in range(0, len(values), step))
    joined: Any = np.concatenate([function(part) for part in parts])
    return cast("Array", joined)


def pairwise_distances(x: Floats, y: Floats | None = None, *, distance: Distance = "euclidean") -> NDArray[np.float32]:
    """Return distances between the rows of `x` and of `y` (or of `x` itself), float32 [n, m].

    Differences are computed in float64, a tile at a time, so equal rows are at distance 0 exactly.
    """
    out = np.empty((len(x), len(x) if y is None else len(y)), dtype=np.float32)
    others = len(x) if y is None else len(y)
    # As few rows as keep OpenBLAS to the bits of larger tiles.
    step = max(1, min(TILE_VALUES // others, max(_ROWS, _multiple(STEP_VALUES // others, _ROWS))))
    for start, tile in _tiles(x, y, distance, step):
        out[start : start + len(tile)] = tile
    return out


def e_distance(x: Floats, y: Floats, *, estimator: Estimator = "U", distance: Distance = "euclidean") -> float:
    """Return the energy distance of two groups of vectors; the module's docstring has the formula.

    Parameters
    ----------
    x, y
        Groups, [n, width] and [m, width]; they are not scaled.
    estimator
        ``U`` (unbiased; needs two cells a group) or ``V``.
    distance
        Ground distance; with ``sqeuclidean`` and ``cosine`` the time grows linearly with the number of cells.

    Raises
    ------
    InvalidEmbeddingError
        A value is not finite, the widths differ, or a row is zero with cosine distance.
    InvalidParameterError
        The estimator or the distance is unknown.
    TooFewCellsError
        A group has one cell, with the U estimator.
    """
    x, y = check_pair(x, y)
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
    """Sum half the squared Euclidean distance over all pairs, in time that grows linearly with the cells.

    For rows of unit length this is the sum of cosine distances.
    """
    half_x, half_y = 0.5 * float((x * x).sum()), 0.5 * float((y * y).sum())
    return len(y) * half_x + len(x) * half_y - float(x.sum(axis=0) @ y.sum(axis=0))


def check_pair(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return two groups checked by :func:`check_rows`, of the same width."""
    x, y = check_rows(x, name="x"), check_rows(y, name="y")
    if x.shape[1] != y.shape[1]:
        raise InvalidEmbeddingError(f"x has {x.shape[1]} dimensions and y has {y.shape[1]}.", field="y")
    return x, y


def _tiles(x: Floats, y: Floats | None, distance: Distance, step: int | None = None) -> Any:
    """Yield (first row, float64 tile) of the distances between the rows of `x` and `y` (or `x` itself).

    A tile has `step` rows, by default as many as make :data:`TILE_VALUES` distances.
    """
    if distance == "cosine":
        x, y = unit_rows(x, name="x"), None if y is None else unit_rows(y, name="y")
    # Distances do not change with the origin; near it, least is lost to cancellation.
    centre = x.mean(axis=0, dtype=np.float64)
    a = np.asarray(x, dtype=np.float64) - centre
    b = a if y is None else np.asarray(y, dtype=np.float64) - centre
    squares_a, squares_b = (a * a).sum(axis=1), (b * b).sum(axis=1)
    step = step or max(1, TILE_VALUES // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        sizes = squares_a[rows, None] + squares_b
        tile = sizes - 2 * product(a[rows], b.T)
        # The rest of equal rows is rounding noise, which the square root would magnify.
        tile[tile < 1e-14 * sizes] = 0.0
        if y is None:
            tile[np.arange(len(tile)), np.arange(start, start + len(tile))] = 0.0
        if distance == "euclidean":
            np.sqrt(tile, out=tile)
        elif distance == "cosine":
            tile *= 0.5
        yield start, tile
