"""``perturbscope degs``, ``enrich-genes``, ``pseudobulk`` and ``perturbscope enrich``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from perturbscope.cli import console, options
from perturbscope.errors import InvalidParameterError

if TYPE_CHECKING:
    import pandas as pd

_TESTING = "Testing"
_CHANCE = 0.25
"""Largest share of random control groups with any differentially expressed gene for which no warning is given; a q of
0.05 promises about 0.05."""


@options.grouped
def degs(
    cells: options.In,
    perturbation_key: options.PerturbationKey,
    control: options.Control,
    counts_in: options.CountsIn,
    labels_in: options.LabelsIn,
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The .parquet or .csv file of numbers of genes to write.")
    ] = None,
    genes: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="The .parquet or .csv file to write with a row a perturbation and gene."),
    ] = None,
    batch_key: Annotated[
        str | None, typer.Option(metavar="COL", help="Column of obs within whose batches cells are compared.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="A gene counts if its q is below this.", rich_help_panel=_TESTING)
    ] = 0.05,
    min_expressed: Annotated[
        float,
        typer.Option(
            help="Test genes expressed in this share of the compared cells, whatever their label.",
            rich_help_panel=_TESTING,
        ),
    ] = 0.01,
    min_log2_fold_change: Annotated[
        float, typer.Option(help="Smallest absolute log2 fold change.", rich_help_panel=_TESTING)
    ] = 0.0,
    max_controls: Annotated[
        int, typer.Option(help="Most controls; a seeded sample of more.", rich_help_panel=_TESTING)
    ] = 5000,
    exclude_target: Annotated[
        bool, typer.Option(help="Leave out the perturbed gene itself.", rich_help_panel=_TESTING)
    ] = True,
    exchanges: Annotated[
        bool,
        typer.Option(
            help="Take p of genes that few cells express from the exchanges of labels.",
            rich_help_panel=_TESTING,
        ),
    ] = True,
    correction: Annotated[
        Literal["perturbation", "screen"],
        typer.Option(help="q over the genes of a perturbation, or of all.", rich_help_panel=_TESTING),
    ] = "perturbation",
    top_genes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --genes: only the N genes with the smallest p of each.")
    ] = None,
    check_null: Annotated[
        bool, typer.Option("--check-null", help="Count genes between random controls too, where there should be none.")
    ] = False,
    top: Annotated[int, typer.Option(min=0, help="Rows of the table on stdout; 0 for none.")] = 20,
    seed: options.Seed = 0,
) -> None:
    """Test each perturbation's genes against controls (Wilcoxon rank sum): numbers, and with --genes the genes."""
    from perturbscope.analysis.degs import DegOptions
    from perturbscope.cells.files import check_output, write_table
    from perturbscope.cells.readers import open_cells
    from perturbscope.tasks.genes import deg_screen, write_genes

    if out is None and genes is None:
        raise InvalidParameterError("Give OUT for numbers of genes, --genes OUT for the genes, or both.", field="out")
    if out is not None and genes is not None and out.absolute() == genes.absolute():
        raise InvalidParameterError(f"OUT and --genes are both {out}; give each its own name.", field="genes")
    for path in (out, genes):
        if path is not None:
            check_output(path, [".parquet", ".csv"], source=cells)
    chosen = DegOptions(
        alpha=alpha,
        min_expressed=min_expressed,
        min_log2_fold_change=min_log2_fold_change,
        exclude_target=exclude_target,
        max_controls=max_controls,
        exchanges=exchanges,
        correction=correction,
    )
    with open_cells(cells, **vars(counts_in)) as source, console.progress_bars() as progress:
        screen, facts, warnings = deg_screen(
            source,
            perturbation_key=perturbation_key,
            control=control,
            batch_key=batch_key,
            options=chosen,
            seed=seed,
            missing_labels=labels_in.missing_label,
            normalize_combinations=labels_in.normalize_combinations,
        )
        facts |= {"input": cells.name, **vars(counts_in)}
        if check_null:
            null = screen.null()
            facts["null"] = null.to_dict("records")
            warnings += _doubts(null)
        if genes is not None:
            table = write_genes(screen, genes, facts, warnings, top=top_genes, progress=progress)
        else:
            table = screen.counts(progress)
    warnings = list(dict.fromkeys([*warnings, *screen.warnings(table)]))
    if out is not None:
        write_table(out, table, {**screen.facts(), **facts, "warnings": warnings})
    for warning in warnings:
        console.warn(warning)
    if top:
        ranked = table.sort_values(["n_degs", "perturbation"], ascending=[False, True])
        console.show_rows(ranked, title="Differentially expressed genes", top=top)


