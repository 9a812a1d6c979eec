"""Maps of a real screen, beside those of scipy, pertpy and scPerturb."""

from __future__ import annotations

import time
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from benchmarks.performance.harness import DATA, Options, race, table
from evaluation.baselines import pca
from perturbscope.cells.readers import open_cells
from perturbscope.scoring.pair_map import distance_map
from perturbscope.scoring.results import ScoreOptions

CONTROL = "control"
MOST = 200
"""Most cells of each label."""
TRANSPORTED = ("STAT1", "JAK2", "BRD4", "CAV1")
"""Targets whose Wasserstein distances are compared."""


@cache
def papalexi(most: int = MOST) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """PCA-50 of the Papalexi panel, float32 [cells, 50], and labels, with at most `most` cells of each label."""
    with open_cells(
        DATA / "papalexi2021_eccite_thp1_panel.h5ad", total_counts_key="total_umi_full_transcriptome"
    ) as source:
        cells, labels = source.read(), source.obs["perturbation"].astype(str).to_numpy()
    rng = np.random.default_rng(0)
    chosen = [np.flatnonzero(labels == name) for name in sorted(set(labels))]
    chosen = [own if len(own) <= most else rng.choice(own, most, replace=False) for own in chosen]
    rows = np.sort(np.concatenate(chosen))
    return pca(cells[rows]).astype(np.float32), labels[rows].astype(str)


def with_scipy(values: NDArray[np.float32], labels: NDArray[np.str_]) -> NDArray[np.float64]:
    """Make the map with scipy's cdist: one matrix of distances for each pair of labels, U estimator."""
    names = sorted(set(labels.tolist()))
    groups = [values[labels == name].astype(np.float64) for name in names]
    sums = np.zeros((len(names), len(names)))
    for i, j in combinations_with_replacement(range(len(names)), 2):
        sums[i, j] = sums[j, i] = cdist(groups[i], groups[j]).sum()
    sizes = np.array([len(group) for group in groups])
    within = np.diag(sums) / (sizes * (sizes - 1))
    found: NDArray[np.float64] = 2 * sums / np.multiply.outer(sizes, sizes) - within - within[:, None]
    np.fill_diagonal(found, 0)
    return found


def against_peers(options: Options, peers: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Return the table and numbers of the real screen; `peers` is the peers' answer, if they were asked."""
    values, labels = papalexi(50 if options.quick else MOST)
    chosen = {name: ScoreOptions(normalize=False, estimator=name, min_cells=2) for name in ("U", "V")}
    turns = race(
        {
            "PerturbScope": lambda: distance_map(values, labels.tolist(), options=chosen["U"]),
            "scipy cdist": lambda: with_scipy(values, labels),
        },
        options.repeats,
    )
    ours = {name: distance_map(values, labels.tolist(), options=each) for name, each in chosen.items()}
    exact = with_scipy(values, labels)
    seconds = {name: found.median for name, found in turns.items()}
    differences = {"PerturbScope": 0.0, "scipy cdist": _difference(ours["U"].distances, exact)}
    if peers:
        for name, title, estimator in (("pertpy", "pertpy", "V"), ("scperturb", "scPerturb", "U")):
            title = f"{title} {peers['versions'][name]}, {estimator}"
            theirs = np.array(peers["maps"][name]["map"])
            np.fill_diagonal(theirs, 0)
            seconds[title] = peers["maps"][name]["seconds"]
            differences[title] = _difference(ours[estimator].distances, theirs)
    mine = seconds["PerturbScope"]
    rows = [
        [name, f"{found:.3f}", f"{found / mine:.0f} x", "" if name == "PerturbScope" else f"{differences[name]:.1e}"]
        for name, found in seconds.items()
    ]
    text = f"A real screen: {len(ours['U'].names)} labels of the Papalexi panel, {len(labels):,} cells x PCA-50, all "
    text += "pairs, Euclidean. Difference: largest, over the largest distance of the map.\n\n"
    columns = ["program", "s", "of ours", "difference from ours"]
    return text + table(columns, rows), {"seconds": seconds, "differences": differences}


def landmark_errors(options: Options) -> tuple[str, dict[str, Any]]:
    """Compare maps from landmarks, and maps of fewer cells, with the exact map of a real screen."""
    values, labels = papalexi(200 if options.quick else 10_000)
    rng = np.random.default_rng(0)
    parts = np.array([f"{label}/{rng.integers(max(1, (labels == label).sum() // 100))}" for label in labels]).tolist()
    whole = ScoreOptions(min_cells=40)

    def timed(given: ScoreOptions, **method: Any) -> tuple[NDArray[np.float32], float]:
        started = time.perf_counter()
        found = distance_map(values, parts, options=given, **method).distances
        return found, time.perf_counter() - started

    exact, seconds = timed(whole)
    routes = {f"{count:,} landmarks": timed(whole, method="landmarks", landmarks=count) for count in (512, 1024, 2048)}
    routes |= {f"exact, {few} cells of each": timed(ScoreOptions(min_cells=few, max_cells=few)) for few in (10, 20, 40)}
    rows, numbers = [["exact", f"{seconds:.2f}", "", "", "", ""]], {}
    for name, (found, took) in routes.items():
        if found.shape != exact.shape:
            continue
        facts = numbers[name] = {"seconds": took, **_errors(exact, found)}
        rows.append([name, f"{took:.2f}", f"{facts['rmse']:.3f}", f"{facts['relative']:.2%}",
                     f"{facts['spearman']:.5f}", f"{facts['recall']:.3f}"])  # fmt: skip
    text = f"Error on real cells: {len(values):,} cells x PCA-50 (unit length), each label split at random into groups "
    text += f"of about 100, {len(exact)} groups. RMSE over the median distance; relative error: median of the larger "
    text += "half of the distances; recall of each group's ten nearest.\n\n"
    return text + table(["map", "s", "RMSE", "relative error", "Spearman", "recall"], rows), numbers


def _errors(exact: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    upper = np.triu_indices(len(exact), 1)
    true, near = exact[upper].astype(np.float64), found[upper].astype(np.float64)
    large = true > np.median(true)
    far = np.eye(len(exact)) * 1e9
    nearest = [np.argsort(matrix + far, axis=1)[:, :10] for matrix in (exact, found)]
    shared = [len(set(a) & set(b)) for a, b in zip(*nearest, strict=True)]
    return {
        "rmse": float(np.sqrt(np.mean((near - true) ** 2)) / np.median(true)),
        "relative": float(np.median(np.abs(near - true)[large] / true[large])),
        "spearman": float(spearmanr(true, near)[0]),
        "recall": float(np.mean(shared)) / 10,
    }


def _difference(ours: NDArray[np.float32], theirs: NDArray[np.float64]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
