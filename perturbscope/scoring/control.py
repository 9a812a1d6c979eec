"""Scores of perturbations against control, from labels and any embedding of cells (the model's, PCA, scVI).

:mod:`perturbscope.scoring.scorers` defines the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from perturbscope.scoring.cleaning import cleaned_for
from perturbscope.scoring.energy.matrix import Compute
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.results import (
    SCORE_COLUMNS,
    Metric,
    Rows,
    ScoreOptions,
    ScoreResult,
    flag_warnings,
    permutations_by_metric,
    provenance,
    resolution_warnings,
    with_q,
)
from perturbscope.scoring.scorers import NOT_SCORED, GroupMaker, make_scorer


def score_perturbations(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str | Sequence[str],
    batches: Sequence[str] | None = None,
    options: ScoreOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ScoreResult:
    """Score every perturbation against control: distance, z, p and q.

    Parameters
    ----------
    embeddings
        One vector a cell, [n, width]. If the array belongs to another library (torch, CuPy ...), that library computes
        unsquared Euclidean distances and sums of them on the array's device; numpy computes everything else.
    perturbations
        Label of each cell.
    control
        Label of the control cells, or several labels: the cells of all of them are one group.
    batches
        Batch of each cell. Vectors are then taken about the mean of all cells of their batch, and labels are exchanged
        within batches; cells in batches without controls are left out (see :mod:`perturbscope.scoring.scorers`).
    options
        Metrics, estimator, null, sizes, seed; default :class:`ScoreOptions`.
    progress
        Called as ``progress("score", done, total)`` when a perturbation is done, by metric; those whose p is small take
        longest and come last.

    Returns
    -------
    A table with one row a perturbation and metric, strongest first within a metric. Rows that could not be scored come
    last, with NaN and a flag.

    Raises
    ------
    InvalidEmbeddingError
        The embeddings are not a finite matrix, or have a zero row; the message names the row.
    MalformedMatrixError
        The number of labels or batches differs from the number of cells.
    ControlLabelMissingError, TooFewControlsError
        There are no, or too few, control cells.
    TooFewCellsError
        No perturbation has `min_cells` cells.
    SolverError
        Optimal transport did not converge.
    """
    options = options or ScoreOptions()
    compute, embeddings = Compute.of(embeddings)
    cleaned = cleaned_for(options, perturbations, control, batches)
    perturbations, control, batches = cleaned.labels, str(cleaned.control), cleaned.kept(batches)
    embeddings = cleaned.kept(embeddings)
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    names = [name for name in groups.members if name != control]
    scorable = set(groups.scorable(names, options))
    controls = groups.members[control]
    control_flags = ["controls_subsampled"] if groups.sizes[control] > len(controls) else []
    control_flags += ["duplicated_vectors"] if groups.has_copies(control) else []
    done, total = 0, len(scorable) * len(options.metrics)

    def finished() -> None:
        nonlocal done
        done += 1
        if progress:
            progress("score", done, total)

    rows = Rows(SCORE_COLUMNS)
    for metric in options.metrics:
        scorer = make_scorer(metric, groups, controls, options, GroupMaker(metric, groups, options, compute))
        # By size, since groups of equal size share exchanges of labels.
        ordered = sorted(names, key=lambda name: len(groups.members[name]))
        to_score = [name for name in ordered if name in scorable]
        streams = [(groups.stream(groups.members[name]), groups.members[name]) for name in to_score]
        by_name = dict(zip(to_score, scorer.score_all(streams, finished), strict=True))
        for name in ordered:
            scored = by_name.get(name, NOT_SCORED)
            flags = list(dict.fromkeys([*groups.label_flags(name, options), *control_flags, *scored.flags]))
            rows.add(
                perturbation=name,
                n_cells=groups.sizes[name],
                n_controls=len(controls),
                metric=metric,
                **scored.columns(),
                flags=";".join(flags),
            )
    table = with_q(rows.frame(), options)
    table["rank"] = table["metric"].map(options.metrics.index)
    table = table.sort_values(["rank", "z", "distance", "perturbation"], ascending=[True, False, False, True])
    table = table.drop(columns="rank").reset_index(drop=True)
    warnings = cleaned.warnings + groups.warnings(names, options) + flag_warnings(table, ["perturbation"])
    warnings += _option_warnings(options, groups, list(scorable))
    facts = {
        "control": control,
        "n_controls": groups.sizes[control],
        "n_controls_used": len(controls),
        "n_perturbations": len(names),
        "n_scored": len(scorable),
        "null": options.null if options.null == "size_matched" else f"fixed, {options.null_size} cells a group",
        "null_moments": {metric: _moments(metric, options) for metric in options.metrics},
        "repeats": options.repeats,
        "permutations": permutations_by_metric(options),
    }
    return ScoreResult(table, provenance("score", options, **groups.facts, **facts, **cleaned.facts), warnings)


def _moments(metric: Metric, options: ScoreOptions) -> str:
    """Say where mean and sd of the null come from."""
    fixed = options.null == "fixed"
    if metric == "wasserstein":
        drawn = f"{options.null_draws} random draws of controls"
        return drawn if fixed else f"{options.wasserstein_permutations} exchanges of labels"
    return f"closed form, over all {'draws of controls' if fixed else 'exchanges of labels'}"


def _option_warnings(options: ScoreOptions, groups: Groups, scorable: list[str]) -> list[str]:
    """Return warnings about reading z and p under these options."""
    warnings = []
    sizes = np.asarray([groups.sizes[name] for name in scorable])
    biased = options.estimator == "V" or "wasserstein" in options.metrics
    if options.null == "fixed" and np.any(sizes != options.null_size):
        warnings.append(
            f"The null is fixed at {options.null_size} cells a group, and the perturbations have {sizes.min()} to "
            f"{sizes.max()}: z of smaller ones is "
            f"{'too large, and spread' if biased else 'spread'} too widely. null='size_matched' has no such bias."
        )
    return warnings + resolution_warnings(len(scorable), options)
