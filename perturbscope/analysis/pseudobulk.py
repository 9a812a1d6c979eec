"""Differential expression between samples: counts summed over the cells of each replicate, tested by DESeq2.

A test between cells says that these cells differ; wells, donors and guides differ too, and a thousand cells of one well
are one well. Where replicates are known, the counts of each replicate's cells are summed (pseudo-bulk, Squair et al.
2021) and the samples compared by DESeq2's negative binomial model (Love et al. 2014), as pydeseq2 implements it. If a
perturbation and its controls share replicates, the replicate is part of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import ProviderUnavailableError, TooFewCellsError
from perturbscope.scoring.cleaning import clean_labels
from perturbscope.scoring.labels import check_labels, require_control
from perturbscope.threads import checkpoint

BULK_COLUMNS = (
    "perturbation", "gene", "n_samples", "n_control_samples", "paired", "base_mean", "log2_fold_change",
    "standard_error", "statistic", "p", "q",
)  # fmt: skip
"""Columns of a table of genes, in order."""


@dataclass(frozen=True)
class Samples:
    """Counts of samples.

    Attributes
    ----------
    counts
        Sums over the cells of each sample, int64 [n_samples, n_genes].
    table
        One row a sample: ``perturbation, replicate, n_cells``.
    """

    counts: NDArray[np.int64]
    table: pd.DataFrame


def sum_samples(
    cells: CountMatrix, perturbations: Sequence[str], replicates: Sequence[str], *, min_cells: int = 10
) -> Samples:
    """Sum the counts of the cells of each perturbation and replicate.

    Parameters
    ----------
    cells
        Raw counts.
    perturbations, replicates
        Labels of each cell.
    min_cells
        Fewest cells of a sample; smaller ones are left out.

    Raises
    ------
    MalformedMatrixError, InvalidParameterError
        The number of labels differs from the number of cells, or a cell has none.
    """
    labels = check_labels(perturbations, len(cells), "perturbations")
    units = check_labels(replicates, len(cells), "replicates")
    table = pd.DataFrame({"perturbation": labels, "replicate": units})
    grouped = table.groupby(["perturbation", "replicate"], sort=True)
    codes = grouped.ngroup().to_numpy()
    sizes = grouped.size().rename("n_cells").reset_index()
    one = sparse.csr_matrix((np.ones(len(cells), dtype=np.int64), (codes, np.arange(len(cells)))))
    counts = np.asarray((one @ cells.counts.astype(np.int64)).todense(), dtype=np.int64)
    large = np.flatnonzero(sizes["n_cells"] >= min_cells)
    return Samples(counts[large], sizes.iloc[large].reset_index(drop=True))


def pseudobulk_degs(
    cells: CountMatrix,
    perturbations: Sequence[str],
    replicates: Sequence[str],
    *,
    control: str | Sequence[str],
    min_cells: int = 10,
    min_counts: int = 10,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Test the genes of each perturbation between replicates; pydeseq2 is needed (``perturbscope[pseudobulk]``).

    It takes some milliseconds a gene and perturbation: it is for tens of perturbations, not for thousands.

    Parameters
    ----------
    cells, perturbations, replicates, min_cells
        See :func:`sum_samples`.
    control
        Label of the control cells, or several.
    min_counts
        Fewest counts of a gene in all samples of a comparison, whatever their label, for it to be tested.
    progress
        Called as ``progress("degs", done, total)``.

    Returns
    -------
    A row a perturbation and gene, columns :data:`BULK_COLUMNS`, the smallest p of a perturbation first: `statistic` is
    Wald's, q Benjamini and Hochberg's. And sentences about perturbations that could not be tested.

    Raises
    ------
    ProviderUnavailableError
        pydeseq2 is not installed.
    TooFewCellsError
        No perturbation has two replicates, or the controls have not.
    ControlLabelMissingError, MalformedMatrixError, InvalidParameterError
        The labels do not allow a test.
    """
    cleaned = clean_labels(perturbations, control)
    one = str(cleaned.control)
    require_control(one, set(map(str, cleaned.labels)))
    samples = sum_samples(cells, cleaned.labels, replicates, min_cells=min_cells)
    names = sorted(set(map(str, cleaned.labels)) - {one})
    found, few = [], []
    for done, name in enumerate(names, start=1):
        checkpoint()
        chosen = _comparison(samples.table, name, one)
        if chosen is None:
            few.append(name)
        else:
            found.append(_tested(samples, name, one, *chosen, gene_ids=cells.gene_ids, min_counts=min_counts))
        if progress:
            progress("degs", done, len(names))
    if not found:
        raise TooFewCellsError(
            f"No perturbation can be compared: it and the controls need two replicates of {min_cells} cells each. "
            "Name a column that holds replicates (wells, donors, guides), or lower min_cells.",
            field="replicates",
        )
    sentences = list(cleaned.warnings)
    if few:
        sentences.append(
            f"{len(few)} of {len(names)} perturbations have fewer than two replicates of {min_cells} cells and were "
            f"not tested: {', '.join(few[:5])}{', ...' if len(few) > 5 else ''}."
        )
    return pd.concat(found, ignore_index=True), sentences


