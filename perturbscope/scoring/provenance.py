"""What tables of scores and of pairs share: corrected p-values, and where the numbers come from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd

from perturbscope.scoring.labels import Groups
from perturbscope.scoring.results import FLAGS, ScoreOptions
from perturbscope.scoring.statistics import benjamini_hochberg, bonferroni

_TOLD = (
    "constant_embeddings",
    "duplicated_vectors",
    "batch_confounded",
    "batch_partly_confounded",
    "few_exchanges",
    "null_sd_zero",
    "null_capped",
    "null_extrapolated",
)
"""Flags that undo a number, or cast doubt on it: a result says them in words too."""


def with_q(table: pd.DataFrame, options: ScoreOptions) -> pd.DataFrame:
    """The table with q: p corrected over the rows of each metric."""
    adjust = benjamini_hochberg if options.correction == "bh" else bonferroni
    table["q"] = table.groupby("metric")["p"].transform(adjust)
    return table


def release() -> str:
    """Version of the installed package."""
    try:
        return version("perturbscope")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def provenance(kind: str, options: ScoreOptions, groups: Groups, **facts: Any) -> dict[str, Any]:
    """What made the numbers, JSON-able."""
    return {
        "kind": kind,
        "version": release(),
        "metrics": list(options.metrics),
        "ground": options.ground,
        "estimator": options.estimator,
        "seed": options.seed,
        "n_cells": len(groups.rows),
        "width": groups.rows.width,
        "unit_length": options.normalize,
        "batches": None if groups.batches is None else int(groups.batches.max()) + 1,
        "correction": options.correction,
        "options": options.to_dict(),
        **facts,
    }


def flag_warnings(table: pd.DataFrame, names: pd.Series) -> list[str]:
    """Warnings in words for the flags that undo a number or cast doubt on it; `names`: a readable name of each row."""
    found = []
    for flag in _TOLD:
        hit = table["flags"].str.split(";").map(lambda flags, flag=flag: flag in flags)
        if hit.any():
            listed = list(dict.fromkeys(names[hit]))
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            found.append(f"{flag}: {FLAGS[flag]} ({', '.join(listed[:5])}{more}).")
    return found


def permutations_by_metric(options: ScoreOptions) -> dict[str, int]:
    """Exchanges of labels behind p, by metric."""
    return {
        metric: options.wasserstein_permutations if metric == "wasserstein" else options.permutations
        for metric in options.metrics
    }


def resolution_warnings(n_tests: int, options: ScoreOptions) -> list[str]:
    """Warnings where even the smallest possible p, alone, could not pass q < 0.05."""
    by_count: dict[int, list[str]] = {}
    for metric, count in permutations_by_metric(options).items():
        by_count.setdefault(count, []).append(metric)
    return [
        f"{', '.join(metrics)}: {count} permutations over {n_tests} tests; the smallest p is {1 / (1 + count):.2g}, so "
        f"a single hit cannot reach q < 0.05. Use {20 * n_tests:,} permutations or more if hits are few."
        for count, metrics in by_count.items()
        if n_tests / (1 + count) > 0.05
    ]
