"""The report's tables as CSV and parquet files, and its figures as SVG and PNG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from perturbscope.analysis.umap import Projection
from perturbscope.cells.files import atomic, write_table
from perturbscope.report import sections
from perturbscope.report.charts.heatmap import heat_map
from perturbscope.report.contents import Pairs, Report
from perturbscope.report.page import chart_style
from perturbscope.scoring.calibration import Calibration

_CHART = re.compile(
    r'<svg (?:style="[^"]*" )?class="chart (?:points|map|heat|)" viewBox="0 0 (\d+) (\d+)".*?</svg>', re.DOTALL
)
_ZOOM = 3
"""Pixels of a PNG per unit of its SVG: about 220 dots an inch on a page's width."""


def tables(report: Report) -> dict[str, pd.DataFrame]:
    """Return the tables behind the report, by the name of their file."""
    named = {"scores": report.scores.table}
    if isinstance(report.degs, pd.DataFrame):
        named["genes"] = report.degs
    if isinstance(report.pairs, Pairs):
        named["pairs"] = report.pairs.table
    if isinstance(report.projection, Projection):
        named["umap"] = report.projection.to_frame()
    if isinstance(report.enrichment, pd.DataFrame):
        named["enrichment"] = report.enrichment
    if isinstance(report.calibration, Calibration):
        rows = [(i.kind, i.metric, p, z) for i in report.calibration.sets for p, z in zip(i.p, i.z, strict=False)]
        named["calibration"] = pd.DataFrame(rows, columns=["kind", "metric", "p", "z"])
    return named


def write_tables(folder: Path, report: Report) -> list[Path]:
    """Write every table as ``.csv`` and ``.parquet`` into an existing folder, and return the files' paths."""
    written = []
    facts: dict[str, Any] = {**report.scores.provenance, "warnings": report.scores.warnings}
    for name, table in tables(report).items():
        parquet, csv = folder / f"{name}.parquet", folder / f"{name}.csv"
        write_table(parquet, table, facts)
        with atomic(csv) as staging:
            table.to_csv(staging, index=False)
        written += [parquet, csv]
    return written


def figures(report: Report) -> dict[str, str]:
    """Return the charts as SVG documents, by the name of their file."""
    metrics = report.scores.provenance["metrics"]
    pages = {
        **{f"effect-{m}": sections.effects(report).partition(f'id="effect-{m}"')[2] for m in metrics},
        **{f"genes-{m}": sections.effects(report).partition(f'id="genes-{m}"')[2] for m in metrics},
        "umap": sections.map_of_cells(report, alone=True),
        "pairs": sections.alike(report),
        "calibration": sections.calibration(report),
    }
    documents = {}
    for name, text in pages.items():
        chart = _CHART.search(text)
        if chart:
            documents[name] = _document(chart)
    return documents


def write_figures(folder: Path, report: Report) -> tuple[list[Path], str]:
    """Write every chart as ``.svg``, and as ``.png`` if that is possible, into an existing folder.

    Returns
    -------
    The files' paths, and why there is no PNG (empty if there is).
    """
    written, why = [], no_png()
    for name, text in figures(report).items():
        path = folder / f"{name}.svg"
        with atomic(path) as staging:
            staging.write_text(text, encoding="utf-8")
        written.append(path)
        if not why:
            with atomic(path.with_suffix(".png")) as staging:
                staging.write_bytes(_png(text))
            written.append(path.with_suffix(".png"))
    return written, why


def heat_map_file(names: Sequence[str], distances: NDArray[np.floating[Any]]) -> str:
    """Return a clustered heat map of a few groups as an SVG document (average linkage).

    Parameters
    ----------
    names, distances
        Names and matrix of a :class:`perturbscope.scoring.pair_map.DistanceMap`; negative distances are drawn as 0.
    """
    values = np.maximum(distances.astype(np.float64), 0.0)
    tree = hierarchy.linkage(squareform(values, checks=False), "average", optimal_ordering=True)
    chart = _CHART.search(heat_map(names, values, tree, control=""))
    return "" if chart is None else _document(chart)


def no_png() -> str:
    """Return why figures cannot be written as PNG here; empty if they can."""
    try:
        import resvg_py  # noqa: F401  to see whether it is installed
    except ImportError:
        return "Figures are SVG only: PNG needs resvg-py, pip install 'perturbscope[report]'."
    box = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40">{}</svg>'
    # Without any font, resvg leaves text out silently.
    if _png(box.format('<text x="2" y="30" font-size="30" font-family="sans-serif">M</text>')) == _png(box.format("")):
        return "Figures are SVG only: this system has no fonts for PNG; install one, such as fonts-dejavu-core."
    return ""


def _document(chart: re.Match[str]) -> str:
    width, height = chart[1], chart[2]
    start, _, rest = chart[0].partition(">")
    start = start.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" ', 1)
    return f'{start}><style>{chart_style()}</style><rect width="{width}" height="{height}" fill="#ffffff"/>{rest}\n'


def _png(text: str) -> bytes:
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=text, zoom=_ZOOM, sans_serif_family="DejaVu Sans"))
