"""Scores of perturbations: distance to control, z, p and q."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.errors import ControlLabelMissingError
from perturbscope.results import COMPARE_COLUMNS, SCORE_COLUMNS, CompareResult, Metric, ScoreOptions, ScoreResult

__all__ = ["CompareResult", "Metric", "ScoreOptions", "ScoreResult", "compare_perturbations", "score_perturbations"]

Progress = Callable[[str, int, int], None]


def _distance(x: NDArray[Any], y: NDArray[Any]) -> float:
    def mean(a: NDArray[Any], b: NDArray[Any]) -> float:
        return float(np.linalg.norm(a[:, None] - b[None], axis=2).sum())

    n, m = len(x), len(y)
    return 2 * mean(x, y) / (n * m) - mean(x, x) / (n * (n - 1)) - mean(y, y) / (m * (m - 1))


def score_perturbations(
    embeddings: NDArray[np.float32],
    perturbations: Sequence[str],
    *,
    control: str,
    batches: Sequence[str] | None = None,
    options: ScoreOptions | None = None,
    progress: Progress | None = None,
) -> ScoreResult:
    """Score every perturbation against the control cells."""
    options = options or ScoreOptions()
    labels = np.asarray(perturbations, dtype=object)
    if control not in labels:
        raise ControlLabelMissingError(f"No cell is labelled {control!r}.", field="control")
    rows = []
    for name in sorted(set(labels) - {control}):
        x, y = embeddings[labels == name], embeddings[labels == control]
        for metric in options.metrics:
            rows.append((name, len(x), len(y), metric, _distance(x, y), *[float("nan")] * 5, ""))
    table = pd.DataFrame(rows, columns=list(SCORE_COLUMNS))
    return ScoreResult(table, {"options": options.to_dict(), "seed": options.seed}, [])


def compare_perturbations(
    embeddings: NDArray[np.float32],
    perturbations: Sequence[str],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    control: str | None = None,
    batches: Sequence[str] | None = None,
    options: ScoreOptions | None = None,
    progress: Progress | None = None,
) -> CompareResult:
    """Distances between pairs of perturbations."""
    options = options or ScoreOptions()
    labels = np.asarray(perturbations, dtype=object)
    names = sorted(set(labels) - {control})
    chosen = pairs if pairs is not None else [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rows = []
    for a, b in chosen:
        x, y = embeddings[labels == a], embeddings[labels == b]
        for metric in options.metrics:
            rows.append((a, b, len(x), len(y), metric, _distance(x, y), *[float("nan")] * 5, ""))
    table = pd.DataFrame(rows, columns=list(COMPARE_COLUMNS))
    return CompareResult(table, {"options": options.to_dict(), "seed": options.seed}, [])
