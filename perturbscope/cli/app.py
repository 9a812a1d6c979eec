"""The commands as one application; an error of any of them becomes one line and an exit code."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from perturbscope import __version__
from perturbscope.cli import bundles, console
from perturbscope.cli.embedding import embed
from perturbscope.cli.enrichment import degs, enrich, enrich_genes, pseudobulk
from perturbscope.cli.mapping import map_pairs
from perturbscope.cli.options import CA_VARIABLE, KEY_FILE_VARIABLE, KEY_VARIABLE
from perturbscope.cli.reference import operations
from perturbscope.cli.report import report
from perturbscope.cli.scoring import compare, score
from perturbscope.cli.vocabulary import vocabulary
from perturbscope.errors import PerturbScopeError

_INTERRUPTED = 128 + signal.SIGINT
"""Exit code that typer returns after a KeyboardInterrupt."""

logger = logging.getLogger("perturbscope.cli")


class Commands(TyperGroup):
    """The commands that are written out here, and one for each further operation of the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, for the help."""
        from perturbscope.cli.operations import names

        written = super().list_commands(ctx)
        return [*written, *(name for name in names() if name not in written)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; None if there is none of that name."""
        written = super().get_command(ctx, cmd_name)
        if written is not None:
            return written
        from perturbscope.cli.operations import command

        return command(cmd_name)


app = typer.Typer(
    name="perturbscope",
    cls=Commands,
    help="See what a gene perturbation does to a cell.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(embed)
app.command()(score)
app.command()(compare)
app.command("map")(map_pairs)
app.command()(degs)
app.command("enrich-genes")(enrich_genes)
app.command()(pseudobulk)
app.command()(enrich)
app.command()(report)
app.command()(vocabulary)
app.command()(operations)
app.add_typer(bundles.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"File with the API key of a server; default: ${KEY_VARIABLE}."),
    ] = None,
    progress: Annotated[
        Literal["auto", "json", "none"],
        typer.Option(help="auto: bars on a terminal, else a line every 30 s; json: a JSON object a line on stderr."),
    ] = "auto",
    summary: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write what came of it as JSON: exit code, error, warnings; - for stdout."),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Authorities (PEM) that a server is trusted by; default: ${CA_VARIABLE}."),
    ] = None,
) -> None:
    """See what a gene perturbation does to a cell."""
    if any(name.startswith("PERTURBSCOPE_") for name in os.environ):
        from perturbscope.client.access import check_names

        check_names(os.environ)
    # The key itself is not an option: the command line can be seen in the list of processes.
    if api_key_file is not None:
        os.environ.pop(KEY_VARIABLE, None)
        os.environ[KEY_FILE_VARIABLE] = str(api_key_file)
    if ca is not None:
        os.environ[CA_VARIABLE] = str(ca)
    console.report_to(progress, summary)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    code = _run(arguments)
    console.finish(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    console.begin()
    try:
        code = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name="perturbscope", standalone_mode=False
        )
    except PerturbScopeError as error:
        console.fail(error.code, error.message)
        return console.exit_code(error)
    except TyperException as error:
        # Without arguments, the help is on the screen already and there is nothing more to say.
        message = error.format_message().rstrip(".")
        if message:
            console.fail("usage", f"{message}. See perturbscope --help.")
        return console.EXIT_USAGE
    except BrokenPipeError:
        # The reader of stdout has gone (head, less); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return console.EXIT_FAILURE
    except Exception as error:
        logger.debug("unexpected", exc_info=True)
        console.fail("internal", f"{type(error).__name__}: {error}")
        return console.EXIT_FAILURE
    if code == _INTERRUPTED:
        console.fail("interrupted", "Stopped; no output was written. perturbscope embed continues where it was.")
        return 128 + _signals.pop() if _signals else _INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the ``perturbscope`` command."""
    if os.environ.get("PERTURBSCOPE_DEBUG"):
        logging.basicConfig(level=logging.DEBUG)
    signal.signal(signal.SIGTERM, _interrupt)
    raise SystemExit(run())


_signals: list[int] = []
"""Signals that ended the command."""


def _interrupt(number: int, _frame: object) -> None:
    _signals.append(number)
    raise KeyboardInterrupt
