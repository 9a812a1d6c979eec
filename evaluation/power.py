"""Number of cells that it takes to detect a perturbation.

A perturbation with many cells stands for one with few: n of its cells are drawn and scored against the controls by the
permutation test of :func:`perturbscope.score_perturbations`, many times. The share of draws with p < alpha is the power
at n. For controls scored against the other controls, it is the false-positive rate: about alpha for any embedding, so
it checks the test and not the model.

The draws of one perturbation overlap unless n is small beside its number of cells. So a curve says what fewer cells of
THIS sample would have shown, and its confidence intervals hold for that question only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from evaluation.profiles import label_warnings
from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.labels import MIN_CONTROLS, Groups
from perturbscope.scoring.results import Metric, ScoreOptions
from perturbscope.scoring.scorers import GroupMaker, make_scorer
from perturbscope.scoring.statistics import generator

GRID = (10, 20, 50, 100, 200, 400)
"""Numbers of cells drawn from a perturbation."""
MAX_POWER_CONTROLS = 500
"""Most controls, since every draw is a test whose time grows with the square of its cells."""
POWER_PERMUTATIONS = 199
"""Most permutations of a draw: p in steps of 0.005, which tells 0.05 from its neighbours."""
_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Power:
    """Power by number of cells.

    Attributes
    ----------
    curves
        One row a perturbation and n: ``perturbation``, ``n_cells`` (all it has), ``n``, ``repeats``, ``detected``
        (share of draws with p < alpha), ``low`` and ``high`` (95 % Wilson interval), ``median_z``.
    needed
        One row a perturbation: ``perturbation``, ``n_cells``, ``largest_n`` (largest n tried), ``power_at_largest``,
        ``n_needed`` (see :func:`cells_needed`), ``flags``. Fewest needed first.
    false_positives
        The rows of `curves` for controls against controls, where ``detected`` is the false-positive rate.
    alpha, target
        Level of the test, and power to reach.
    warnings
        Sentences that a reader should know before trusting a number.
    """

    curves: pd.DataFrame
    needed: pd.DataFrame
    false_positives: pd.DataFrame
    alpha: float
    target: float
    warnings: list[str] = field(default_factory=list)


def power(
    embeddings: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str,
    batches: Sequence[str] | None = None,
    metric: Metric = "e_distance",
    grid: Sequence[int] = GRID,
    repeats: int = 20,
    alpha: float = 0.05,
    target: float = 0.8,
    max_controls: int = MAX_POWER_CONTROLS,
    options: ScoreOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Power:
    """Score random draws of every perturbation, of several sizes.

    Parameters
    ----------
    embeddings, perturbations, control, batches
        See :func:`perturbscope.score_perturbations`. Draws from a perturbation ignore batches; the test does not.
    metric
        ``e_distance`` or ``cosine_e_distance``.
    grid
        Numbers of cells to draw; a perturbation with fewer cells is left out at that n.
    repeats
        Number of draws at each n.
    alpha, target
        Level of the test, and power to reach.
    max_controls
        Most controls to compare with, the same ones in every draw of a perturbation; more are sampled.
    options
        Options of scoring; one metric, at most 199 permutations, and the smallest n as `min_cells` are used.
    progress
        Called as ``progress("power", done, total)``, by draw.

    Raises
    ------
    InvalidParameterError
        The grid is empty or has an n below 2, a share is outside 0 to 1, the metric is Wasserstein, or alpha needs more
        permutations.
    InvalidEmbeddingError, MalformedMatrixError, ControlLabelMissingError, TooFewControlsError, TooFewCellsError
        See :func:`perturbscope.score_perturbations`.
    """
    sizes = sorted({int(n) for n in grid})
    _check(sizes, repeats, alpha, target, max_controls, metric)
    options = options or ScoreOptions()
    options = replace(
        options,
        metrics=(metric,),
        null="size_matched",
        permutations=(permutations := min(options.permutations or POWER_PERMUTATIONS, POWER_PERMUTATIONS)),
        exceedances=0,
        min_cells=max(sizes[0], 2),
    )
    if alpha <= 1 / (1 + permutations):
        raise InvalidParameterError(
            f"With {permutations} permutations p is never below {1 / (1 + permutations):.2g}, so "
            f"alpha = {alpha} detects nothing. Raise alpha, or permutations (at most {POWER_PERMUTATIONS} are used).",
            field="alpha",
        )
    groups = Groups.of(embeddings, perturbations, batches, options, control=control)
    names = [name for name in groups.members if name != control]
    groups.scorable(names, options)
    rng = generator(options.seed, "power", control)
    everyone = rng.permutation(groups.members[control])[: 2 * max_controls]
    controls = np.sort(everyone[:max_controls])
    pools = {name: groups.members[name] for name in names} | {control: np.sort(everyone)}
    # A pretended perturbation needs as many other controls for comparison.
    room = {name: min(len(pools[name]), len(controls)) for name in names}
    room[control] = min(len(everyone) // 2, len(everyone) - MIN_CONTROLS)
    plan = [(name, n) for name in pools for n in sizes if n <= room[name]]
    maker = GroupMaker(metric, groups, options)
    maker.remember(pools[control])
    done, rows = 0, []
    for name, n in plan:
        scored = []
        scorer = None if name == control else make_scorer(metric, groups, controls, options, maker)
        draws = generator(options.seed, "power", name, n)
        for repeat in range(repeats):
            drawn = np.sort(draws.choice(pools[name], n, replace=False))
            judge = scorer
            if judge is None:
                others = np.setdiff1d(pools[control], drawn, assume_unique=True)
                others = np.sort(draws.choice(others, min(len(others), max_controls), replace=False))
                judge = make_scorer(metric, groups, others, options, maker)
            scored.append(judge.score(f"{name} {n} {repeat}", drawn))
            done += 1
            if progress:
                progress("power", done, repeats * len(plan))
        rows.append(
            {"perturbation": name, "n_cells": groups.sizes[name], "n": n}
            | _share(np.array([item.p for item in scored]), alpha)
            | {"median_z": _median(np.array([item.z for item in scored]))}
        )
    columns = ["perturbation", "n_cells", "n", "repeats", "detected", "low", "high", "median_z"]
    table = pd.DataFrame(rows, columns=columns)
    curves = table[table["perturbation"] != control].reset_index(drop=True)
    false = table[table["perturbation"] == control].reset_index(drop=True)
    needed = _needed(curves, names, groups.sizes, target)
    return Power(
        curves, needed, false, alpha, target, [*label_warnings(names), *_warnings(curves, false, needed, target)]
    )


def cells_needed(n: ArrayLike, detected: ArrayLike, *, target: float = 0.8) -> tuple[float, str]:
    """Return the n at which power reaches `target`, by linear interpolation in log n, and a flag.

    If noise lets power fall as n rises, neighbours are averaged first (pooled adjacent violators).

    Parameters
    ----------
    n, detected
        Numbers of cells, and share detected at each; NaN is left out.
    target
        Power to reach.

    Returns
    -------
    n and ``""``; NaN and ``not_reached`` if the largest n does not suffice; the smallest n and ``below_grid`` if that
    suffices already; NaN and ``not_tried`` if there is no n.
    """
    sizes, shares = np.asarray(n, dtype=np.float64), np.asarray(detected, dtype=np.float64)
    known = ~np.isnan(shares)
    sizes, shares = sizes[known], shares[known]
    if not len(sizes):
        return _NAN, "not_tried"
    order = np.argsort(sizes)
    sizes, shares = np.log(sizes[order]), _rising(shares[order])
    if shares[-1] < target:
        return _NAN, "not_reached"
    at = int(np.argmax(shares >= target))
    if at == 0:
        return round(float(np.exp(sizes[0])), 9), "below_grid"
    step = (target - shares[at - 1]) / (shares[at] - shares[at - 1])
    return float(np.exp(sizes[at - 1] + step * (sizes[at] - sizes[at - 1]))), ""


def _rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the closest values (least squares) that never fall, by pooled adjacent violators."""
    blocks: list[list[float]] = []
    for value in values.tolist():
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            last, before = blocks.pop(), blocks.pop()
            count = before[1] + last[1]
            blocks.append([(before[0] * before[1] + last[0] * last[1]) / count, count])
    return np.concatenate([np.full(int(count), value) for value, count in blocks])


