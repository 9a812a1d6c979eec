"""Sums of unsquared Euclidean distances between many groups of cells, in tiles that fit the cache.

One float32 matrix product of vectors that carry their squared lengths gives a tile's squared distances; then come
roots, then sums by group. Products take most of the time: at width 256 a distance is 512 floating-point operations, a
root and an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.distances import product
from perturbscope.scoring.labels import Vectors
from perturbscope.scoring.results import Estimator
from perturbscope.threads import in_order

TILE_CELLS = 600
"""Cells on one side of a tile: its float32 distances (1.4 MB) and both sets of vectors stay near the core."""
SUMMED = 64
"""Rows of a tile that are summed in float32."""
_ONES = np.ones(SUMMED, dtype=np.float32)


def euclidean_sums(
    rows: Vectors,
    origin: NDArray[np.float64],
    members: Sequence[NDArray[np.intp]],
    progress: Callable[[str, int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Sum the distances between the cells of every two groups, on all cores.

    Parameters
    ----------
    rows
        Vectors of cells.
    origin
        Any point near the cells, float64 [width]; it only reduces rounding.
    members
        Positions in `rows` of each group's cells.
    progress
        Called as ``progress("map", done, total)``, once a strip.

    Returns
    -------
    float64 [groups, groups], symmetric; the diagonal holds the sums over ordered pairs within each group.
    """
    sizes = [len(cells) for cells in members]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    right = _columns(rows, origin, members)
    strips = [(groups, _pieces(groups, offsets)) for groups in _strips(sizes)]
    sums = np.zeros((len(members), len(members)))

    def strip(number: int) -> int:
        """Add the distances from a strip's cells to those of this strip and of all later ones."""
        own, pieces = strips[number]
        tile = np.empty(TILE_CELLS**2, dtype=np.float32)
        for a in pieces:
            left = _rows(right[a.cells])
            for other, others in strips[number:]:
                for b in others:
                    squares = tile[: len(left) * b.size].reshape(len(left), b.size)
                    sums[own, other] += _sums(left, right[b.cells], squares, a, b)
        sums[own, own] = (sums[own, own] + sums[own, own].T) / 2
        return len(strips) - number

    done, total = 0, len(strips) * (len(strips) + 1) // 2
    for tiles in in_order(strip, range(len(strips))):
        done += tiles
        if progress:
            progress("map", done, total)
    for i, (own, _) in enumerate(strips):
        for other, _ in strips[i + 1 :]:
            sums[other, own] = sums[own, other].T
    return sums


def energies(sums: NDArray[np.float64], sizes: NDArray[np.int64], estimator: Estimator) -> NDArray[np.float32]:
    """Return energy distances from the sums of distances between all groups.

    Parameters
    ----------
    sums
        Sums as :func:`euclidean_sums` returns them.
    sizes
        Cells of each group.
    estimator
        ``U`` or ``V``.

    Returns
    -------
    float32 [groups, groups], 0 on the diagonal.
    """
    within = np.diag(sums) / (sizes * (sizes - (estimator == "U")))
    distances = np.empty(sums.shape, dtype=np.float32)
    for i, row in enumerate(sums):
        # One row at a time stays in the cache; the matrix of a genome is 800 MB.
        distances[i] = row * (2 / (sizes[i] * sizes)) - (within[i] + within)
    np.fill_diagonal(distances, 0.0)
    return distances


def _columns(rows: Vectors, origin: NDArray[np.float64], members: Sequence[NDArray[np.intp]]) -> NDArray[np.float32]:
    """Return the vectors of all groups' cells, each followed by its squared length and by ones.

    Their product with the result of :func:`_rows` gives squared distances, ``|x|^2 + |y|^2 - 2 x.y``. A squared length
    is two float32 numbers, the second of which holds what the first loses.
    """
    width = rows.width
    right = np.empty((sum(map(len, members)), width + 4), dtype=np.float32)
    start = 0
    for cells in members:
        part = right[start : start + len(cells)]
        # Distances do not change with the origin; near it, least is lost to cancellation.
        part[:, :width] = rows[cells] - origin
        squares = np.einsum("nw,nw->n", part[:, :width], part[:, :width], dtype=np.float64)
        part[:, width] = squares
        part[:, width + 1] = squares - part[:, width]
        part[:, width + 2 :] = 1
        start += len(cells)
    return right


def _rows(right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the other factor of squared distances; see :func:`_columns`."""
    left = right * np.float32(-2)
    left[:, -4:-2] = 1
    left[:, -2:] = right[:, -4:-2]
    return left


def _sums(
    left: NDArray[np.float32], right: NDArray[np.float32], squares: NDArray[np.float32], a: _Piece, b: _Piece
) -> NDArray[np.float64]:
    """Sum the distances between the groups of two pieces; `squares` is scratch space for a matrix of them."""
    product(left, right.T, squares)
    if a is b:
        np.fill_diagonal(squares, 0)
    with np.errstate(invalid="ignore"):
        sums = _sums_of_roots(squares, a, b)
    if np.isnan(sums).any():
        # Rounding has made the squared distance of two nearly equal cells negative.
        product(left, right.T, squares)
        np.maximum(squares, 0, out=squares)
        if a is b:
            np.fill_diagonal(squares, 0)
        sums = _sums_of_roots(squares, a, b)
    return sums


def _sums_of_roots(squares: NDArray[np.float32], a: _Piece, b: _Piece) -> NDArray[np.float64]:
    """Sum the roots (formed in place) of a matrix by the groups of its rows and columns."""
    np.sqrt(squares, out=squares)
    # Ones times a few rows sum these five times as fast as reduceat does.
    across = np.stack([_ONES[: j - i] @ squares[i:j] for i, j in a.runs])
    down = np.add.reduceat(across, a.first, axis=0, dtype=np.float64)
    sums: NDArray[np.float64] = np.add.reduceat(down, b.starts, axis=1)
    return sums


def _strips(sizes: Sequence[int]) -> Iterator[slice]:
    """Yield runs of groups with at most `TILE_CELLS` cells; a larger group is a run of its own."""
    start = held = 0
    for i, size in enumerate(sizes):
        if i > start and held + size > TILE_CELLS:
            yield slice(start, i)
            start, held = i, 0
        held += size
    yield slice(start, len(sizes))


class _Piece:
    """At most `TILE_CELLS` cells of a strip.

    Attributes
    ----------
    cells, size
        Slice of the cells, and their number.
    starts
        Position among them at which each of the strip's groups starts.
    runs
        Start and end of stretches of at most `SUMMED` cells of one group.
    first
        First run of each group.
    """

    def __init__(self, start: int, stop: int, starts: NDArray[np.intp]) -> None:
        self.cells, self.size, self.starts = slice(start, stop), stop - start, starts
        edges = np.union1d(np.append(starts, self.size), np.arange(0, self.size, SUMMED))
        self.runs = list(pairwise(edges.tolist()))
        self.first = np.searchsorted(edges, starts)


def _pieces(groups: slice, offsets: NDArray[np.intp]) -> list[_Piece]:
    """Return a strip's cells as one piece, or as several of one large group."""
    first, last = int(offsets[groups.start]), int(offsets[groups.stop])
    count = -(-(last - first) // TILE_CELLS)
    edges = [first + (last - first) * i // count for i in range(count + 1)]
    return [_Piece(i, j, np.maximum(offsets[groups] - i, 0)) for i, j in pairwise(edges)]
