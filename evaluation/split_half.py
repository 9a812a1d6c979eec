"""Agreement of random halves of each perturbation's cells, without controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from evaluation.profiles import Profiles, Whitening, group_means, label_warnings, make_profiles, random_halves, whiten
from perturbscope.errors import InvalidParameterError

_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class SplitHalf:
    """Agreement of random halves of each perturbation's cells.

    Attributes
    ----------
    table
        One row a perturbation: ``perturbation``, ``n_cells``, ``correlation`` (Pearson's, over dimensions, of its two
        centred halves; mean over repeats), ``correlation_sd`` over repeats, ``mismatch`` (mean correlation with
        the other perturbations' other halves), ``accuracy`` (how often its own other half is the nearest).
    correlation, mismatch, accuracy
        Means over perturbations.
    chance
        Accuracy of guessing.
    n_perturbations, repeats
        Numbers of perturbations and of halvings.
    warnings
        Sentences that a reader should know before trusting a number.
    """

    table: pd.DataFrame
    correlation: float
    mismatch: float
    accuracy: float
    chance: float
    n_perturbations: int
    repeats: int
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON-able values, without the table."""
        return {name: value for name, value in vars(self).items() if name != "table"}


def split_half(
    values: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str | None = None,
    batches: Sequence[str] | None = None,
    whitening: Whitening = "none",
    min_cells: int = 10,
    repeats: int = 20,
    seed: int = 0,
) -> SplitHalf:
    """Correlate, and match, the mean vectors of random halves of each perturbation's cells.

    Each half is centred by the mean of its own cells, so that the two halves share no noise.

    Parameters
    ----------
    values, perturbations, control, whitening
        See :func:`evaluation.retrieval.retrieve`.
    batches
        Batch of each cell; both halves then have as many cells of each batch.
    min_cells
        Fewest cells of a perturbation, both halves together.
    repeats
        Number of random halvings.
    seed
        Seed of the halvings.

    Raises
    ------
    InvalidEmbeddingError, MalformedMatrixError, InvalidParameterError, TooFewCellsError
        See :func:`evaluation.profiles.make_profiles`.
    """
    if repeats < 1 or min_cells < 4:
        raise InvalidParameterError(
            f"repeats is {repeats} (1 or more) and min_cells {min_cells} (4 or more).",
            field="repeats" if repeats < 1 else "min_cells",
        )
    labels = list(perturbations)
    # One profile a perturbation first: it checks the input, and whitening must not see which half a cell is in.
    whole = make_profiles(values, labels, ["all"] * len(labels), control=control, min_cells=min_cells)
    names = whole.perturbations
    column = np.asarray(labels, dtype=object).astype(str)
    rows = np.flatnonzero(np.isin(column, names))
    codes = np.searchsorted(names, column[rows])
    cells = whiten(np.asarray(values)[rows], codes, how=whitening)
    row_batches = None if batches is None else [list(batches)[i] for i in rows]
    correlations, mismatches, hits = (np.full((repeats, len(names)), _NAN) for _ in range(3))
    constant = False
    for repeat in range(repeats):
        halves = np.asarray(random_halves(column[rows].tolist(), seed=seed, batches=row_batches, repeat=repeat))
        sides = []
        for half in ("A", "B"):
            members = np.flatnonzero(halves == half)
            means = group_means(cells[members], codes[members], len(names))
            sizes = np.bincount(codes[members], minlength=len(names)).astype(np.intp)
            vectors, directed = Profiles(means, names, names, sizes).directions("cells")
            constant |= not bool(directed.all())
            sides.append(_standard(vectors))
        similarity = sides[0] @ sides[1].T
        similarity[~np.isfinite(similarity)] = _NAN
        matched = similarity.diagonal().copy()
        correlations[repeat] = matched
        if len(names) > 1:
            others = np.nansum(similarity, axis=1) - np.nan_to_num(matched)
            mismatches[repeat] = others / (len(names) - 1)
            rivals = similarity.copy()
            np.fill_diagonal(rivals, -np.inf)
            with np.errstate(invalid="ignore"):
                forth, back = matched > rivals.max(axis=1), matched > rivals.max(axis=0)
            hits[repeat] = np.where(np.isnan(matched), _NAN, (forth.astype(float) + back) / 2)
    warnings = label_warnings(names.tolist())
    if len(names) == 1:
        warnings.append(f"Only {names[0]!r} has {min_cells} cells or more: nothing to tell it from.")
    if constant or np.isnan(correlations).any():
        warnings.append("Some halves have no direction (constant or one-dimensional embeddings); they are not counted.")
    table = pd.DataFrame(
        {
            "perturbation": names.astype(object),
            "n_cells": whole.sizes,
            "correlation": _column_means(correlations),
            "correlation_sd": np.sqrt(_column_means((correlations - _column_means(correlations)) ** 2)),
            "mismatch": _column_means(mismatches),
            "accuracy": _column_means(hits),
        }
    )
    return SplitHalf(
        table.sort_values(["correlation", "perturbation"], ascending=[False, True], ignore_index=True),
        float(table["correlation"].mean()),
        float(table["mismatch"].mean()),
        float(table["accuracy"].mean()),
        1 / len(names),
        len(names),
        repeats,
        warnings,
    )


def _standard(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows with mean 0 and unit length, whose dot products are Pearson correlations; constant rows are NaN."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit: NDArray[np.float64] = np.divide(centred, lengths, out=np.full_like(centred, _NAN), where=lengths > 1e-12)
    return unit


def _column_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return means of columns without their NaN; NaN if nothing is left."""
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    sums = np.where(known, values, 0.0).sum(axis=0)
    means: NDArray[np.float64] = np.where(counts > 0, sums / np.maximum(counts, 1), _NAN)
    return means
