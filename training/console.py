"""What the training commands share: arguments, errors as messages, progress bars."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from perturbscope.errors import InvalidInputError, PerturbScopeError


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every stage takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("config", metavar="CONFIG", help="YAML file; see training/configs/")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of CONFIG; a dot goes one level down: --set loop.max_steps=10",
    )
    made.add_argument("--overwrite", action="store_true", help="replace results of an earlier run")
    # The deepspeed launcher adds it; the environment says the same.
    made.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return made


def is_first_process() -> bool:
    """Whether this process prints, builds and writes; true without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def stderr() -> Console:
    """Return a console on standard error, which prints in the first process only."""
    return Console(stderr=True, quiet=not is_first_process())


def run(body: Callable[[], None]) -> int:
    """Run a command; the exit status is 0, 2 for bad input or configuration, 1 for the rest."""
    try:
        body()
    except PerturbScopeError as error:
        print(f"error [{error.code}]: {error.message}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, InvalidInputError) else 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)  # noqa: T201
        return 130
    return 0


@contextmanager
def cell_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each file, in cells."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr()) as bars:
        tasks = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield advance
