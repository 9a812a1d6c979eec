"""The cards of the page: each has a heading, a picture and how to read it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from typing import Any

import pandas as pd

from perturbscope.analysis.degs import correlate_degs
from perturbscope.analysis.umap import Projection
from perturbscope.report.charts.cells import COLOURS, cell_map
from perturbscope.report.charts.frame import NARROW, WIDE, Frame
from perturbscope.report.charts.heatmap import heat_map, scale
from perturbscope.report.charts.quantiles import qq_chart
from perturbscope.report.charts.scatter import DegPoint, Point, deg_chart, effect_chart
from perturbscope.report.contents import Absent, Pairs, Report
from perturbscope.report.pairs import PAIR_CELLS
from perturbscope.report.sentences import METRIC_NAMES, number
from perturbscope.report.table import plain_table
from perturbscope.scoring.calibration import Calibration

_SET_COLUMNS = {
    "gene_set": "gene set",
    "n_members": "genes perturbed",
    "n": "among the top",
    "k": "found",
    "expected": "by chance",
    "p_exact": "p",
    "p_exact_adjusted": "p adjusted",
    "p_stratified_exact_adjusted": "p adjusted, similar cells",
}
"""Columns of a table of enrichment that are shown, and their headings."""


def card(heading: str, body: str, *, anchor: str = "", kind: str = "", metric: str = "") -> str:
    """Return a titled box; `anchor` is its address on the page."""
    attributes = "".join(f' {name}="{value}"' for name, value in (("id", anchor), ("data-metric", metric)) if value)
    return f'<section class="card {kind}"{attributes}><h2>{heading}</h2>{body}</section>'


def absent(section: Absent) -> str:
    """Return the reason why a section is missing."""
    return f'<p class="muted absent">{escape(section.reason)}</p>'


def bullets(lines: list[str]) -> str:
    """Return sentences as a list, one a point."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def both(draw: Callable[[Frame], str]) -> str:
    """Draw a chart twice, for a laptop and for a phone; the style sheet shows the one that fits."""
    return f'<div class="for-wide">{draw(WIDE)}</div><div class="for-narrow">{draw(NARROW)}</div>'


def effects(report: Report) -> str:
    """Return two cards a metric: effect against evidence, and effect against changed genes."""
    result = report.scores
    cards = []
    for metric in result.provenance["metrics"]:
        rows = result.table[result.table["metric"] == metric]
        name = METRIC_NAMES[metric]
        points = [
            Point(str(label), float(z), float(q))
            for label, z, q in zip(rows["perturbation"], rows["z"], rows["q"], strict=True)
        ]
        chart = both(lambda frame, points=points, name=name: effect_chart(points, metric=name, frame=frame))  # type: ignore[misc]
        note = (
            '<p class="muted">One point a perturbation. Further right: its cells lie further from control than '
            "controls lie from each other. Above the dashed line: beyond chance, after correction for the number of "
            "perturbations.</p>"
        )
        cards.append(card(f"Effect and evidence ({name})", chart + note, metric=metric, anchor=f"effect-{metric}"))
        cards.append(_degs(report, points, metric, name))
    return "".join(cards)


def _degs(report: Report, points: list[Point], metric: str, name: str) -> str:
    heading = "Effect and changed genes"
    if isinstance(report.degs, Absent):
        return card(heading, absent(report.degs), metric=metric)
    counts = report.degs.set_index(report.degs["perturbation"].astype(str))["n_degs"]
    with_counts = [
        DegPoint(point.name, point.z, point.q, int(counts[point.name]))
        for point in points
        if point.name in counts.index
    ]
    correlations = correlate_degs(report.scores.table, report.degs)
    row = correlations[(correlations["metric"] == metric) & (correlations["against"] == "z")].iloc[0].to_dict()
    correlated = (
        "Too few perturbations, or all with as many genes, to correlate the two."
        if math.isnan(row["spearman"])
        else f"Spearman correlation {number(row['spearman'])}, Pearson {number(row['pearson'])}, "
        f"n&nbsp;=&nbsp;{row['n']}."
    )
    chart = both(lambda frame: deg_chart(with_counts, metric=name, frame=frame))
    note = (
        '<p class="muted">Up: a larger effect on the whole cell. Right: more genes that change by themselves. High on '
        "the left are perturbations that a test gene by gene would miss. "
        f"{correlated}</p>"
    )
    return card(f"{heading} ({name})", chart + note, metric=metric, anchor=f"genes-{metric}")


