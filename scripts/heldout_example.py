"""Write data/papalexi2021_heldout.h5ad: cells of the Papalexi panel that the default model was not fine-tuned on.

They are the test targets and test controls of the split that bundles/default names, at most 100 cells of each target (a
seeded sample), so that a first score takes seconds. The controls follow from the split's seed, as in training.

    python scripts/heldout_example.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anndata
import numpy as np
from encode_h5ad import encode, verify, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.data.splits import divide_controls  # noqa: E402  the checkout is no package

NAME = "papalexi"
MOST = 100


def main() -> None:
    training = json.loads((ROOT / "bundles/default/manifest.json").read_text())["training"]
    sources = [source["name"] for source in training["data"]["sources"]]
    source = training["data"]["sources"][sources.index(NAME)]
    split, options = training["split"][NAME], training["hyper_parameters"]["split"]
    whole = anndata.read_h5ad(ROOT / source["path"])
    labels = whole.obs["perturbation"].to_numpy(dtype=str)
    controls = divide_controls(
        np.flatnonzero(labels == "control"), sources.index(NAME), options["control_fractions"], options["seed"]
    )["test"]
    assert len(controls) == split["controls"]["test"]
    rng = np.random.default_rng(0)
    rows = [controls]
    for target in split["targets"]["test"]:
        own = np.flatnonzero(labels == target)
        rows.append(rng.choice(own, min(MOST, len(own)), replace=False))
    part = whole[np.sort(np.concatenate(rows))].copy()
    note = "cells that bundles/default was not fine-tuned on: test targets, at most 100 cells each, and test controls"
    encoded = encode(part, ["gene_symbol"], {**whole.uns["source"], "part": note})
    path = ROOT / "data/papalexi2021_heldout.h5ad"
    write(encoded, path)
    verify(part, anndata.read_h5ad(path))
    print(f"{path}: {encoded.n_obs} x {encoded.n_vars}, {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
