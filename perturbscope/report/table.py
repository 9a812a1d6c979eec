"""The ranked table of the page."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import pandas as pd

from perturbscope.report.contents import Report
from perturbscope.report.sentences import METRIC_NAMES, number, p_value
from perturbscope.scoring.results import FLAGS

_HEADS = {
    "perturbation": ("", "Label of the cells"),
    "metric": ("metric text", "Which distance"),
    "z": ("", "Size of the effect in standard deviations of the null"),
    "q": ("", "p corrected for the number of perturbations"),
    "p": ("wide", "Chance of a distance this large if nothing was done"),
    "cells": ("", "Cells with this label"),
    "genes": ("", "Differentially expressed genes, tested one by one, without the perturbed gene itself"),
    "distance": ("wide", "Distance from control"),
    "null mean": ("wide", "Mean distance after exchanges of labels"),
    "null sd": ("wide", "Standard deviation of it"),
    "flags": ("text", "What to be careful about"),
}


def score_table(report: Report) -> str:
    """Return the table of every perturbation and metric, strongest first, with an explanation of its flags."""
    result = report.scores
    degs = report.degs.set_index("perturbation")["n_degs"] if isinstance(report.degs, pd.DataFrame) else None
    heads = [name for name in _HEADS if name != "genes" or degs is not None]
    head = "".join(f'<th class="{_HEADS[name][0]}" title="{_HEADS[name][1]}" scope="col">{name}</th>' for name in heads)
    largest = {
        metric: max(1.0, float(part["z"].max(skipna=True)) if part["z"].notna().any() else 1.0)
        for metric, part in result.table.groupby("metric")
    }
    rows = "".join(_row(row, largest[row["metric"]], degs) for row in result.table.to_dict("records"))
    options = "".join(f'<option value="{m}">{METRIC_NAMES[m]}</option>' for m in result.provenance["metrics"])
    return (
        '<div class="tools" hidden>'
        '<input id="search" type="search" placeholder="Find a perturbation" aria-label="Find a perturbation">'
        f'<select id="metric" aria-label="Metric">{options}</select>'
        '<span id="count" class="muted" aria-live="polite"></span></div>'
        f'<div class="scroll tall"><table id="scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{_flag_notes(result.table)}"
    )


def plain_table(table: pd.DataFrame, *, limit: int = 25) -> str:
    """Return the first `limit` rows of any table as HTML."""
    shown = table.head(limit)
    is_text = [not pd.api.types.is_numeric_dtype(shown[name]) for name in shown.columns]
    head = "".join(
        f'<th class="{"text" if text else ""}" scope="col">{escape(str(name).replace("_", " "))}</th>'
        for name, text in zip(shown.columns, is_text, strict=True)
    )
    rows = []
    for values in shown.itertuples(index=False):
        cells = []
        for name, value, text in zip(shown.columns, values, is_text, strict=True):
            if text:
                cells.append(f'<td class="text">{escape(str(value))}</td>')
            else:
                cells.append(f"<td>{(p_value if str(name)[:2] in ('p', 'p ', 'q') else number)(float(value))}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    more = f'<p class="note">{limit} of {len(table):,} rows.</p>' if len(table) > limit else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{more}'
    )


def _flag_notes(table: pd.DataFrame) -> str:
    """Return what the flags in the table mean, for readers who cannot hover with a pointer."""
    used = list(dict.fromkeys(flag for flags in table["flags"] for flag in str(flags).split(";") if flag))
    return "".join(f'<p class="note">{_flag(flag)} {escape(FLAGS.get(flag, ""))}.</p>' for flag in used)


def _flag(flag: str) -> str:
    return f'<span class="flag" title="{escape(FLAGS.get(flag, flag))}">{escape(flag.replace("_", " "))}</span>'


def _row(row: dict[Any, Any], largest: float, degs: pd.Series[Any] | None) -> str:
    name, metric, z = str(row["perturbation"]), str(row["metric"]), float(row["z"])
    share = 0.0 if math.isnan(z) else 100 * math.asinh(max(z, 0.0) / 2) / math.asinh(largest / 2)
    flags = " ".join(_flag(flag) for flag in str(row["flags"]).split(";") if flag)
    cells = [
        f'<td title="{escape(name)}">{escape(name)}</td>',
        f'<td class="metric text">{METRIC_NAMES[metric]}</td>',
        _cell(z, bar=f'<span class="bar"><i style="width:{share:.0f}%"></i></span>'),
        _cell(row["q"], probability=True),
        _cell(row["p"], probability=True, wide=True),
        f'<td data-value="{row["n_cells"]}">{row["n_cells"]:,}</td>',
        *([] if degs is None else [_cell(float(degs.get(name, math.nan)))]),
        *(_cell(row[column], wide=True) for column in ("distance", "null_mean", "null_sd")),
        f'<td class="text">{flags}</td>',
    ]
    weak = "" if row["q"] < 0.05 else ' class="weak"'
    return f'<tr{weak} data-metric="{metric}" data-name="{escape(name)}">{"".join(cells)}</tr>'


def _cell(value: float, *, bar: str = "", wide: bool = False, probability: bool = False) -> str:
    shown = p_value(value) if probability else number(value)
    raw = "" if pd.isna(value) else repr(float(value))
    if bar and raw:
        shown = f'{bar}<span class="number">{shown}</span>'
    return f'<td data-value="{raw}"{" class=wide" if wide else ""}>{shown}</td>'
