"""How far perturbed cells are from control, and from each other: the table of Zhao et al. (2025), in two modes.

``size_matched``
    Unbiased E-distance, mean over ten control samples, beside a null of the same size: z of few and of many cells mean
    the same.
``paper``
    One control sample as large as the perturbation, beside ONE null for all: 300 controls against 300 others, or as
    many as the controls allow. A perturbation with fewer cells than that has a z that is spread too widely.

Vectors are scaled to unit length first, those of every model alike.
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
from perturbscope.scoring.results import Metric, ScoreOptions
from perturbscope.scoring.scorers import GroupMaker, TransportScorer
from perturbscope.scoring.statistics import correlation, generator

ENERGY: tuple[Metric, ...] = ("e_distance", "cosine_e_distance")
PAPER_NULL = 300
"""Controls in each group of the paper's null."""
FDR = 0.05
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SeparationOptions:
    """How separation is measured.

    Parameters
    ----------
    permutations
        Exchanges of labels behind p of the size-matched E-distance.
    splits
        Control-against-control splits of each kind.
    transport_cells
        Most cells of a perturbation for the Wasserstein distance, which is slow; twice as many controls. 0: leave the
        metric out.
    transport_draws
        Draws behind the null of the Wasserstein distance.
    min_cells, max_cells
        Fewest and most cells of a group.
    pairs
        Compare perturbations with each other as well.
    seed
        Of all draws.

    Raises
    ------
    InvalidParameterError
        Fewer cells for the Wasserstein distance than a group must have.
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
        """Options of scoring, the size-matched ones by default."""
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
    """What one embedding shows of one screen.

    Attributes
    ----------
    scores
        Perturbations against control: ``context``, ``mode``, and the columns of a table of scores.
    pairs
        Perturbations against each other, each pair once: ``context, mode, a, b, n_a, n_b, metric, distance, z``.
    null
        Control against control: ``context, metric, kind, p, z``, one row a split.
    batches
        z (size-matched E-distance) of every perturbation in every batch that has controls: ``context, batch,
        perturbation, n_cells, z``.
    warnings
        What a careful reader should know.
    """

    scores: pd.DataFrame
    pairs: pd.DataFrame
    null: pd.DataFrame
    batches: pd.DataFrame
    warnings: list[str]


def separate(
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
        Vectors that are not finite, or of length zero.
    TooFewControlsError, TooFewCellsError
        No context has controls, and a perturbation, with enough cells.
    """
    options = options or SeparationOptions()
    scores, pairs, nulls, batches = [], [], [], []
    warnings: list[str] = []
    null_sizes: list[int] = []
    too_few: TooFewControlsError | TooFewCellsError | None = None
    for name, part in contexts(screen):
        rows, there = values[part], screen[part]
        try:
            scores.append(_scores(rows, there, options, warnings, progress).assign(context=name))
        except (TooFewControlsError, TooFewCellsError) as error:
            if not name:
                raise
            warnings.append(f"{name} was left out: {error.message}")
            too_few = error
            continue
        null_sizes.append(paper_null_size(there.perturbations.count(there.control)))
        if options.pairs and len(set(there.perturbations)) > 2:
            pairs.append(_pairs(rows, there, options, progress).assign(context=name))
        null = calibrate(
            rows,
            there.perturbations,
            control=there.control,
            batches=there.batches,
            options=options.score_options(),
            splits=options.splits,
            progress=progress,
        )
        warnings += [f"{name}: {warning}" if name else warning for warning in null.warnings]
        nulls.append(_null_rows(null).assign(context=name))
        batches.append(_by_batch(rows, there, options).assign(context=name))
    if not scores:
        raise too_few or TooFewCellsError("There is nothing to score.", field="perturbations")
    if min(null_sizes) < PAPER_NULL:
        span = f"{min(null_sizes)}" + (f" to {max(null_sizes)}" if max(null_sizes) > min(null_sizes) else "")
        warnings.insert(0, f"Paper mode: the controls allow a null of {span} cells a group, not {PAPER_NULL}.")
    return Separation(_joined(scores), _joined(pairs), _joined(nulls), _joined(batches), list(dict.fromkeys(warnings)))


