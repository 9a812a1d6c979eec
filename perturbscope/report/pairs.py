"""Distances of perturbations from each other, their clustering, and the perturbations that act alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from perturbscope.report.contents import Absent, Pairs
from perturbscope.scoring.distances import unit_rows
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.results import ScoreOptions, ScoreResult

MAX_NAMES = 60
"""Most perturbations of the heat map; more names could not be read."""
PAIR_CELLS = 300
"""Most cells of a group, since there are many pairs and a colour needs no third digit."""
CLEAR = 5.0
"""z from which a perturbation is far enough from control for its direction to be known."""
ALIKE = 0.5
"""Share of the smaller of two perturbations' distances to control below which their own distance means alike."""


def make_pairs(
    embeddings: ArrayLike,
    labels: Sequence[str],
    scores: ScoreResult,
    *,
    options: ScoreOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> Pairs | Absent:
    """Measure distances between the strongest perturbations, and to control.

    Parameters
    ----------
    embeddings, labels, options
        Cells and options as they were scored.
    scores
        Their scores, whose first metric says which perturbations are strongest and differ from control.
    progress
        Called as ``progress("compare", done, total)``.
    """
    control = str(scores.provenance["control"])
    table = scores.table[scores.table["metric"] == scores.provenance["metrics"][0]]
    scored = table[table["z"].notna() | table["p"].notna()]
    if len(scored) < 2:
        return Absent("There are no two perturbations with enough cells to compare.")
    names = [control, *scored["perturbation"].astype(str).head(MAX_NAMES)]
    metric = "e_distance" if options.metrics[0] == "wasserstein" else options.metrics[0]
    cheap = replace(
        options,
        metrics=(metric,),
        estimator="U",
        max_cells=max(min(options.max_cells, PAIR_CELLS), options.min_cells, 4),
    )
    everything = np.asarray(labels, dtype=object)
    rows = np.flatnonzero(np.isin(everything, names))
    pair_map = distance_map(
        np.asarray(embeddings)[rows],
        everything[rows].tolist(),
        options=cheap,
        progress=None if progress is None else lambda _, done, total: progress("compare", done, total),
    )
    places = [pair_map.names.index(name) for name in names]
    measured = pair_map.distances[np.ix_(places, places)].astype(np.float64)
    sizes = [int((everything == name).sum()) for name in names]
    pairs = pd.DataFrame(
        [(names[i], names[j], sizes[i], sizes[j], measured[i, j]) for i, j in combinations(range(len(names)), 2)],
        columns=["a", "b", "n_a", "n_b", "distance"],
    )
    pairs["effect_similarity"] = _similarities(embeddings, everything, names, options)
    pairs = pairs.sort_values("distance", kind="stable", ignore_index=True)
    distances = np.maximum(measured, 0.0)
    tree = hierarchy.linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    clear = scored[(scored["q"] < 0.05) & (scored["z"] >= CLEAR)]
    hits = set(clear["perturbation"].astype(str))
    return Pairs(
        names=names,
        distances=distances,
        tree=tree,
        alike=_alike(names, distances, hits),
        noise=0.0 if metric != options.metrics[0] else float(scored["null_sd"].fillna(0.0).median()),
        n_hits=int((scored["q"].head(MAX_NAMES) < 0.05).sum()),
        n_all=len(scored),
        table=pairs,
    )


def _similarities(
    embeddings: ArrayLike, labels: NDArray[np.object_], names: list[str], options: ScoreOptions
) -> list[float]:
    """Return the cosine between the effects of each pair of names, of which the first is the control."""
    rows = np.asarray(embeddings)
    means = []
    for name in names:
        members = np.flatnonzero(labels == name)[: options.max_cells]
        vectors = rows[members].astype(np.float64)
        means.append((unit_rows(vectors) if options.normalize else vectors).mean(axis=0))
    moved = np.array(means) - means[0]
    with np.errstate(invalid="ignore"):
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    return [float(moved[i] @ moved[j]) for i, j in combinations(range(len(names)), 2)]


def _alike(names: list[str], distances: NDArray[np.float64], hits: set[str]) -> list[list[str]]:
    """Return groups, strongest first, of perturbations that are all alike (:data:`ALIKE`); row 0 is the control."""
    hit_rows = [i for i, name in enumerate(names) if name in hits and distances[0, i] > 0]
    if len(hit_rows) < 2:
        return []
    to_control = distances[0, hit_rows]
    ratio = distances[np.ix_(hit_rows, hit_rows)] / np.minimum.outer(to_control, to_control)
    np.fill_diagonal(ratio, 0.0)
    tree = hierarchy.linkage(squareform(ratio, checks=False), "complete")
    groups: dict[int, list[str]] = {}
    for i, code in zip(hit_rows, hierarchy.fcluster(tree, ALIKE, "distance"), strict=True):
        groups.setdefault(int(code), []).append(names[i])
    return [group for group in groups.values() if len(group) > 1]
