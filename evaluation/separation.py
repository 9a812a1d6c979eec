"""Separation of perturbed cells from control and from each other: the table of Zhao et al. (2025), in two modes.

``size_matched``
    Unbiased E-distance, mean over ten control samples, with a null of the same size, so that z of few and of many cells
    mean the same.
``paper``
    One control sample as large as the perturbation, with ONE null for all: 300 controls against 300 others, or as many
    as the controls allow. For a perturbation with fewer cells than that, z is spread too widely.

Vectors of all models are scaled to unit length first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.screens import EvaluationScreen
from perturbscope.errors import (
    ControlLabelMissingError,
    InvalidParameterError,
    TooFewCellsError,
    TooFewControlsError,
)
from perturbscope.scoring.calibration import CALIBRATION_PERMUTATIONS, Calibration, calibrate
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.energy.pool import moments_of, null_moments
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.results import Metric, ScoreOptions, distribution
from perturbscope.scoring.scorers import GroupMaker, TransportScorer
from perturbscope.scoring.statistics import correlation, generator

ENERGY: tuple[Metric, ...] = ("e_distance", "cosine_e_distance")
PAPER_NULL = 300
"""Number of controls in each group of the paper's null."""
FDR = 0.05
"""q below which a perturbation is detected."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SeparationOptions:
    """Options of the measures of separation.

    Parameters
    ----------
    permutations
        Number of exchanges of labels behind p of the size-matched E-distance.
    splits
        Number of control-against-control splits of each kind.
    transport_cells
        Most cells of a perturbation for the Wasserstein distance, which is slow, with twice as many controls; 0 leaves
        the metric out.
    transport_draws
        Number of draws behind the null of the Wasserstein distance.
    min_cells, max_cells
        Fewest and most cells of a group.
    pairs
        Whether to compare perturbations with each other as well.
    seed
        Seed of all draws.

    Raises
    ------
    InvalidParameterError
        `transport_cells` is below `min_cells`.
    """

    permutations: int = 1000
    splits: int = 200
    transport_cells: int = 200
    transport_draws: int = 20
    min_cells: int = 20
    max_cells: int = 2500
    pairs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if 0 < self.transport_cells < self.min_cells:
            raise InvalidParameterError(
                f"transport_cells is {self.transport_cells}, below min_cells ({self.min_cells}); raise it (0: none).",
                field="transport_cells",
            )

    def score_options(self, **changes: Any) -> ScoreOptions:
        """Return options of scoring, size-matched unless `changes` say otherwise."""
        options = ScoreOptions(
            metrics=ENERGY,
            permutations=self.permutations,
            min_cells=self.min_cells,
            max_cells=self.max_cells,
            seed=self.seed,
        )
        return replace(options, **changes)


@dataclass(frozen=True)
class Separation:
    """Separation of one screen's perturbations in one embedding.

    Attributes
    ----------
    scores
        Scores of perturbations against control: ``context``, ``mode``, and the columns of a table of scores.
    pairs
        Distances of perturbations from each other, one row a pair:
        ``context, mode, a, b, n_a, n_b, metric, distance, z``.
    null
        Scores of controls against controls, one row a split: ``context, metric, kind, p, z``.
    batches
        z (size-matched E-distance) of every perturbation in every batch that has controls: ``context, batch,
        perturbation, n_cells, z``.
    warnings
        Sentences that a reader should know before trusting a number.
    """

    scores: pd.DataFrame
    pairs: pd.DataFrame
    null: pd.DataFrame
    batches: pd.DataFrame
    warnings: list[str]


def measure_separation(
    values: NDArray[np.float32],
    screen: EvaluationScreen,
    *,
    options: SeparationOptions | None = None,
    progress: Progress | None = None,
) -> Separation:
    """Score an embedding of a screen's cells, context by context.

    Parameters
    ----------
    values
        One vector a cell, [n_cells, width].
    screen
        Labels of the same cells.
    progress
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    InvalidEmbeddingError
        A vector is not finite, or zero.
    TooFewControlsError, TooFewCellsError
        No context has enough controls and a perturbation with enough cells.
    """
    options = options or SeparationOptions()
    scores, pairs, nulls, batches = [], [], [], []
    warnings: list[str] = []
    null_sizes: list[int] = []
    too_few: TooFewControlsError | TooFewCellsError | None = None
    for name, part in contexts(screen):
        rows, subset = values[part], screen[part]
        try:
            scores.append(_scores(rows, subset, options, warnings, progress).assign(context=name))
        except (TooFewControlsError, TooFewCellsError) as error:
            if not name:
                raise
            warnings.append(f"{name} was left out: {error.message}")
            too_few = error
            continue
        null_sizes.append(paper_null_size(subset.perturbations.count(subset.control)))
        if options.pairs and len(set(subset.perturbations)) > 2:
            pairs.append(_pairs(rows, subset, options, progress).assign(context=name))
        null = calibrate(
            rows,
            subset.perturbations,
            control=subset.control,
            batches=subset.batches,
            options=options.score_options(),
            splits=options.splits,
            progress=progress,
        )
        warnings += [f"{name}: {warning}" if name else warning for warning in null.warnings]
        nulls.append(_null_rows(null).assign(context=name))
        batches.append(_by_batch(rows, subset, options).assign(context=name))
    if not scores:
        raise too_few or TooFewCellsError("There is nothing to score.", field="perturbations")
    if min(null_sizes) < PAPER_NULL:
        span = f"{min(null_sizes)}" + (f" to {max(null_sizes)}" if max(null_sizes) > min(null_sizes) else "")
        warnings.insert(0, f"Paper mode: the controls allow a null of {span} cells a group, not {PAPER_NULL}.")
    return Separation(_joined(scores), _joined(pairs), _joined(nulls), _joined(batches), list(dict.fromkeys(warnings)))


def contexts(screen: EvaluationScreen) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield name and cells of each context with controls and perturbed cells; one without a name if there are none."""
    if screen.contexts is None:
        yield "", np.arange(len(screen))
        return
    names, labels = np.asarray(screen.contexts), np.asarray(screen.perturbations)
    for name in np.unique(names):
        part = np.flatnonzero(names == name)
        control = labels[part] == screen.control
        if control.any() and not control.all():
            yield str(name), part


