"""Small synthetic perturbation data sets and corpora of 60 genes for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from tests.models import small_vocabulary

TARGETS = ("strong1", "strong2", "strong3", "strong4", "weak")
VOCABULARY = small_vocabulary()


def data_set(*, cells_per_target: int = 14, controls: int = 60, seed: int = 0) -> anndata.AnnData:
    """Make raw counts in which each strong target shifts 20 of the 60 genes, and the weak target none."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(2.0, 1.0, size=60) + 0.3
    labels = ["control"] * controls
    rates = [np.tile(base, (controls, 1))]
    for number, target in enumerate(TARGETS):
        shifted = base.copy()
        if target != "weak":
            shifted[rng.choice(60, 20, replace=False)] *= 4.0 + number
        rates.append(np.tile(shifted, (cells_per_target, 1)))
        labels += [target] * cells_per_target
    mean = np.concatenate(rates)
    counts = rng.poisson(mean * rng.uniform(0.5, 1.5, size=(len(mean), 1)))
    counts[:, 0] += 1
    order = rng.permutation(len(counts))
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(np.asarray(labels)[order]),
            "batch": pd.Categorical(rng.choice(["a", "b"], len(counts))),
            "disease": pd.Categorical(rng.choice(["normal", "lung carcinoma"], len(counts), p=[0.8, 0.2])),
        },
        index=pd.Index([f"cell{number}" for number in range(len(counts))]),
    )
    var = pd.DataFrame(index=pd.Index(list(VOCABULARY.gene_ids)))
    return anndata.AnnData(X=sparse.csr_matrix(counts[order].astype(np.int32)), obs=obs, var=var)


def write_data_set(path: Path, **options: Any) -> Path:
    """Write :func:`data_set` to a file."""
    data_set(**options).write_h5ad(path)
    return path


def write_vocabulary(path: Path) -> Path:
    """Write the vocabulary of the 60 genes to a file."""
    path.write_text(VOCABULARY.to_tsv(), encoding="utf-8")
    return path


MODEL = {"layers": 2, "hidden": 16, "heads": 2, "feed_forward": 24, "max_length": 40, "dropout": 0.1}


def pretrain_values(folder: Path, **loop: Any) -> dict[str, Any]:
    """Return a pre-training configuration that runs in seconds, over a data set in `folder`, as plain values."""
    if not (folder / "perturbed.h5ad").exists():
        write_data_set(folder / "perturbed.h5ad")
        write_vocabulary(folder / "genes.tsv")
    return {
        "output": str(folder / "pretrain"),
        "corpus": {
            "path": str(folder / "corpus"),
            "sources": [{"path": str(folder / "perturbed.h5ad")}],
            "vocabulary": str(folder / "genes.tsv"),
            "max_length": 40,
            "min_genes": 1,
            "exclude_cancer": False,
        },
        "model": MODEL,
        "validation_share": 0.1,
        "optimizer": {"base_lr": 5e-3, "warmup_steps": 2},
        "loop": {"epochs": 2, "micro_batch": 8, "device": "cpu", "threads": 1, **loop},
    }


def contrastive_values(folder: Path, **loop: Any) -> dict[str, Any]:
    """Return a fine-tuning configuration that runs in seconds, from the checkpoint of :func:`pretrain_values`."""
    return {
        "output": str(folder / "contrastive"),
        "checkpoint": str(folder / "pretrain" / "checkpoint"),
        "corpus": {
            "path": str(folder / "contrastive-corpus"),
            "sources": [{"path": str(folder / "perturbed.h5ad")}],
            "max_length": 40,
            "min_genes": 1,
            "exclude_cancer": False,
        },
        "degs": {"min_degs": 5},
        "split": {
            "control_fractions": [0.5, 0.25, 0.25],
            "validation": ["strong3"],
            "test": ["strong4"],
        },
        "loss": {"margin": 3.0},
        "optimizer": {"base_lr": 1e-3, "schedule": "constant"},
        "loop": {"epochs": 2, "micro_batch": 5, "device": "cpu", "threads": 1, **loop},
    }
