"""Energy distances between all pairs of perturbations, as one matrix.

:func:`perturbscope.compare_perturbations` tests pairs; this module measures all of them. An energy distance is
``2 B - W_a - W_b`` with the mean distances between and within the groups. With the squared Euclidean and the cosine
distance all B come from one product of the groups' mean vectors. With the unsquared Euclidean distance every pair of
cells is measured (:mod:`perturbscope.scoring.energy.all_pairs`); if that takes too long, distances to landmarks
approximate all of them, with the error measured on some (:mod:`perturbscope.scoring.energy.all_pairs_approximate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.energy.all_pairs import energies, euclidean_sums
from perturbscope.scoring.energy.all_pairs_approximate import landmark_energies
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.pool import Group
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.results import Metric, ScoreOptions, one_of, provenance
from perturbscope.scoring.scorers import GroupMaker

Method = Literal["exact", "landmarks"]
LANDMARKS = 2048
"""Default number of landmarks of the approximate map."""


@dataclass(frozen=True)
class DistanceMap:
    """Distances between all groups.

    Attributes
    ----------
    names
        Labels of the groups, sorted.
    n_cells
        Number of cells of each group that were used.
    distances
        float32 [groups, groups], symmetric, 0 on the diagonal. The U estimator is unbiased, so values may be slightly
        negative.
    metric
        ``e_distance`` or ``cosine_e_distance``.
    provenance
        Options, seed, sizes and version that made the map (JSON-able).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    names: list[str]
    n_cells: NDArray[np.int64]
    distances: NDArray[np.float32]
    metric: Metric
    provenance: dict[str, object]
    warnings: list[str]

    def nearest(self, k: int) -> pd.DataFrame:
        """Return the `k` nearest groups of each, the nearest first.

        Returns
        -------
        Columns ``perturbation, rank, nearest, distance``; rank 1 is the nearest.
        """
        distances = self.distances.astype(np.float64)
        np.fill_diagonal(distances, np.inf)
        order = np.argsort(distances, axis=1, kind="stable")[:, : min(k, len(self.names) - 1)]
        of, rank = np.indices(order.shape)
        names = np.array(self.names, dtype=object)
        return pd.DataFrame(
            {
                "perturbation": names[of.ravel()],
                "rank": rank.ravel() + 1,
                "nearest": names[order.ravel()],
                "distance": distances[of.ravel(), order.ravel()],
            }
        )

    def frame(self) -> pd.DataFrame:
        """Return the matrix with the names as its index and columns."""
        return pd.DataFrame(self.distances, index=self.names, columns=self.names)


def distance_map(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    options: ScoreOptions | None = None,
    method: Method = "exact",
    landmarks: int = LANDMARKS,
    progress: Callable[[str, int, int], None] | None = None,
) -> DistanceMap:
    """Measure the energy distance between the cells of every two labels that have `min_cells` cells.

    Parameters
    ----------
    embeddings
        One vector a cell, [n, width].
    perturbations
        Label of each cell; controls are a group like any other.
    options
        Options of scoring, of which the first metric, `ground`, `estimator`, `normalize`, `min_cells`, `seed` and
        `max_cells` are used. The time of the unsquared Euclidean distance grows with the square of all cells used, so a
        map of a whole genome needs a smaller `max_cells` (50, say; the U estimator stays unbiased) or landmarks.
    method
        ``exact``, or ``landmarks``: the unsquared Euclidean energy distance from each cell's distances to some cells,
        in time that grows linearly with the cells. Its error is measured against exact distances of some groups, and
        reported in the map's warnings and provenance (``landmarks``).
    landmarks
        Number of landmarks: more are slower and nearer to exact.
    progress
        Called as ``progress("map", done, total)``.

    Raises
    ------
    InvalidParameterError
        The metric is Wasserstein, or landmarks are asked for with a distance whose exact map is as fast.
    InvalidEmbeddingError, MalformedMatrixError, TooFewCellsError
        See :func:`perturbscope.score_perturbations`.
    """
    options = options or ScoreOptions()
    metric = options.metrics[0]
    check_map(options, method, landmarks)
    options = replace(options, metrics=(metric,))
    groups = Groups.of(embeddings, perturbations, None, options)
    names = groups.scorable(list(groups.members), options)
    members = [groups.members[name] for name in names]
    maker = GroupMaker(metric, groups, options)
    sizes = np.array([len(cells) for cells in members], dtype=np.int64)
    facts: dict[str, object] = {"n_groups": len(names), "method": method}
    warnings = groups.warnings(list(groups.members), options)
    if method == "landmarks":
        distances, error = landmark_energies(
            maker.vectors,
            maker.centre,
            members,
            estimator=options.estimator,
            landmarks=landmarks,
            seed=options.seed,
            progress=progress,
        )
        facts["landmarks"] = {"count": landmarks, **error.to_dict()}
        warnings.append(error.warning(landmarks))
    else:
        if metric == "e_distance" and options.ground == "euclidean":
            sums = euclidean_sums(maker.vectors, maker.centre, members, progress)
        else:
            sums = _linear_sums(maker.make(cells) for cells in members)
        distances = energies(sums, sizes, options.estimator)
    return DistanceMap(names, sizes, distances, metric, provenance("map", options, **groups.facts, **facts), warnings)


def check_map(options: ScoreOptions, method: object, landmarks: int) -> None:
    """Refuse options that :func:`distance_map` would refuse, before there are embeddings.

    Raises
    ------
    InvalidParameterError
        See :func:`distance_map`.
    """
    metric = options.metrics[0]
    if metric == "wasserstein":
        raise InvalidParameterError(
            "A map of all pairs takes e_distance or cosine_e_distance; compare_perturbations takes wasserstein too, "
            "for some pairs.",
            field="metrics",
        )
    one_of("method", method, get_args(Method))
    if method == "landmarks" and (metric != "e_distance" or options.ground != "euclidean"):
        raise InvalidParameterError(
            "Landmarks approximate the e_distance with the unsquared Euclidean distance; others are mapped exactly in "
            "less time. Leave method out.",
            field="method",
        )
    if isinstance(landmarks, bool) or not isinstance(landmarks, int) or not 2 <= landmarks <= 20_000:
        raise InvalidParameterError(
            f"landmarks must be a whole number from 2 to 20,000, not {landmarks!r}.", field="landmarks"
        )


def _linear_sums(groups: Iterable[Group]) -> NDArray[np.float64]:
    """Return sums of distances from sums of vectors (:class:`perturbscope.scoring.energy.closed_form.LinearGroup`)."""
    parts = [
        (group.size, group.half.sum(), group.rows.sum(axis=0)) for group in groups if isinstance(group, LinearGroup)
    ]
    sizes, half = (np.array([float(part[i]) for part in parts]) for i in (0, 1))
    totals = np.stack([total for *_, total in parts])
    sums: NDArray[np.float64] = totals @ totals.T
    np.negative(sums, out=sums)
    sums += np.multiply.outer(half, sizes)
    sums += np.multiply.outer(sizes, half)
    return sums
