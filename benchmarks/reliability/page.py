"""The page of all rows."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from benchmarks.reliability.trial import Row
from tests.integration.server import ROOT

PAGE = ROOT / "benchmarks" / "reliability.md"
PACKAGES = ("bentoml", "uvicorn", "grpcio", "onnxruntime", "pyarrow", "h5py", "numpy")


def hardware() -> str:
    """Processor, cores, memory and system of this machine."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    total = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {total / 2**20:.0f} GiB, {platform.system()}"


def write(rows: Iterable[Row], *, minutes: float) -> None:
    """Write benchmarks/reliability.md."""
    rows = list(rows)
    PAGE.write_text(page(rows, minutes=minutes))


def page(rows: list[Row], *, minutes: float) -> str:
    """Return the text of the page."""
    commits = sorted({row.commit for row in rows})
    held = sum(row.held for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    quick = sorted(row.name for row in rows if row.quick)
    parts = [
        "# Faults made on purpose, and what came of them\n",
        "    python -m benchmarks.reliability                  # every row, and this page\n"
        "    python -m benchmarks.reliability --only killed    # one row anew\n",
        f"{held} of {len(rows)} rows hold. Each was made against the real service (`python -m serving`, a process of "
        "its own, one thread for the model) with clients in another process of the same machine. "
        f"{hardware()}; Python {platform.python_version()}, {versions}; commit {', '.join(commits)}; "
        f"{sum(row.seconds for row in rows) / 60:.0f} minutes in all. What clients saw are the codes of the typed "
        "errors (`perturbscope/errors.py`) and how many requests ended so.\n",
    ]
    if quick:
        parts.append(f"**Made with --quick, a few of everything, and no evidence: {', '.join(quick)}.**\n")
    parts.append("| fault | clients saw | the service | held | s |\n|---|---|---|---|---|")
    for row in rows:
        seen = ", ".join(f"{code} {n:,}" for code, n in row.clients.items()) or "-"
        cells = (
            f"[{row.title}](#{row.name})",
            seen,
            "; ".join(row.service) or "-",
            "yes" if row.held else "**no**",
            f"{row.seconds:.0f}",
        )
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for row in rows:
        parts.append(f"\n## {row.name}\n\n**{row.title}.** {row.done}\n")
        parts += [f"- {'held' if holds else '**did not hold**'}: {what}" for what, holds in row.checks]
        parts += [f"- {note}" for note in row.notes]
        parts.append(
            f"\n`python -m benchmarks.reliability --only {row.name}`, {row.seconds:.0f} s, "
            f"commit {row.commit}, {row.date}."
        )
    return "\n".join(parts) + "\n"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
