"""Golden vectors of the default bundle; after a new default model, ``python -m tests.golden.golden`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from perturbscope.cells.readers import open_cells
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import Embeddings

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "default"
FILE = Path(__file__).with_name("default_bundle.json")
CELLS = {"pbmc3k_10x.h5ad": 3, "papalexi2021_eccite_thp1_panel.h5ad": 3}
"""The first cells of a full transcriptome and of a panel."""


def embed(variant: str = "fp32") -> tuple[Bundle, dict[str, Embeddings]]:
    """Return the bundle and its embeddings of the chosen cells by file."""
    bundle = Bundle.open(BUNDLE)
    embedder = Embedder.from_bundle(bundle, variant=variant)
    found = {}
    for name, n in CELLS.items():
        with open_cells(ROOT / "data" / name, chunk_cells=n) as source:
            found[name] = embedder.embed(next(iter(source)))
    return bundle, found


def describe(bundle: Bundle, found: dict[str, Embeddings]) -> dict[str, Any]:
    """Return the model id, and the number of tokens and the first five values of each cell."""
    return {
        "model_id": bundle.model_id,
        "cells": {
            name: [
                {"length": int(length), "first_values": [round(float(value), 6) for value in vector[:5]]}
                for length, vector in zip(result.lengths, result.values, strict=True)
            ]
            for name, result in found.items()
        },
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(describe(*embed()), indent=1) + "\n")
