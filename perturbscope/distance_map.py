"""Energy distances between all pairs of perturbations, as one matrix.

:func:`perturbscope.comparison.compare_perturbations` tests pairs; this measures them all. An energy distance is
``2 B - W_a - W_b`` with the mean distances between and within the groups. With the squared Euclidean and the cosine
distance all B come from one product of the groups' mean vectors. With the unsquared Euclidean distance every pair of
cells counts once, in tiles that fit the cache, in float32; the sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from perturbscope.encoder import usable_cores
from perturbscope.energy import Estimator, Group, LinearGroup
from perturbscope.errors import InvalidParameterError
from perturbscope.groups import Groups
from perturbscope.results import Metric, ScoreOptions
from perturbscope.scorers import GroupMaker
from perturbscope.tables import provenance

TILE_CELLS = 600
"""Cells on one side of a tile: its float32 distances (1.4 MB) and both sets of vectors stay near the core."""
SUMMED = 64
"""Rows of a tile that are summed in float32."""
_ONES = np.ones(SUMMED, dtype=np.float32)


@dataclass(frozen=True)
class DistanceMap:
    """Distances between all groups.

    Attributes
    ----------
    names
        Of the groups, sorted.
    n_cells
        Cells of each that were used.
    distances
        float32 [groups, groups], symmetric, 0 on the diagonal. Unbiased, so it may be slightly negative.
    metric
        Which distance.
    provenance
        What made it.
    warnings
        What a careful reader should know.
    """

    names: list[str]
    n_cells: NDArray[np.int64]
    distances: NDArray[np.float32]
    metric: Metric
    provenance: dict[str, object]
    warnings: list[str]

    def frame(self) -> pd.DataFrame:
        """The matrix with its names."""
        return pd.DataFrame(self.distances, index=self.names, columns=self.names)


def distance_map(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    options: ScoreOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DistanceMap:
    """Energy distance between the cells of every two labels that have `min_cells` cells.

    Parameters
    ----------
    embeddings
        One vector a cell, [n, width].
    perturbations
        Label of each cell; controls are a group like any other.
    options
        Of these, the first metric, `ground`, `estimator`, `normalize`, `min_cells`, `seed`, and `max_cells` count. The
        time of the unsquared Euclidean distance grows with the square of all cells that are used, so a map of a whole
        genome wants a smaller `max_cells` (50, say); the U estimator stays unbiased.
    progress
        Called as ``progress("map", done, total)``, by tile.

    Raises
    ------
    InvalidParameterError
        The metric is Wasserstein.
    InvalidEmbeddingError, MalformedMatrixError, TooFewCellsError
        As :func:`perturbscope.scoring.score_perturbations`.
    """
    options = options or ScoreOptions()
    metric = options.metrics[0]
    if metric == "wasserstein":
        raise InvalidParameterError(
            "A map of all pairs takes e_distance or cosine_e_distance; compare_perturbations takes wasserstein too, "
            "for some pairs.",
            field="metrics",
        )
    options = replace(options, metrics=(metric,))
    groups = Groups.of(embeddings, perturbations, None, options)
    names = groups.scorable(list(groups.members), options)
    members = [groups.members[name] for name in names]
    maker = GroupMaker(metric, groups, options)
    sizes = np.array([len(cells) for cells in members], dtype=np.int64)
    if metric == "e_distance" and options.ground == "euclidean":
        sums = _euclidean_sums(maker, members, progress)
    else:
        sums = _linear_sums(maker.make(cells) for cells in members)
    return DistanceMap(
        names,
        sizes,
        _energies(sums, sizes, options.estimator),
        metric,
        provenance("map", options, groups, n_groups=len(names)),
        groups.warnings(list(groups.members), options),
    )


def _energies(sums: NDArray[np.float64], sizes: NDArray[np.int64], estimator: Estimator) -> NDArray[np.float32]:
    """Energy distances from the sums of distances between all groups; the diagonal has those within."""
    within = np.diag(sums) / (sizes * (sizes - (estimator == "U")))
    sums *= 2 / np.multiply.outer(sizes, sizes)
    sums -= within[:, None]
    sums -= within
    np.fill_diagonal(sums, 0.0)
    return sums.astype(np.float32)


def _linear_sums(groups: Iterable[Group]) -> NDArray[np.float64]:
    """Sums of distances from sums of vectors; see :class:`perturbscope.energy.LinearGroup`."""
    found = [
        (group.size, group.half.sum(), group.rows.sum(axis=0)) for group in groups if isinstance(group, LinearGroup)
    ]
    sizes, half = (np.array([float(each[i]) for each in found]) for i in (0, 1))
    totals = np.stack([total for *_, total in found])
    sums: NDArray[np.float64] = totals @ totals.T
    np.negative(sums, out=sums)
    sums += np.multiply.outer(half, sizes)
    sums += np.multiply.outer(sizes, half)
    return sums


def _euclidean_sums(
    maker: GroupMaker, members: Sequence[NDArray[np.intp]], progress: Callable[[str, int, int], None] | None
) -> NDArray[np.float64]:
    """Sums of the distances between the cells of all groups, tile by tile on all cores."""
    sizes = [len(cells) for cells in members]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    right = _columns(maker, members)
    strips = [(groups, _pieces(groups, offsets)) for groups in _strips(sizes)]
    sums = np.zeros((len(members), len(members)))

    def strip(number: int) -> int:
        """The distances of a strip's cells to those of this strip and of all after it."""
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
    # One thread of the matrix products beside each of ours: threads that wait for each other cost half of the speed.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(usable_cores()) as pool:
        try:
            for tiles in pool.map(strip, range(len(strips))):
                done += tiles
                if progress:
                    progress("map", done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for i, (own, _) in enumerate(strips):
        for other, _ in strips[i + 1 :]:
            sums[other, own] = sums[own, other].T
    return sums


def _columns(maker: GroupMaker, members: Sequence[NDArray[np.intp]]) -> NDArray[np.float32]:
    """Vectors of all groups' cells, each followed by its squared length and by ones.

    With what :func:`_rows` makes of them, one product gives squared distances: ``|x|^2 + |y|^2 - 2 x.y``. A squared
    length is two float32 numbers, what the first loses being in the second.
    """
    width = maker.rows.width
    right = np.empty((sum(map(len, members)), width + 4), dtype=np.float32)
    start = 0
    for cells in members:
        part = right[start : start + len(cells)]
        # Distances do not change with the origin; near it, least is lost to cancellation.
        part[:, :width] = maker.rows[cells] - maker.origin
        squares = np.einsum("nw,nw->n", part[:, :width], part[:, :width], dtype=np.float64)
        part[:, width] = squares
        part[:, width + 1] = squares - part[:, width]
        part[:, width + 2 :] = 1
        start += len(cells)
    return right


def _rows(right: NDArray[np.float32]) -> NDArray[np.float32]:
    """The other factor of squared distances, see :func:`_columns`."""
    left = right * np.float32(-2)
    left[:, -4:-2] = 1
    left[:, -2:] = right[:, -4:-2]
    return left


def _sums(
    left: NDArray[np.float32], right: NDArray[np.float32], squares: NDArray[np.float32], a: _Piece, b: _Piece
) -> NDArray[np.float64]:
    """Sums of the distances between the groups of two pieces; `squares`: room for a matrix of them."""
    np.matmul(left, right.T, out=squares)
    if a is b:
        np.fill_diagonal(squares, 0)
    with np.errstate(invalid="ignore"):
        sums = _sums_of_roots(squares, a, b)
    if np.isnan(sums).any():
        # Rounding has left less than nothing of the squared distance of two cells that are nearly equal.
        np.matmul(left, right.T, out=squares)
        np.maximum(squares, 0, out=squares)
        if a is b:
            np.fill_diagonal(squares, 0)
        sums = _sums_of_roots(squares, a, b)
    return sums


def _sums_of_roots(squares: NDArray[np.float32], a: _Piece, b: _Piece) -> NDArray[np.float64]:
    """Sums of the roots (formed in place) of a matrix, by the groups of its rows and columns."""
    np.sqrt(squares, out=squares)
    # Ones times a few rows sum these five times as fast as reduceat does.
    across = np.stack([_ONES[: j - i] @ squares[i:j] for i, j in a.runs])
    down = np.add.reduceat(across, a.first, axis=0, dtype=np.float64)
    sums: NDArray[np.float64] = np.add.reduceat(down, b.starts, axis=1)
    return sums


def _strips(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of groups with at most `TILE_CELLS` cells; a larger group is a run of its own."""
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
        Which cells, and how many.
    starts
        Where the strip's groups start among them.
    runs
        At most `SUMMED` cells of one group at a time: first, and first of the next.
    first
        The first run of each group.
    """

    def __init__(self, start: int, stop: int, starts: NDArray[np.intp]) -> None:
        self.cells, self.size, self.starts = slice(start, stop), stop - start, starts
        edges = np.union1d(np.append(starts, self.size), np.arange(0, self.size, SUMMED))
        self.runs = list(pairwise(edges.tolist()))
        self.first = np.searchsorted(edges, starts)


def _pieces(groups: slice, offsets: NDArray[np.intp]) -> list[_Piece]:
    """A strip's cells: one piece, or several of one large group."""
    first, last = int(offsets[groups.start]), int(offsets[groups.stop])
    count = -(-(last - first) // TILE_CELLS)
    edges = [first + (last - first) * i // count for i in range(count + 1)]
    return [_Piece(i, j, np.maximum(offsets[groups] - i, 0)) for i, j in pairwise(edges)]
