"""Mean vectors of groups of cells, which the measures without controls compare.

A profile is the mean vector of the cells of one perturbation in one replicate: a guide, a batch, or a random half.
Control cells are not the reference here: vectors are centred by the mean of the perturbed cells themselves, so an
embedding gains nothing by moving all treated cells away from all untreated ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from perturbscope.errors import InvalidParameterError, TooFewCellsError
from perturbscope.scoring.distances import check_rows
from perturbscope.scoring.labels import check_labels
from perturbscope.scoring.results import one_of
from perturbscope.scoring.statistics import generator

Whitening = Literal["none", "standardize", "sphere"]
Centre = Literal["cells", "profiles", "replicate"]

RIDGE = 1e-3
"""Share of the mean within-profile variance that sphering adds to every direction, so that none is magnified."""
_ZERO = 1e-6
"""Share of the largest profile's length below which a centred profile is rounding noise and has no direction."""


@dataclass(frozen=True, eq=False)
class Profiles:
    """Mean vectors by perturbation and replicate, in the order of their names.

    Attributes
    ----------
    vectors
        Mean vectors, float64 [n_profiles, width].
    perturbations, replicates
        Names of each profile, str [n_profiles].
    sizes
        Number of cells of each profile, int [n_profiles].
    dropped
        Perturbation and replicate of the profiles with too few cells.
    """

    vectors: NDArray[np.float64]
    perturbations: NDArray[np.str_]
    replicates: NDArray[np.str_]
    sizes: NDArray[np.intp]
    dropped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    def directions(self, centre: Centre) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return centred vectors of unit length, [n_profiles, width], and a mask of those that have a direction.

        Parameters
        ----------
        centre
            Mean to subtract. ``cells``: over all cells of all profiles. ``profiles``: over the profiles, whatever their
            sizes; without any effect it makes large profiles resemble each other, since each is then minus the noise
            of the small ones. ``replicate``: over the cells of the profile's own replicate, which removes shifts
            between batches; a replicate of one perturbation then has no direction.
        """
        one_of("centre", centre, get_args(Centre))
        weights = np.ones(len(self)) if centre == "profiles" else self.sizes.astype(np.float64)
        names = self.replicates if centre == "replicate" else np.zeros(len(self), dtype=int)
        centred = np.empty_like(self.vectors)
        for name in np.unique(names):
            own = np.flatnonzero(names == name)
            centred[own] = self.vectors[own] - np.average(self.vectors[own], axis=0, weights=weights[own])
        lengths = np.linalg.norm(centred, axis=1)
        directed = lengths > _ZERO * max(float(np.linalg.norm(self.vectors, axis=1).max(initial=0.0)), 1e-300)
        centred[directed] /= lengths[directed, None]
        centred[~directed] = 0.0
        return centred, directed


def make_profiles(
    values: ArrayLike,
    perturbations: Sequence[str],
    replicates: Sequence[str],
    *,
    control: str | None = None,
    min_cells: int = 5,
    whitening: Whitening = "none",
) -> Profiles:
    """Return the mean vector of every perturbation in every replicate.

    Parameters
    ----------
    values
        One vector a cell, [n, width].
    perturbations, replicates
        Labels of each cell.
    control
        Label of cells to leave out.
    min_cells
        Fewest cells of a profile; smaller ones are left out.
    whitening
        See :func:`whiten`; it is fitted to the cells of the profiles.

    Raises
    ------
    InvalidEmbeddingError
        The values are not a finite matrix.
    MalformedMatrixError, InvalidParameterError
        The number of labels differs from that of cells, a label is missing, or an option is out of range.
    TooFewCellsError
        No profile has `min_cells` cells.
    """
    rows = check_rows(values)
    labels = check_labels(perturbations, len(rows), "perturbations")
    parts = check_labels(replicates, len(rows), "replicates")
    if min_cells < 1:
        raise InvalidParameterError(f"min_cells must be 1 or more, not {min_cells}.", field="min_cells")
    perturbed = np.arange(len(rows)) if control is None else np.flatnonzero(labels != control)
    keys = pd.MultiIndex.from_arrays([labels[perturbed], parts[perturbed]])
    codes, names = keys.factorize(sort=True)
    sizes = np.bincount(codes, minlength=len(names))
    large = np.flatnonzero(sizes >= min_cells)
    if not len(large):
        raise TooFewCellsError(
            f"No perturbation has {min_cells} cells or more in a replicate (the most is {sizes.max(initial=0)}). "
            "Lower min_cells, or take larger replicates.",
            field="perturbations",
        )
    inside = np.isin(codes, large)
    perturbed, codes = perturbed[inside], np.searchsorted(large, codes[inside])
    cells = whiten(rows[perturbed], codes, how=whitening)
    listed = [(str(a), str(b)) for a, b in names]
    return Profiles(
        group_means(cells, codes, len(large)),
        np.array([listed[i][0] for i in large]),
        np.array([listed[i][1] for i in large]),
        sizes[large].astype(np.intp),
        tuple(listed[i] for i in np.flatnonzero(sizes < min_cells)),
    )


def group_means(values: NDArray[Any], codes: NDArray[np.intp], n_groups: int) -> NDArray[np.float64]:
    """Return the mean row of each group 0 .. n_groups - 1, none of which is empty; float64 [n_groups, width]."""
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes, minlength=n_groups)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    sums: NDArray[np.float64] = np.add.reduceat(values[order], starts, axis=0, dtype=np.float64)
    return sums / sizes[:, None]


def whiten(values: NDArray[Any], codes: NDArray[np.intp], *, how: Whitening) -> NDArray[Any]:
    """Transform cells so that noise has the same size in every direction; the origin stays.

    Parameters
    ----------
    values
        Vectors, [n, width].
    codes
        Group of each cell, from 0. Noise is the variation within groups, so no control is needed.
    how
        ``none``; ``standardize``: every dimension divided by its standard deviation within groups; ``sphere``: the
        inverse square root of the covariance within groups, plus a ridge of :data:`RIDGE` of its mean variance.
    """
    one_of("whitening", how, get_args(Whitening))
    if how == "none":
        return values
    n_groups = int(codes.max()) + 1
    residuals = values - group_means(values, codes, n_groups)[codes]
    freedom = max(len(values) - n_groups, 1)
    if how == "standardize":
        sd = np.sqrt((residuals * residuals).sum(axis=0) / freedom)
        scaled: NDArray[Any] = values / np.where(sd > 0, sd, 1.0)
        return scaled
    variances, axes = np.linalg.eigh(residuals.T @ residuals / freedom)
    floor = RIDGE * max(float(variances.mean()), np.finfo(np.float64).tiny)
    turned: NDArray[Any] = (values @ axes) / np.sqrt(np.maximum(variances, 0.0) + floor)
    return turned


def random_halves(
    perturbations: Sequence[str], *, seed: int = 0, batches: Sequence[str] | None = None, repeat: int = 0
) -> list[str]:
    """Assign ``"A"`` or ``"B"`` to every cell: random halves of each perturbation, and of each of its batches if given.

    Draws of one perturbation do not depend on the others. An odd cell goes to either half with equal chance.
    """
    labels = check_labels(perturbations, len(perturbations), "perturbations")
    parts = np.zeros(len(labels), dtype=int)
    if batches is not None:
        parts = np.unique(check_labels(batches, len(labels), "batches"), return_inverse=True)[1]
    halves = np.empty(len(labels), dtype=object)
    for name in np.unique(labels):
        rng = generator(seed, "halves", repeat, name)
        mine = np.flatnonzero(labels == name)
        for part in np.unique(parts[mine]):
            cells = rng.permutation(mine[parts[mine] == part])
            first = (len(cells) + int(rng.integers(2))) // 2
            halves[cells[:first]], halves[cells[first:]] = "A", "B"
    return [str(half) for half in halves]


def label_warnings(names: Iterable[str]) -> list[str]:
    """Return a warning if labels differ only in case or white space, so that one perturbation may pass for two."""
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(" ".join(name.split()).casefold(), []).append(name)
    twice = [same for same in by_key.values() if len(same) > 1]
    if not twice:
        return []
    listed = ", ".join(" and ".join(map(repr, same)) for same in twice[:3])
    return [
        f"Labels that differ only in case or white space are taken as different perturbations ({len(twice)} cases): "
        f"{listed}. Merge them if they are one."
    ]
