"""The request that a file of cells makes: which parts of the file are read follows from the fields of the request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import CellSource
from perturbscope.errors import InvalidParameterError
from perturbscope.protocol import checks as check
from perturbscope.protocol.fields import PER_ROW, Field, Meta
from perturbscope.protocol.operations import Operation
from perturbscope.tasks.backends import Backend, StageProgress, count_stage

WHERE = {
    "layer": "Where the raw counts are: X (default), a layer, or raw.",
    "gene_key": "Column of var with the gene identifiers; the index by default.",
    "total_counts_key": "Column of obs with each cell's total counts over all measured genes.",
    "round_counts": "true: round estimated counts (alevin, RSEM, STARsolo EM, CellBender) to whole numbers.",
}
"""Parameters that say where in a file the counts are; see :func:`perturbscope.open_cells`."""
_FLAGS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
"""Spellings of a flag; a form's ticked box sends "on"."""
REPRESENTATION = "use_rep"
"""Parameter that names a matrix of obsm."""
_JSON = {"options": ("an object", dict), "pairs": ("a list", list)}


def parameters_of(operation: Operation[Any, Any]) -> dict[str, str]:
    """Return the parameters that an operation takes beside a file, with a sentence about each."""
    found = dict(WHERE) if operation.takes.of("cells") else {}
    for item in operation.takes.fields:
        if item.kind != "cells":
            found[parameter_of(item)] = sentence_of(item)
    return found


def parameter_of(item: Field) -> str:
    """Return the name of the parameter for a field."""
    if item.kind in ("labels", "numbers"):
        return f"{item.column}_key"
    return REPRESENTATION if item.kind == "vectors" else item.name


def sentence_of(item: Field) -> str:
    """Return the sentence about the parameter for a field."""
    text = {
        "labels": f"Column of obs: {item.doc}",
        "numbers": f"Column of obs: {item.doc}",
        "vectors": "Matrix of obsm to take in place of the model's embedding.",
        "options": f"{item.doc} A JSON object.",
        "pairs": f"{item.doc} A JSON list of lists of two.",
        "texts": f"{item.doc} Separated by commas.",
        "names": f"{item.doc} Several are a JSON list.",
    }.get(item.kind, item.doc)
    return f"{text} Required." if item.required else text


def request_of(
    operation: Operation[Any, Any],
    source: CellSource,
    parameters: Mapping[str, str],
    *,
    fields: Mapping[str, Any] | None = None,
    read: Callable[[CellSource], CountMatrix] = CellSource.read,
) -> tuple[Any, NDArray[np.intp], list[str]]:
    """Make the request of a file and its parameters. Cells without a label are left out, with a warning.

    Parameters
    ----------
    operation
        Operation that is asked.
    source
        The file, opened where the counts are.
    parameters
        Parameters by name, as texts; an empty text is none.
    fields
        Fields of the request that are given as they are.
    read
        Reads the counts.

    Returns
    -------
    The request, the rows of its cells in the file, and warnings for the caller.

    Raises
    ------
    InvalidParameterError
        A parameter is missing, or cannot be read.
    MissingColumnError
        The file has no such column.
    """
    given = {name: text for name, text in parameters.items() if text}
    values: dict[str, Any] = {name: value for name, value in (fields or {}).items() if value is not None}
    for item in operation.takes.fields:
        if item.required and item.kind != "cells" and parameter_of(item) not in given and item.name not in values:
            name = parameter_of(item)
            raise InvalidParameterError(
                f"{name} is missing: {sentence_of(item)} Give it as a query parameter or form field.", field=name
            )
    columns = {item.name: _column(source, item, given) for item in operation.takes.of("labels", "numbers")}
    labels = [columns[item.name] for item in operation.takes.of("labels") if columns[item.name] is not None]
    keep = np.ones(source.n_cells, dtype=bool)
    for column in labels:
        keep &= np.array([bool(label and label.strip()) for label in column])
    rows = np.flatnonzero(keep)
    keys = [parameter_of(item) for item in operation.takes.of("labels") if parameter_of(item) in given]
    where = " and ".join(f"obs[{given[key]!r}]" for key in keys)
    if keys and not len(rows):
        raise InvalidParameterError(f"No cell has a value in {where}.", field=keys[0])
    for item in operation.takes.fields:
        if item.kind == "cells":
            if REPRESENTATION not in given:
                cells = read(source)
                values[item.name] = cells if len(rows) == len(cells) else cells[rows]
        elif item.kind == "vectors":
            if REPRESENTATION in given:
                values[item.name] = source.representation(given[REPRESENTATION])[rows]
        elif item.name in columns:
            if (column := columns[item.name]) is not None:
                values[item.name] = tuple(column[rows].tolist()) if item.kind == "labels" else column[rows]
        elif item.name in given:
            values[item.name] = value_of(item, given[item.name])
    n_left_out = source.n_cells - len(rows)
    warnings = [f"{n_left_out} of {source.n_cells} cells have no value in {where} and were left out."]
    return operation.takes.make(**values), rows, warnings if n_left_out else []


