"""Gene sets in the expression of each perturbation, as an operation: no model takes part."""

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
class EnrichGenesRequest:
    """A request to test gene sets in the expression of perturbations.

    Attributes
    ----------
    cells
        Raw counts.
    perturbations
        Label of each cell.
    control
        The label of control cells, or several of them.
    gene_sets
        The text of a .gmt file: one set a line, its name, a description and its genes separated by tabs.
    batches
        Batch of each cell; cells and controls are then compared within batches (van Elteren's test).
    correlation
        Assumed correlation between the genes of a set; 0 gives the plain Mann-Whitney test.
    min_members
        Fewest tested genes of a set; smaller ones are left out.
    max_members
        Most tested genes of a set; larger ones are left out.
    alpha
        q below which a gene counts as differentially expressed.
    min_expressed
        Smallest share of the compared cells, whatever their label, that must express a gene for it to be tested.
    min_log2_fold_change
        Smallest absolute log2 fold change of a gene that counts.
    exclude_target
        Whether the perturbed gene itself is left out.
    max_controls
        Most controls to compare with; of more, a seeded sample is used.
    exchanges
        Whether p of a gene that few cells express is taken from the exchanges of labels; else it is a normal one.
    correction
        What q is over: perturbation (genes, and sets, of each) or screen (those of all).
    seed
        Seed of the sample of controls.
    model
        Name of a model, which has no effect: genes are tested without one.
    """

    cells: CountMatrix
    perturbations: Annotated[tuple[str, ...], PerRow("perturbation")]
    control: str | tuple[str, ...]
    gene_sets: str
    batches: Annotated[tuple[str, ...], PerRow("batch")] | None = None
    correlation: float = 0.01
    min_members: int = 5
    max_members: int = 500
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
class EnrichGenesAnswer:
    """Gene sets of perturbations, a row a perturbation and set, the smallest p of a perturbation first.

    Attributes
    ----------
    perturbations
        Perturbation of each row.
    gene_sets
        Name of the set.
    direction
        up, down or none: where the genes of the set rank among all tested genes.
    n_genes
        Genes of the set.
    n_members
        Those that were tested.
    statistic
        z of the rank sum of their own z.
    p
        Its two-sided p.
    q
        Its q of Benjamini and Hochberg.
    n_degs
        Differentially expressed genes in the set.
    expected_degs
        As many as by chance.
    p_degs
        Chance of that many or more (hypergeometric).
    q_degs
        Its q of Benjamini and Hochberg.
    meta
        Warnings, and what made the numbers.
    """

    perturbations: Annotated[tuple[str, ...], PerRow("perturbation")]
    gene_sets: Annotated[tuple[str, ...], PerRow("gene_set")]
    direction: Labels
    n_genes: NDArray[np.int64]
    n_members: NDArray[np.int64]
    statistic: NDArray[np.float64]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    n_degs: NDArray[np.int64]
    expected_degs: NDArray[np.float64]
    p_degs: NDArray[np.float64]
    q_degs: NDArray[np.float64]
    meta: Meta = field(default_factory=Meta)


def enrich(_model: Embedder, request: EnrichGenesRequest) -> EnrichGenesAnswer:
    """Test the sets."""
    from perturbscope.analysis.degs import DegOptions, DegScreen
    from perturbscope.analysis.expression_sets import enrich_expression
    from perturbscope.analysis.gene_sets import parse_gmt

    sets = parse_gmt(request.gene_sets)
    screen = DegScreen(
        request.cells,
        request.perturbations,
        control=request.control,
        batches=request.batches,
        options=DegOptions(**{item.name: getattr(request, item.name) for item in fields(DegOptions)}),
        seed=request.seed,
    )
    found = enrich_expression(
        screen,
        sets,
        correlation=request.correlation,
        min_members=request.min_members,
        max_members=request.max_members,
    )
    table = found.table
    numbers = {item.name: table[item.name].to_numpy(dtype=item.dtype) for item in OPERATION.gives.of("numbers")}
    return EnrichGenesAnswer(
        perturbations=tuple(table["perturbation"]),
        gene_sets=tuple(table["gene_set"]),
        direction=tuple(table["direction"]),
        **numbers,
        meta=Meta(warnings=tuple(found.warnings), provenance=found.provenance),
    )


def cost(request: EnrichGenesRequest) -> Cost:
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
        top=request.gene_sets.count("\n") + 1,
        n_members=request.gene_sets.count("\t"),
    )


OPERATION = Operation(
    name="enrich_genes",
    summary="Gene sets that move in the expression of each perturbation.",
    request=EnrichGenesRequest,
    answer=EnrichGenesAnswer,
    run=enrich,
    cost=cost,
)
