"""Cells that fine-tuning never saw, as a file ready to be scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy import sparse

from perturbscope.cells.files import atomic
from training.config.stages import SourceConfig
from training.data.shards import Corpus
from training.data.sources import chunks, open_source
from training.data.splits import INELIGIBLE, DataSplit


def has_heldout(split: DataSplit, *, score_ineligible: bool) -> bool:
    """Return whether a split holds any cell out."""
    targets = split.targets["test"] or (score_ineligible and split.targets[INELIGIBLE])
    return bool(targets) or len(split.controls["test"]) > 0


def write_heldout(
    path: Path, corpus: Corpus, number: int, source: SourceConfig, split: DataSplit, *, score_ineligible: bool
) -> dict[str, int]:
    """Write raw counts and labels of the test targets' cells and the test controls of one data set.

    Parameters
    ----------
    path
        The ``.h5ad`` file to write. ``obs`` has the columns of the source and ``split`` (test, control or ineligible);
        ``uns["heldout"]`` tells its origin, as JSON.
    corpus
        Tokenized cells; no others are written.
    number
        Number of the data set in the corpus.
    source, split
        Configuration and split of the data set.
    score_ineligible
        Whether to add the targets with too few differentially expressed genes.

    Returns
    -------
    Number of cells of each value of ``split``; without any held-out cell, nothing is written.
    """
    import anndata

    inside = corpus.per_cell("source") == number
    rows, labels = corpus.per_cell("row"), corpus.labels(source.perturbation_key)
    parts = {"test": set(split.targets["test"])}
    if score_ineligible:
        parts[INELIGIBLE] = set(split.targets[INELIGIBLE])
    with open_source(source) as cells:
        kind = np.full(cells.n_cells, "", dtype=object)
        kind[split.controls["test"]] = "control"
        for part, targets in parts.items():
            kind[rows[inside & np.isin(labels.astype(str), sorted(targets))]] = part
        if not (kind != "").any():
            return dict.fromkeys(("control", *parts), 0)
        chunks_of_file = list(chunks(cells, kind != ""))
        at = np.concatenate([part for part, _ in chunks_of_file])
        obs = cells.obs.iloc[at].copy()
        obs["split"] = kind[at].astype(str)
        adata = anndata.AnnData(
            X=sparse.csr_matrix(sparse.vstack([counts.counts for _, counts in chunks_of_file], format="csr")), obs=obs
        )
        adata.var_names = cells.gene_ids.astype(object)
    for column in obs.select_dtypes("category"):
        adata.obs[column] = adata.obs[column].cat.remove_unused_categories()
    adata.uns["heldout"] = json.dumps(
        {
            "source": source.path,
            "perturbation_key": source.perturbation_key,
            "control": source.control,
            "total_counts_key": source.total_counts_key,
            "targets": {part: sorted(targets) for part, targets in parts.items()},
            "degs": {name: split.degs[name] for targets in parts.values() for name in sorted(targets)},
        }
    )
    with atomic(path) as staging:
        adata.write_h5ad(staging, compression="gzip")
    return {name: int((kind == name).sum()) for name in ("control", *parts)}
