"""Approximate energy distances between many groups, from each cell's distances to a few landmark cells.

The distance ``d`` is of negative type, so ``k(x, y) = (d(x, o) + d(y, o) - d(x, y)) / 2`` is a kernel and the energy
distance is ``2 |mean phi(X) - mean phi(Y)|^2`` with its features (Sejdinovic et al. 2013). Nystrom's approximation
(Williams and Seeger 2001) makes features of finite length from the leading directions of the kernel matrix of L
landmarks among the cells; a cell's features follow from its distances to them. Then all pairs of groups are one product
of their mean features. The U estimator takes the cells' own terms out, as it does with exact distances.

The features do not span everything, so distances come out too small, all in about the same proportion. Some groups are
also mapped exactly: the ratio corrects all others, and the difference that is left is the stated error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from perturbscope.scoring.energy.all_pairs import energies, euclidean_sums
from perturbscope.scoring.labels import Vectors
from perturbscope.scoring.results import Estimator
from perturbscope.scoring.statistics import correlation, generator
from perturbscope.threads import checkpoint, in_order

RANK_SHARE, MIN_RANK = 4, 512
"""Landmarks for one feature, and fewest features."""
CHECK_GROUPS, CHECK_CELLS = 64, 30_000
"""Most groups that are also mapped exactly, and most cells of them together (but at least three groups are)."""
CHUNK = 1024
"""Cells whose features are computed at a time."""
_SMALLEST = 1e-6
"""Share of the largest eigenvalue below which one is rounding of float32 distances."""


@dataclass(frozen=True)
class LandmarkError:
    """Difference of a map from landmarks to the exact one, measured on some of its groups.

    Attributes
    ----------
    groups, pairs
        Number of groups, and of their pairs, that were mapped exactly.
    scale
        Factor by which all distances were multiplied.
    median_distance
        Median of the exact distances.
    rmse
        Root mean square difference.
    spearman
        Rank correlation; NaN with fewer than three pairs.
    """

    groups: int
    pairs: int
    scale: float
    median_distance: float
    rmse: float
    spearman: float

    def to_dict(self) -> dict[str, float]:
        """Return all attributes by name."""
        return asdict(self)

    def warning(self, landmarks: int) -> str:
        """Return the error as a sentence for the reader of a map."""
        return (
            f"Distances are approximate, from {landmarks:,} landmarks. Against {self.pairs:,} pairs that were measured "
            f"exactly: root mean square error {self.rmse:.2g} (median distance {self.median_distance:.2g}), rank "
            f"correlation {self.spearman:.4f}."
        )


def landmark_energies(
    rows: Vectors,
    origin: NDArray[np.float64],
    members: Sequence[NDArray[np.intp]],
    *,
    estimator: Estimator,
    landmarks: int,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[NDArray[np.float32], LandmarkError]:
    """Return approximate energy distances between every two groups, and their error.

    Parameters
    ----------
    rows, origin, members
        Cells, as :func:`perturbscope.scoring.energy.all_pairs.euclidean_sums` takes them.
    estimator
        ``U`` or ``V``.
    landmarks
        Number of cells to measure distances to.
    seed
        Seed of the choice of landmarks, and of the groups that are also mapped exactly.
    progress
        Called as ``progress("map", done, total)``, by group.

    Returns
    -------
    float32 [groups, groups], symmetric, 0 on the diagonal; and the error measured on some of it.
    """
    features = _Features.of(rows, origin, np.concatenate(members), landmarks, generator(seed, "landmarks"))
    means = np.empty((len(members), features.rank), dtype=np.float64)
    spread = np.empty(len(members))

    def one(number: int) -> None:
        means[number], spread[number] = features.moments(rows, members[number])

    for done, _ in enumerate(in_order(one, range(len(members))), start=1):
        if progress:
            progress("map", done, len(members))
    sizes = np.array([len(cells) for cells in members], dtype=np.float64)
    # The V estimator exceeds the U one by the distance within each group over its size.
    own = 2 * spread / (sizes - 1) if estimator == "U" else np.zeros_like(sizes)
    distances = _squared(means, own)
    error = _check(distances, rows, origin, members, estimator, generator(seed, "check"))
    distances *= np.float32(error.scale)
    return distances, error


@dataclass(frozen=True)
class _Features:
    """Computes features of vectors: their kernel with the landmarks times `weights` [L, rank]."""

    origin: NDArray[np.float64]
    landmarks: NDArray[np.float32]
    weights: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        rows: Vectors,
        origin: NDArray[np.float64],
        cells: NDArray[np.intp],
        count: int,
        rng: np.random.Generator,
    ) -> _Features:
        from scipy.linalg import eigh

        chosen = np.sort(rng.choice(cells, min(count, len(cells)), replace=False))
        landmarks = (rows[chosen] - origin).astype(np.float32)
        kernel = _kernel(landmarks, landmarks).astype(np.float64)
        np.fill_diagonal(kernel, np.linalg.norm(landmarks, axis=1))
        rank = min(len(chosen), max(MIN_RANK, count // RANK_SHARE))
        values, directions = eigh((kernel + kernel.T) / 2, subset_by_index=(len(chosen) - rank, len(chosen) - 1))
        kept = values > _SMALLEST * max(values[-1], np.finfo(np.float32).tiny)
        return cls(origin, landmarks, (directions[:, kept] / np.sqrt(values[kept])).astype(np.float32))

    @property
    def rank(self) -> int:
        return int(self.weights.shape[1])

    def moments(self, rows: Vectors, cells: NDArray[np.intp]) -> tuple[NDArray[np.float64], float]:
        """Return the mean features of some cells, and the mean squared distance of their features from it."""
        total, squares = np.zeros(self.rank), 0.0
        for start in range(0, len(cells), CHUNK):
            checkpoint()
            part = (rows[cells[start : start + CHUNK]] - self.origin).astype(np.float32)
            features = _kernel(part, self.landmarks) @ self.weights
            total += features.sum(axis=0, dtype=np.float64)
            squares += float(np.einsum("nr,nr->", features, features, dtype=np.float64))
        mean = total / len(cells)
        return mean, max(squares / len(cells) - float(mean @ mean), 0.0)


def _kernel(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``(|x| + |y| - |x - y|) / 2`` for all rows of two matrices."""
    squares_x: NDArray[np.float32] = np.einsum("nw,nw->n", x, x)
    squares_y: NDArray[np.float32] = np.einsum("nw,nw->n", y, y)
    kernel: NDArray[np.float32] = np.matmul(x * np.float32(-2), y.T)
    kernel += squares_x[:, None]
    kernel += squares_y
    np.maximum(kernel, 0, out=kernel)
    np.sqrt(kernel, out=kernel)
    np.negative(kernel, out=kernel)
    kernel += np.sqrt(squares_x)[:, None]
    kernel += np.sqrt(squares_y)
    kernel *= np.float32(0.5)
    return kernel


