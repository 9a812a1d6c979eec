"""Runs in the peers' own environment: seconds and results of maps and Wasserstein distances of the same vectors.

    PYTHON benchmarks/performance/pairs_peer.py INPUT.npz OUTPUT.json

INPUT holds `values` [cells, width], `labels` [cells], `transported` (labels) and `repeats`. Imports and a first call,
which compiles what is compiled, are not timed. Knows nothing of PerturbScope.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pertpy
import scperturb

CONTROL = "control"


def screen(values: np.ndarray, labels: np.ndarray) -> anndata.AnnData:
    """Cells in the order of their labels: pertpy 1.0.3 mixes up rows otherwise."""
    order = np.argsort(labels, kind="stable")
    names = [f"cell{i}" for i in range(len(labels))]
    adata = anndata.AnnData(np.zeros((len(labels), 1), dtype=np.float32), obs=pd.DataFrame(index=names))
    adata.obs["perturbation"] = labels[order].astype(str)
    adata.obsm["X_pca"] = values[order]
    return adata


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Its result, and the median of its seconds after a first call."""
    found, seconds = work(), []
    for _ in range(repeats):
        started = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with np.load(options.input) as arrays:
        values, labels = arrays["values"].astype(np.float64), arrays["labels"]
        transported, repeats = arrays["transported"].tolist(), int(arrays["repeats"])
    adata = screen(values, labels)
    energy = pertpy.tl.Distance("edistance", obsm_key="X_pca")
    transport = pertpy.tl.Distance("wasserstein", obsm_key="X_pca")
    controls = values[labels == CONTROL]
    routes: dict[str, Callable[[], pd.DataFrame]] = {
        "pertpy": lambda: energy.pairwise(adata, groupby="perturbation", show_progressbar=False),
        "scperturb": lambda: scperturb.edist(adata, "perturbation", dist="euclidean", n_jobs=1, verbose=False),
    }
    found: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in routes}}
    for name, route in routes.items():
        made, seconds = timed(route, repeats)
        ordered = made.loc[sorted(made.index), sorted(made.columns)].astype(float)
        found[name] = {"map": ordered.to_numpy().tolist(), "names": list(ordered.index), "seconds": seconds}
    found["wasserstein"] = {}
    for name in transported:
        value, seconds = timed(lambda cells=values[labels == name]: float(transport(cells, controls)), 1)
        found["wasserstein"][name] = {"value": value, "seconds": seconds}
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
