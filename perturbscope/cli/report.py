"""``perturbscope report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perturbscope.cli import console, options

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from perturbscope.cells.counts import CountMatrix
    from perturbscope.cells.readers import CellSource
    from perturbscope.report import Absent, Report
    from perturbscope.scoring.results import ScoreResult
    from perturbscope.tasks.backends import StageProgress

PAGE = "report.html"
"""Name of the page if OUT is a folder."""


@options.grouped
def report(
    cells: options.In,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The .html file to write, or a folder for page and files.")
    ],
    screen: options.ScreenIn,
    control: options.Control,
    testing: options.Testing,
    gene_sets: Annotated[
        Path | None, typer.Option(metavar="FILE.gmt", help="Gene sets to look for among the strongest perturbations.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write tables (CSV, parquet) and figures (SVG, PNG) there.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page; default: the name of the file.")] = None,
) -> None:
    """Score a screen and write a page about it, to open in a browser, offline too.

    If OUT is a folder, it gets report.html, the tables as CSV and parquet, and the figures as SVG and PNG.
    """
    from perturbscope.analysis.gene_sets import read_gmt
    from perturbscope.cells.files import check_output
    from perturbscope.report import build_report, write_report

    page, folder = _places(out, figures)
    check_output(page, [".html"], source=cells)
    sets = None if gene_sets is None else read_gmt(gene_sets)
    chosen = screen.options(testing)
    with screen.open(cells, chosen, control=control, batch_key=testing.batch_key) as (opened, source, progress):
        scores = opened.score(progress)
        scores.provenance["input"] = cells.name
        page_report = build_report(
            opened.values,
            opened.labels,
            scores,
            title=title or f"Perturbations of {cells.stem}",
            options=chosen,
            batches=opened.batches,
            cells=_counts(source, opened.rows),
            enrichment=_enrichment(sets, scores, screen.seed, progress),
            progress=progress,
        )
    write_report(page, page_report)
    if folder is not None:
        _write_files(folder, page_report)
    for warning in scores.warnings:
        console.warn(warning)
    console.say(f"{scores.provenance['n_scored']} perturbations of {cells.name} -> {page}")


def _places(out: Path, figures: Path | None) -> tuple[Path, Path | None]:
    """Return the path of the page, and the folder of its tables and figures, which is made."""
    from perturbscope.errors import InvalidParameterError

    is_page = out.suffix.lower() in (".html", ".htm") and not out.is_dir()
    folder = figures or (None if is_page else out)
    for directory in [folder, None if is_page else out]:
        if directory is None:
            continue
        if directory.exists() and not directory.is_dir():
            raise InvalidParameterError(
                f"{directory} is a file; give a folder, or a page that ends in .html.",
                field="figures" if figures else "out",
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidParameterError(
                f"The folder {directory} cannot be made: {error.strerror}.", field="out"
            ) from error
    return (out if is_page else out / PAGE), folder


def _counts(source: CellSource, rows: NDArray[np.intp]) -> CountMatrix | Absent:
    """Raw counts of the cells in these rows, or the reason that the page gives for having none."""
    from perturbscope.errors import InvalidInputError
    from perturbscope.report import Absent

    try:
        return source.read()[rows]
    except InvalidInputError as error:
        return Absent(f"The file has no raw counts that could be tested gene by gene: {error.message}")


def _enrichment(
    sets: dict[str, tuple[str, ...]] | None, scores: ScoreResult, seed: int, progress: StageProgress
) -> pd.DataFrame | Absent:
    """Gene sets at the top of the ranking by the first metric, or the reason that the page gives for having none."""
    from perturbscope.analysis.enrichment import enrich_scores
    from perturbscope.errors import InvalidInputError
    from perturbscope.report import Absent

    if sets is None:
        return Absent("No gene sets were given; --gene-sets FILE.gmt looks for them among the strongest perturbations.")
    try:
        metric = scores.provenance["metrics"][0]
        result = enrich_scores(scores.table, sets, metric=metric, seed=seed, progress=progress)
    except InvalidInputError as error:
        return Absent(f"The gene sets could not be tested: {error.message}")
    scores.warnings.extend(result.warnings)
    return result.best()


def _write_files(folder: Path, report: Report) -> None:
    from perturbscope.report import write_figures, write_tables

    tables = write_tables(folder, report)
    figures, why = write_figures(folder, report)
    if why:
        console.warn(why)
    console.say(f"{len(tables)} tables and {len(figures)} figures -> {folder}")