def contexts(screen: EvaluationScreen) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Name and cells of each context that has controls and perturbed cells; one without a name if there are none."""
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
    """Controls in a group of the paper's null: 300, or half of the controls where there are not 600."""
    return min(PAPER_NULL, n_controls // 2)


def _scores(
    values: NDArray[np.float32],
    screen: EvaluationScreen,
    options: SeparationOptions,
    warnings: list[str],
    progress: Progress | None,
) -> pd.DataFrame:
    labels, control = screen.perturbations, screen.control
    found = score_perturbations(
        values,
        labels,
        control=control,
        batches=screen.batches,
        options=options.score_options(),
        progress=progress,
    )
    warnings += [text for text in found.warnings if "batch" in text or "fewer than" in text]
    size = paper_null_size(labels.count(control))
    fixed = {"null": "fixed", "repeats": 1, "permutations": 1}
    paper = score_perturbations(
        values, labels, control=control, options=options.score_options(null_size=size, **fixed)
    ).table.assign(p=np.nan, q=np.nan)
    tables = [found.table.assign(mode="size_matched"), paper.assign(mode="paper")]
    if options.transport_cells:
        chosen = _transport_cells(screen, options)
        rows, part = values[chosen], screen[chosen]
        transport = {
            "metrics": ("wasserstein",),
            "null_draws": options.transport_draws,
            "wasserstein_permutations": 1,
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
    """Distances between perturbations; both nulls are of controls, in closed form for the energy distances."""
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
    """Wasserstein distances of groups of ONE size, so that one null serves both modes; smaller groups have none."""
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
    """At most `transport_cells` cells of each perturbation, and twice as many controls."""
    labels = np.asarray(screen.perturbations)
    kept = []
    for name in np.unique(labels):
        cells = np.flatnonzero(labels == name)
        most = options.transport_cells * (2 if name == screen.control else 1)
        if len(cells) > most:
            cells = generator(options.seed, "transport", str(name)).choice(cells, most, replace=False)
        kept.append(cells)
    return np.sort(np.concatenate(kept))


def _null_rows(null: Calibration) -> pd.DataFrame:
    tables = [
        pd.DataFrame({"metric": part.metric, "kind": part.kind, "p": part.p, "z": part.z[: len(part.p)]})
        for part in null.sets
        if len(part.p) == len(part.z)
    ]
    return _joined(tables)


def _by_batch(values: NDArray[np.float32], screen: EvaluationScreen, options: SeparationOptions) -> pd.DataFrame:
    """Scores within each batch that has enough controls: what one batch shows, another should show again."""
    columns = ["batch", "perturbation", "n_cells", "z"]
    if screen.batches is None:
        return pd.DataFrame(columns=columns)
    found = []
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
        found.append(table.assign(batch=str(name))[columns])
    return _joined(found) if found else pd.DataFrame(columns=columns)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    full = [table for table in tables if len(table)]
    return pd.concat(full, ignore_index=True) if full else pd.DataFrame()


def batch_agreement(batches: pd.DataFrame) -> pd.DataFrame:
    """Correlation of z between each two batches, over the perturbations that both scored.

    Returns
    -------
    ``a, b, n, pearson, spearman``, a row a pair of batches.
    """
    if not len(batches):
        return pd.DataFrame(columns=["a", "b", "n", "pearson", "spearman"])
    wide = batches.pivot_table(index=["context", "perturbation"], columns="batch", values="z", dropna=False)
    rows = []
    names = [str(name) for name in wide.columns]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found = correlation(wide[a].to_numpy(), wide[b].to_numpy())
            rows.append({"a": a, "b": b, "n": found.n, "pearson": found.pearson, "spearman": found.spearman})
    return pd.DataFrame(rows, columns=["a", "b", "n", "pearson", "spearman"])


def detection(separation: Separation, metric: Metric = "e_distance") -> dict[str, float]:
    """Share of perturbations with q < 0.05, and of pretended ones that would pass the same threshold of p.

    Returns
    -------
    ``n``, ``detected``, ``threshold`` (largest p with q < 0.05; NaN where none has) and ``pretended``: share of the
    control-against-control splits by cell whose p is at most that, or at most 0.005, the smallest that a split can
    have; 0 where nothing was detected.
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


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Distribution of z by mode and metric: ``mode, metric, n, median, q25, q75, iqr, skewness``."""
    rows = []
    for (mode, metric), part in table.groupby(["mode", "metric"], sort=False):
        z = part["z"].dropna()
        low, middle, high = (float(z.quantile(share)) for share in (0.25, 0.5, 0.75))
        centred = z - z.mean()
        spread = float((centred**2).mean()) ** 0.5
        rows.append(
            {
                "mode": mode,
                "metric": metric,
                "n": len(z),
                "median": middle,
                "q25": low,
                "q75": high,
                "iqr": high - low,
                "skewness": float((centred**3).mean()) / spread**3 if spread > 0 else float("nan"),
            }
        )
    return pd.DataFrame(rows, columns=["mode", "metric", "n", "median", "q25", "q75", "iqr", "skewness"])
