"""Arguments, error messages and progress bars of the commands; of training it imports its ground alone."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from perturbscope.errors import InvalidInputError, PerturbScopeError
from training.errors import StoppedError
from training.launcher import place

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every stage takes."""
    stage = argparse.ArgumentParser(description=description)
    stage.add_argument("config", metavar="CONFIG", help="YAML file; see training/configs/")
    stage.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of CONFIG; a dot goes one level down: --set loop.max_steps=10",
    )
    stage.add_argument(
        "--overwrite", action="store_true", help="replace results of an earlier run, once the new ones are complete"
    )
    return stage


def add_extend(stage: argparse.ArgumentParser) -> None:
    """Add the argument of the stages that train."""
    stage.add_argument(
        "--extend",
        action="store_true",
        help="go on from the last state with other loop.epochs or loop.max_steps than before; a linear schedule is "
        "then that of the new length from here on",
    )


def is_first_process() -> bool:
    """Return whether this process is the one that prints, builds and writes; true without a launcher."""
    try:
        return place().rank == 0
    except PerturbScopeError:
        return True  # it is about to end with this error


def stderr() -> Console:
    """Return a console on standard error, which prints in the first process only."""
    return Console(stderr=True, quiet=not is_first_process())


def run(body: Callable[[], None], *, resumes: bool = True) -> int:
    """Run a command, with its errors as messages on standard error.

    Parameters
    ----------
    body
        The command.
    resumes
        Whether the command, given again, goes on where it was interrupted.

    Returns
    -------
    Exit code: 0; 2 for bad input or configuration, 130 for an interruption, 128 and the number of a signal that ended
    the run after a step, 1 for all other errors.
    """
    try:
        body()
    except StoppedError as error:
        print(error.message, file=sys.stderr)  # noqa: T201
        return 128 + error.number
    except PerturbScopeError as error:
        print(f"error [{error.code}]: {error.message}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, InvalidInputError) else 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        path = f"{error.filename}: " if error.filename else ""
        text = f"{path}{os.strerror(error.errno)}. Nothing that was complete is lost; make room or give another path"
        print(f"error [not_written]: {text}, and run the same command again.", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again{' to resume' * resumes}", file=sys.stderr)  # noqa: T201
        return 130
    return 0


@contextmanager
def cell_progress(unit: str = "cells") -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar, in cells or another `unit`, for each name that the given function is called with."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr()) as bars:
        tasks = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield advance