def _squared(means: NDArray[np.float64], own: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return twice the squared distances between rows of `means`, less both rows' own terms; 0 on the diagonal."""
    centred = (means - means.mean(axis=0)).astype(np.float32)
    squares = 2 * np.einsum("nr,nr->n", centred, centred, dtype=np.float64)
    distances: NDArray[np.float32] = np.matmul(centred, centred.T)
    distances *= -4
    for i, row in enumerate(distances):
        row += np.maximum(squares[i] + squares, -row) - (own[i] + own)
    np.fill_diagonal(distances, 0)
    return distances


def _check(
    distances: NDArray[np.float32],
    rows: Vectors,
    origin: NDArray[np.float64],
    members: Sequence[NDArray[np.intp]],
    estimator: Estimator,
    rng: np.random.Generator,
) -> LandmarkError:
    """Compare the distances of some groups with exact ones."""
    order = rng.permutation(len(members))[:CHECK_GROUPS]
    held = np.cumsum([len(members[i]) for i in order])
    chosen = order[: max(3, int((held <= CHECK_CELLS).sum()))]
    some = [members[i] for i in chosen]
    sizes = np.array([len(cells) for cells in some], dtype=np.int64)
    upper = np.triu_indices(len(chosen), 1)
    exact = energies(euclidean_sums(rows, origin, some), sizes, estimator)[upper].astype(np.float64)
    near = distances[np.ix_(chosen, chosen)][upper].astype(np.float64)
    length = float(near @ near)
    scale = float(near @ exact) / length if length > 0 else 1.0
    ranks = correlation(exact, near).spearman
    rmse = float(np.sqrt(np.mean((scale * near - exact) ** 2))) if len(exact) else 0.0
    median = float(np.median(exact)) if len(exact) else 0.0
    return LandmarkError(len(chosen), len(exact), scale, median, rmse, ranks)
