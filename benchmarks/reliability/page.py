"""The page of all rows: those that were made, and of the others what the page said before."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.reliability.trial import FAULTS, Row
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


@dataclass(frozen=True)
class Part:
    """A row of the table, and the section about it."""

    line: str
    section: str

    @classmethod
    def of(cls, row: Row) -> Part:
        """Return the part of the page that a row makes."""
        seen = ", ".join(f"{code} {n:,}" for code, n in row.clients.items()) or "-"
        cells = (
            f"[{row.title}](#{row.name})",
            seen,
            "; ".join(row.service) or "-",
            "yes" if row.held else "**no**",
            f"{row.seconds:.0f}",
        )
        lines = [f"## {row.name}\n\n**{row.title}.** {row.done}\n"]
        lines += [f"- {'held' if holds else '**did not hold**'}: {what}" for what, holds in row.checks]
        lines += [f"- {note}" for note in row.notes]
        quick = " --quick" if row.quick else ""
        lines.append(
            f"\n`python -m benchmarks.reliability --only {row.name}{quick}`, {row.seconds:.0f} s, commit {row.commit}, "
            f"{row.date}."
        )
        return cls("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", "\n".join(lines))

    @property
    def held(self) -> bool:
        """Whether all its checks hold."""
        return self.line.split(" | ")[-2] == "yes"

    @property
    def seconds(self) -> int:
        """Seconds that it took."""
        return int(self.line.split(" | ")[-1].split()[0])

    @property
    def commit(self) -> str:
        """The commit that it was made at."""
        found = re.search(r", commit ([^,]+), [\d: -]+\.\s*$", self.section)
        return found[1] if found else "unknown"


def parts_of(text: str) -> dict[str, Part]:
    """Return the parts of a page by the names of their faults."""
    sections = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    lines = {name: line for line, name in re.findall(r"^(\| \[.*?\]\(#([\w-]+)\) \|.*\|)$", text, re.MULTILINE)}
    return {name: Part(lines[name], f"## {name}\n{body.rstrip()}") for name, body in sections.items() if name in lines}


def write(rows: Iterable[Row]) -> None:
    """Write benchmarks/reliability.md: these rows anew, and all others as they stand there."""
    PAGE.write_text(page(rows, parts_of(PAGE.read_text()) if PAGE.exists() else {}))


def page(rows: Iterable[Row], others: Mapping[str, Part] | None = None) -> str:
    """Return the text of the page.

    Parameters
    ----------
    rows
        Rows that are made.
    others
        Parts of faults without one, by name; those of faults that there are no more are left out.
    """
    made = {row.name: row for row in rows}
    known = {**(others or {}), **{name: Part.of(row) for name, row in made.items()}}
    parts = [known[name] for name in FAULTS if name in known]
    quick = sorted(name for name in FAULTS if name in known and f"--only {name} --quick`" in known[name].section)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    held = sum(part.held for part in parts)
    text = [
        "# Faults made on purpose, and what came of them\n",
        "    python -m benchmarks.reliability                  # every row, and this page\n"
        "    python -m benchmarks.reliability --only killed    # one row anew\n",
        f"{held} of {len(parts)} rows hold. Each was made against the real service "
        "(`python -m serving`, a process of its own, one thread for the model) with clients in another process of the "
        f"same machine. {hardware()}; Python {platform.python_version()}, {versions}; commit "
        f"{', '.join(sorted({part.commit for part in parts}))}; {sum(part.seconds for part in parts) / 60:.0f} minutes "
        "in all. What clients saw are the codes of the typed errors (`perturbscope/errors.py`) and how many requests "
        "ended so.\n",
    ]
    if quick:
        text.append(f"**Made with --quick, a few of everything, and no evidence: {', '.join(quick)}.**\n")
    text.append("| fault | clients saw | the service | held | s |\n|---|---|---|---|---|")
    text += [part.line for part in parts]
    text += [f"\n{part.section}" for part in parts]
    return "\n".join(text) + "\n"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
