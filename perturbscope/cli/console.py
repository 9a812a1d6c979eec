"""Output of the command line: progress, tables, warnings and errors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from perturbscope.errors import (
    BundleError,
    InvalidInputError,
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    PerturbScopeError,
    ServerUnreachableError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedOperationError,
)
from perturbscope.tasks.backends import StageProgress

if TYPE_CHECKING:
    import pandas as pd

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: the same command may succeed later."""
LINE_SECONDS = 30.0
"""Seconds between two lines of progress where there is no terminal."""
JSON_SECONDS = 1.0
"""Seconds between two JSON objects of progress."""
_AGAIN = (OverloadedError, ServerUnreachableError)
_CALLERS_ERRORS = (InvalidInputError, LimitExceededError, UnknownModelError, UnsupportedOperationError, BundleError)
_STAGES = {
    "embed": "Embedding",
    "score": "Scoring",
    "compare": "Comparing",
    "calibrate": "Calibrating",
    "degs": "Testing genes",
    "enrich": "Drawing",
    "map": "Mapping cells",
    "pairs": "Mapping pairs",
}
_HINTS = {
    UnauthenticatedError.code: " Here: perturbscope --api-key-file FILE, or the variable PERTURBSCOPE_API_KEY.",
}
"""Options of the commands that remedy an error, by its code; the message of the error does not know them."""
_WIDTH = 140
"""Width, in characters, of a table that goes into a file or pipe."""


def exit_code(error: PerturbScopeError) -> int:
    """Return 2 if input, options, bundle or model name are wrong, 75 if it may go well later, else 1."""
    if isinstance(error, _AGAIN):
        return EXIT_AGAIN
    return EXIT_USAGE if isinstance(error, _CALLERS_ERRORS) else EXIT_FAILURE


def fail(code: str, message: str) -> None:
    """Print an error on one line of stderr: its code and its message."""
    message += _HINTS.get(code, "")
    _OUTCOME.error = {"code": code, "message": " ".join(message.split())}
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        Text.assemble((f"Error [{code}]: ", "bold red"), " ".join(message.split()))
    )


def warn(message: str) -> None:
    """Print a warning on one line of stderr."""
    _OUTCOME.warnings.append(message)
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble(("Warning: ", "yellow"), message))


def note(message: str) -> None:
    """Print a line that is no result on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(message))


def say(message: str) -> None:
    """Print one line on stdout, or on stderr if the summary goes there."""
    _OUTCOME.lines.append(message)
    if _OUTCOME.summary == "-":
        note(message)
        return
    Console(soft_wrap=True, highlight=False).print(Text(message))


@dataclass
class _Outcome:
    """Outcome of a command."""

    progress: str = "auto"
    summary: str | None = None
    began: float = field(default_factory=time.monotonic)
    error: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    stages: dict[str, tuple[int, int]] = field(default_factory=dict)


_OUTCOME = _Outcome()


def begin() -> None:
    """Forget the outcome of an earlier command of this process."""
    vars(_OUTCOME).update(vars(_Outcome()))


def report_to(progress: str, summary: str | None) -> None:
    """Choose how progress is shown, and where :func:`finish` writes the summary.

    Raises
    ------
    InvalidParameterError
        The summary cannot be written there.
    """
    if summary not in (None, "-") and not Path(str(summary)).absolute().parent.is_dir():
        raise InvalidParameterError(f"--summary {summary}: there is no such folder; make it first.", field="summary")
    _OUTCOME.progress, _OUTCOME.summary = progress, summary


def finish(code: int) -> None:
    """Write the summary, if one was asked for: exit code, error, warnings, lines, stages, seconds."""
    if _OUTCOME.summary is None:
        return
    text = json.dumps(
        {
            "exit_code": code,
            "error": _OUTCOME.error,
            "warnings": _OUTCOME.warnings,
            "lines": _OUTCOME.lines,
            "stages": {name: {"done": done, "total": total} for name, (done, total) in _OUTCOME.stages.items()},
            "seconds": round(time.monotonic() - _OUTCOME.began, 3),
        }
    )
    if _OUTCOME.summary == "-":
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        return
    try:
        Path(_OUTCOME.summary).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        fail("unreadable_file", f"The summary {_OUTCOME.summary} cannot be written: {error.strerror}.")


class _Lines:
    """Progress without a terminal: lines on stderr, none of a short stage."""

    def __init__(self) -> None:
        self._began = self._said = _clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        _OUTCOME.stages[stage] = (done, total)
        now, is_json = _clock(), _OUTCOME.progress == "json"
        due = now - self._said >= (JSON_SECONDS if is_json else LINE_SECONDS)
        if _OUTCOME.progress == "none" or not (due or (is_json and done == total)):
            return
        self._said = now
        if is_json:
            seconds = round(now - self._began, 3)
            sys.stderr.write(json.dumps({"stage": stage, "done": done, "total": total, "seconds": seconds}) + "\n")
            sys.stderr.flush()
        else:
            note(f"{_STAGES.get(stage, stage.replace('_', ' ').capitalize())}: {done} of {total}")


_clock = time.monotonic


@contextmanager
def progress_bars() -> Iterator[StageProgress]:
    """Show progress on stderr: bars on a terminal, else a line now and then, or JSON if that was asked for."""
    console = Console(stderr=True)
    if _OUTCOME.progress != "auto" or not console.is_terminal:
        yield _Lines()
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        _OUTCOME.stages[stage] = (done, total)
        if stage not in tasks:
            tasks[stage] = bars.add_task(_STAGES.get(stage, stage.replace("_", " ").capitalize()), total=total)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield show


def show_table(table: pd.DataFrame, *, title: str, top: int) -> None:
    """Print the first `top` rows of each metric on stdout, in the order of the table."""
    for metric, rows in table.groupby("metric", sort=False):
        show_rows(rows.drop(columns="metric"), title=f"{title}: {metric}", top=top)


def show_rows(table: pd.DataFrame, *, title: str, top: int) -> None:
    """Print the first `top` rows on stdout."""
    shown = table.head(top)
    _print(
        title,
        list(map(str, shown.columns)),
        [[_cell(value) for value in row] for row in shown.itertuples(index=False)],
        caption=f"{len(shown)} of {len(table)}" if len(table) > len(shown) else None,
    )


def show_facts(title: str, facts: Sequence[tuple[str, Any]]) -> None:
    """Print names and values on stdout."""
    _print(title, ["", ""], [[name, str(value)] for name, value in facts], header=False)


def _print(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str | None = None,
    header: bool = True,
) -> None:
    console = Console(highlight=False, stderr=_OUTCOME.summary == "-")
    if not console.is_terminal:
        console = Console(highlight=False, stderr=_OUTCOME.summary == "-", width=max(console.width, _WIDTH))
    table = Table(title=Text(title), caption=caption, title_justify="left", caption_justify="left", show_header=header)
    for number, column in enumerate(columns):
        is_text = number == 0 or column in ("b", "flags", "")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(item) for item in row))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)
