"""``perturbscope map``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from perturbscope.cli import console, options

if TYPE_CHECKING:
    from perturbscope.scoring.pair_map import DistanceMap

SUFFIXES = (".parquet", ".csv", ".npz")


@options.grouped
def map_pairs(
    cells: options.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .parquet, .csv or .npz file to write.")],
    screen: options.ScreenIn,
    metric: Annotated[
        Literal["e_distance", "cosine_e_distance"], typer.Option(help="The distance.", rich_help_panel="Scoring")
    ] = "e_distance",
    method: Annotated[
        Literal["exact", "landmarks"],
        typer.Option(
            help="landmarks: approximate, in time that grows with the cells and not with their square; the error is "
            "measured and reported.",
            rich_help_panel="Scoring",
        ),
    ] = "exact",
    landmarks: Annotated[
        int, typer.Option(help="Number of cells to which distances are measured.", rich_help_panel="Scoring")
    ] = 2048,
    nearest: Annotated[
        int, typer.Option(min=0, metavar="K", help="Also write the K nearest of each perturbation to OUT.nearest.csv.")
    ] = 0,
    figure: Annotated[
        Path | None, typer.Option(metavar="OUT.svg", help="Also draw the map, of at most 60 perturbations.")
    ] = None,
) -> None:
    """Map all pairs of perturbations: write their distances as one matrix. A server may embed the cells."""
    from perturbscope.cells.files import check_output, write_matrix, write_table
    from perturbscope.scoring.pair_map import check_map, distance_map

    check_output(out, SUFFIXES, source=cells)
    if figure is not None:
        check_output(figure, [".svg"], source=cells)
    chosen = screen.options(metrics=[metric], permutations=1)
    check_map(chosen, method, landmarks)
    with screen.open(cells, chosen) as (opened, _, progress):
        pair_map = distance_map(
            opened.values,
            opened.labels,
            options=chosen,
            method=method,
            landmarks=landmarks,
            progress=lambda _, done, total: progress("pairs", done, total),
        )
    warnings = [*opened.warnings, *opened.cleaned.warnings, *pair_map.warnings]
    provenance = {
        **pair_map.provenance,
        **opened.provenance,
        "input": cells.name,
        **vars(screen.counts),
        "warnings": warnings,
    }
    write_matrix(out, pair_map.names, pair_map.n_cells, pair_map.distances, provenance)
    if nearest:
        write_table(out.with_name(f"{out.name}.nearest.csv"), pair_map.nearest(nearest), provenance)
    if figure is not None:
        warnings += _draw(figure, pair_map)
    for warning in warnings:
        console.warn(warning)
    console.say(
        f"{len(pair_map.names)} perturbations of {cells.name}, all pairs by {pair_map.metric} ({method}) -> {out}"
    )


def _draw(path: Path, pair_map: DistanceMap) -> list[str]:
    """Draw the heat map and return no warning, or return the warning that it would be illegible."""
    from perturbscope.cells.files import atomic
    from perturbscope.report.files import heat_map_file
    from perturbscope.report.pairs import MAX_NAMES

    if not 2 <= len(pair_map.names) <= MAX_NAMES:
        return [f"No figure was drawn: {len(pair_map.names)} perturbations; it can show 2 to {MAX_NAMES}."]
    with atomic(path) as staging:
        staging.write_text(heat_map_file(pair_map.names, pair_map.distances), encoding="utf-8")
    return []
