"""Energy distances, E-tests and Wasserstein distances of pertpy and scPerturb beside ours, on the same vectors.

    python -m benchmarks.peers [--peers-python runs/peers/bin/python --store]

The vectors: PCA-50 of the Papalexi panel's log CP10k, at most 100 cells of each of 25 targets and 500 controls, in the
order of the file. Without --peers-python the peers' numbers are those stored in tests/golden/peers.json; with it they
are computed anew by benchmarks/_peers.py (some minutes), and --store writes them there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks._markdown import markdown
from benchmarks._peer_tests import PERTPY, SCPERTURB, largest_family, peer_e_test
from benchmarks._peers import ask
from evaluation.baselines import pca
from perturbscope.cells.readers import open_cells
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.distances import e_distance, pairwise_distances
from perturbscope.scoring.optimal_transport import transport_cost, wasserstein
from perturbscope.scoring.results import ScoreOptions

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "tests/golden/peers.json"
COMMAND = "python -m benchmarks.peers --peers-python runs/peers/bin/python --store"
CONTROL = "control"
MAX_CELLS, MAX_CONTROLS, PERMUTATIONS = 100, 500, 1000
TRANSPORTED = ("STAT1", "JAK2", "BRD4", "CAV1")
DEFINITIONS: dict[str, tuple[str, str]] = {
    "pertpy, two matrices": ("euclidean", "V"),
    "pertpy, precomputed": ("euclidean", "V"),
    "scperturb, sqeuclidean, sample_correct=True": ("sqeuclidean", "U"),
    "scperturb, sqeuclidean, sample_correct=False": ("sqeuclidean", "V"),
    "scperturb, euclidean, sample_correct=True": ("euclidean", "U"),
    "scperturb, euclidean, sample_correct=False": ("euclidean", "V"),
}
"""Each of the peers' numbers, and the ground distance and estimator that it is."""


def vectors() -> tuple[np.ndarray, np.ndarray]:
    """PCA-50, float64 [cells, 50], and labels of the cells to compare on."""
    with open_cells(
        ROOT / "data/papalexi2021_eccite_thp1_panel.h5ad", total_counts_key="total_umi_full_transcriptome"
    ) as source:
        cells, labels = source.read(), source.obs["perturbation"].astype(str).to_numpy()
    rng = np.random.default_rng(0)
    chosen = []
    for name in sorted(set(labels)):
        own, most = np.flatnonzero(labels == name), MAX_CONTROLS if name == CONTROL else MAX_CELLS
        chosen.append(own if len(own) <= most else rng.choice(own, most, replace=False))
    rows = np.sort(np.concatenate(chosen))
    return pca(cells[rows]).astype(np.float64), labels[rows].astype(str)


def ours(values: np.ndarray, labels: np.ndarray, ground: str, estimator: str) -> dict[str, float]:
    """Our energy distance of every label to control."""
    controls = values[labels == CONTROL]
    names = sorted(set(labels.tolist()) - {CONTROL})
    return {name: e_distance(values[labels == name], controls, estimator=estimator, distance=ground) for name in names}


def largest_difference(theirs: dict[str, float], mine: dict[str, float]) -> float:
    """Return the largest relative difference over the labels."""
    return max(abs(theirs[name] - mine[name]) / abs(theirs[name]) for name in theirs)


