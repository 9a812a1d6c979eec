"""Scale laws: seconds and memory against size, and the limits that are met first at 100 million cells."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.performance.embedding.models import BUILT
from benchmarks.performance.harness import Options, Section, in_child, table
from benchmarks.performance.scaling.laws import LAWS, Law, build_widths, measure
from benchmarks.performance.scaling.limits import limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(options: Options) -> Section:
    """Run the whole part."""
    widths = LAWS["embed-width"].quick if options.quick else LAWS["embed-width"].sizes
    if not all((BUILT / f"width-{size}").exists() for size in widths):
        in_child(build_widths, widths)
    repeats = 1 if options.quick else min(options.repeats, 3)
    found: dict[str, list[dict[str, float]]] = {}
    took: dict[str, float] = {}
    for name, law in LAWS.items():
        began = time.perf_counter()
        found[name], _ = in_child(measure, name, law.quick if options.quick else law.sizes, repeats)
        took[name] = time.perf_counter() - began
    text, numbers = limits(found, quick=options.quick)
    laws = {name: {"points": points, **exponents(LAWS[name], points)} for name, points in found.items()}
    return Section(
        f"{laws_table(laws)}\n{text}", {"laws": laws, "limits": numbers, "took": took}, {"scaling": figure(laws)}
    )


def exponents(law: Law, points: list[dict[str, float]]) -> dict[str, float]:
    """Fit slopes of log-log lines: measured, between the two largest sizes, and of the operations."""
    sizes = np.array([point["size"] for point in points])
    seconds = np.array([point["seconds"] for point in points])
    work = np.array([law.operations(size) for size in sizes])
    slope, level = np.polyfit(np.log(sizes), np.log(seconds), 1)
    rest = np.log(seconds) - slope * np.log(sizes) - level
    return {
        "exponent": float(slope),
        "last": float(np.log(seconds[-1] / seconds[-2]) / np.log(sizes[-1] / sizes[-2])),
        "expected": float(np.polyfit(np.log(sizes), np.log(work), 1)[0]),
        "expected_last": float(np.log(work[-1] / work[-2]) / np.log(sizes[-1] / sizes[-2])),
        "level": float(np.exp(level)),
        "off": float(np.exp(np.abs(rest).max())),
    }


def laws_table(laws: dict[str, Any]) -> str:
    """Return the table, one row for each law."""
    rows = []
    for name, found in laws.items():
        law, first, last = LAWS[name], found["points"][0], found["points"][-1]
        rows.append(
            (
                law.what,
                law.size,
                f"{first['size']:,} to {last['size']:,}",
                f"{first['seconds']:.2g} to {last['seconds']:.2g}",
                f"{found['exponent']:.2f}",
                f"{found['expected']:.2f}",
                f"{found['last']:.2f} ({found['expected_last']:.2f})",
                f"{found['off']:.2f} x",
                f"{first['memory']:.0f} to {last['memory']:.0f}",
            )
        )
    head = (
        "### Cost against size\n\n"
        "Each law in a process of its own; seconds are the fastest turn, memory is the most that the process held "
        "above what it had before the first size, input included, sizes ascending. The exponent is the slope of a "
        "log-log line through all sizes; expected is the slope of the operations over the same sizes, so it is no "
        "whole number where two terms meet.\n\n"
    )
    columns = (
        "work",
        "grows",
        "sizes",
        "seconds",
        "exponent",
        "expected",
        "last step (expected)",
        "off by",
        "MiB",
    )
    return head + table(columns, rows)


def figure(laws: dict[str, Any]) -> Figure:
    """Draw a panel for each law: seconds (points) and the line of the operations through their middle; and memory."""
    from matplotlib.figure import Figure as Made

    made = Made(figsize=(11, 7.6))
    panels = made.subplots(3, 4).ravel()
    for panel, (name, found) in zip(panels, laws.items(), strict=False):
        law = LAWS[name]
        sizes = np.array([point["size"] for point in found["points"]])
        seconds = np.array([point["seconds"] for point in found["points"]])
        work = np.array([law.operations(size) for size in sizes])
        line = work * np.exp(np.mean(np.log(seconds) - np.log(work)))
        panel.loglog(sizes, line, "-", color="0.6", linewidth=1, label="as the operations")
        panel.loglog(sizes, seconds, "o", color="C0", markersize=4, label="seconds")
        panel.set_title(f"{law.what}: {found['exponent']:.2f} ({found['expected']:.2f})", fontsize=7)
        panel.set_xlabel(law.size, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.minorticks_off()
        panel.set_xticks(sizes[::2], [f"{size:,}" for size in sizes[::2]])
        panel.grid(alpha=0.3)
        low, high = min(*seconds, *line), max(*seconds, *line)
        panel.set_ylim(min(low / 1.5, (low * high) ** 0.5 / 10), max(high * 1.5, (low * high) ** 0.5 * 10))
    panels[0].set_ylabel("seconds", fontsize=8)
    memory = panels[len(laws)]
    for name in ("tokenize-cells", "stream-cells", "embed-cells"):
        points = laws[name]["points"]
        label = f"{LAWS[name].what.lower()}"
        memory.loglog(
            [p["size"] for p in points], [max(p["memory"], 1) for p in points], "o-", markersize=4, label=label
        )
    memory.set_title("Memory, MiB", fontsize=8)
    memory.set_xlabel("cells", fontsize=8)
    memory.tick_params(labelsize=7)
    memory.grid(alpha=0.3)
    memory.legend(fontsize=6)
    panels[0].legend(fontsize=6)
    made.tight_layout()
    return made
