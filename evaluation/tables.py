"""Results as Markdown pages and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluation.run import ScreenResult, by_target, deg_correlation, overview, separation_table
from evaluation.separation import batch_agreement
from perturbscope.scoring.statistics import uniformity

METRICS = {"e_distance": "E-distance", "cosine_e_distance": "cosine E", "wasserstein": "Wasserstein"}
MODES = {"size_matched": "size-matched", "paper": "paper"}
MAX_TARGETS = 40
"""Most rows of a table of targets; the parquet files have all of them."""


def markdown(table: pd.DataFrame) -> str:
    """Return a Markdown table; numbers have three significant digits, missing values are a dash."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return "\n".join(lines) + "\n"


def screen_page(
    result: ScreenResult, *, title: str | None = None, note: str = "", figures: Mapping[str, str] | None = None
) -> str:
    """Return all tables of one screen, with headings, as Markdown.

    Parameters
    ----------
    result
        Results of the screen.
    title, note
        Heading, and a paragraph below it.
    figures
        Caption -> path of an image.
    """
    parts = [f"## {title or result.screen.name}\n"]
    if note:
        parts.append(note.strip() + "\n")
    parts.append(_facts(result) + "\n")
    if not result.models:
        return "\n".join([*parts, *_warnings(result)])
    table = overview(result)
    parts += ["### At a glance\n", markdown(_glance(table)), _GLANCE]
    replication = _replication(table)
    if len(replication.columns) > 1:
        parts += ["### Without controls as the reference\n", markdown(replication), _REPLICATION]
    separation = separation_table(result)
    if len(separation):
        parts += ["### Separation: median z\n", markdown(medians(separation)), _SEPARATION]
        parts += ["<details><summary>Quartiles, skewness and numbers</summary>\n", markdown(_spread(separation))]
        parts.append("</details>\n")
    parts += ["### Controls against controls\n", markdown(_null(result)), _NULL]
    batches = _batches(result)
    if len(batches):
        parts += ["### One batch against another\n", markdown(batches), _BATCHES]
    parts += ["### z against the number of differential genes\n", markdown(_degs(result))]
    power = _power(result)
    if len(power):
        parts += ["### Cells needed\n", markdown(power), _POWER]
    targets = by_target(result)
    parts += ["### z by target\n" + _top(targets), markdown(targets.head(MAX_TARGETS))]
    for caption, path in (figures or {}).items():
        parts.append(f"![{caption}]({path})\n")
    parts += _warnings(result)
    return "\n".join(parts)


def medians(separation: pd.DataFrame) -> pd.DataFrame:
    """Return the median z: a row a model, a column a comparison, metric and mode."""
    columns = [
        (against, metric, mode)
        for against in ("control", "pairs")
        for metric in METRICS
        for mode in MODES
        if ((separation["against"] == against) & (separation["metric"] == metric)).any()
    ]
    indexed = separation.set_index(["model", "against", "metric", "mode"])["median"]
    rows = []
    for model in separation["model"].unique():
        row: dict[str, Any] = {"model": model}
        for against, metric, mode in columns:
            name = f"{METRICS[metric]}, {MODES[mode]}" + (" (pairs)" if against == "pairs" else "")
            row[name] = indexed.get((model, against, metric, mode), float("nan"))
        rows.append(row)
    return pd.DataFrame(rows)


def _glance(table: pd.DataFrame) -> pd.DataFrame:
    shown = table[["model", "width", "median z", "paper z"]].copy()
    shown["detected (pretended)"] = [
        f"{_percent(a)} ({_percent(b)})" for a, b in zip(table["detected"], table["pretended"], strict=True)
    ]
    for name in ("map_guide", "map_batch", "map_half"):
        if name in table:
            shown[f"mAP by {name[4:]} (chance)"] = _beside(table[name], table[f"{name}_chance"])
    shown["null KS p"] = table["null KS p (cell)"]
    shown["DEG rho"] = table["DEG rho"]
    return shown


