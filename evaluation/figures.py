"""Figures of one screen: calibration, z by model, z by target, and maps of the cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evaluation.run import ScreenResult, by_target
from perturbscope.cells.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
"""Colours of models, in order; with their labels they can be told apart with any common colour blindness."""
GREY = "#c9ccd1"
MOST_LABELS = 6
"""Perturbations with a colour of their own on a map."""


def write_figures(result: ScreenResult, folder: Path, *, dpi: int = 110) -> dict[str, Path]:
    """Draw the figures that the results allow.

    Returns
    -------
    Caption -> file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    drawn: dict[str, Path] = {}
    figures: tuple[tuple[str, str, Callable[[ScreenResult], Figure | None]], ...] = (
        ("calibration", "Calibration: p-values of controls against controls", calibration_figure),
        ("z-by-model", "z by model", model_figure),
        ("z-by-target", "z by target and model", target_figure),
        ("umap", "Maps of the cells (UMAP), model by model", umap_figure),
    )
    for name, caption, draw in figures:
        with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            figure = draw(result)
            if figure is None:
                continue
            path = folder / f"{name}.png"
            with atomic(path) as staging:
                figure.savefig(staging, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
            drawn[f"{caption} - {result.screen.name}"] = path
    return drawn


def calibration_figure(result: ScreenResult) -> Figure | None:
    """Draw sorted p-values of control-against-control splits against uniform ones; sound ones lie on the diagonal."""
    nulls = [(model.model, model.tables["null"]) for model in result.models if "null" in model.tables]
    kinds = [kind for kind in ("cell", "batch") if any((null["kind"] == kind).any() for _, null in nulls)]
    if not kinds:
        return None
    figure, axes = _canvas(1, len(kinds), 3.6, 3.6)
    for axis, kind in zip(axes.flat, kinds, strict=True):
        axis.plot([0, 1], [0, 1], color=GREY, lw=1, zorder=0)
        for (name, null), colour in zip(nulls, _cycle(len(nulls)), strict=True):
            rows = null[(null["kind"] == kind) & (null["metric"] == "e_distance")]
            p = np.sort(rows["p"].to_numpy())
            if len(p):
                axis.plot((np.arange(len(p)) + 0.5) / len(p), p, lw=1.4, color=colour, label=name)
        axis.set(title=f"controls split by {kind}", xlabel="expected p", ylabel="observed p", xlim=(0, 1), ylim=(0, 1))
    axes.flat[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def model_figure(result: ScreenResult) -> Figure | None:
    """Draw boxes of z, one a model, against control and between perturbations, on a scale that is linear near 0."""
    panels = [("scores", "against control")]
    if any("pairs" in model.tables for model in result.models):
        panels.append(("pairs", "pairs of perturbations"))
    if not result.models:
        return None
    figure, axes = _canvas(1, len(panels), 1.2 + 0.55 * len(result.models), 3.8)
    for axis, (table, title) in zip(axes.flat, panels, strict=True):
        groups, names = [], []
        for model in result.models:
            if table in model.tables:
                rows = model.tables[table]
                size_matched = (rows["mode"] == "size_matched") & (rows["metric"] == "e_distance")
                groups.append(rows.loc[size_matched, "z"].dropna().to_numpy())
                names.append(model.model)
        boxes = axis.boxplot(groups, patch_artist=True, showfliers=False, widths=0.6, medianprops={"color": "black"})
        for box, colour in zip(boxes["boxes"], _cycle(len(groups)), strict=True):
            box.set(facecolor=colour, alpha=0.55)
        rng = np.random.default_rng(0)
        for place, values in enumerate(groups, start=1):
            axis.plot(place + rng.uniform(-0.18, 0.18, len(values)), values, ".", ms=2.5, color="black", alpha=0.5)
        axis.axhline(0, color=GREY, lw=1, zorder=0)
        axis.set_yscale("symlog", linthresh=5)
        axis.set_xticks(range(1, len(names) + 1), names, rotation=60, ha="right")
        axis.set(title=title, ylabel="z of E-distance (size-matched)")
    return figure


def target_figure(result: ScreenResult) -> Figure | None:
    """Draw a heat map of z, a row a perturbation and a column a model; its colour scale is logarithmic above 2."""
    from matplotlib.colors import SymLogNorm

    table = by_target(result)
    names = [model.model for model in result.models]
    if not names or not len(table):
        return None
    values = table[names].to_numpy(dtype=float)
    strongest = np.nan_to_num(values, nan=-np.inf).max(axis=1)
    table = table.iloc[np.argsort(-strongest, kind="stable")].head(60)
    labels = table["perturbation"].astype(str)
    if "context" in table:
        labels = labels + " in " + table["context"].astype(str)
    values = table[names].to_numpy(dtype=float)
    figure, axes = _canvas(1, 1, 1.8 + 0.6 * len(names), 1.0 + 0.19 * len(table))
    axis = axes.flat[0]
    top = max(10.0, float(np.abs(np.nan_to_num(values)).max()))
    image = axis.imshow(
        values, aspect="auto", cmap="PuOr_r", norm=SymLogNorm(2.0, vmin=-top, vmax=top), interpolation="nearest"
    )
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axis.set_yticks(range(len(table)), labels, fontsize=7)
    figure.colorbar(image, ax=axis, shrink=0.6, label="z of E-distance")
    return figure


def umap_figure(result: ScreenResult) -> Figure | None:
    """Draw one map a model, with the strongest perturbations (by mean rank of z) in colour and controls in grey."""
    maps = [(model.model, model.tables["umap"]) for model in result.models if "umap" in model.tables]
    if not maps:
        return None
    control = result.screen.control
    coloured = _shown(result, maps[0][1], control)
    columns = min(4, len(maps))
    figure, axes = _canvas(-(-len(maps) // columns), columns, 2.7, 2.7)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, cells) in zip(axes.flat, maps, strict=False):
        labels = cells["perturbation"].astype(str)
        controls = labels.str.startswith(control)
        rest = ~controls & ~labels.isin(coloured)
        axis.scatter(cells["umap1"][rest], cells["umap2"][rest], s=1.5, color="#dfe2e7", lw=0)
        axis.scatter(cells["umap1"][controls], cells["umap2"][controls], s=2, color="#7d828a", lw=0, label=control)
        for label, colour in zip(coloured, COLOURS, strict=False):
            own = labels == label
            axis.scatter(cells["umap1"][own], cells["umap2"][own], s=4, color=colour, lw=0, label=label)
        axis.set(title=name, xlim=_span(cells["umap1"]), ylim=_span(cells["umap2"]))
    axes.flat[0].legend(frameon=False, fontsize=7, markerscale=3, loc="upper right", bbox_to_anchor=(0.0, 1.0))
    return figure


def _shown(result: ScreenResult, cells: pd.DataFrame, control: str) -> list[str]:
    """Return the labels of a map that get a colour: those with the best mean rank of z over the models."""
    table = by_target(result)
    names = [model.model for model in result.models]
    order = table[names].rank(ascending=False).mean(axis=1).sort_values().index
    labels = table.loc[order, "perturbation"].astype(str)
    if "context" in table:
        labels = labels + " in " + table.loc[order, "context"].astype(str)
    on_map = set(cells["perturbation"].astype(str))
    return [label for label in labels if label in on_map and label != control][:MOST_LABELS]


def _span(values: pd.Series) -> tuple[float, float]:
    """Return limits of an axis that leave out one cell in a hundred at either end, if these are far away."""
    low, high = (float(values.quantile(share)) for share in (0.01, 0.99))
    margin = 0.1 * (high - low)
    return max(float(values.min()), low - margin) - 0.2, min(float(values.max()), high + margin) + 0.2


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure that belongs to no window, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]
