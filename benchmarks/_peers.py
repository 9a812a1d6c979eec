"""Runs in the peers' own environment: distances and tests of pertpy and scPerturb over vectors and labels.

    PYTHON benchmarks/_peers.py INPUT.npz OUTPUT.json [--only distances tests wasserstein]

INPUT holds `values` [cells, width], `labels` [cells], `permutations` and `wasserstein` (labels). Knows nothing of
PerturbScope, so that nothing of it can leak into the peers' numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

CONTROL = "control"
PARTS = ("distances", "tests", "wasserstein")


def screen(values: np.ndarray, labels: np.ndarray) -> anndata.AnnData:
    names = [f"cell{i}" for i in range(len(labels))]
    adata = anndata.AnnData(np.zeros((len(labels), 1), dtype=np.float32), obs=pd.DataFrame(index=names))
    adata.obs["perturbation"] = labels.astype(str)
    adata.obsm["X_pca"] = values
    return adata


def in_label_order(values: np.ndarray, labels: np.ndarray) -> anndata.AnnData:
    order = np.argsort(labels, kind="stable")
    return screen(values[order], labels[order])


def distances(adata: anndata.AnnData) -> dict[str, dict[str, float]]:
    """E-distance of every label to control, by program, path and option."""
    import pertpy
    import scperturb

    found: dict[str, dict[str, float]] = {}
    distance = pertpy.tl.Distance("edistance", obsm_key="X_pca")
    labels, values = adata.obs["perturbation"].to_numpy(), adata.obsm["X_pca"]
    names = sorted(set(labels) - {CONTROL})
    controls = values[labels == CONTROL]
    found["pertpy, two matrices"] = {name: float(distance(values[labels == name], controls)) for name in names}
    one_sided = distance.onesided_distances(adata, "perturbation", selected_group=CONTROL, show_progressbar=False)
    found["pertpy, precomputed"] = {name: float(one_sided[name]) for name in names}
    for ground in ("sqeuclidean", "euclidean"):
        for correct in (True, False):
            table = scperturb.edist_to_control(
                adata, "perturbation", CONTROL, dist=ground, sample_correct=correct, n_jobs=1, verbose=False
            )
            key = f"scperturb, {ground}, sample_correct={correct}"
            found[key] = {name: float(table.loc[name, "distance"]) for name in names}
    return found


def tests(values: np.ndarray, labels: np.ndarray, permutations: int) -> dict[str, Any]:
    """E-tests: pertpy's with the cells as given and in the order of their labels, and scPerturb's."""
    import pertpy
    import scperturb

    found: dict[str, Any] = {}
    test = pertpy.tl.DistanceTest("edistance", n_perms=permutations, obsm_key="X_pca")
    for name, adata in (("given", screen(values, labels)), ("sorted", in_label_order(values, labels))):
        table = test(adata, groupby="perturbation", contrast=CONTROL, show_progressbar=False)
        found[f"pertpy, cells {name}"] = table[["distance", "pvalue", "pvalue_adj"]].to_dict("index")
        found[f"order, cells {name}"] = [str(label) for label in adata.obs["perturbation"].unique()]
    np.random.seed(0)  # noqa: NPY002 - scPerturb draws from the global generator
    table = scperturb.etest(screen(values, labels), "perturbation", runs=permutations, n_jobs=1, verbose=False)
    table = table.rename(columns={"edist": "distance"})
    found["scperturb"] = table[["distance", "pvalue", "pvalue_adj"]].to_dict("index")
    return found


def wasserstein(values: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, float]:
    import pertpy

    distance = pertpy.tl.Distance("wasserstein", obsm_key="X_pca")
    controls = values[labels == CONTROL]
    return {name: float(distance(values[labels == name], controls)) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with np.load(options.input) as arrays:
        values, labels = arrays["values"].astype(np.float64), arrays["labels"]
        permutations, names = int(arrays["permutations"]), arrays["wasserstein"].tolist()
    programs = ("pertpy", "scperturb", "statsmodels", "scikit-learn", "numpy", "pandas")
    found: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in programs}}
    seconds = found["seconds"] = {}
    for part in options.only:
        started = time.process_time()
        if part == "distances":
            found[part] = distances(screen(values, labels))
        elif part == "tests":
            found[part] = tests(values, labels, permutations)
        else:
            found[part] = wasserstein(values, labels, names)
        seconds[part] = round(time.process_time() - started, 1)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
