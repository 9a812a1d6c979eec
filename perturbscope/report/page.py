"""The HTML page of one scored screen: sentences, table and charts."""

from __future__ import annotations

import math
import os
import re
from html import escape
from importlib import resources
from pathlib import Path

from perturbscope.cells.files import atomic
from perturbscope.report import sections
from perturbscope.report.contents import Report
from perturbscope.report.sentences import READING, cautions, conclusions, count, doubt, number
from perturbscope.report.table import score_table

_LINKS = (
    ("summary", "Summary"),
    ("ranking", "Ranking"),
    ("charts", "Effects"),
    ("map", "Map"),
    ("alike", "Alike"),
    ("sets", "Gene sets"),
    ("calibration", "Calibration"),
    ("reading", "Help"),
)


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write one HTML file that needs no other file and no network; an existing file is replaced at once or not at all.

    Parameters
    ----------
    path
        File to write.
    report
        Contents of the page.
    """
    text = render_report(report)
    with atomic(Path(path)) as staging:
        staging.write_text(text, encoding="utf-8")


def render_report(report: Report) -> str:
    """Return the page as HTML. All text that comes from the data is escaped."""
    facts = report.scores.provenance
    subtitle = (
        f"{count(facts['n_perturbations'], 'perturbation')} in {facts['n_cells']:,} cells, compared with the "
        f"{facts['n_controls']:,} cells labelled \N{LEFT DOUBLE QUOTATION MARK}{facts['control']}"
        f"\N{RIGHT DOUBLE QUOTATION MARK}."
    )
    warnings = cautions(report)
    reading = sections.card("How to read the numbers", sections.bullets(READING), anchor="reading")
    links = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in _LINKS)
    body = [
        f'<header><h1>{escape(report.title)}</h1><p class="lead">{escape(subtitle)}</p>'
        f'<nav aria-label="Parts of this page">{links}</nav></header>',
        _facts(report),
        sections.card("What this says", sections.bullets(conclusions(report)), anchor="summary", kind="summary"),
        sections.card("Read with care", sections.bullets(warnings), kind="warnings") if warnings else "",
        sections.card("All perturbations, strongest first", score_table(report), anchor="ranking"),
        f'<div class="charts" id="charts">{sections.effects(report)}</div>',
        f'<div class="charts uneven">{sections.map_of_cells(report)}{sections.alike(report)}</div>',
        sections.gene_sets(report),
        f'<div class="charts">{sections.calibration(report)}{reading}</div>',
        sections.provenance(report),
        f'<footer class="muted">PerturbScope {escape(str(facts["version"]))}. This file needs no network.</footer>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{stylesheet()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in body if section)
        + f"\n</main>\n<script>\n{_file('page.js')}</script>\n</body>\n</html>\n"
    )


def stylesheet() -> str:
    """Return the styles of the page and of its charts."""
    return _file("style.css") + _file("charts.css")


def chart_style() -> str:
    """Return the styles of the charts for figures in their own files: light colours in place of variables."""
    light = dict(re.findall(r"(--[a-z0-9-]+):\s*([^;]+);", _file("style.css").partition("@media")[0]))
    return re.sub(r"var\((--[a-z0-9-]+)\)", lambda match: light[match[1]], _file("charts.css").partition("@media")[0])


def _file(name: str) -> str:
    return (resources.files("perturbscope.report") / name).read_text(encoding="utf-8")


def _facts(report: Report) -> str:
    facts, first = report.scores.provenance, report.scores.provenance["metrics"][0]
    rows, undone = report.scores.table[report.scores.table["metric"] == first], doubt(report)
    doubtful = " doubtful" if undone else ""
    items = [
        (
            f"{int((rows['q'] < 0.05).sum()):,}" if rows["q"].notna().any() else number(math.nan),
            f"differ from control (q < 0.05){f', {undone}' if undone else ''}",
            doubtful,
        ),
        (f"{facts['n_scored']:,}", f"perturbation{'' if facts['n_scored'] == 1 else 's'} scored", ""),
        (number(float(rows["z"].dropna().median())), "median effect z", doubtful),
        (f"{facts['n_controls']:,}", "control cells", ""),
    ]
    cards = "".join(
        f'<div class="fact{kind}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label, kind in items
    )
    return f'<div class="facts">{cards}</div>'
