"""``perturbscope operations``: the table of operations as a page, and as .proto files for other languages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from perturbscope.protocol.fields import Field, Form
    from perturbscope.protocol.operations import Operation

_HEAD = """# Operations

What can be asked of a model or a server, from the one table that routes, clients and commands are made of. Written by
`perturbscope operations`; `perturbscope operations --proto NAME` prints the .proto of one, for clients in other
languages. A further operation is a module in `perturbscope/operations/`.
"""
_TYPES = {
    "cells": "raw counts",
    "vectors": "float32 [rows, width]",
    "labels": "string [rows]",
    "text": "string",
    "integer": "integer",
    "number": "number",
    "flag": "true or false",
    "texts": "strings",
    "names": "string or strings",
    "pairs": "pairs of strings",
    "options": "options of a score",
    "meta": "meta",
    "table": "table",
    "records": "rows",
    "outputs": "values by name",
}
_PLACES = {"cells": "columns", "table": "columns", "outputs": "columns"}


def operations(
    proto: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print the .proto of this operation in place of the page.")
    ] = None,
) -> None:
    """Print what can be asked, as Markdown: fields, types, routes, methods, parameters."""
    from perturbscope.operations import OPERATIONS
    from perturbscope.protocol.descriptors import proto_of

    typer.echo(page(OPERATIONS.values()) if proto is None else proto_of(OPERATIONS.named(proto)), nl=False)


def page(found: Iterable[Operation[Any, Any]]) -> str:
    """Return the reference page of operations, as Markdown."""
    return "\n".join([_HEAD, *(line for operation in found for line in _section(operation))])


def _section(operation: Operation[Any, Any]) -> Iterator[str]:
    from perturbscope.protocol.descriptors import method_of
    from perturbscope.tasks.requests import parameters_of

    takes, gives = operation.takes, operation.gives
    bodies = "JSON, Arrow or an .h5ad file" if operation.has_body else "no body"
    answers = "JSON or Arrow" if operation.has_arrow else "JSON"
    request = operation.request.__name__
    yield f"## {operation.name}\n"
    yield f"{operation.summary}\n"
    yield f"- HTTP: `{'POST' if operation.has_body else 'GET'} {operation.path}`; {bodies} in, {answers} out"
    yield f"- gRPC: `{method_of(operation)}`"
    yield f"- Python: `client.ask({request}({'cells=...' if takes.of('cells') else ''}))`"
    if takes.of("cells"):
        yield f"- command: `perturbscope {operation.name.replace('_', '-')}`"
    yield f"- capability of the model: `{operation.capability}`\n"
    if takes.fields:
        yield from _table(f"`{request}`", takes)
        yield "Parameters beside a file:\n"
        yield from (f"- `{name}`: {text}" for name, text in parameters_of(operation).items())
        yield ""
    yield from _table(f"`{gives.name}`", gives, arrow=operation.has_arrow)


def _table(title: str, form: Form, *, arrow: bool = True) -> Iterator[str]:
    from perturbscope.protocol.tables import form_of

    yield f"| {title} | type | {'in Arrow | ' if arrow else ''}|\n|---|---|---|{'---|' if arrow else ''}"
    for item in form.fields:
        kind = f"{item.dtype.name} [rows]" if item.kind == "numbers" else _TYPES[item.kind]
        yield f"| `{item.name}` | {kind} | {_place(item) + ' | ' if arrow else ''}{_about(item)} |"
    yield ""
    for item in form.of("records"):
        yield from _table(f"row of `{item.name}`", form_of(item.record), arrow=False)


def _place(item: Field) -> str:
    if item.derived:
        return "JSON alone"
    return f"column `{item.column}`" if item.column else _PLACES.get(item.kind, "metadata")


def _about(item: Field) -> str:
    if item.required:
        return item.doc
    default = item.default
    said = f" Default: {json.dumps(default)}." if default and isinstance(default, str | int | float) else ""
    return f"May be absent. {item.doc}{said}"