def _replication(table: pd.DataFrame) -> pd.DataFrame:
    shown = table[["model"]].copy()
    for kind in ("guide", "batch", "half"):
        if f"map_{kind}" in table:
            shown[f"mAP by {kind} (chance)"] = _beside(table[f"map_{kind}"], table[f"map_{kind}_chance"])
            shown[f"p by {kind}"] = table[f"map_{kind}_p"]
    for column, name in (
        ("split_half_correlation", "split-half r"),
        ("split_half_accuracy", "own half nearest"),
        ("consistency_median_z", "consistency z"),
        ("magnitude_median_z", "magnitude z"),
    ):
        if column in table:
            shown[name] = table[column]
    for column, name in (("consistency_detected", "consistent"), ("magnitude_detected", "apart from the rest")):
        if column in table:
            shown[name] = [_percent(value) for value in table[column]]
    if "relations_recall" in table:
        shown["known pairs recalled (chance)"] = _beside(table["relations_recall"], table["relations_chance"])
        shown["p of recall"] = table["relations_p"]
        shown["nearest is known (chance)"] = _beside(table["relations_nearest"], table["relations_nearest_chance"])
    return shown


def _spread(separation: pd.DataFrame) -> pd.DataFrame:
    shown = separation.copy()
    shown["metric"], shown["mode"] = shown["metric"].map(METRICS), shown["mode"].map(MODES)
    return shown.rename(columns={"q25": "25 %", "q75": "75 %", "iqr": "IQR"})


def _null(result: ScreenResult) -> pd.DataFrame:
    rows = []
    for model in result.models:
        null = model.tables.get("null", pd.DataFrame())
        if not len(null):
            continue
        for (kind, metric), part in null.groupby(["kind", "metric"], sort=False):
            test = uniformity(part["p"])
            rows.append(
                {
                    "model": model.model,
                    "split by": kind,
                    "metric": METRICS[str(metric)],
                    "splits": len(part),
                    "KS p": test.p,
                    "p < 0.05": _percent(float((part["p"] < 0.05).mean())),
                    "mean z": part["z"].mean(),
                    "sd z": part["z"].std(),
                }
            )
    return pd.DataFrame(rows)


def _batches(result: ScreenResult) -> pd.DataFrame:
    rows = []
    for model in result.models:
        agreement = batch_agreement(model.tables.get("batches", pd.DataFrame()))
        if len(agreement):
            rows.append(agreement.assign(model=model.model))
    if not rows:
        return pd.DataFrame()
    table = pd.concat(rows, ignore_index=True)
    means = table.groupby("model", sort=False)[["pearson", "spearman"]].mean().reset_index()
    means.insert(1, "pairs of batches", table.groupby("model", sort=False).size().to_numpy())
    return means.rename(columns={"pearson": "mean Pearson", "spearman": "mean Spearman"})


def _degs(result: ScreenResult) -> pd.DataFrame:
    tables = [deg_correlation(model, result.degs).assign(model=model.model) for model in result.models]
    if not tables:
        return pd.DataFrame(columns=["model"])
    table = pd.concat(tables, ignore_index=True)
    table["metric"] = table["metric"].map(METRICS)
    return table[["model", "metric", "n", "pearson", "spearman"]]


def _power(result: ScreenResult) -> pd.DataFrame:
    """Return the share of perturbations that at least 80 % of draws of n cells detect."""
    rows = []
    for model in result.models:
        if "power" not in model.tables:
            continue
        curves = model.tables["power"]
        control = curves["perturbation"] == result.screen.control
        row: dict[str, Any] = {"model": model.model}
        for n, part in curves[~control].groupby("n"):
            row[f"{n} cells"] = f"{_percent(float((part['detected'] >= 0.8).mean()))} of {len(part)}"
        draws = int(curves.loc[control, "repeats"].sum())
        row["false positives"] = f"{_percent(float(curves.loc[control, 'detected'].mean()))} of {draws} draws"
        rows.append(row)
    return pd.DataFrame(rows)


