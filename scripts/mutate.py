"""Change the source one operator or number at a time, and count the changes that no test notices.

``make mutate`` runs it with cosmic-ray (Bingham et al.), in a copy of the last commit. Each module has the tests that
stand for it; a seeded sample of its mutants is tried, since all would take days. Survivors are printed as differences.
The result is written to ``docs/mutation.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from cosmic_ray.commands import execute, init
from cosmic_ray.config import ConfigDict
from cosmic_ray.modules import find_modules
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/mutation.md"
PARTS = {
    "perturbscope/scoring/control.py": "tests/unit/scoring",
    "perturbscope/scoring/labels.py": "tests/unit/scoring",
    "perturbscope/scoring/scorers.py": "tests/unit/scoring",
    "perturbscope/scoring/statistics.py": "tests/unit/scoring",
    "perturbscope/scoring/energy/closed_form.py": "tests/unit/scoring",
    "perturbscope/scoring/energy/exchanges.py": "tests/unit/scoring",
    "perturbscope/tasks/resume.py": "tests/unit/tasks tests/integration/test_cli_resume.py",
    "serving/access/limits.py": "tests/unit/serving/access/test_limits.py",
    "serving/access/rates.py": "tests/unit/serving/access/test_rates.py",
    "training/data/copies.py": "tests/unit/training/data/test_copies.py",
    "training/loop/resume.py": "tests/unit/training/loop",
}
"""Modules, each with its tests."""


def tried(tree: Path, module: str, tests: str, *, python: str, most: int, seed: int) -> tuple[int, int, list[str]]:
    """Return the number of mutants, of those that were tried, and the differences of the survivors."""
    config = ConfigDict(
        {
            "module-path": str(tree / module),
            "timeout": 600.0,
            "excluded-modules": [],
            "test-command": f"{python} -m pytest -x -q -p no:cacheprovider {tests}",
            "distributor": {"name": "local"},
        }
    )
    with tempfile.TemporaryDirectory() as folder, use_db(Path(folder) / "work.sqlite", WorkDB.Mode.create) as work:
        init(find_modules([tree / module]), work, config.operators_config)
        items = sorted(item.job_id for item in work.work_items)
        mutants = sorted(
            work.work_items,
            key=lambda item: (item.mutations[0].start_pos, item.mutations[0].operator_name, item.job_id),
        )
        chosen = {item.job_id for item in random.Random(seed).sample(mutants, min(most, len(mutants)))}
        work.set_multiple_results(
            [item for item in items if item not in chosen], WorkResult(worker_outcome=WorkerOutcome.SKIPPED)
        )
        with contextlib.chdir(tree):  # python -m pytest imports what lies there, before what is installed
            execute(work, config)
        results = [result for job, result in work.results if job in chosen]
    survivors = [result.diff or "" for result in results if result.test_outcome == TestOutcome.SURVIVED]
    return len(items), len(results), survivors


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"), help="interpreter that runs the tests")
    parser.add_argument("--most", type=int, default=20, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(PARTS), metavar="MODULE")
    options = parser.parse_args()
    rows, differences = [], []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree)], check=True)
        try:
            for module in options.only:
                n_mutants, n_tried, survivors = tried(
                    tree, module, PARTS[module], python=options.python, most=options.most, seed=options.seed
                )
                killed = n_tried - len(survivors)
                rows.append(
                    f"| `{module}` | {n_mutants} | {n_tried} | {killed} | {100 * killed / max(n_tried, 1):.0f} % |"
                )
                differences += [f"{module}\n{survivor}" for survivor in survivors]
                sys.stderr.write(rows[-1] + "\n")
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    head = (
        "# Mutation testing\n\nHow many small changes of the source do tests notice? `make mutate` makes them with\n"
        f"cosmic-ray, a seeded sample of at most {options.most} for each module (seed {options.seed}), and runs\n"
        f"the tests of that module. {datetime.now(UTC):%Y-%m-%d}.\n\n"
        "| module | mutants | tried | noticed | share |\n|---|---|---|---|---|\n"
    )
    PAGE.write_text(head + "\n".join(rows) + "\n")
    sys.stdout.write("\n".join(differences) + "\n")


if __name__ == "__main__":
    main()