def p_values(peers: dict[str, Any], values: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """p-values of every program, one row for each perturbation."""
    names = labels.tolist()
    options = ScoreOptions(normalize=False, repeats=1, permutations=PERMUTATIONS, exceedances=0)
    scored = score_perturbations(values, names, control=CONTROL, options=options).table.set_index("perturbation")
    columns = {
        title: pd.DataFrame.from_dict(peers["tests"][key], orient="index")["pvalue"]
        for title, key in (
            ("pertpy, file's order", "pertpy, cells given"),
            ("pertpy, sorted", "pertpy, cells sorted"),
            ("scPerturb", "scperturb"),
        )
    }
    for title, peer in (("pertpy restated", PERTPY), ("scPerturb restated", SCPERTURB)):
        table = peer_e_test(values, names, control=CONTROL, peer=peer, permutations=PERMUTATIONS)
        columns[title] = table.set_index("perturbation")["p"]
    columns["PerturbScope, not scaled"] = scored["p"]
    default = score_perturbations(values, names, control=CONTROL, options=ScoreOptions(repeats=1))
    columns["PerturbScope"] = default.table.set_index("perturbation")["p"]
    wide = pd.DataFrame(columns).drop(index=CONTROL)
    wide.insert(0, "E-distance", pd.Series(ours(values, labels, "euclidean", "U")))
    return wide.sort_values("E-distance", ascending=False)


def misplaced(peers: dict[str, Any]) -> pd.Series:
    """Return the target whose p-value is in each row of pertpy's table when the cells are in the file's order."""
    order = peers["tests"]["order, cells given"]
    return pd.Series(sorted(order), index=order).drop(CONTROL)


def report(peers: dict[str, Any], values: np.ndarray, labels: np.ndarray) -> str:
    sizes = pd.Series(labels).value_counts()
    versions = ", ".join(f"{name} {version}" for name, version in peers["versions"].items())
    parts = [f"{len(labels)} cells, {sizes[CONTROL]} controls, {len(sizes) - 1} targets. {versions}.\n"]
    same = {
        key: {"ours": f"{ground}, {estimator}", "largest relative difference": f"{difference:.1e}"}
        for key, (ground, estimator) in DEFINITIONS.items()
        for difference in [largest_difference(peers["distances"][key], ours(values, labels, ground, estimator))]
    }
    parts.append(markdown(pd.DataFrame.from_dict(same, orient="index"), "theirs"))
    by_definition = {
        f"{ground}, {estimator}": ours(values, labels, ground, estimator)
        for ground in ("euclidean", "sqeuclidean")
        for estimator in ("U", "V")
    }
    distances = pd.DataFrame(by_definition).sort_values("euclidean, U", ascending=False)
    distances.insert(0, "cells", sizes)
    parts.append(markdown(distances, "target", digits=3))
    table = p_values(peers, values, labels)
    whose = misplaced(peers)
    table.insert(2, "is the p of", whose)
    parts.append(markdown(table, "target", digits=3))
    given, right = table["pertpy, file's order"], table["pertpy, sorted"]
    moved = pd.Series(given.to_numpy(), index=table["is the p of"]).drop(CONTROL)
    differences = {
        "pertpy, file's order, as it stands": given - right,
        "pertpy, file's order, each p with its own target": moved - right.loc[moved.index],
        "pertpy restated": table["pertpy restated"] - right,
        "scPerturb restated - scPerturb": table["scPerturb restated"] - table["scPerturb"],
    }
    parts.append(
        markdown(
            pd.DataFrame({"largest difference": {name: values.abs().max() for name, values in differences.items()}}),
            "p - p of pertpy, sorted",
            digits=3,
        )
    )
    found = {"file's order": given < 0.05, "sorted": right < 0.05, "both": (given < 0.05) & (right < 0.05)}
    parts.append(f"Targets with p < 0.05: {', '.join(f'{name} {n.sum()}' for name, n in found.items())}.\n")
    controls = values[labels == CONTROL]
    moved_mass = {
        name: {
            "pertpy": peers["wasserstein"][name],
            "exact, squared Euclidean": transport_cost(pairwise_distances(own, controls, distance="sqeuclidean")),
            "exact, Euclidean (ours)": wasserstein(own, controls),
        }
        for name in TRANSPORTED
        for own in [values[labels == name]]
    }
    parts.append(markdown(pd.DataFrame.from_dict(moved_mass, orient="index"), "Wasserstein"))
    parts.append(
        f"Holm-Sidak at {PERMUTATIONS} exchanges can pass 0.05 in up to {largest_family(PERMUTATIONS)} tests.\n"
    )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, help="interpreter with requirements/peers.txt")
    parser.add_argument("--store", action="store_true", help=f"write the peers' numbers to {STORED.relative_to(ROOT)}")
    options = parser.parse_args()
    values, labels = vectors()
    if options.peers_python:
        parts = ("distances", "tests", "wasserstein")
        found = ask(options.peers_python, values, labels, *parts, permutations=PERMUTATIONS, transported=TRANSPORTED)
        peers = {"command": COMMAND, **found}
        if options.store:
            STORED.write_text(json.dumps(peers, indent=1) + "\n")
    else:
        peers = json.loads(STORED.read_text())
    print(report(peers, values, labels))


if __name__ == "__main__":
    main()
