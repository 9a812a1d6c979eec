"""Consistency and magnitude of perturbations: similarity of their cells, and distance from other perturbations.

Both measures need no controls. They come from the EFAAR benchmarks of maps of perturbations (Celik et al. 2024,
recursionpharma/EFAAR_benchmarking), with these differences:

consistency
    EFAAR takes the mean angle among replicates, and random sets drawn from each batch with replacement. Here it is the
    mean cosine after centring by the mean of all perturbed cells (without it, vectors of a transformer all point the
    same way), and sets are drawn without replacement, so that p is that of an exact exchange of labels.
magnitude
    EFAAR takes the energy distance to controls. Here it is that to the other perturbed cells, so that an embedding
    gains nothing from a general difference between treated and untreated cells. The estimate is unbiased (U), where
    EFAAR's grows as cells get fewer; and p is never 0.

Both are relative to the rest. If a few perturbations have a strong effect, the rest contains it, and perturbations
without any effect differ from the rest by not having it: a small p says "unlike the others", not "unlike untreated".
With PCA on the screen of Papalexi et al. 2021, in which five of 22 targets share a pathway, all 22 are "detected" for
that reason. Perturbations named as `strong` are left out of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from evaluation.profiles import label_warnings
from perturbscope.errors import InvalidParameterError, TooFewCellsError
from perturbscope.scoring.distances import check_rows, unit_rows
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.pool import Pool
from perturbscope.scoring.labels import check_labels
from perturbscope.scoring.statistics import Exchange, benjamini_hochberg, empirical_p, generator

Progress = Callable[[str, int, int], None]

SIGNAL_COLUMNS = ("perturbation", "n_cells", "value", "null_mean", "null_sd", "z", "p", "q", "flags")
"""Columns of a table of either measure, in order."""
MOST = 0.8
"""Share of detected perturbations above which a warning names a possible cause."""
_NAN = float("nan")
_ZERO = 1e-6


@dataclass(frozen=True, eq=False)
class Signal:
    """One measure of every perturbation, with its null.

    Attributes
    ----------
    name
        ``consistency`` or ``magnitude``.
    table
        One row a perturbation, strongest z first: ``perturbation``, ``n_cells``, ``value``, ``null_mean``,
        ``null_sd``, ``z``, ``p``, ``q`` (Benjamini-Hochberg), ``flags``.
    detected
        Share of the perturbations with a p that have q < 0.05; NaN if none has a p.
    n_perturbations
        Number of perturbations with a p.
    warnings
        Sentences that a reader should know before trusting a number.
    """

    name: str
    table: pd.DataFrame
    detected: float
    n_perturbations: int
    warnings: list[str] = field(default_factory=list)


def consistency(
    values: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str | None = None,
    batches: Sequence[str] | None = None,
    strong: Collection[str] = (),
    min_cells: int = 10,
    max_cells: int = 2000,
    draws: int = 999,
    seed: int = 0,
    progress: Progress | None = None,
) -> Signal:
    """Measure the mean cosine similarity among the cells of each perturbation, and among random perturbed cells.

    Parameters
    ----------
    values
        One vector a cell, [n, width]; or one a replicate, with a small `min_cells`.
    perturbations
        Perturbation of each cell.
    control
        Label of cells to leave out.
    batches
        Batch of each cell; random sets then have as many cells of each batch as the perturbation.
    strong
        Perturbations that are judged, but belong neither to the rest nor to the centre of the others.
    min_cells
        Fewest cells of a perturbation.
    max_cells
        Most cells of a perturbation, and of the rest beside it; more are sampled.
    draws
        Number of random sets.
    seed
        Seed of all draws.
    progress
        Called as ``progress("consistency", done, total)``, by perturbation.

    Raises
    ------
    InvalidEmbeddingError
        The values are not a finite matrix.
    MalformedMatrixError, InvalidParameterError
        The number of labels differs from that of cells, a label is missing, or an option is out of range.
    TooFewCellsError
        No perturbation has `min_cells` cells.
    """
    cells = _Cells.of(values, perturbations, control, batches, strong, min_cells, max_cells, draws, seed)
    at = cells.reference if len(cells.reference) else slice(None)
    centred = cells.rows - cells.rows[at].mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    largest = float(np.linalg.norm(cells.rows, axis=1).max())
    flat = lengths[:, 0] <= _ZERO * largest
    unit = np.divide(centred, lengths, out=np.zeros_like(centred), where=~flat[:, None]).astype(np.float32)

    def statistic(own: NDArray[np.intp], rest: NDArray[np.intp]) -> _Statistic | None:
        if flat[own].all():
            return None
        pool = unit[np.concatenate([own, rest])]
        squares = (pool * pool).sum(axis=1)
        n = len(own)

        def of_sets(members: NDArray[np.float32]) -> NDArray[np.float64]:
            totals = (members.T @ pool).astype(np.float64)
            mean: NDArray[np.float64] = ((totals**2).sum(axis=1) - members.T @ squares) / (n * (n - 1))
            return mean

        return _Statistic(float(of_sets(_first(n, len(pool)))[0]), 1e-6, of_sets)

    return cells.judge("consistency", statistic, progress)


def magnitude(
    values: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str | None = None,
    batches: Sequence[str] | None = None,
    strong: Collection[str] = (),
    min_cells: int = 10,
    max_cells: int = 1000,
    draws: int = 499,
    normalize: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Signal:
    """Measure the energy distance (U, unsquared Euclidean) of each perturbation to the cells of all others.

    Parameters
    ----------
    normalize
        Whether to scale every vector to unit length first, as scoring does.
    values, perturbations, control, batches, strong, min_cells, max_cells, draws, seed, progress
        See :func:`consistency`; `draws` are exchanges of labels, and time grows with the square of `max_cells`.

    Raises
    ------
    InvalidEmbeddingError, MalformedMatrixError, InvalidParameterError, TooFewCellsError
        See :func:`consistency`; InvalidEmbeddingError also for a zero row if vectors are scaled.
    """
    cells = _Cells.of(values, perturbations, control, batches, strong, min_cells, max_cells, draws, seed)
    rows = unit_rows(cells.rows) if normalize else cells.rows

    def statistic(own: NDArray[np.intp], rest: NDArray[np.intp]) -> _Statistic | None:
        pool = Pool(DenseGroup(rows[own]), DenseGroup(rows[rest]), "U")
        if pool.total == 0:
            return None
        return _Statistic(pool.observed, pool.noise, pool.split)

    return cells.judge("magnitude", statistic, progress)


@dataclass(frozen=True)
class _Statistic:
    """A measured value, the difference up to which two values are equal, and the values of sets of the pooled cells."""

    observed: float
    noise: float
    of_sets: Callable[[NDArray[np.float32]], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class _Cells:
    """Perturbed cells, and the options of their comparison."""

    rows: NDArray[np.float64]
    members: dict[str, NDArray[np.intp]]
    reference: NDArray[np.intp]
    batches: NDArray[np.intp] | None
    min_cells: int
    max_cells: int
    draws: int
    seed: int

    @classmethod
    def of(
        cls,
        values: Any,
        perturbations: Sequence[str],
        control: str | None,
        batches: Sequence[str] | None,
        strong: Collection[str],
        min_cells: int,
        max_cells: int,
        draws: int,
        seed: int,
    ) -> _Cells:
        if min_cells < 2 or max_cells < min_cells or draws < 1:
            name = "min_cells" if min_cells < 2 else "draws" if draws < 1 else "max_cells"
            raise InvalidParameterError(
                f"min_cells is {min_cells} (2 or more), max_cells {max_cells} (min_cells or more), draws {draws} "
                "(1 or more).",
                field=name,
            )
        rows = check_rows(values)
        labels = check_labels(perturbations, len(rows), "perturbations")
        codes = None
        if batches is not None:
            codes = np.unique(check_labels(batches, len(rows), "batches"), return_inverse=True)[1]
        perturbed = np.arange(len(rows)) if control is None else np.flatnonzero(labels != control)
        if not len(perturbed):
            raise TooFewCellsError("Every cell is a control; there is no perturbation.", field="perturbations")
        names, inverse = np.unique(labels[perturbed], return_inverse=True)
        members = {str(name): np.flatnonzero(inverse == code) for code, name in enumerate(names)}
        unknown = sorted(set(strong) - set(members))
        if unknown:
            raise InvalidParameterError(f"strong names {unknown[0]!r}, which is no perturbation here.", field="strong")
        largest = max(map(len, members.values()))
        if largest < min_cells:
            raise TooFewCellsError(
                f"No perturbation has {min_cells} cells or more; the largest has {largest}. Lower min_cells.",
                field="perturbations",
            )
        return cls(
            rows[perturbed].astype(np.float64),
            members,
            np.flatnonzero(~np.isin(labels[perturbed], list(strong))),
            None if codes is None else codes[perturbed],
            min_cells,
            max_cells,
            draws,
            seed,
        )

    def judge(
        self,
        name: str,
        statistic: Callable[[NDArray[np.intp], NDArray[np.intp]], _Statistic | None],
        progress: Progress | None,
    ) -> Signal:
        """Compute the statistic of every perturbation, and its null from exchanged labels."""
        rows = []
        for done, (label, own) in enumerate(self.members.items(), start=1):
            rows.append({"perturbation": label, "n_cells": len(own), **self._row(name, label, own, statistic)})
            if progress:
                progress(name, done, len(self.members))
        table = pd.DataFrame(rows)
        table["q"] = benjamini_hochberg(table["p"])
        table = table[list(SIGNAL_COLUMNS)].sort_values(
            ["z", "value", "perturbation"], ascending=[False, False, True], ignore_index=True
        )
        known = table["p"].notna()
        detected = float((table.loc[known, "q"] < 0.05).mean()) if known.any() else _NAN
        return Signal(name, table, detected, int(known.sum()), self._warnings(table))

    def _row(
        self,
        name: str,
        label: str,
        own: NDArray[np.intp],
        statistic: Callable[[NDArray[np.intp], NDArray[np.intp]], _Statistic | None],
    ) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(("value", "null_mean", "null_sd", "z", "p"), _NAN)
        rng = generator(self.seed, name, label)
        rest = np.setdiff1d(self.reference, own, assume_unique=True)
        if len(own) < self.min_cells or len(rest) < self.min_cells:
            return {**row, "flags": "too_few_cells" if len(own) < self.min_cells else "no_other_cells"}
        flags = ["cells_subsampled"] if len(own) > self.max_cells else []
        own, rest = self._sample(own, rng), self._sample(rest, rng, like=own)
        measured = statistic(own, rest)
        if measured is None:
            return {**row, "flags": ";".join([*flags, "constant_embeddings"])}
        row["value"] = measured.observed
        pooled = None if self.batches is None else self.batches[np.concatenate([own, rest])]
        exchange = Exchange.of(len(own), len(rest), pooled)
        if not exchange.blocks:
            return {**row, "flags": ";".join([*flags, "batch_confounded"])}
        if len(exchange.fixed):
            flags.append("batch_partly_confounded")
        null = np.concatenate(list(map(measured.of_sets, exchange.draw(self.draws, rng))))
        row["null_mean"], row["null_sd"] = float(null.mean()), float(null.std())
        if row["null_sd"] > measured.noise:
            row["z"] = (measured.observed - row["null_mean"]) / row["null_sd"]
        row["p"] = empirical_p(measured.observed, null, noise=measured.noise)
        return {**row, "flags": ";".join(flags)}

    def _sample(
        self, cells: NDArray[np.intp], rng: np.random.Generator, *, like: NDArray[np.intp] | None = None
    ) -> NDArray[np.intp]:
        """Sample at most `max_cells` of these cells; with batches, only from batches of `like`, if they have any."""
        if like is not None and self.batches is not None:
            shared = cells[np.isin(self.batches[cells], np.unique(self.batches[like]))]
            cells = shared if len(shared) else cells
        if len(cells) <= self.max_cells:
            return cells
        return np.sort(rng.choice(cells, self.max_cells, replace=False))

    def _warnings(self, table: pd.DataFrame) -> list[str]:
        texts = {
            "too_few_cells": f"have fewer than {self.min_cells} cells and were not judged",
            "no_other_cells": "stand alone: there are no cells of other perturbations to compare with",
            "constant_embeddings": "have one and the same vector in all cells",
            "batch_confounded": "share no batch with another perturbation, so p is undefined",
            "batch_partly_confounded": "have cells in batches of their own, which are never exchanged",
        }
        warnings = label_warnings(self.members)
        for flag, text in texts.items():
            count = sum(flag in flags.split(";") for flags in table["flags"])
            if count:
                warnings.append(f"{count} of {len(table)} perturbations {text}.")
        known = table["p"].notna()
        if known.sum() > 2 and (table.loc[known, "q"] < 0.05).mean() > MOST:
            warnings.append(
                "Nearly every perturbation differs from the rest. A few strong ones within the rest are enough for "
                "that; name them as strong, so that they are left out of it, before reading this as many effects."
            )
        return warnings


def _first(n: int, size: int) -> NDArray[np.float32]:
    """Return the first n of `size` cells as a set, [size, 1]."""
    members = np.zeros((size, 1), dtype=np.float32)
    members[:n] = 1
    return members
