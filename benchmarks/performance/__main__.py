"""Run parts and write the page: ``python -m benchmarks.performance [PART ...] [--quick]``.

Each part times PerturbScope and its peers in turns, in one run. Its results go to
``benchmarks/performance/results/PART.json``, and ``benchmarks/performance.md`` is made again from all results and from
``notes/PART.md`` (the floor, what paid and what did not). ``--quick`` prints, and writes no file.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.performance.harness import Options, Section, commit, machine

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "performance.md"
PARTS = {
    "tokenization": "Tokenization",
    "embedding": "Embedding on CPU",
    "published": "Published weights",
    "gpu": "Embedding on GPU",
    "training": "Training",
    "scoring": "Scoring at genome scale",
    "pairs": "All pairs, and Wasserstein",
    "service": "Service",
    "scaling": "Scale laws",
}
"""Titles of the parts by folder, in the order of the page; module ``part`` of each has ``run(options) -> Section``."""
INTRODUCTION = """# Performance

This page says how fast each part is, beside the programs that it replaces, and how far it is from what the machine can
do. Routes of a table took turns in one run; numbers are medians unless a column says otherwise. `make bench` runs all
parts, `make bench PARTS=scoring` one; peers from other packages (pertpy, scPerturb) need an environment of their own,
`--peers PYTHON`, see `benchmarks/peers.md`. Tests assert correctness, and none of these numbers.
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all ({', '.join(PARTS)})")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written: does it run?")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each route")
    parser.add_argument("--peers", type=Path, help="Python of an environment with requirements/peers.txt")
    parser.add_argument("--page", action="store_true", help="only put the page together from the results")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    wanted = Options(quick=options.quick, repeats=2 if options.quick else options.repeats, peers=options.peers)
    for part in [] if options.page else options.parts or PARTS:
        print(f"# {PARTS[part]}", flush=True)
        before, started = machine(), time.perf_counter()
        section: Section = importlib.import_module(f"benchmarks.performance.{part}.part").run(wanted)
        print(section.markdown, flush=True)
        if not options.quick:
            keep(part, section, wanted, before, time.perf_counter() - started)
    if not options.quick:
        PAGE.write_text(page())


def keep(part: str, section: Section, options: Options, before: dict[str, str], seconds: float) -> None:
    """Write the results of a part."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    for name, figure in section.figures.items():
        figure.savefig(results / f"{name}.png", dpi=110, bbox_inches="tight")
    command = f"python -m benchmarks.performance {part}"
    command += f" --repeats {options.repeats}" if options.repeats != Options.repeats else ""
    command += " --peers PYTHON" if options.peers else ""
    made = {
        "command": command,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds),
        **before,
    }
    found = {"made": made, "markdown": section.markdown, "figures": list(section.figures), "numbers": section.numbers}
    (results / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")


def page() -> str:
    """Return the page, made from all results in the folder."""
    text = [INTRODUCTION]
    for part, title in PARTS.items():
        path = HERE / "results" / f"{part}.json"
        text.append(f"## {title}\n")
        if path.exists():
            found = json.loads(path.read_text())
            text += [found["markdown"].strip() + "\n"]
            text += [f"![{name}](performance/results/{name}.png)\n" for name in found["figures"]]
            text += [origin(found["made"])]
        else:
            text.append("Not measured yet.\n")
        notes = HERE / "notes" / f"{part}.md"
        if notes.exists():
            text.append(notes.read_text().strip() + "\n")
    return "\n".join(text)


def origin(made: dict[str, Any]) -> str:
    """Return the line that says how and where a part's numbers were measured."""
    return (
        f"*`{made['command']}`, {made['date']}, commit {made['commit']}, {made['seconds']} s. {made['processor']}, "
        f"accelerator: {made['accelerator']}, load average {made['load']} before. {made['versions']}.*\n"
    )


if __name__ == "__main__":
    main()
