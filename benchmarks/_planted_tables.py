"""Tables and the figure of the planted effects: which are detected, from how many cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks._markdown import markdown

NULL = "null"
"""Name of the effect of an unchanged group."""


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of groups with p and with adjusted p below 0.05, by background, method, effect and size."""
    keys = ["background", "embedding", "method", "effect", "n"]
    found = rows.assign(raw=rows["p"] < 0.05, adjusted=rows["q"] < 0.05)
    return (
        found.groupby(keys, sort=False)
        .agg(groups=("p", "size"), raw=("raw", "mean"), adjusted=("adjusted", "mean"))
        .reset_index()
    )


def smallest_n(table: pd.DataFrame, power: float) -> pd.DataFrame:
    """Fewest cells from which on a share `power` of the groups is detected after correction, by effect."""

    def fewest(part: pd.DataFrame) -> str:
        part = part.sort_values("n")
        enough = (part["adjusted"] >= power)[::-1].cummin()[::-1]
        return str(part.loc[enough, "n"].min()) if enough.any() else f"> {part['n'].max()}"

    return table.groupby(["effect", "column"], sort=False)[["n", "adjusted"]].apply(fewest).unstack()


def discoveries(rows: pd.DataFrame, background: str) -> pd.DataFrame:
    """Detected groups, unchanged ones among them, the mean share of these in a screen, and detection by kind."""
    rows = rows[rows["background"] == background].assign(hit=lambda table: table["q"] < 0.05)
    by_screen = rows.groupby(["column", "screen", "n"])
    false = (rows["hit"] & rows["null"]).groupby([rows[key] for key in ("column", "screen", "n")]).sum()
    hits = by_screen["hit"].sum()
    found = pd.DataFrame({"detected": hits.groupby("column").sum(), "unchanged": false.groupby("column").sum()})
    found["mean false share"] = (false / hits.clip(lower=1)).groupby("column").mean()
    planted = rows[~rows["null"]]
    kinds = planted["effect"].str.partition(",")[0]
    return found.join(planted.groupby(["column", kinds], sort=False)["hit"].mean().unstack())


def tables(table: pd.DataFrame, rows: pd.DataFrame, order: dict[str, list[str]]) -> str:
    """Markdown tables of each background; `order` holds the names of its effects."""
    parts = []
    table = table.assign(column=table["embedding"] + ": " + table["method"])
    rows = rows.assign(column=rows["embedding"] + ": " + rows["method"], null=rows["effect"] == NULL)
    for name, effects in order.items():
        part = table[table["background"] == name]
        columns = list(dict.fromkeys(part["column"]))
        null = part[part["effect"] == NULL]
        false = null.pivot_table(index="column", columns="n", values="raw").reindex(columns)
        groups = int(null["groups"].iloc[0])
        parts.append(f"### {name}\n\nUnchanged groups with p < 0.05, of {groups} for each number of cells:\n")
        parts.append(markdown(false, "method", digits=3))
        parts.append(
            f"All numbers of cells together:\n\n{markdown(discoveries(rows, name).reindex(columns), 'method')}"
        )
        parts.append("Fewest cells with which 75 % of the groups are detected (adjusted p < 0.05):\n")
        parts.append(markdown(smallest_n(part, 0.75).reindex(effects).loc[:, columns], "effect"))
        for n in sorted(set(part["n"]) & {50, 100, 200}):
            wide = part[part["n"] == n].pivot_table(index="effect", columns="column", values="adjusted")
            parts.append(f"Share detected with {n} cells (adjusted p < 0.05):\n")
            parts.append(markdown(wide.reindex(index=effects).reindex(columns=columns), "effect"))
    return "\n".join(parts)


def figure(table: pd.DataFrame, order: dict[str, list[str]], path: Path) -> None:
    """Draw the share detected after correction: a panel for each method, effects by numbers of cells."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    shown = [
        ("PCA-50", "E-distance"),
        ("PCA-50", "cosine E-distance"),
        ("PCA-50", "Wasserstein"),
        ("PCA-50", "pertpy's E-test"),
        ("PCA-50", "scPerturb's E-test"),
        ("model", "E-distance"),
        ("model", "cosine E-distance"),
    ]
    mpl.rcParams.update({"font.size": 8})
    chart, axes = plt.subplots(
        len(order), len(shown), figsize=(12.5, 3.2 * len(order)), squeeze=False, layout="constrained"
    )
    for row, (name, effects) in zip(axes, order.items(), strict=True):
        for axis, (embedding, method) in zip(row, shown, strict=True):
            part = table.query("background == @name and embedding == @embedding and method == @method")
            wide = part.pivot_table(index="effect", columns="n", values="adjusted").reindex(effects)
            if wide.empty:
                axis.set_axis_off()
                continue
            axis.imshow(wide.to_numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_xticks(range(wide.shape[1]), wide.columns)
            axis.set_yticks(range(len(effects)), effects if axis is row[0] else [""] * len(effects))
            axis.set_title(f"{embedding}\n{method}", fontsize=7)
            for y, values in enumerate(wide.to_numpy()):
                for x, value in enumerate(values):
                    if np.isfinite(value):
                        colour = "black" if value > 0.6 else "white"
                        axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
        row[0].set_ylabel(name)
        row[len(row) // 2].set_xlabel("cells in a group; numbers: % detected after correction")
    chart.savefig(path, dpi=110)
    plt.close(chart)
    with Image.open(path) as picture:  # few colours, so a palette makes it several times smaller
        small = picture.convert("RGB").quantize(96)
    small.save(path, optimize=True)
