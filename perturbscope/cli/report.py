"""``perturbscope report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perturbscope.cli import console, options
from perturbscope.cli.session import open_work

if TYPE_CHECKING:
    import pandas as pd

    from perturbscope.cells.counts import CountMatrix
    from perturbscope.cells.readers import CellSource
    from perturbscope.report import Absent, Report
    from perturbscope.scoring.results import ScoreResult
    from perturbscope.tasks.backends import StageProgress

PAGE = "report.html"
"""Name of the page where OUT is a folder."""


def report(
    cells: options.In,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The .html file to write, or a folder for page and files.")
    ],
    perturbation_key: options.PerturbationKey,
    control: Annotated[str, typer.Option(metavar="LABEL", help="The label of control cells.")],
    use_rep: options.UseRep = None,
    batch_key: options.BatchKey = None,
    gene_sets: Annotated[
        Path | None, typer.Option(metavar="FILE.gmt", help="Gene sets to look for among the strongest perturbations.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write tables (CSV, parquet) and figures (SVG, PNG) there.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page; default: the name of the file.")] = None,
    metric: options.Metrics = ["e_distance"],  # noqa: B006  typer copies it
    min_cells: options.MinCells = 20,
    permutations: options.Permutations = 1000,
    setting: options.Settings = None,
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
    """Score a screen and show it: one page to open in a browser, offline too.

    A folder as OUT gets report.html, the tables as CSV and parquet, and the figures as SVG and PNG.
    """
    from perturbscope.analysis.gene_sets import read_gmt
    from perturbscope.cells.files import check_output
    from perturbscope.report import build_report, write_report
    from perturbscope.tasks.screen import Screen

    page, folder = _places(out, figures)
    check_output(page, [".html"], source=cells)
    sets = None if gene_sets is None else read_gmt(gene_sets)
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
        scores = screen.score(progress)
        scores.provenance["input"] = cells.name
        made = build_report(
            screen.values,
            screen.labels,
            scores,
            title=title or f"Perturbations of {cells.stem}",
            options=chosen,
            batches=screen.batches,
            cells=_counts(source, perturbation_key, batch_key),
            enrichment=_enrichment(sets, scores, seed, progress),
            progress=progress,
        )
    write_report(page, made)
    if folder is not None:
        _write_files(folder, made)
    for warning in scores.warnings:
        console.warn(warning)
    console.say(f"{scores.provenance['n_scored']} perturbations of {cells.name} -> {page}")


def _places(out: Path, figures: Path | None) -> tuple[Path, Path | None]:
    """The page, and the folder of the files that go with it, which is made."""
    from perturbscope.errors import InvalidParameterError

    is_page = out.suffix.lower() in (".html", ".htm") and not out.is_dir()
    folder = figures or (None if is_page else out)
    for made in [folder, None if is_page else out]:
        if made is None:
            continue
        if made.exists() and not made.is_dir():
            raise InvalidParameterError(
                f"{made} is a file; give a folder, or a page that ends in .html.", field="figures" if figures else "out"
            )
        try:
            made.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidParameterError(f"The folder {made} cannot be made: {error.strerror}.", field="out") from error
    return (out if is_page else out / PAGE), folder


def _counts(source: CellSource, perturbation_key: str, batch_key: str | None) -> CountMatrix | Absent:
    """Raw counts of the cells that carry a label; where the file has none, the page says so."""
    from perturbscope.errors import InvalidInputError
    from perturbscope.report import Absent

    keys = [key for key in (perturbation_key, batch_key) if key is not None]
    labelled = [[bool(label and label.strip()) for label in source.labels(key)] for key in keys]
    try:
        return source.read()[[row for row, given in enumerate(zip(*labelled, strict=True)) if all(given)]]
    except InvalidInputError as error:
        return Absent(f"The file has no raw counts that could be tested gene by gene: {error.message}")


def _enrichment(
    sets: dict[str, tuple[str, ...]] | None, scores: ScoreResult, seed: int, progress: StageProgress
) -> pd.DataFrame | Absent:
    """Gene sets at the top of the ranking by the first metric."""
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


def _write_files(folder: Path, made: Report) -> None:
    from perturbscope.report import write_figures, write_tables

    tables = write_tables(folder, made)
    written, why = write_figures(folder, made)
    if why:
        console.warn(why)
    console.say(f"{len(tables)} tables and {len(written)} figures -> {folder}")
