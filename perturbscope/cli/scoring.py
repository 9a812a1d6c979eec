"""``perturbscope score`` and ``perturbscope compare``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perturbscope.cli import console, options

if TYPE_CHECKING:
    from perturbscope.scoring.results import CompareResult, ScoreResult


@options.grouped
def score(
    cells: options.In,
    out: options.OutTable,
    screen: options.ScreenIn,
    control: options.Control,
    testing: options.Testing,
    unit_key: options.UnitKey = None,
    report: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Also write a one-page report.")] = None,
    top: options.Top = 20,
) -> None:
    """Score perturbations against control: distance, z, p and q of each, in OUT and as a ranked table."""
    from perturbscope.cells.files import check_output

    check_output(out, [".parquet", ".csv"], source=cells)
    if report is not None:
        check_output(report, [".html"], source=cells)
    chosen = screen.options(testing)
    columns = {"batch_key": testing.batch_key, "unit_key": unit_key}
    with screen.open(cells, chosen, control=control, **columns) as (opened, _, progress):
        result = opened.score(progress)
        calibration = opened.calibrate(progress) if report is not None else None
    _write(result, out, {"input": cells.name, **vars(screen.counts)}, title="Scores", top=top)
    if report is not None:
        from perturbscope.report import Report, write_report

        page = Report(title=f"Perturbations of {cells.stem}", scores=result)
        write_report(report, page if calibration is None else replace(page, calibration=calibration))


@options.grouped
def compare(
    cells: options.In,
    out: options.OutTable,
    screen: options.ScreenIn,
    testing: options.Testing,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="A label of control cells: z by their null; not compared. Repeatable."),
    ] = None,
    nearest: Annotated[
        int,
        typer.Option(min=0, metavar="K", help="Only the K nearest of each, by cells and (with --control) by effects."),
    ] = 0,
    top: options.Top = 20,
) -> None:
    """Compare perturbations with each other, all pairs; the closest are shown."""
    from perturbscope.cells.files import check_output

    check_output(out, [".parquet", ".csv"], source=cells)
    chosen = screen.options(testing, **({"nearest": nearest} if nearest else {}))
    with screen.open(cells, chosen, control=control, batch_key=testing.batch_key) as (opened, _, progress):
        result = opened.compare(progress=progress)
    _write(result, out, {"input": cells.name, **vars(screen.counts)}, title="Closest pairs", top=top)


_IN_THE_FILE_ALONE = ["null_mean", "null_sd", "p_source", "exchanges", "p_tail_source", "q_omnibus"]
"""Columns that the terminal has no room for."""


def _write(result: ScoreResult | CompareResult, out: Path, facts: dict[str, Any], *, title: str, top: int) -> None:
    """Write the table of a result, and show its warnings and its first rows."""
    from perturbscope.cells.files import misread_labels, write_table
    from perturbscope.scoring.nearest import by_closeness

    write_table(out, result.table, {**result.provenance, **facts, "warnings": result.warnings})
    for warning in result.warnings:
        console.warn(warning)
    misread = misread_labels(result.table) if out.suffix.lower() == ".csv" else []
    if misread:
        console.warn(
            f"pandas.read_csv takes {', '.join(map(repr, misread[:5]))} for a missing value, unless it is called with "
            f"the arguments in {out.name}.provenance.json (read_csv). A .parquet file is read as it is."
        )
    if top:
        table = result.table if "perturbation" in result.table else by_closeness(result.table)
        shown = table.drop(columns=_IN_THE_FILE_ALONE, errors="ignore")
        if not result.provenance["options"].get("omnibus"):
            shown = shown.drop(columns=["p_omnibus", "fired"], errors="ignore")
        console.show_table(shown, title=title, top=top)