def ask_source(
    operation: Operation[Any, Any],
    source: CellSource,
    backend: Backend,
    values: Mapping[str, Any],
    *,
    progress: StageProgress | None = None,
) -> Any:
    """Ask an operation for the cells of a source, which are read as the request needs them.

    Parameters
    ----------
    operation
        Operation that is asked.
    source
        Cells.
    backend
        The model, here or on a server.
    values
        Fields of the request other than the cells. In place of a field with one entry a cell stands the parameter that
        names its place in the source, such as ``perturbation_key`` or ``use_rep``.
    progress
        Called with the stage and the number of cells that are done.

    Raises
    ------
    InvalidInputError
        A cell cannot be used; the message names its row in the source.
    UnsupportedOperationError
        The model cannot do it.
    """
    advance = count_stage(operation.name, source.n_cells, progress)
    cells = operation.takes.of("cells")
    if operation.per_cell and not operation.takes.of(*PER_ROW):
        # Cell by cell, so that memory holds a chunk of the counts at a time.
        parts = [backend.ask(operation.asked(**{cells[0].name: chunk}, **values), progress=advance) for chunk in source]
        return warned(operation.joined(parts), source.warnings)
    columns = {parameter_of(item) for item in operation.takes.of(*PER_ROW)}
    keys = {name: value for name, value in values.items() if name in columns and value is not None}
    given = {name: value for name, value in values.items() if name not in columns}
    request, _, warnings = request_of(operation, source, keys, fields=given)
    return warned(backend.ask(request, progress=advance), [*source.warnings, *warnings])


def warned(answer: Any, warnings: Sequence[str]) -> Any:
    """Return an answer with further warnings in its meta, if it has one."""
    meta = getattr(answer, "meta", None)
    if not warnings or not isinstance(meta, Meta):
        return answer
    return replace(answer, meta=replace(meta, warnings=(*meta.warnings, *warnings)))


def where_of(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of :func:`perturbscope.open_cells` among parameters that are texts.

    Raises
    ------
    InvalidParameterError
        `round_counts` is neither true nor false.
    """
    found: dict[str, Any] = {name: parameters.get(name) or None for name in WHERE}
    text = (found["round_counts"] or "false").strip().casefold()
    if text not in _FLAGS:
        raise InvalidParameterError(f"round_counts is {text[:40]!r}; give true or false.", field="round_counts")
    return {**found, "round_counts": _FLAGS[text]}


def _column(source: CellSource, item: Field, given: Mapping[str, str]) -> Any:
    name = parameter_of(item)
    if name not in given:
        return None
    if item.kind == "labels":
        return source.labels(given[name], field=name)
    return check.numbers_as(source.column(given[name], field=name).to_numpy(), name, item.dtype)


def value_of(item: Field, text: str) -> Any:
    """Read the text of one parameter. Raises InvalidParameterError."""
    if item.kind == "text":
        return check.text(text, item.name)
    if item.kind == "texts":
        return check.texts([part.strip() for part in text.split(",")], item.name)
    if item.kind == "names":
        return check.names(_listed(text), item.name)
    try:
        value = json.loads(text)
    except ValueError as error:
        what = _JSON.get(item.kind, (f"a {item.kind}",))[0]
        raise InvalidParameterError(f"{item.name} is not JSON ({error}); give {what}.", field=item.name) from error
    what, kind = _JSON.get(item.kind, ("", object))
    if not isinstance(value, kind):
        raise InvalidParameterError(f"{item.name} is JSON, but not {what}.", field=item.name)
    return check.READERS[item.kind](value, item.name)


def _listed(text: str) -> Any:
    """Return a JSON list of strings, or the text itself if it is none: a label may begin with a bracket."""
    if text.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(text)
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return value
    return text
