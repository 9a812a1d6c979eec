"""Differentially expressed genes of each perturbation, as an operation: no model takes part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol.fields import Labels, Meta, PerRow
from perturbscope.protocol.operations import Operation
from perturbscope.scoring.cost import Cost, deg_cost


@dataclass(frozen=True, kw_only=True, eq=False)
class DegsRequest:
    """A request for the differentially expressed genes of perturbations.

    Attributes
    ----------
    cells
        Raw counts.
    perturbations
        Label of each cell.
    control
        The label of control cells, or several of them.
    batches
        Batch of each cell; cells and controls are then compared within batches (van Elteren's test).
    top
        Number of genes of each perturbation to return, those with the smallest p.
    alpha
        q below which a gene counts as differentially expressed.
    min_expressed
        Smallest share of the compared cells, whatever their label, that must express a gene for it to be tested.
    min_log2_fold_change
        Smallest absolute log2 fold change of a gene that counts.
    exclude_target
        Whether the perturbed gene itself has no q and does not count.
    max_controls
        Most controls to compare with; of more, a seeded sample is used.
    exchanges
        Whether p of a gene that few cells express is taken from the exchanges of labels; else it is a normal one.
    correction
        What q is over: perturbation (the genes of each) or screen (all genes of all).
    seed
        Seed of the sample of controls.
    model
        Name of a model, which has no effect: genes are tested without one.
    """

    cells: CountMatrix
    perturbations: Annotated[tuple[str, ...], PerRow("perturbation")]
    control: str | tuple[str, ...]
    batches: Annotated[tuple[str, ...], PerRow("batch")] | None = None
    top: int = 50
    alpha: float = 0.05
    min_expressed: float = 0.01
    min_log2_fold_change: float = 0.0
    exclude_target: bool = True
    max_controls: int = 5000
    exchanges: bool = True
    correction: str = "perturbation"
    seed: int = 0
    model: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DegsAnswer:
    """Genes of perturbations, a row a perturbation and gene, the smallest p of a perturbation first.

    Attributes
    ----------
    perturbations
        Perturbation of each row.
    genes
        Identifier of the gene, as it was sent.
    log2_fold_change
        log2 ratio of the mean counts per 10,000 (plus 1e-9), perturbed cells over controls.
    mean
        Mean counts per 10,000 of the perturbed cells.
    mean_control
        Mean counts per 10,000 of the controls.
    expressed
        Share of the perturbed cells that express the gene.
    expressed_control
        Share of the controls that express it.
    statistic
        z of the Wilcoxon rank sum, as scanpy computes it; within batches van Elteren's.
    p
        Two-sided p.
    q
        q of Benjamini and Hochberg; none for the perturbed gene itself.
    p_normal
        p of a normal z, which is scanpy's.
    p_source
        Where p comes from: normal, or exchanges (of labels) for a gene that few cells express.
    flags
        target for the perturbed gene itself; else empty.
    n_cells
        Cells of the perturbation.
    n_degs
        Number of its differentially expressed genes, of all that were tested.
    n_tested
        Number of its genes that were tested.
    meta
        Warnings, and what made the numbers; provenance.counts has a row a perturbation.
    """

    perturbations: Annotated[tuple[str, ...], PerRow("perturbation")]
    genes: Annotated[tuple[str, ...], PerRow("gene")]
    log2_fold_change: NDArray[np.float64]
    mean: NDArray[np.float64]
    mean_control: NDArray[np.float64]
    expressed: NDArray[np.float64]
    expressed_control: NDArray[np.float64]
    statistic: NDArray[np.float64]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    p_normal: NDArray[np.float64]
    p_source: Labels
    flags: Labels
    n_cells: NDArray[np.int64]
    n_degs: NDArray[np.int64]
    n_tested: NDArray[np.int64]
    meta: Meta = field(default_factory=Meta)


def find(_model: Embedder, request: DegsRequest) -> DegsAnswer:
    """Test the genes."""
    from perturbscope.analysis.degs import DegOptions, differential_genes

    found = differential_genes(
        request.cells,
        request.perturbations,
        control=request.control,
        batches=request.batches,
        options=DegOptions(**{item.name: getattr(request, item.name) for item in fields(DegOptions)}),
        top=request.top,
        seed=request.seed,
    )
    table, counts = found.table, found.counts.set_index("perturbation")
    numbers = counts.loc[table["perturbation"]]
    values = {
        item.name: table[item.name].to_numpy(dtype=np.float64)
        for item in OPERATION.gives.of("numbers")
        if item.name in table
    }
    sizes = {name: numbers[name].to_numpy(dtype=np.int64) for name in ("n_cells", "n_degs", "n_tested")}
    return DegsAnswer(
        perturbations=tuple(table["perturbation"]),
        genes=tuple(table["gene"]),
        p_source=tuple(table["p_source"]),
        flags=tuple(table["flags"]),
        **values,
        **sizes,
        meta=Meta(
            warnings=tuple(found.warnings),
            provenance={**found.provenance, "counts": found.counts.to_dict("records")},
        ),
    )


def cost(request: DegsRequest) -> Cost:
    """Estimate the cost of a request before it is computed."""
    return deg_cost(
        Counter(request.perturbations),
        request.control,
        n_counts=int(request.cells.counts.nnz),
        n_genes=request.cells.n_genes,
        batches=0 if request.batches is None else len(set(request.batches)),
        max_controls=request.max_controls,
        exchanges=request.exchanges,
        passes=2 if request.correction == "screen" else 1,
        top=request.top,
    )


OPERATION = Operation(
    name="degs",
    summary="The differentially expressed genes of each perturbation.",
    request=DegsRequest,
    answer=DegsAnswer,
    run=find,
    cost=cost,
)
