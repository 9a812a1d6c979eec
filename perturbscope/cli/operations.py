"""The commands of operations that are a module of their own; imported when one of them is asked for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perturbscope.cli import console, options
from perturbscope.operations import OPERATIONS

if TYPE_CHECKING:
    import pandas as pd

    from perturbscope.protocol.fields import Field
    from perturbscope.protocol.operations import Operation

Out = Annotated[
    Path | None, typer.Argument(metavar="[OUT]", help="The .parquet or .csv file to write; default: CSV on stdout.")
]
_TYPES = {"integer": int, "number": float, "flag": bool}
"""Types of options; all other fields are given as text, as beside an uploaded file."""


def names() -> list[str]:
    """Return the names of the commands of all operations on cells."""
    return [name for operation in OPERATIONS.values() if (name := _name(operation))]


def command(name: str) -> Any:
    """Return the command of an operation; None if there is none of that name."""
    operation = OPERATIONS.get(name.replace("-", "_"))
    if operation is None or not _name(operation):
        return None
    app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
    app.command(name)(options.grouped(_command(operation)))
    return typer.main.get_command(app)


def _name(operation: Operation[Any, Any]) -> str:
    """Return the command of an operation on a file of cells; empty if it takes no cells."""
    return operation.name.replace("_", "-") if operation.takes.of("cells") else ""


def _command(operation: Operation[Any, Any]) -> Callable[..., None]:
    """Return the function of a command, whose options follow from the fields of the request."""
    from perturbscope.tasks.requests import parameter_of

    fields = {parameter_of(item): item for item in operation.takes.fields if item.kind != "cells"}
    fields.pop("model", None)  # one of the options of a model

    def run(
        *, cells: Path, out: Path | None, counts_in: options.CountsIn, model_from: options.ModelFrom, **values: Any
    ) -> None:
        _run(operation, fields, cells, out, counts_in, model_from, values)

    parameters = [
        _parameter("cells", options.In),
        _parameter("out", Out, None),
        *(_option(name, item) for name, item in fields.items()),
        _parameter("counts_in", options.CountsIn),
        _parameter("model_from", options.ModelFrom),
    ]
    described: Any = run
    described.__doc__ = operation.summary
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    described.__signature__ = inspect.Signature(parameters)
    return run


def _parameter(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _option(name: str, item: Field) -> inspect.Parameter:
    """Return the option for a field: typed if it has one value, else the text that an upload would have."""
    from perturbscope.tasks.requests import sentence_of

    option = typer.Option(help=sentence_of(item).removesuffix(" Required."))
    kind: Any = _TYPES.get(item.kind, str)
    if item.required:
        return _parameter(name, Annotated[kind, option])
    default = item.default if item.kind in (*_TYPES, "text") else None
    return _parameter(name, Annotated[kind if default is not None else kind | None, option], default)


def _run(
    operation: Operation[Any, Any],
    fields: dict[str, Field],
    cells: Path,
    out: Path | None,
    counts_in: options.CountsIn,
    model_from: options.ModelFrom,
    values: dict[str, Any],
) -> None:
    from perturbscope.cells.files import check_output, write_table
    from perturbscope.cells.readers import open_cells
    from perturbscope.protocol.fields import PER_ROW
    from perturbscope.protocol.tables import meta_to_dict
    from perturbscope.tasks.requests import ask_source, value_of

    if out is not None:
        check_output(out, [".parquet", ".csv"], source=cells)
    for name, value in values.items():
        if isinstance(value, str) and fields[name].kind not in PER_ROW:
            values[name] = value_of(fields[name], value)
    with (
        open_cells(cells, **vars(counts_in)) as source,
        model_from.open() as backend,
        console.progress_bars() as progress,
    ):
        answer = ask_source(operation, source, backend, values, progress=progress)
        table = _table(operation, answer, source.cell_ids)
    meta = getattr(answer, "meta", None)
    for warning in meta.warnings if meta is not None else ():
        console.warn(warning)
    taken = operation.gives.take(answer)
    facts = {item.name: taken[item.name] for item in operation.gives.of("text", "integer", "number", "flag", "texts")}
    if table is None:
        console.show_facts(operation.summary, list(facts.items()))
    elif out is None:
        table.to_csv(sys.stdout, index=False)
    else:
        provenance = {**(meta_to_dict(meta) if meta is not None else {}), **facts, "input": cells.name}
        write_table(out, table, {**provenance, **vars(counts_in)})
        console.say(f"{operation.summary.rstrip('.')}: {len(table)} rows -> {out}")


def _table(operation: Operation[Any, Any], answer: Any, cell_ids: Any) -> pd.DataFrame | None:
    """Return the rows of an answer, with the names of the cells if there is one a cell; None if it has no rows."""
    import pandas as pd

    from perturbscope.protocol.fields import PER_ROW

    taken = operation.gives.take(answer)
    columns: dict[str, Any] = {}
    for item in operation.gives.of(*PER_ROW):
        values = taken[item.name]
        if item.kind == "vectors":
            columns |= {f"{item.name}_{number}": values[:, number] for number in range(values.shape[1])}
        elif values is not None:
            columns[item.name] = list(values) if item.kind == "labels" else values
    if not columns:
        return None
    table = pd.DataFrame(columns)
    if operation.per_cell and len(table) == len(cell_ids):
        table.insert(0, "cell", cell_ids.astype(object))
    return table