def _facts(result: ScreenResult) -> str:
    screen, facts = result.screen, result.provenance
    labels = np.asarray(screen.perturbations)
    n_controls = int((labels == screen.control).sum())
    text = (
        f"{len(screen):,} cells x {screen.cells.n_genes:,} genes; {len(set(labels)) - 1} perturbation(s), "
        f"{n_controls:,} controls"
    )
    if screen.contexts is not None:
        text += f", in {len(set(screen.contexts))} contexts, each with its own controls"
    if facts.get("n_cells", len(screen)) != len(screen):
        text += f". Held out of {facts['n_cells']:,} cells; models are fitted to, or trained on, the others as said"
    return text + f". File: `{facts.get('file', screen.name)}`."


def _warnings(result: ScreenResult) -> list[str]:
    """List the facts and warnings of each embedding; warnings that all models share are listed once."""
    everyone = (
        []
        if len(result.models) < 2
        else [text for text in _listed(result) if all(text in model.warnings for model in result.models)]
    )
    lines = ["### Embeddings and warnings\n"]
    lines += [f"- All: {text}" for text in everyone]
    for model in result.models:
        facts = {key: value for key, value in model.facts["embedding"].items() if key not in _SILENT}
        described = "; ".join(f"{key.replace('_', ' ')}: {_cell(value)}" for key, value in facts.items())
        lines.append(f"- **{model.model}** - {described}.")
        own = [text for text in model.warnings if text not in everyone]
        lines += [f"  - {text}" for text in own]
    lines += [f"- **{name}** gave nothing: {message}" for name, message in result.failed.items()]
    return [*lines, ""]


_SILENT = {"vocabulary_hash", "dropout", "train_size", "seed", "architecture", "batch_size"}


def _listed(result: ScreenResult) -> list[str]:
    return list(dict.fromkeys(text for model in result.models for text in model.warnings))


def _top(targets: pd.DataFrame) -> str:
    if len(targets) <= MAX_TARGETS:
        return ""
    return f"\nThe first {MAX_TARGETS} of {len(targets)}.\n"


def _beside(values: Sequence[Any] | pd.Series, chance: Sequence[Any] | pd.Series) -> list[str]:
    return [f"{_cell(a)} ({_cell(b)})" for a, b in zip(values, chance, strict=True)]


def _percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.0%}".replace("%", " %")


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return "-" if np.isnan(value) else f"{value:.3g}"
    return str(value)


_GLANCE = (
    "Median z: E-distance, size-matched null. Paper z: the same with one fixed null. Detected: share of perturbations "
    "with q < 0.05; pretended: share of random groups of controls that pass the same threshold of p. Null KS p: are "
    "p-values of controls against controls uniform? DEG rho: Spearman's correlation of z with the number of "
    "differential genes.\n"
)
_REPLICATION = (
    "mAP: how far up the other replicates of a perturbation stand among all profiles, beside random rankings. "
    "Split-half r: correlation of the mean vectors of random halves of a perturbation's cells; own half nearest: how "
    "often the other half is the nearest of all. Consistency: cosine similarity among a perturbation's cells; "
    "magnitude: E-distance to the other perturbed cells (an ineffective target among effective ones is apart, too).\n"
)
_SEPARATION = (
    "Against control, and pairs of perturbations (each once). Wasserstein: at most 200 cells a perturbation and 400 "
    "controls, so its two modes coincide for pairs; pairs with fewer cells have none. It falls as cells get more, so "
    "that in paper mode a perturbation with more cells than the null has a z below 0 for that alone.\n"
)
_NULL = (
    "Pretended perturbations: random cells of the controls (cell), or all controls of some batches (batch). Uniform "
    "p, mean z 0 and sd 1 are sound. A mean z above 0 by batch is a shift between batches, which a perturbation "
    "confined to few of them would show as well.\n"
)
_BATCHES = "Correlation, between two batches, of the z that each gives the same perturbations by its own cells alone.\n"
_POWER = (
    "Share of the perturbations that at least 80 % of random draws of so many cells detect (p < 0.05), of those that "
    "have as many. False positives: draws of controls.\n"
)
