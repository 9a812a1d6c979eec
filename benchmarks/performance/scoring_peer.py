"""Runs in the peers' own environment: seconds and results of pertpy's and scPerturb's tests of the same vectors.

    PYTHON benchmarks/performance/scoring_peer.py INPUT.npz OUTPUT.json

INPUT holds `values` [cells, width], `labels` [cells], `permutations` and `runs` (scPerturb's exchanges, fewer because
it is slower). Imports and a first call with a tenth of the cells, which compiles what is compiled, are not timed.
Knows nothing of PerturbScope, so that nothing of it can leak into the peers' numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pertpy
import scperturb
from scipy.spatial.distance import cdist

CONTROL = "control"


def screen(values: np.ndarray, labels: np.ndarray) -> anndata.AnnData:
    """Cells in the order of their labels: pertpy 1.0.3 gives p-values to the wrong rows otherwise."""
    order = np.argsort(labels, kind="stable")
    names = [f"cell{i}" for i in range(len(labels))]
    adata = anndata.AnnData(np.zeros((len(labels), 1), dtype=np.float32), obs=pd.DataFrame(index=names))
    adata.obs["perturbation"] = labels[order].astype(str)
    adata.obsm["X_pca"] = values[order]
    return adata


def pertpy_test(adata: anndata.AnnData, permutations: int) -> pd.DataFrame:
    """Its table."""
    test = pertpy.tl.DistanceTest("edistance", n_perms=permutations, obsm_key="X_pca")
    return test(adata, groupby="perturbation", contrast=CONTROL, show_progressbar=False)


def scperturb_test(adata: anndata.AnnData, runs: int) -> pd.DataFrame:
    """Its table, with the unsquared distance, in one process: two would hold the distances twice."""
    return scperturb.etest(adata, "perturbation", dist="euclidean", runs=runs, n_jobs=1, verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with np.load(options.input) as arrays:
        values, labels = arrays["values"].astype(np.float64), arrays["labels"]
        permutations, runs = int(arrays["permutations"]), int(arrays["runs"])
    np.random.seed(0)  # noqa: NPY002 - scPerturb draws from the global generator
    whole, part = screen(values, labels), screen(values[::10], labels[::10])
    pertpy_test(part, 2)
    scperturb_test(part, 2)
    found: dict[str, object] = {
        "versions": {name: importlib.metadata.version(name) for name in ("pertpy", "scperturb", "scipy", "numpy")}
    }
    started = time.perf_counter()
    table = pertpy_test(whole, permutations)
    found["pertpy"] = {
        "seconds": time.perf_counter() - started,
        "distance": table["distance"].to_dict(),
        "p": table["pvalue"].to_dict(),
    }
    started = time.perf_counter()
    table = scperturb_test(whole, runs)
    found["scperturb"] = {
        "seconds": time.perf_counter() - started,
        "distance": table["edist"].to_dict(),
        "p": table["pvalue"].to_dict(),
    }
    controls = values[labels == CONTROL]
    started = time.perf_counter()
    for name in np.unique(labels):
        cdist(values[labels == name], controls)
    found["cdist"] = {"seconds": time.perf_counter() - started}
    options.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