def _comparison(table: pd.DataFrame, name: str, control: str) -> tuple[NDArray[np.intp], bool] | None:
    """Return the samples to compare, and whether they are paired by replicate; None if there are too few."""
    own, theirs = (table[table["perturbation"] == label] for label in (name, control))
    shared = set(own["replicate"]) & set(theirs["replicate"])
    both = pd.concat([own, theirs])
    if len(shared) >= 2:
        return both.index[both["replicate"].isin(shared)].to_numpy(dtype=np.intp), True
    if min(len(own), len(theirs)) >= 2:
        return both.index.to_numpy(dtype=np.intp), False
    return None


def _tested(
    samples: Samples,
    name: str,
    control: str,
    rows: NDArray[np.intp],
    paired: bool,
    *,
    gene_ids: NDArray[np.str_],
    min_counts: int,
) -> pd.DataFrame:
    dataset, statistics = _pydeseq2()
    table, counts = samples.table.iloc[rows], samples.counts[rows]
    genes = np.flatnonzero(counts.sum(axis=0) >= min_counts)
    index = [f"sample{number}" for number in range(len(rows))]
    # Labels may hold signs that formulas understand; the model sees names of its own.
    metadata = pd.DataFrame(
        {
            "condition": np.where(table["perturbation"] == name, "perturbed", "control"),
            "unit": [f"u{code}" for code in pd.factorize(table["replicate"])[0]],
        },
        index=index,
    )
    of_genes = pd.DataFrame(counts[:, genes], index=index, columns=[str(gene) for gene in genes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        design = "~unit + condition" if paired else "~condition"
        fitted = dataset(counts=of_genes, metadata=metadata, design=design, quiet=True, n_cpus=1)
        fitted.deseq2()
        wald = statistics(fitted, contrast=["condition", "perturbed", "control"], quiet=True, n_cpus=1)
        wald.summary()
    result = wald.results_df
    found = pd.DataFrame(
        {
            "perturbation": np.full(len(genes), name, dtype=object),
            "gene": gene_ids[genes].astype(object),
            "n_samples": int((table["perturbation"] == name).sum()),
            "n_control_samples": int((table["perturbation"] == control).sum()),
            "paired": paired,
            "base_mean": result["baseMean"].to_numpy(),
            "log2_fold_change": result["log2FoldChange"].to_numpy(),
            "standard_error": result["lfcSE"].to_numpy(),
            "statistic": result["stat"].to_numpy(),
            "p": result["pvalue"].to_numpy(),
            "q": result["padj"].to_numpy(),
        },
        columns=list(BULK_COLUMNS),
    )
    return found.sort_values("p", kind="stable", ignore_index=True)


def _pydeseq2() -> tuple[Any, Any]:
    try:
        from pydeseq2.dds import DeseqDataSet
        from pydeseq2.ds import DeseqStats
    except ImportError as error:
        raise ProviderUnavailableError(
            "Pseudo-bulk tests need pydeseq2, which is not installed: pip install 'perturbscope[pseudobulk]'."
        ) from error
    return DeseqDataSet, DeseqStats
