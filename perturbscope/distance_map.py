"""Energy distances between all pairs of perturbations, as one matrix.

:func:`perturbscope.comparison.compare_perturbations` tests pairs; this measures them all. An energy distance is
``2 B - W_a - W_b`` with the mean distances between and within the groups. With the squared Euclidean and the cosine
distance all B come from one product of the groups' mean vectors. With the unsquared Euclidean distance every pair of
cells counts once, in tiles that fit the cache, in float32; the sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from perturbscope.encoder import usable_cores
from perturbscope.energy import Estimator, Group, LinearGroup
from perturbscope.errors import InvalidParameterError
from perturbscope.groups import Groups
from perturbscope.results import Metric, ScoreOptions
from perturbscope.scorers import GroupMaker
from perturbscope.tables import provenance

BLOCK_CELLS = 2048
"""Cells on one side of a tile: its float32 distances (16 MiB) and both sets of vectors stay near the core."""


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
        sums = _linear_sums([maker.make(cells) for cells in members])
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


def _linear_sums(groups: Sequence[Group]) -> NDArray[np.float64]:
    """Sums of distances from sums of vectors; see :class:`perturbscope.energy.LinearGroup`."""
    linear = [group for group in groups if isinstance(group, LinearGroup)]
    sizes = np.array([float(group.size) for group in linear])
    half = np.array([group.half.sum() for group in linear])
    totals = np.stack([group.rows.sum(axis=0) for group in linear])
    sums: NDArray[np.float64] = np.multiply.outer(half, sizes) + np.multiply.outer(sizes, half) - totals @ totals.T
    return sums


def _euclidean_sums(
    maker: GroupMaker, members: Sequence[NDArray[np.intp]], progress: Callable[[str, int, int], None] | None
) -> NDArray[np.float64]:
    """Sums of the distances between the cells of all groups, tile by tile on all cores."""
    blocks = list(_blocks([len(cells) for cells in members]))
    # Distances do not change with the origin; near it, least is lost to cancellation.
    rows = np.concatenate([(maker.rows[cells] - maker.origin).astype(np.float32) for cells in members])
    squares = np.einsum("nw,nw->n", rows, rows)
    offsets = np.concatenate([[0], np.cumsum([len(cells) for cells in members])])
    sums = np.empty((len(members), len(members)))

    def tile(pair: tuple[slice, slice]) -> None:
        a, b = pair
        cells_a, cells_b = (slice(offsets[part.start], offsets[part.stop]) for part in pair)
        distances = rows[cells_a] @ rows[cells_b].T
        distances *= -2
        distances += squares[cells_a, None]
        distances += squares[cells_b]
        np.maximum(distances, 0, out=distances)
        np.sqrt(distances, out=distances)
        if a == b:
            np.fill_diagonal(distances, 0)
        across = np.add.reduceat(distances, offsets[b] - offsets[b.start], axis=1)
        part = np.add.reduceat(across, offsets[a] - offsets[a.start], axis=0, dtype=np.float64)
        if a == b:
            part = (part + part.T) / 2
        sums[a, b] = part
        sums[b, a] = part.T

    pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[i:]]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for done, _ in enumerate(pool.map(tile, pairs), start=1):
            if progress:
                progress("map", done, len(pairs))
    return sums


def _blocks(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of groups with at most `BLOCK_CELLS` cells; a larger group is a run of its own."""
    start = held = 0
    for i, size in enumerate(sizes):
        if i > start and held + size > BLOCK_CELLS:
            yield slice(start, i)
            start, held = i, 0
        held += size
    yield slice(start, len(sizes))
