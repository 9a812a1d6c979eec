"""``perturbscope score`` and ``perturbscope compare``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perturbscope.cli import console, options
from perturbscope.cli.session import open_work

if TYPE_CHECKING:
    from perturbscope.scoring.results import CompareResult, ScoreResult


def score(
    cells: options.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .parquet or .csv file to write.")],
    perturbation_key: options.PerturbationKey,
    control: Annotated[str, typer.Option(metavar="LABEL", help="The label of control cells.")],
    use_rep: options.UseRep = None,
    batch_key: options.BatchKey = None,
    metric: options.Metrics = ["e_distance"],  # noqa: B006  typer copies it
    min_cells: options.MinCells = 20,
    permutations: options.Permutations = 1000,
    setting: options.Settings = None,
    report: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Also write a one-page report.")] = None,
    top: options.Top = 20,
    layer: options.Layer = None,
    gene_key: options.GeneKey = None,
    total_counts_key: options.TotalCountsKey = None,
    bundle: options.BundleDir = None,
    server: options.Server = None,
    grpc: options.Grpc = None,
    model: options.ModelName = None,
    device: options.DeviceName = "cpu",
    variant: options.VariantName = "fp32",
    seed: options.Seed = 0,
) -> None:
    """Score perturbations against control: distance, z, p and q of each, in OUT and as a ranked table."""
    from perturbscope.cells.files import check_output
    from perturbscope.tasks.screen import Screen

    check_output(out, [".parquet", ".csv"], source=cells)
    if report is not None:
        check_output(report, [".html"], source=cells)
    chosen = options.score_options(metric, seed, min_cells, permutations, setting)
    where = {"layer": layer, "gene_key": gene_key, "total_counts_key": total_counts_key}
    with open_work(cells, where, use_rep, bundle, server, grpc, model, device, variant) as (source, backend, progress):
        screen = Screen.of(
            source,
            backend,
            perturbation_key=perturbation_key,
            control=control,
            use_rep=use_rep,
            batch_key=batch_key,
            options=chosen,
            progress=progress,
        )
        result = screen.score(progress)
        calibration = screen.calibrate(progress) if report is not None else None
    _deliver(result, out, {"input": cells.name, **where}, title="Scores", top=top)
    if report is not None:
        from perturbscope.report import Report, write_report

        page = Report(title=f"Perturbations of {cells.stem}", scores=result)
        write_report(report, page if calibration is None else replace(page, calibration=calibration))


def compare(
    cells: options.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .parquet or .csv file to write.")],
    perturbation_key: options.PerturbationKey,
    control: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The label of control cells: z by their null; not compared.")
    ] = None,
    use_rep: options.UseRep = None,
    batch_key: options.BatchKey = None,
    metric: options.Metrics = ["e_distance"],  # noqa: B006  typer copies it
    min_cells: options.MinCells = 20,
    permutations: options.Permutations = 1000,
    setting: options.Settings = None,
    top: options.Top = 20,
    layer: options.Layer = None,
    gene_key: options.GeneKey = None,
    total_counts_key: options.TotalCountsKey = None,
    bundle: options.BundleDir = None,
    server: options.Server = None,
    grpc: options.Grpc = None,
    model: options.ModelName = None,
    device: options.DeviceName = "cpu",
    variant: options.VariantName = "fp32",
    seed: options.Seed = 0,
) -> None:
    """Compare perturbations with each other, all pairs."""
    from perturbscope.cells.files import check_output
    from perturbscope.tasks.screen import Screen

    check_output(out, [".parquet", ".csv"], source=cells)
    chosen = options.score_options(metric, seed, min_cells, permutations, setting)
    where = {"layer": layer, "gene_key": gene_key, "total_counts_key": total_counts_key}
    with open_work(cells, where, use_rep, bundle, server, grpc, model, device, variant) as (source, backend, progress):
        screen = Screen.of(
            source,
            backend,
            perturbation_key=perturbation_key,
            control=control,
            use_rep=use_rep,
            batch_key=batch_key,
            options=chosen,
            progress=progress,
        )
        result = screen.compare(progress=progress)
    _deliver(result, out, {"input": cells.name, **where}, title="Distances", top=top)


def _deliver(result: ScoreResult | CompareResult, out: Path, facts: dict[str, Any], *, title: str, top: int) -> None:
    from perturbscope.cells.files import write_table

    write_table(out, result.table, {**result.provenance, **facts, "warnings": result.warnings})
    for warning in result.warnings:
        console.warn(warning)
    if top:
        console.show_table(result.table, title=title, top=top)
