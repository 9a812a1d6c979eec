"""Output of the command line: progress, tables, warnings and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from perturbscope.errors import (
    BundleError,
    InvalidInputError,
    LimitExceededError,
    PerturbScopeError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedOperationError,
)
from perturbscope.tasks.backends import StageProgress

if TYPE_CHECKING:
    import pandas as pd

EXIT_USAGE = 2
EXIT_FAILURE = 1
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
    """Return 2 if input, options, bundle or model name are wrong, else 1."""
    return EXIT_USAGE if isinstance(error, _CALLERS_ERRORS) else EXIT_FAILURE


def fail(code: str, message: str) -> None:
    """Print an error on one line of stderr: its code and its message."""
    message += _HINTS.get(code, "")
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        Text.assemble((f"Error [{code}]: ", "bold red"), " ".join(message.split()))
    )


def warn(message: str) -> None:
    """Print a warning on one line of stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble(("Warning: ", "yellow"), message))


def note(message: str) -> None:
    """Print a line that is no result on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(message))


def say(message: str) -> None:
    """Print one line on stdout."""
    Console(soft_wrap=True, highlight=False).print(Text(message))


@contextmanager
def progress_bars() -> Iterator[StageProgress]:
    """Show progress bars on stderr, one a stage; none if stderr is not a terminal."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
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
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, _WIDTH))
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
