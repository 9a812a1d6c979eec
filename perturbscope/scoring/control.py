"""Scores of perturbations against control, from labels and any embedding of cells (the model's, PCA, scVI).

:mod:`perturbscope.scoring.scorers` defines the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perturbscope.scoring.cleaning import clean_labels
from perturbscope.scoring.energy.matrix import Compute
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.results import (
    SCORE_COLUMNS,
    Rows,
    ScoreOptions,
    ScoreResult,
    flag_warnings,
    permutations_by_metric,
    provenance,
    resolution_warnings,
    with_q,
)
from perturbscope.scoring.scorers import NOT_SCORED, DistanceScorer, GroupMaker, Scored, make_scorer
from perturbscope.threads import in_order


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
        Batch of each cell; labels are then exchanged within batches only. z takes no account of batches.
    options
        Metrics, estimator, null, sizes, seed; default :class:`ScoreOptions`.
    progress
        Called as ``progress("score", done, total)``, by perturbation and metric.

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
    cleaned = clean_labels(perturbations, control)
    perturbations, control = cleaned.labels, str(cleaned.control)
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    names = [name for name in groups.members if name != control]
    scorable = set(groups.scorable(names, options))
    controls = groups.members[control]
    control_flags = ["controls_subsampled"] if groups.sizes[control] > len(controls) else []
    control_flags += ["duplicated_vectors"] if groups.has_copies(control) else []
    done, total = 0, len(scorable) * len(options.metrics)
    rows = Rows(SCORE_COLUMNS)
    for metric in options.metrics:
        scorer = make_scorer(metric, groups, controls, options, GroupMaker(metric, groups, options, compute))
        # By size, since groups of equal size share exchanges of labels.
        ordered = sorted(names, key=lambda name: len(groups.members[name]))
        to_score = [(name, groups.members[name]) for name in ordered if name in scorable]
        with closing(_scores(scorer, to_score)) as scores:
            by_name = {}
            for name, _ in to_score:
                by_name[name] = next(scores)
                done += 1
                if progress:
                    progress("score", done, total)
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
    warnings = groups.warnings(names, options) + flag_warnings(table, ["perturbation"])
    warnings += _option_warnings(options, groups, list(scorable))
    facts = {
        "control": control,
        "n_controls": groups.sizes[control],
        "n_controls_used": len(controls),
        "n_perturbations": len(names),
        "n_scored": len(scorable),
        "null": options.null if options.null == "size_matched" else f"fixed, {options.null_size} cells a group",
        "null_moments": {
            metric: f"{options.null_draws} random draws" if metric == "wasserstein" else "closed form, over all draws"
            for metric in options.metrics
        },
        "repeats": options.repeats,
        "permutations": permutations_by_metric(options),
    }
    return ScoreResult(table, provenance("score", options, **groups.facts, **facts, **cleaned.facts), warnings)


def _scores(scorer: DistanceScorer, groups: list[tuple[str, NDArray[np.intp]]]) -> Generator[Scored]:
    """Yield the scores of named groups, in order."""
    step = scorer.at_a_time or max(len(groups), 1)
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        scorer.prepare([cells for _, cells in part])
        yield from in_order(lambda group: scorer.score(*group), part)


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
