"""Whether z and p are what they say, by simulation.

    python -m benchmarks.statistics [--only PART ...] [--scale 1.0] [--before TREE]

Each part writes ``benchmarks/statistics/results/PART.json`` as soon as it is done, and the page
``benchmarks/statistics.md`` is put together of all that are there; ``--only`` makes some parts anew and keeps the
others. ``--scale`` multiplies the numbers of simulated screens. ``--before`` runs the part ``batches`` once more with
the sources of another checkout, for the table that compares them.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "statistics.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(_parts()), metavar="PART")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--before", type=Path, metavar="TREE")
    arguments = parser.parse_args()
    for name, part in _parts().items():
        if arguments.only and name not in arguments.only:
            continue
        began = time.perf_counter()
        rows = part(arguments.scale)
        record = {"scale": arguments.scale, "commit": _commit(HERE), "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.before:
        code = f"import json; from screens import batches; print(json.dumps(batches({arguments.scale!r})))"
        environment = {**os.environ, "PYTHONPATH": f"{HERE}:{arguments.before}"}
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=HERE, capture_output=True, text=True, check=True
        ).stdout
        rows = json.loads(output.splitlines()[-1])
        record = {"scale": arguments.scale, "commit": _commit(arguments.before), "rows": rows}
        (RESULTS / "batches_before.json").write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page())
    return 0


def _parts() -> dict[str, Callable[[float], list[dict[str, Any]]]]:
    from benchmarks.statistics import screens, tails

    return {
        "type1": screens.type1,
        "batches": screens.batches,
        "units": screens.units,
        "wasserstein": screens.wasserstein,
        "tails": tails.tails,
        "sparse": screens.sparse,
        "time": screens.seconds,
    }


def _commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def page() -> str:
    """Put the page together of the notes and the recorded numbers."""
    text = PAGE.with_suffix(".in.md").read_text()
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        columns = list(record["rows"][0])
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in record["rows"]]
        said = f"\n\nCommit {record['commit']}, scale {record['scale']:g}."
        text = text.replace(f"<!-- {path.stem} -->", "\n".join(lines) + said)
    return text


if __name__ == "__main__":
    sys.exit(main())
