"""Scores of perturbations against control, from embeddings and labels of cells.

Works on any embedding: the model's, PCA, scVI. See :mod:`perturbscope.scoring.scorers` for what the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from perturbscope.scoring.calibration import Calibration, CalibrationSet, calibrate
from perturbscope.scoring.energy.kernels import Compute
from perturbscope.scoring.labels import Groups
from perturbscope.scoring.pairs import compare_perturbations
from perturbscope.scoring.provenance import (
    flag_warnings,
    permutations_by_metric,
    provenance,
    resolution_warnings,
    with_q,
)
from perturbscope.scoring.results import SCORE_COLUMNS, CompareResult, Metric, ScoreOptions, ScoreResult
from perturbscope.scoring.scorers import GroupMaker, Scored, Scorer, make_scorer
from perturbscope.threads import in_order

__all__ = [
    "Calibration",
    "CalibrationSet",
    "CompareResult",
    "Metric",
    "ScoreOptions",
    "ScoreResult",
    "calibrate",
    "compare_perturbations",
    "score_perturbations",
]

_NOT_SCORED = Scored(float("nan"), float("nan"), float("nan"), float("nan"), ())


def score_perturbations(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str,
    batches: Sequence[str] | None = None,
    options: ScoreOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ScoreResult:
    """Distance of every perturbation from control, with z, p and q.

    Parameters
    ----------
    embeddings
        One vector a cell, [n, width]. If the array is another library's (torch, CuPy ...), unsquared Euclidean
        distances and sums of them are computed by that library, on the array's device; all else by numpy.
    perturbations
        Label of each cell.
    control
        The label of the control cells.
    batches
        Batch of each cell: labels are then exchanged within batches only. z takes no account of batches.
    options
        Metrics, estimator, null, sizes, seed; default :class:`ScoreOptions`.
    progress
        Called as ``progress("score", done, total)``, by perturbation and metric.

    Returns
    -------
    One row a perturbation and metric, strongest first within a metric. Rows that could not be scored come last, with
    NaN and a flag.

    Raises
    ------
    InvalidEmbeddingError
        Embeddings that are not a finite matrix, or with a zero row; names the row.
    MalformedMatrixError
        As many labels or batches as cells are needed.
    ControlLabelMissingError, TooFewControlsError
        No, or too few, control cells.
    TooFewCellsError
        No perturbation has `min_cells` cells.
    SolverError
        Optimal transport did not converge.
    """
    options = options or ScoreOptions()
    compute, embeddings = Compute.of(embeddings)
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    names = [name for name in groups.members if name != control]
    scorable = set(groups.scorable(names, options))
    controls = groups.members[control]
    of_control = ["controls_subsampled"] if groups.sizes[control] > len(controls) else []
    of_control += ["duplicated_vectors"] if groups.has_copies(control) else []
    done, total = 0, len(scorable) * len(options.metrics)
    rows = []
    for metric in options.metrics:
        scorer = make_scorer(metric, groups, controls, options, GroupMaker(metric, groups, options, compute))
        # By size: groups of as many cells share exchanges of labels.
        ordered = sorted(names, key=lambda name: len(groups.members[name]))
        chosen = [(name, groups.members[name]) for name in ordered if name in scorable]
        with closing(_scores(scorer, chosen)) as found:
            by_name = {}
            for name, _ in chosen:
                by_name[name] = next(found)
                done += 1
                if progress:
                    progress("score", done, total)
        for name in ordered:
            scored = by_name.get(name, _NOT_SCORED)
            flags = list(dict.fromkeys([*groups.label_flags(name, options), *of_control, *scored.flags]))
            rows.append(
                {
                    "perturbation": name,
                    "n_cells": groups.sizes[name],
                    "n_controls": len(controls),
                    "metric": metric,
                    "distance": scored.distance,
                    "null_mean": scored.null_mean,
                    "null_sd": scored.null_sd,
                    "z": scored.z,
                    "p": scored.p,
                    "q": float("nan"),
                    "flags": ";".join(flags),
                }
            )
    table = with_q(pd.DataFrame(rows, columns=list(SCORE_COLUMNS)), options)
    table["rank"] = table["metric"].map(options.metrics.index)
    table = table.sort_values(["rank", "z", "distance", "perturbation"], ascending=[True, False, False, True])
    table = table.drop(columns="rank").reset_index(drop=True)
    warnings = groups.warnings(names, options) + flag_warnings(table, table["perturbation"])
    warnings += _reading(options, groups, list(scorable))
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
    return ScoreResult(table, provenance("score", options, groups, **facts), warnings)


def _scores(scorer: Scorer, groups: list[tuple[str, NDArray[np.intp]]]) -> Generator[Scored]:
    """Yield the scores of named groups, in their order."""
    step = scorer.at_a_time or max(len(groups), 1)
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        scorer.prepare([cells for _, cells in part])
        yield from in_order(lambda group: scorer.score(*group), part)


def _reading(options: ScoreOptions, groups: Groups, scorable: list[str]) -> list[str]:
    """Warnings about how to read z and p under these options."""
    found = []
    sizes = np.asarray([groups.sizes[name] for name in scorable])
    biased = options.estimator == "V" or "wasserstein" in options.metrics
    if options.null == "fixed" and np.any(sizes != options.null_size):
        found.append(
            f"The null is fixed at {options.null_size} cells a group, and the perturbations have {sizes.min()} to "
            f"{sizes.max()}: z of smaller ones is "
            f"{'too large, and spread' if biased else 'spread'} too widely. null='size_matched' has no such bias."
        )
    return found + resolution_warnings(len(scorable), options)
