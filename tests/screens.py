"""A small screen for tests: cells with perturbation labels, two of which differ from control."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbscope.cells.vocabulary import GeneVocabulary

SIZES = {"control": 60, "strong": 30, "weak": 30, "rare": 3}


def make_screen(*, seed: int = 0, repeats: int = 1) -> ad.AnnData:
    """Make 123 cells (times `repeats`) x 40 genes of the vocabulary, with labels, batches, totals and layers."""
    rng = np.random.default_rng(seed)
    vocabulary = GeneVocabulary.geneformer_gc30m()
    genes = [vocabulary.gene_ids[row] for row in rng.choice(len(vocabulary.gene_ids), size=40, replace=False)]
    labels = np.repeat(list(SIZES), [size * repeats for size in SIZES.values()])
    rates = rng.gamma(0.7, 1.5, size=(1, 40)) * rng.uniform(0.5, 2.0, size=(len(labels), 1))
    rates[labels == "strong", :15] *= 6
    rates[labels == "weak", 15:18] *= 2
    counts = rng.poisson(rates).astype(np.float32)
    counts[:, 0] += 1  # no cell is empty
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(labels),
            "batch": [f"lane{i % 2}" for i in range(len(labels))],
            "total": counts.sum(axis=1) * 3.0,
        },
        index=[f"cell{i}" for i in range(len(labels))],
    )
    var = pd.DataFrame(
        {"symbol": [f"no-gene-{i}" for i in range(40)], "ensembl": genes, "one": ["A"] * 40}, index=genes
    )
    adata = ad.AnnData(X=sparse.csr_matrix(counts), obs=obs, var=var)
    adata.layers["logged"] = sparse.csr_matrix(np.log1p(counts))
    adata.layers["negative"] = sparse.csr_matrix(counts - 2 * (np.arange(40) == 7)[None, :])
    adata.obsm["X_pca"] = rng.standard_normal((len(labels), 5))
    adata.uns["kept"] = {"as": "it was"}
    return adata
