"""The page: words, table and charts of one scored screen."""

from __future__ import annotations

import json
import math
import os
import tempfile
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from perturbscope.calibration import Calibration
from perturbscope.report.charts import Point, effect_chart, qq_chart
from perturbscope.report.words import METRIC_NAMES, READING, conclusions, number, p_value
from perturbscope.results import FLAGS, ScoreResult

_HEAD_CLASSES = {"metric": "metric text", "null mean": "wide", "null sd": "wide", "flags": "text"}


def write_report(
    path: str | os.PathLike[str], result: ScoreResult, *, title: str, calibration: Calibration | None = None
) -> None:
    """Write one HTML file that needs no other file and no network; an existing file is replaced at once, or not at all.

    Parameters
    ----------
    path
        The file to write.
    result
        Scores of a screen.
    title
        Heading of the page, such as the name of the screen.
    calibration
        Control-against-control splits; without them the page says that they are missing.
    """
    target = Path(path)
    text = render_report(result, title=title, calibration=calibration)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render_report(result: ScoreResult, *, title: str, calibration: Calibration | None = None) -> str:
    """The page as text. All that comes from the data is escaped."""
    files = resources.files("perturbscope.report")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    facts = result.provenance
    subtitle = (
        f"Perturbations scored against {facts['control']!r}: "
        f"{facts['n_cells']:,} cells x {facts['width']} dimensions, PerturbScope {facts['version']}"
    )
    warnings = [*result.warnings, *(calibration.warnings if calibration else [])]
    body = [
        f"<header><h1>{escape(title)}</h1><p class='muted'>{escape(subtitle)}</p></header>",
        _facts(result),
        _list_card("What this says", conclusions(result, calibration)),
        _list_card("Read with care", warnings, "warnings") if warnings else "",
        f'<div class="charts">{_effects(result)}{_calibration(calibration)}</div>',
        _table(result),
        _list_card("How to read the numbers", READING),
        _provenance(result, calibration),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _facts(result: ScoreResult) -> str:
    facts, first = result.provenance, result.provenance["metrics"][0]
    part = result.table[result.table["metric"] == first]
    median = part["z"].median()
    items = [
        (f"{facts['n_scored']:,}", "perturbations scored"),
        (f"{int((part['q'] < 0.05).sum()):,}", "differ from control (q < 0.05)"),
        (number(float(median)), "median z"),
        (f"{facts['n_controls']:,}", "control cells"),
    ]
    cards = "".join(f'<div class="fact"><b>{escape(value)}</b><span>{label}</span></div>' for value, label in items)
    return f'<div class="facts">{cards}</div>'


def _list_card(heading: str, lines: list[str], kind: str = "") -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="card {kind}"><h2>{heading}</h2><ul>{items}</ul></section>'


def _effects(result: ScoreResult) -> str:
    parts = []
    for metric in result.provenance["metrics"]:
        part = result.table[result.table["metric"] == metric]
        points = [
            Point(str(name), float(z), float(q))
            for name, z, q in zip(part["perturbation"], part["z"], part["q"], strict=True)
        ]
        name = METRIC_NAMES[metric]
        parts.append(
            f'<section class="card" data-metric="{metric}"><h2>Effect and evidence: {name}</h2>'
            f"{effect_chart(points, metric=name)}"
            '<p class="muted">Right: further from control than controls are from each other. '
            "Above the line: beyond chance after correction for the number of perturbations.</p></section>"
        )
    return "".join(parts)


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None or not calibration.sets:
        return (
            '<section class="card"><h2>Calibration</h2><p class="muted">Controls were not scored against controls, so '
            "this page cannot show that its p-values hold for these data.</p></section>"
        )
    curves = [(f"split by {item.kind}, {METRIC_NAMES[item.metric]}", item.p) for item in calibration.sets]
    return (
        f'<section class="card"><h2>Calibration: controls against controls</h2>{qq_chart(curves)}'
        '<p class="muted">On the dashed line, p-values are what they say. Above it they are too small: those cells '
        "differ although nothing was done to them.</p></section>"
    )


def _table(result: ScoreResult) -> str:
    heads = ["perturbation", "metric", "z", "q", "p", "cells", "distance", "null mean", "null sd", "flags"]
    head = "".join(f'<th class="{_HEAD_CLASSES.get(name, "")}">{name}</th>' for name in heads)
    largest = {
        metric: max(1.0, float(part["z"].max(skipna=True)) if part["z"].notna().any() else 1.0)
        for metric, part in result.table.groupby("metric")
    }
    rows = "".join(_row(row, largest[row["metric"]]) for row in result.table.to_dict("records"))
    options = "".join(f'<option value="{m}">{METRIC_NAMES[m]}</option>' for m in result.provenance["metrics"])
    return (
        '<section class="card"><h2>All perturbations, strongest first</h2><div class="tools" hidden>'
        '<input id="search" type="search" placeholder="Find a perturbation" aria-label="Find a perturbation">'
        f'<select id="metric" aria-label="Metric">{options}</select>'
        '<span id="count" class="muted" aria-live="polite"></span></div>'
        f'<div class="scroll"><table id="scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{_flag_notes(result)}</section>"
    )


def _flag_notes(result: ScoreResult) -> str:
    """What the flags in the table mean, for readers without a pointer to hover with."""
    used = list(dict.fromkeys(flag for flags in result.table["flags"] for flag in str(flags).split(";") if flag))
    return "".join(f'<p class="note">{_flag(flag)} {escape(FLAGS.get(flag, ""))}.</p>' for flag in used)


def _flag(flag: str) -> str:
    return f'<span class="flag" title="{escape(FLAGS.get(flag, flag))}">{escape(flag.replace("_", " "))}</span>'


def _row(row: dict[Any, Any], largest: float) -> str:
    name, metric, z = str(row["perturbation"]), str(row["metric"]), float(row["z"])
    share = 0.0 if math.isnan(z) else 100 * math.asinh(max(z, 0.0) / 2) / math.asinh(largest / 2)
    flags = " ".join(_flag(flag) for flag in str(row["flags"]).split(";") if flag)
    cells = [
        f'<td title="{escape(name)}">{escape(name)}</td>',
        f'<td class="metric text">{METRIC_NAMES[metric]}</td>',
        _cell(z, bar=f'<span class="bar"><i style="width:{share:.0f}%"></i></span>'),
        _cell(row["q"], probability=True),
        _cell(row["p"], probability=True),
        f'<td data-value="{row["n_cells"]}">{row["n_cells"]:,}</td>',
        *(_cell(row[column], wide=column.startswith("null")) for column in ("distance", "null_mean", "null_sd")),
        f'<td class="text">{flags}</td>',
    ]
    weak = "" if row["q"] < 0.05 else ' class="weak"'
    return f'<tr{weak} data-metric="{metric}" data-name="{escape(name.lower())}">{"".join(cells)}</tr>'


def _cell(value: float, *, bar: str = "", wide: bool = False, probability: bool = False) -> str:
    shown = p_value(value) if probability else number(value)
    raw = "" if pd.isna(value) else repr(float(value))
    return f'<td data-value="{raw}"{" class=wide" if wide else ""}>{bar if raw else ""}{shown}</td>'


def _provenance(result: ScoreResult, calibration: Calibration | None) -> str:
    facts = result.provenance
    keys = ["metrics", "ground", "estimator", "null", "repeats", "permutations", "correction", "seed", "unit_length"]
    keys += ["control", "n_controls_used", "batches", "version"]
    items = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(facts[key]))}</dd>" for key in keys if key in facts
    )
    everything = {"score": facts, "calibration": calibration.provenance if calibration else None}
    return (
        f'<section class="card"><h2>Where the numbers come from</h2><dl>{items}</dl><details>'
        f"<summary>All of it, as JSON</summary><pre>{escape(json.dumps(everything, indent=1))}</pre>"
        "</details></section>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
