"""Make every fault against the real service and write benchmarks/reliability.md.

Rows are kept in runs/reliability: an interrupted run continues where it stopped, ``--only`` makes some rows again, and
``--page`` writes the page from the rows in that folder. Rows that the folder lacks stay on the page as they are.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reliability import page
from benchmarks.reliability.trial import FAULTS, Plan, Row, attempt

MODULES = (
    "load",
    "killed",
    "clients",
    "disk",
    "keys",
    "models",
    "fuzzing",
    "hostile",
    "container",
    "clock",
    "stopping",
    "bad_input",
)
"""Modules in the order of the page; each registers its faults."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a row does not hold."""
    for name in MODULES:
        importlib.import_module(f"benchmarks.reliability.{name}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), help="make these again")
    parser.add_argument("--minutes", type=float, default=15.0, help="duration of the load")
    parser.add_argument("--quick", action="store_true", help="a few of everything; rows are not kept")
    parser.add_argument("--anew", action="store_true", help="make all rows again")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    plan = Plan(options.quick, options.minutes)
    found: list[Row] = []
    for name, item in FAULTS.items():
        kept = Row.load(name)
        wanted = name in options.only if options.only else (options.anew or options.quick or kept is None)
        if options.page or not wanted:
            found += [kept] if kept is not None else []
            continue
        print(f"{name}: {item.title}", flush=True)
        with tempfile.TemporaryDirectory(prefix=f"perturbscope-{name}-") as folder:
            row = attempt(item, plan, Path(folder))
        print(f"  {'held' if row.held else 'DID NOT HOLD'} in {row.seconds:.0f} s; clients: {row.clients}", flush=True)
        if not options.quick:
            row.save()
            page.write([*found, row, *_later(name)])
        found.append(row)
    if options.quick:
        print(page.page(found))
    else:
        page.write(found)
    bad = [row.name for row in found if not row.held]
    print(f"{len(found) - len(bad)} of {len(found)} rows hold{': not ' + ', '.join(bad) if bad else ''}.")
    return 1 if bad else 0


def _later(name: str) -> list[Row]:
    """Return the kept rows of the faults after this one."""
    names = list(FAULTS)
    return [row for other in names[names.index(name) + 1 :] if (row := Row.load(other)) is not None]


if __name__ == "__main__":
    raise SystemExit(main())