def _doubts(null: pd.DataFrame) -> list[str]:
    """Return a sentence about each size at which random controls have differentially expressed genes."""
    return [
        f"Random groups of {size} controls have {median:g} differentially expressed genes in the median (some in "
        f"{share:.0%} of the groups), though nothing was done to them: numbers of genes of perturbations with "
        "as few cells cannot be trusted. Batches (--batch-key), or more cells, may help."
        for size, median, _, share in null.itertuples(index=False, name=None)
        if share > _CHANCE
    ]


@options.grouped
def enrich_genes(
    cells: options.In,
    out: options.OutTable,
    gene_sets: Annotated[Path, typer.Option(metavar="SETS.gmt", help="Gene sets: .gmt, plain or gzipped.")],
    perturbation_key: options.PerturbationKey,
    control: options.Control,
    counts_in: options.CountsIn,
    labels_in: options.LabelsIn,
    batch_key: Annotated[
        str | None, typer.Option(metavar="COL", help="Column of obs within whose batches cells are compared.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="A gene counts if its q is below this.", rich_help_panel=_TESTING)
    ] = 0.05,
    correlation: Annotated[
        float,
        typer.Option(
            help="Assumed correlation between genes of a set; 0: the plain Mann-Whitney test.", rich_help_panel=_TESTING
        ),
    ] = 0.01,
    min_members: Annotated[
        int, typer.Option(min=1, help="Fewest tested genes of a set.", rich_help_panel=_TESTING)
    ] = 5,
    max_members: Annotated[
        int, typer.Option(min=1, help="Most tested genes of a set.", rich_help_panel=_TESTING)
    ] = 500,
    correction: Annotated[
        Literal["perturbation", "screen"],
        typer.Option(help="q over the genes and sets of a perturbation, or of all.", rich_help_panel=_TESTING),
    ] = "perturbation",
    top: Annotated[int, typer.Option(min=0, help="Rows of the table on stdout; 0 for none.")] = 20,
    seed: options.Seed = 0,
) -> None:
    """Test gene sets in the expression of each perturbation, by the ranks of their genes and by their changed genes."""
    from perturbscope.analysis.degs import DegOptions
    from perturbscope.cells.files import check_output, write_table
    from perturbscope.tasks import genes

    check_output(out, [".parquet", ".csv"], source=cells)
    with console.progress_bars() as progress:
        result = genes.enrich_genes(
            cells, gene_sets, perturbation_key=perturbation_key, control=control, batch_key=batch_key,
            options=DegOptions(alpha=alpha, correction=correction), correlation=correlation, min_members=min_members,
            max_members=max_members, missing_labels=labels_in.missing_label,
            normalize_combinations=labels_in.normalize_combinations, seed=seed, progress=progress, **vars(counts_in),
        )  # fmt: skip
    facts = {"input": cells.name, "gene_sets": gene_sets.name, **vars(counts_in)}
    write_table(out, result.table, {**result.provenance, **facts, "warnings": result.warnings})
    for warning in result.warnings:
        console.warn(warning)
    if top:
        ranked = result.table.sort_values(["p", "perturbation"], kind="stable")
        console.show_rows(ranked, title="Gene sets in the expression of perturbations", top=top)


@options.grouped
def pseudobulk(
    cells: options.In,
    out: options.OutTable,
    perturbation_key: options.PerturbationKey,
    control: options.Control,
    replicate_key: Annotated[
        str, typer.Option(metavar="COL", help="Column of obs with each cell's replicate: well, donor, guide.")
    ],
    counts_in: options.CountsIn,
    min_cells: Annotated[int, typer.Option(min=1, help="Fewest cells of a sample.")] = 10,
    top: Annotated[int, typer.Option(min=0, help="Rows of the table on stdout; 0 for none.")] = 20,
) -> None:
    """Test genes between replicates, whose counts are summed (DESeq2; needs perturbscope[pseudobulk])."""
    from perturbscope.cells.files import check_output, write_table
    from perturbscope.scoring.results import release
    from perturbscope.tasks import genes

    check_output(out, [".parquet", ".csv"], source=cells)
    with console.progress_bars() as progress:
        table = genes.pseudobulk(
            cells, perturbation_key=perturbation_key, control=control, replicate_key=replicate_key,
            min_cells=min_cells, progress=progress, **vars(counts_in),
        )  # fmt: skip
    warnings = table.attrs["warnings"]
    facts: dict[str, object] = {
        "kind": "pseudobulk",
        "version": release(),
        "control": control,
        "replicate_key": replicate_key,
    }
    facts |= {"perturbation_key": perturbation_key, "min_cells": min_cells, "input": cells.name, "warnings": warnings}
    write_table(out, table, {**facts, **vars(counts_in)})
    for warning in warnings:
        console.warn(warning)
    if top:
        console.show_rows(table.sort_values(["p", "perturbation"]), title="Genes between replicates", top=top)


def enrich(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="Output of perturbscope score: .parquet or .csv.")],
    out: options.OutTable,
    gene_sets: Annotated[Path, typer.Option(metavar="SETS.gmt", help="Gene sets: .gmt, plain or gzipped.")],
    degs: Annotated[
        Path | None,
        typer.Option(
            metavar="DEGS",
            help="Output of perturbscope degs: rank only weak perturbations.",
        ),
    ] = None,
    max_degs: Annotated[int, typer.Option(min=0, help="With --degs: most differentially expressed genes.")] = 0,
    metric: Annotated[str | None, typer.Option(help="Metric to rank by, if SCORES has several.")] = None,
    rank_by: Annotated[str, typer.Option(metavar="COL", help="Column to rank by, largest first.")] = "z",
    grid: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Sizes of the top; default: every 100, fewer if small.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Number of random draws behind p.")] = 10_000,
    top: Annotated[int, typer.Option(min=0, help="Sets of the table on stdout; 0 for none.")] = 20,
    seed: options.Seed = 0,
) -> None:
    """Test whether gene sets gather at the top of a ranking, over all and within strata of the number of cells."""
    from perturbscope.analysis.enrichment import enrich_scores
    from perturbscope.analysis.gene_sets import read_gmt
    from perturbscope.cells.files import check_output, read_table, write_table

    check_output(out, [".parquet", ".csv"], source=scores)
    with console.progress_bars() as progress:
        result = enrich_scores(
            read_table(scores, field="scores"),
            read_gmt(gene_sets),
            metric=metric,
            rank_by=rank_by,
            degs=None if degs is None else read_table(degs, field="degs"),
            max_degs=max_degs,
            grid=None if grid is None else _numbers(grid),
            draws=draws,
            seed=seed,
            progress=progress,
        )
    facts = {"scores": scores.name, "gene_sets": gene_sets.name, "degs": degs.name if degs else None}
    write_table(out, result.table, {**result.provenance, **facts, "warnings": result.warnings})
    for warning in result.warnings:
        console.warn(warning)
    if top:
        columns = ["gene_set", "n_members", "n", "k", "expected", "p_exact", "p_exact_adjusted"]
        columns += ["p_stratified_exact", "p_stratified_exact_adjusted"]
        console.show_rows(result.best()[columns], title="Enrichment, at each set's strongest n", top=top)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidParameterError(
            f"--grid {text} is not a list of whole numbers, e.g. 100,200,500.", field="grid"
        ) from None
