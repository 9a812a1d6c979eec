"""``perturbscope degs`` and ``perturbscope enrich``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perturbscope.cli import console, options
from perturbscope.errors import InvalidParameterError

_TESTING = "Testing"
_CHANCE = 0.25
"""Largest share of random control groups with any differentially expressed gene for which no warning is given; a q of
0.05 promises about 0.05."""


@options.grouped
def degs(
    cells: options.In,
    out: options.OutTable,
    perturbation_key: options.PerturbationKey,
    control: options.Control,
    counts_in: options.CountsIn,
    alpha: Annotated[
        float, typer.Option(help="A gene counts if its q is below this.", rich_help_panel=_TESTING)
    ] = 0.05,
    min_expressed: Annotated[
        float, typer.Option(help="Test genes expressed in this share of either group.", rich_help_panel=_TESTING)
    ] = 0.05,
    min_log2_fold_change: Annotated[
        float, typer.Option(help="Smallest absolute log2 fold change.", rich_help_panel=_TESTING)
    ] = 0.0,
    max_controls: Annotated[
        int, typer.Option(help="Most controls; a seeded sample of more.", rich_help_panel=_TESTING)
    ] = 5000,
    exclude_target: Annotated[
        bool, typer.Option(help="Leave out the perturbed gene itself.", rich_help_panel=_TESTING)
    ] = True,
    top: Annotated[int, typer.Option(min=0, help="Rows of the table on stdout; 0 for none.")] = 20,
    seed: options.Seed = 0,
) -> None:
    """Count each perturbation's differentially expressed genes (Mann-Whitney U against controls). Reads all counts."""
    from dataclasses import asdict

    import numpy as np

    from perturbscope.analysis.degs import DegOptions, deg_null, deg_table, target_columns
    from perturbscope.cells.files import check_output, write_table
    from perturbscope.cells.readers import open_cells
    from perturbscope.scoring.results import release

    check_output(out, [".parquet", ".csv"], source=cells)
    chosen = DegOptions(
        alpha=alpha,
        min_expressed=min_expressed,
        min_log2_fold_change=min_log2_fold_change,
        exclude_target=exclude_target,
        max_controls=max_controls,
    )
    with open_cells(cells, **vars(counts_in)) as source, console.progress_bars() as progress:
        labels = source.labels(perturbation_key, field="perturbation_key")
        rows = np.flatnonzero([label is not None and label.strip() != "" for label in labels])
        if not len(rows):
            raise InvalidParameterError(f"No cell has a value in obs[{perturbation_key!r}].", field="perturbation_key")
        counts = source.read()
        row_labels = labels[rows].tolist()
        targets = target_columns(counts.gene_ids, sorted(set(row_labels) - set(control)))
        table = deg_table(
            counts[rows], row_labels, control=control, targets=targets, options=chosen, seed=seed, progress=progress
        )
        null = deg_null(counts[rows], row_labels, control=control, options=chosen, seed=seed)
    warnings = [
        f"Random groups of {size} controls have {median:g} differentially expressed genes in the median (some in "
        f"{share:.0%} of the groups), though nothing was done to them: numbers of genes of perturbations with "
        "as few cells cannot be trusted. A larger --min-expressed, or more cells, helps."
        for size, median, _, share in null.itertuples(index=False, name=None)
        if share > _CHANCE
    ]
    if len(rows) < len(labels):
        warnings.append(
            f"{len(labels) - len(rows)} of {len(labels)} cells have no value in obs[{perturbation_key!r}] and were "
            "left out."
        )
    unknown = [name for name in table["perturbation"] if name not in targets]
    if exclude_target and unknown:
        warnings.append(
            f"{len(unknown)} of {len(table)} perturbations are not named by a gene that was measured, so their own "
            f"gene could not be left out: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}."
        )
    facts = {
        "kind": "degs",
        "version": release(),
        "options": asdict(chosen),
        "control": control if len(control) > 1 else control[0],
        "seed": seed,
    }
    facts["null"] = null.to_dict("records")
    facts |= {"perturbation_key": perturbation_key, "input": cells.name, **vars(counts_in), "warnings": warnings}
    write_table(out, table, facts)
    for warning in warnings:
        console.warn(warning)
    if top:
        ranked = table.sort_values(["n_degs", "perturbation"], ascending=[False, True])
        console.show_rows(ranked, title="Differentially expressed genes", top=top)


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