def map_of_cells(report: Report, *, alone: bool = False) -> str:
    """Return the card of the UMAP; `alone` puts the names inside the chart, for a figure in its own file."""
    heading = "Map of the cells"
    projection = report.projection
    if not isinstance(projection, Projection):
        return card(heading, absent(projection), anchor="map")
    control = str(report.scores.provenance["control"])
    first = report.scores.table[report.scores.table["metric"] == report.scores.provenance["metrics"][0]]
    shown = set(projection.labels)
    ranked = [str(name) for name in first["perturbation"] if str(name) in shown]
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in ranked)
    legend = "".join(
        f'<span class="key"><i class="c{i}"></i>{escape(name)}</span>' for i, name in enumerate(ranked[:COLOURS])
    )
    facts = projection.provenance
    few = facts["n_shown"] < facts["n_cells"]
    sample = f"{facts['n_shown']:,} of {facts['n_cells']:,} cells" if few else f"{facts['n_cells']:,} cells"
    others = '<span class="key"><i class="others"></i>other perturbations</span>' if len(ranked) > COLOURS else ""
    body = (
        '<div class="tools" hidden><label for="focus">Colour</label>'
        f'<select id="focus"><option value="">the strongest {min(COLOURS, len(ranked))}</option>{options}</select>'
        '<span class="muted">against control</span></div>'
        f"{cell_map(projection.coordinates, projection.labels, control=control, ranked=ranked, legend=alone)}"
        f'<p class="legend" id="keys"><span class="key"><i class="control"></i>{escape(control)}</span>{legend}{others}'
        "</p>"
        f'<p class="muted">One dot a cell ({sample}); cells with similar profiles lie close together. A map distorts '
        "distances; sizes of clouds and gaps between them mean little, so look here but judge by the scores. "
        f"UMAP, {facts['n_neighbors']} neighbours, minimum distance {facts['min_dist']}, seed {facts['seed']}.</p>"
    )
    return card(heading, body, anchor="map")


def alike(report: Report) -> str:
    """Return the card of the distances between perturbations, a heat map."""
    heading = "Which perturbations act alike?"
    pairs = report.pairs
    if not isinstance(pairs, Pairs):
        return card(heading, absent(pairs), anchor="alike")
    control = str(report.scores.provenance["control"])
    shown = len(pairs.names) - 1
    which = f"The {shown} strongest of {pairs.n_all} perturbations" if shown < pairs.n_all else f"{shown} perturbations"
    chart = heat_map(pairs.names, pairs.distances, pairs.tree, control=control, noise=pairs.noise)
    nothing = (
        '<p class="muted"><b>None of these perturbations was shown to differ from control, so the differences between '
        "them may be chance alone.</b></p>"
        if not pairs.n_hits
        else ""
    )
    body = (
        f"{nothing}"
        '<p id="pair" class="muted" aria-live="polite">Point at a square, or tap it, to see its pair.</p>'
        f'<div class="scroll">{chart}</div>'
        f'<p class="legend scale-legend"><span>close</span>{scale()}<span>far</span></p>'
        f'<p class="muted">{which} and control. Strong colours are pairs whose cells lie close together; the tree '
        "above joins the closest first (average linkage of the E-distance). Perturbations without an effect form one "
        f"strong block around control. At most {PAIR_CELLS} cells of each were compared.</p>"
    )
    return card(heading, body, anchor="alike", kind="whole" if shown > 32 else "")


def gene_sets(report: Report) -> str:
    """Return the card of gene sets among the strongest perturbations."""
    heading = "Gene sets among the strongest"
    table = report.enrichment
    if isinstance(table, Absent):
        return card(heading, absent(table), anchor="sets")
    if not len(table):
        return card(heading, '<p class="muted">No gene set holds enough of these perturbations.</p>', anchor="sets")
    shown = table[[name for name in _SET_COLUMNS if name in table.columns] or list(table.columns)]
    note = (
        '<p class="muted">For each set, how many of the strongest perturbations hit its genes, and how many would by '
        "chance. The last column compares perturbations with similar numbers of cells only, since those with more "
        "cells rank higher for that alone.</p>"
    )
    return card(heading, plain_table(shown.rename(columns=_SET_COLUMNS)) + note, anchor="sets", kind="whole")


def calibration(report: Report) -> str:
    """Return the card of controls scored against controls."""
    heading = "Can the p-values be trusted?"
    calibrated = report.calibration
    if isinstance(calibrated, Absent):
        return card(heading, absent(calibrated), anchor="calibration")
    if not calibrated.sets:
        return card(heading, '<p class="muted">There were too few controls to split.</p>', anchor="calibration")
    curves = [(f"split by {item.kind}, {METRIC_NAMES[item.metric]}", item.p) for item in calibrated.sets]
    note = (
        '<p class="muted">Controls were scored against controls, to which nothing was done. On the dashed line, '
        "p-values hold. Above it they are too small: these cells differ although nothing was done to them.</p>"
    )
    return card(heading, both(lambda frame: qq_chart(curves, frame=frame)) + note, anchor="calibration")


def provenance(report: Report) -> str:
    """Return the card of provenance."""
    facts = report.scores.provenance
    keys = ["model_id", "use_rep", "input", "perturbation_key", "batch_key", "metrics", "ground", "estimator", "null"]
    keys += ["repeats", "permutations", "correction", "seed", "unit_length", "control", "n_controls_used", "batches"]
    keys += ["version"]
    items = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(facts[key]))}</dd>" for key in keys if key in facts
    )
    everything = {
        "score": facts,
        "calibration": report.calibration.provenance if isinstance(report.calibration, Calibration) else None,
        "map": report.projection.provenance if isinstance(report.projection, Projection) else None,
        "genes": None
        if not isinstance(report.degs, pd.DataFrame)
        else "q < 0.05 within the perturbation, Mann-Whitney",
    }
    return card(
        "Where the numbers come from",
        f"<dl>{items}</dl><details><summary>All of it, as JSON</summary>"
        f"<pre>{escape(json.dumps(everything, indent=1))}</pre></details>",
        anchor="provenance",
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