def paper_null_size(n_controls: int) -> int:
    """Return the controls in a group of the paper's null: 300, or half of the controls if there are fewer than 600."""
    return min(PAPER_NULL, n_controls // 2)


def _scores(
    values: NDArray[np.float32],
    screen: EvaluationScreen,
    options: SeparationOptions,
    warnings: list[str],
    progress: Progress | None,
) -> pd.DataFrame:
    labels, control = screen.perturbations, screen.control
    matched = score_perturbations(
        values,
        labels,
        control=control,
        batches=screen.batches,
        options=options.score_options(),
        progress=progress,
    )
    warnings += [text for text in matched.warnings if "batch" in text or "fewer than" in text]
    size = paper_null_size(labels.count(control))
    fixed = {"null": "fixed", "repeats": 1, "permutations": 1}
    paper = score_perturbations(
        values, labels, control=control, options=options.score_options(null_size=size, **fixed)
    ).table.assign(p=np.nan, q=np.nan)
    tables = [matched.table.assign(mode="size_matched"), paper.assign(mode="paper")]
    if options.transport_cells:
        chosen = _transport_cells(screen, options)
        rows, part = values[chosen], screen[chosen]
        transport = {
            "metrics": ("wasserstein",),
            "null_draws": options.transport_draws,
            "wasserstein_permutations": options.transport_draws,
        }
        for mode, changes in (
            ("size_matched", {"repeats": 2}),
            ("paper", {**fixed, "null_size": min(options.transport_cells, part.perturbations.count(control) // 2)}),
        ):
            table = score_perturbations(
                rows, part.perturbations, control=control, options=options.score_options(**transport, **changes)
            ).table
            tables.append(table.assign(p=np.nan, q=np.nan, mode=mode))
    return pd.concat(tables, ignore_index=True)


def _pairs(
    values: NDArray[np.float32], screen: EvaluationScreen, options: SeparationOptions, progress: Progress | None
) -> pd.DataFrame:
    """Measure distances between perturbations; both nulls are of controls, in closed form for the energy distances."""
    labels, control = screen.perturbations, screen.control
    score = options.score_options(permutations=1)
    table = compare_perturbations(values, labels, control=control, options=score, progress=progress).table
    columns = ["a", "b", "n_a", "n_b", "metric", "distance", "z"]
    groups = Groups.of(values, labels, None, score, control=control)
    size = paper_null_size(groups.sizes[control])
    fixed = []
    for metric in ENERGY:
        controls = GroupMaker(metric, groups, score).make(groups.members[control])
        mean, sd = null_moments(moments_of(controls), size, size, pool=size, repeats=1, estimator="U")
        rows = table[table["metric"] == metric]
        fixed.append(rows.assign(mode="paper", z=(rows["distance"] - mean) / sd if sd > 0 else np.nan))
    tables = [table.assign(mode="size_matched"), *fixed]
    if options.transport_cells:
        tables += _transport_pairs(values, screen, options)
    return pd.concat(tables, ignore_index=True)[["mode", *columns]]


def _transport_pairs(
    values: NDArray[np.float32], screen: EvaluationScreen, options: SeparationOptions
) -> list[pd.DataFrame]:
    """Measure Wasserstein distances of groups of ONE size, so that one null serves both modes; skip smaller groups."""
    chosen = _transport_cells(screen, options)
    rows, part = values[chosen], screen[chosen]
    size = min(options.transport_cells, part.perturbations.count(screen.control) // 2)
    labels = np.asarray(part.perturbations)
    names, counts = np.unique(labels[labels != screen.control], return_counts=True)
    full = names[counts >= size]
    if len(full) < 2:
        return []
    rng = generator(options.seed, "transport pairs")
    picked = [rng.choice(np.flatnonzero(labels == name), size, replace=False) for name in full]
    keep = np.concatenate([*picked, np.flatnonzero(labels == screen.control)])
    score = options.score_options(
        metrics=("wasserstein",), repeats=1, null_draws=options.transport_draws, wasserstein_permutations=1
    )
    table = compare_perturbations(rows[keep], labels[keep].tolist(), control=screen.control, options=score).table
    groups = Groups.of(rows[keep], labels[keep].tolist(), None, score, control=screen.control)
    mean, sd = TransportScorer(groups, groups.members[screen.control], score).null(size)
    table["z"] = (table["distance"] - mean) / sd if sd > 0 else np.nan
    return [table.assign(mode=mode) for mode in ("size_matched", "paper")]


def _transport_cells(screen: EvaluationScreen, options: SeparationOptions) -> NDArray[np.intp]:
    """Sample at most `transport_cells` cells of each perturbation, and twice as many controls."""
    labels = np.asarray(screen.perturbations)
    sampled = []
    for name in np.unique(labels):
        cells = np.flatnonzero(labels == name)
        most = options.transport_cells * (2 if name == screen.control else 1)
        if len(cells) > most:
            cells = generator(options.seed, "transport", str(name)).choice(cells, most, replace=False)
        sampled.append(cells)
    return np.sort(np.concatenate(sampled))


def _null_rows(null: Calibration) -> pd.DataFrame:
    tables = [
        pd.DataFrame({"metric": part.metric, "kind": part.kind, "p": part.p, "z": part.z[: len(part.p)]})
        for part in null.sets
        if len(part.p) == len(part.z)
    ]
    return _joined(tables)


def _by_batch(values: NDArray[np.float32], screen: EvaluationScreen, options: SeparationOptions) -> pd.DataFrame:
    """Score within each batch that has enough controls, since an effect in one batch should recur in another."""
    columns = ["batch", "perturbation", "n_cells", "z"]
    if screen.batches is None:
        return pd.DataFrame(columns=columns)
    tables = []
    names = np.asarray(screen.batches)
    for name in np.unique(names):
        part = np.flatnonzero(names == name)
        try:
            table = score_perturbations(
                values[part],
                [screen.perturbations[row] for row in part],
                control=screen.control,
                options=options.score_options(metrics=("e_distance",), permutations=1),
            ).table
        except (ControlLabelMissingError, TooFewCellsError, TooFewControlsError):
            continue
        tables.append(table.assign(batch=str(name))[columns])
    return _joined(tables) if tables else pd.DataFrame(columns=columns)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    full = [table for table in tables if len(table)]
    return pd.concat(full, ignore_index=True) if full else pd.DataFrame()


def batch_agreement(batches: pd.DataFrame) -> pd.DataFrame:
    """Correlate z between every two batches, over the perturbations scored in both.

    Returns
    -------
    A table with one row a pair of batches: ``a, b, n, pearson, spearman``.
    """
    if not len(batches):
        return pd.DataFrame(columns=["a", "b", "n", "pearson", "spearman"])
    wide = batches.pivot_table(index=["context", "perturbation"], columns="batch", values="z", dropna=False)
    rows = []
    names = [str(name) for name in wide.columns]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            result = correlation(wide[a].to_numpy(), wide[b].to_numpy())
            rows.append({"a": a, "b": b, "n": result.n, "pearson": result.pearson, "spearman": result.spearman})
    return pd.DataFrame(rows, columns=["a", "b", "n", "pearson", "spearman"])


def detection(separation: Separation, metric: Metric = "e_distance") -> dict[str, float]:
    """Return the share of perturbations with q < 0.05, and of pretended ones that would pass the same threshold of p.

    Returns
    -------
    ``n``, ``detected``, ``threshold`` (largest p with q < 0.05; NaN if there is none) and ``pretended``: share of the
    control-against-control splits by cell whose p is at most that, or at most 0.005, the smallest p of a split; 0 if
    nothing was detected.
    """
    scores = separation.scores
    rows = scores[(scores["mode"] == "size_matched") & (scores["metric"] == metric) & scores["p"].notna()]
    hits = rows[rows["q"] < FDR]
    null = separation.null
    p = null.loc[(null["metric"] == metric) & (null["kind"] == "cell"), "p"] if len(null) else pd.Series(dtype=float)
    threshold = float(hits["p"].max()) if len(hits) else float("nan")
    smallest = 1 / (1 + CALIBRATION_PERMUTATIONS)
    pretended = float((p <= max(threshold, smallest)).mean()) if len(hits) else 0.0
    return {
        "n": float(len(rows)),
        "detected": len(hits) / len(rows) if len(rows) else float("nan"),
        "threshold": threshold,
        "pretended": pretended if len(p) else float("nan"),
    }


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Return the distribution of z by mode and metric: ``mode, metric, n, median, q25, q75, iqr, skewness``."""
    rows = []
    for (mode, metric), part in table.groupby(["mode", "metric"], sort=False):
        z = part["z"].dropna()
        rows.append({"mode": mode, "metric": metric, "n": len(z), **distribution(z)})
    return pd.DataFrame(rows, columns=["mode", "metric", "n", "median", "q25", "q75", "iqr", "skewness"])
