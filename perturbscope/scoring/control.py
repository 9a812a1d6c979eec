"""Scores of perturbations against control, from labels and any embedding of cells (the model's, PCA, scVI).

:mod:`perturbscope.scoring.scorers` defines the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from perturbscope.scoring.cleaning import cleaned_for
from perturbscope.scoring.energy.matrix import Compute
from perturbscope.scoring.labels import Groups, check_labels, codes_of
from perturbscope.scoring.results import (
    CORRECTIONS,
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
from perturbscope.scoring.scorers import NOT_SCORED, DistanceScorer, EnergyScorer, GroupMaker, make_scorer
from perturbscope.scoring.units import Units, UnitScore, unit_score
from perturbscope.threads import in_order

LENGTHS = 0.1
"""Share of the variance of vectors that is one of their lengths above which it is told."""


def score_perturbations(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str | Sequence[str],
    batches: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
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
    units
        Unit of each cell: the well, guide or donor whose cells share more than their perturbation. The table then has
        the columns ``n_units, z_unit, p_unit, q_unit`` of exchanges of whole units
        (:mod:`perturbscope.scoring.units`), NaN for ``wasserstein``, and the provenance the controls' intra-class
        correlation and design effect.
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
        The number of labels, batches or units differs from the number of cells.
    ControlLabelMissingError, TooFewControlsError
        There are no, or too few, control cells; or all are in one unit.
    InvalidParameterError
        The units are the batches.
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
    if units is not None:
        units = check_labels(cleaned.kept(units), len(perturbations), "units").tolist()
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    names = [name for name in groups.members if name != control]
    scorable = set(groups.scorable(names, options))
    controls = groups.members[control]
    control_flags = ["controls_subsampled"] if groups.sizes[control] > len(controls) else []
    control_flags += ["duplicated_vectors"] if groups.has_copies(control) else []
    whole = None if units is None else _units_of(units, perturbations, groups, controls)
    done, total = 0, len(scorable) * len(options.metrics)

    def finished() -> None:
        nonlocal done
        done += 1
        if progress:
            progress("score", done, total)

    rows = Rows(SCORE_COLUMNS)
    by_unit: dict[tuple[str, str], UnitScore] = {}
    for metric in options.metrics:
        scorer = make_scorer(metric, groups, controls, options, GroupMaker(metric, groups, options, compute))
        # By size, since groups of equal size share exchanges of labels.
        ordered = sorted(names, key=lambda name: len(groups.members[name]))
        to_score = [name for name in ordered if name in scorable]
        streams = [(groups.stream(groups.members[name]), groups.members[name]) for name in to_score]
        by_name = dict(zip(to_score, scorer.score_all(streams, finished), strict=True))
        if whole is not None:
            by_unit |= {(name, metric): one for name, one in _unit_scores(whole, scorer, groups, controls, to_score)}
        for name in ordered:
            scored = by_name.get(name, NOT_SCORED)
            unit_flags = by_unit[name, metric].flags if (name, metric) in by_unit else ()
            flags = list(
                dict.fromkeys([*groups.label_flags(name, options), *control_flags, *scored.flags, *unit_flags])
            )
            rows.add(
                perturbation=name,
                n_cells=groups.sizes[name],
                n_controls=len(controls),
                metric=metric,
                **scored.columns(),
                flags=";".join(flags),
            )
    table = with_q(rows.frame(), options)
    if whole is not None:
        table = _with_units(table, by_unit, options)
    table["rank"] = table["metric"].map(options.metrics.index)
    table = table.sort_values(["rank", "z", "distance", "perturbation"], ascending=[True, False, False, True])
    table = table.drop(columns="rank").reset_index(drop=True)
    warnings = cleaned.warnings + groups.warnings(names, options) + flag_warnings(table, ["perturbation"])
    warnings += _option_warnings(options, groups, list(scorable))
    of_length = groups.length_share() if options.normalize and not options.centre else 0.0
    if of_length > LENGTHS:
        warnings.append(
            f"{of_length:.0%} of the variance of the vectors is one of their lengths, which scaling to unit length "
            "takes away, with effects along their mean. Compare with centre=true (--centre), or with normalize=false."
        )
    if batches is not None and groups.facts["batches"] == 1:
        warnings.append("All cells are in one batch, so batches change nothing.")
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
    if whole is not None:
        of_units = whole.facts(GroupMaker("e_distance", groups, options).rows(controls), controls)
        facts["units"] = of_units
        warnings += whole.warnings(of_units)
    return ScoreResult(table, provenance("score", options, **groups.facts, **facts, **cleaned.facts), warnings)


def _units_of(units: Sequence[str], perturbations: Sequence[str], groups: Groups, controls: NDArray[np.intp]) -> Units:
    codes, labels = (codes_of(np.asarray(values, dtype=object))[1] for values in (units, perturbations))
    return Units(codes, labels, controls, groups.batches)


def _unit_scores(
    units: Units, scorer: DistanceScorer, groups: Groups, controls: NDArray[np.intp], names: Sequence[str]
) -> Iterator[tuple[str, UnitScore]]:
    """Yield the names of perturbations and their scores over whole units; none if the metric has none."""
    if not isinstance(scorer, EnergyScorer):
        return

    def one(name: str) -> tuple[str, UnitScore]:
        cells = groups.members[name]
        if groups.batches is not None:
            cells = cells[np.isin(groups.batches[cells], groups.batches[controls])]
        if len(cells) < 2 or groups.is_constant(np.concatenate([cells, controls])):
            return name, UnitScore()
        return name, unit_score(units, cells, controls, scorer.pool, scorer.options, groups.stream(cells))

    with closing(in_order(one, names)) as found:
        yield from found


def _with_units(table: pd.DataFrame, scores: dict[tuple[str, str], UnitScore], options: ScoreOptions) -> pd.DataFrame:
    """Return the table with the columns of scores over whole units."""
    found = [scores.get(key, UnitScore()) for key in zip(table["perturbation"], table["metric"], strict=True)]
    table = table.assign(
        n_units=[one.n_units for one in found], z_unit=[one.z for one in found], p_unit=[one.p for one in found]
    )
    table["q_unit"] = table.groupby("metric")["p_unit"].transform(CORRECTIONS[options.correction])
    return table


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
