"""``perturbscope map``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from perturbscope.cli import console, options
from perturbscope.cli.session import open_work

if TYPE_CHECKING:
    from perturbscope.scoring.pair_map import DistanceMap

SUFFIXES = (".parquet", ".csv", ".npz")


def map_pairs(
    cells: options.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .parquet, .csv or .npz file to write.")],
    perturbation_key: options.PerturbationKey,
    use_rep: options.UseRep = None,
    metric: Annotated[
        Literal["e_distance", "cosine_e_distance"], typer.Option(help="The distance.", rich_help_panel="Scoring")
    ] = "e_distance",
    method: Annotated[
        Literal["exact", "landmarks"],
        typer.Option(
            help="landmarks: approximate, in time that grows with the cells and not with their square; its error is "
            "measured and said.",
            rich_help_panel="Scoring",
        ),
    ] = "exact",
    landmarks: Annotated[
        int, typer.Option(help="Cells that distances are measured to.", rich_help_panel="Scoring")
    ] = 2048,
    min_cells: options.MinCells = 20,
    setting: options.Settings = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="OUT.svg", help="Also draw the map, of at most 60 perturbations.")
    ] = None,
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
    """Map all pairs of perturbations: their distances as one matrix. Cells may be embedded by a server."""
    from perturbscope.cells.files import check_output, write_matrix
    from perturbscope.scoring.pair_map import check_map, distance_map
    from perturbscope.tasks.screen import Screen

    check_output(out, SUFFIXES, source=cells)
    if figure is not None:
        check_output(figure, [".svg"], source=cells)
    chosen = options.score_options([metric], seed, min_cells, 1, setting)
    check_map(chosen, method, landmarks)
    where = {"layer": layer, "gene_key": gene_key, "total_counts_key": total_counts_key}
    with open_work(cells, where, use_rep, bundle, server, grpc, model, device, variant) as (source, backend, progress):
        screen = Screen.of(
            source,
            backend,
            perturbation_key=perturbation_key,
            use_rep=use_rep,
            options=chosen,
            progress=progress,
        )
        found = distance_map(
            screen.values,
            screen.labels,
            options=chosen,
            method=method,
            landmarks=landmarks,
            progress=lambda _, done, total: progress("pairs", done, total),
        )
    warnings = [*screen.warnings, *found.warnings]
    provenance = {**found.provenance, **screen.provenance, "input": cells.name, **where, "warnings": warnings}
    write_matrix(out, found.names, found.n_cells, found.distances, provenance)
    if figure is not None:
        warnings += _draw(figure, found)
    for warning in warnings:
        console.warn(warning)
    console.say(f"{len(found.names)} perturbations of {cells.name}, all pairs by {found.metric} ({method}) -> {out}")


def _draw(path: Path, found: DistanceMap) -> list[str]:
    """Write the heat map, if it can be read; why not, otherwise."""
    from perturbscope.cells.files import atomic
    from perturbscope.report.files import heat_map_file
    from perturbscope.report.pairs import MAX_NAMES

    if not 2 <= len(found.names) <= MAX_NAMES:
        return [f"No figure was drawn: {len(found.names)} perturbations; it can show 2 to {MAX_NAMES}."]
    with atomic(path) as staging:
        staging.write_text(heat_map_file(found.names, found.distances), encoding="utf-8")
    return []