def _share(p: NDArray[np.float64], alpha: float) -> dict[str, float]:
    """Return the share of p below alpha with its Wilson interval; NaN if p is undefined in every draw."""
    p = p[~np.isnan(p)]
    if not len(p):
        return {"repeats": 0, "detected": _NAN, "low": _NAN, "high": _NAN}
    share, z2 = float(np.mean(p < alpha)), 1.959964**2
    middle = (share + z2 / (2 * len(p))) / (1 + z2 / len(p))
    half = np.sqrt(z2 * (share * (1 - share) / len(p) + z2 / (4 * len(p) ** 2))) / (1 + z2 / len(p))
    return {
        "repeats": len(p),
        "detected": share,
        "low": max(float(middle - half), 0.0),
        "high": min(float(middle + half), 1.0),
    }


def _median(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else _NAN


def _needed(curves: pd.DataFrame, names: list[str], sizes: dict[str, int], target: float) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for name in names:
        own = curves[curves["perturbation"] == name]
        n, flag = cells_needed(own["n"], own["detected"], target=target)
        rows.append(
            {
                "perturbation": name,
                "n_cells": sizes[name],
                "largest_n": int(own["n"].max()) if len(own) else 0,
                "power_at_largest": float(own["detected"].iloc[-1]) if len(own) else _NAN,
                "n_needed": n,
                "flags": flag,
            }
        )
    table = pd.DataFrame(rows)
    order = ["n_needed", "power_at_largest", "perturbation"]
    return table.sort_values(order, ascending=[True, False, True], ignore_index=True)


def _warnings(curves: pd.DataFrame, false: pd.DataFrame, needed: pd.DataFrame, target: float) -> list[str]:
    warnings = []
    untried = int((needed["flags"] == "not_tried").sum())
    if untried:
        warnings.append(f"{untried} of {len(needed)} perturbations have fewer cells than any n, or no p at all.")
    if false.empty:
        warnings.append("There are too few controls to measure the false-positive rate.")
    if not curves.empty and curves["detected"].notna().any() and (needed["flags"] == "not_reached").all():
        warnings.append(f"No perturbation reaches a power of {target:g} at any n.")
    return warnings


def _check(sizes: list[int], repeats: int, alpha: float, target: float, max_controls: int, metric: str) -> None:
    problems = {
        "grid": f"grid must hold numbers of cells of 2 or more, not {sizes}" if not sizes or sizes[0] < 2 else "",
        "repeats": f"repeats must be 1 or more, not {repeats}" if repeats < 1 else "",
        "alpha": f"alpha must be between 0 and 1, not {alpha}" if not 0 < alpha < 1 else "",
        "target": f"target must be between 0 and 1, not {target}" if not 0 < target < 1 else "",
        "max_controls": f"max_controls must be {MIN_CONTROLS} or more" if max_controls < MIN_CONTROLS else "",
        "metric": "metric must be e_distance or cosine_e_distance; Wasserstein is too slow to score hundreds of times"
        if metric not in ("e_distance", "cosine_e_distance")
        else "",
    }
    for name, text in problems.items():
        if text:
            raise InvalidParameterError(f"{text}.", field=name)
