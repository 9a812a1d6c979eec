"""Messages as one Arrow IPC stream: what has one entry a row is a column.

Everything that is not a column is JSON in the schema's metadata, under the key ``perturbscope``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, MalformedMatrixError
from perturbscope.inference.embeddings import OutputValues
from perturbscope.protocol import checks as check
from perturbscope.protocol.arrow_ipc import read_stream, write_stream
from perturbscope.protocol.fields import PER_ROW, SILENT, Field, Kind
from perturbscope.protocol.outputs import genes_of, output_of, spec_from_dict, spec_to_dict
from perturbscope.protocol.tables import form_of, meta_from_dict, meta_to_dict, rows_of, table_of

T = TypeVar("T")
COUNTS = ("indices", "counts", "total_counts")
"""Columns of cells."""
OUTPUT, GENES = "outputs.", "gene_ids"
"""Beginning of the name of an output's column, and the column of the genes behind outputs per token."""
OF_CELLS = ("gene_ids", "first_row")
"""Names in the metadata that belong to cells."""
_NOT_INSIDE: frozenset[Kind] = PER_ROW | {"cells"}
_ARROW_TYPES: dict[Kind, Any] = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}


def request_to_arrow(request: Any) -> bytes:
    """Encode a request.

    Cells are the columns ``indices, counts, total_counts``, with ``gene_ids`` and ``first_row`` in the metadata; what
    has one entry a cell is a column of its own (``embedding``, ``perturbation``, ``batch``). All other fields stand in
    the metadata.
    """
    return _to_arrow(request)


def request_from_arrow(kind: type[T], body: bytes) -> T:
    """Decode a request of this kind. Raises errors of :mod:`perturbscope.errors` for bad input."""
    form = form_of(kind)
    cells, vectors = form.of("cells"), form.of("vectors")
    columns, inside = form.of("labels", "numbers"), [item for item in form.fields if item.kind not in _NOT_INSIDE]
    table, meta = read_stream(body)
    needed = [item.name for item in inside if item.required]
    needed += [OF_CELLS[0] for item in cells if item.required]
    known = (*(OF_CELLS if cells else ()), *(item.name for item in inside))
    meta = check.mapping(meta, "metadata", required=needed, optional=[name for name in known if name not in needed])
    embedded = [item for item in vectors if item.column in table.column_names]
    source = [item.column for item in embedded] or (COUNTS if cells else ())
    expect_columns(table, (*source, *(item.column for item in columns)))
    if embedded and "gene_ids" in meta:
        raise InvalidParameterError("gene_ids are given with embeddings; give cells or embeddings.", field="gene_ids")
    found: dict[str, Any] = {item.name: vectors_from(table, item.column) for item in embedded}
    if not embedded:
        found |= {item.name: _cells_from(table, meta) for item in cells}
    for item in columns:
        if item.required or item.column in table.column_names:
            found[item.name] = _COLUMNS[item.kind](table, item)
    for item in inside:
        if item.required or meta.get(item.name) is not None:
            found[item.name] = check.READERS[item.kind](meta[item.name], item.name)
    made: T = form.make(**found)
    return made


def answer_to_arrow(answer: Any) -> bytes:
    """Encode an answer, with its ``meta`` in the metadata.

    Embeddings have the columns ``embedding, length, n_detected, known_share``, one row a cell; scores and comparisons
    those of their table.
    """
    return _to_arrow(answer)


def answer_from_arrow(kind: type[T], body: bytes) -> T:
    """Decode an answer of this kind. Raises errors of :mod:`perturbscope.errors` that name the field."""
    form = form_of(kind)
    table, metadata = read_stream(body)
    found: dict[str, Any] = {}
    for item in form.fields:
        if item.derived:
            continue
        if item.kind == "table":
            known = [name for name in item.columns if name in table.column_names]
            found[item.name] = table_of(table.select(known).to_pylist(), item.columns)
        elif item.kind == "meta":
            found[item.name] = meta_from_dict(metadata)
        elif item.kind == "outputs":
            found[item.name] = outputs_from(table, metadata.get(item.name) or [])
        elif item.kind in _COLUMNS:
            if item.required or item.column in table.column_names:
                found[item.name] = _COLUMNS[item.kind](table, item)
        elif item.required or (isinstance(metadata, Mapping) and metadata.get(item.name) is not None):
            given = check.mapping(metadata, "metadata", required=[item.name], optional=list(metadata))
            found[item.name] = check.READERS[item.kind](given[item.name], item.name)
    made: T = form.make(**found)
    return made


def _to_arrow(message: Any) -> bytes:
    form = form_of(type(message))
    values = form.take(message)
    columns: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    for item in form.fields:
        value = values[item.name]
        if item.derived or (value is None and item.kind in (*SILENT, *PER_ROW)):
            continue
        if item.kind == "cells":
            columns |= count_columns(value)
            meta |= {"gene_ids": value.gene_ids.tolist(), "first_row": value.first_row}
        elif item.kind == "table":
            rows = rows_of(value, item.columns)
            columns |= {
                name: pa.array([row[name] for row in rows], _ARROW_TYPES[kind]) for name, kind in item.columns.items()
            }
        elif item.kind == "meta":
            meta |= meta_to_dict(value)
        elif item.kind == "outputs":
            columns |= output_columns(value)
            meta[item.name] = [spec_to_dict(output.spec) for output in value.values()]
        elif item.kind in PER_ROW:
            columns[item.column] = vectors(value) if item.kind == "vectors" else _plain_column(value, item)
        else:
            meta[item.name] = value.to_dict() if item.kind == "options" and value is not None else value
    return write_stream(columns, meta)


def _table_columns(table: Any, item: Field) -> dict[str, Any]:
    rows = rows_of(table, item.columns)
    return {name: pa.array([row[name] for row in rows], _ARROW_TYPES[kind]) for name, kind in item.columns.items()}


def _plain_column(values: Any, item: Field) -> Any:
    return pa.array(values, pa.string()) if item.kind == "labels" else pa.array(values)


def count_columns(cells: CountMatrix) -> dict[str, Any]:
    """Return the columns of cells; :func:`counts_from` reads them."""
    indptr = cells.counts.indptr
    kind, offsets = _list_kind(int(indptr[-1]))
    starts = pa.array(indptr.astype(offsets))
    return {
        "indices": kind.from_arrays(starts, pa.array(cells.counts.indices)),
        "counts": kind.from_arrays(starts, pa.array(cells.counts.data)),
        "total_counts": pa.array(cells.totals),
    }


def expect_columns(table: pa.Table | pa.Schema, allowed: tuple[str, ...]) -> None:
    """Raise InvalidParameterError for a column that is unknown, or that stands in the table twice."""
    names = table.names if isinstance(table, pa.Schema) else table.column_names
    for name in names:
        if name not in allowed or names.count(name) > 1:
            raise InvalidParameterError(
                f"The column {check.shown(name)} is unknown, or there twice; known are {', '.join(allowed)}.",
                field=check.printable(name),
            )


def _column(table: pa.Table, name: str) -> Any:
    """Return a column as one chunk, after checking that it exists, has rows and has no nulls."""
    if name not in table.column_names:
        raise MalformedMatrixError(f"The column {name!r} is missing.", field=name)
    column = table.column(name)
    if not len(column):
        raise MalformedMatrixError("The stream has no rows; one a cell is needed.", field=name)
    if column.null_count:
        raise MalformedMatrixError(f"The column {name!r} has {column.null_count} nulls.", field=name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def plain(table: pa.Table, name: str) -> NDArray[Any]:
    """Return a column of numbers."""
    column = _column(table, name)
    if not _is_number(column.type):
        raise MalformedMatrixError(f"The column {name!r} has type {column.type}; numbers are needed.", field=name)
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return array


def _ragged(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the starts and the values of a column of lists of numbers."""
    starts, values = _lists(table, name, "lists of numbers", _is_number)
    return starts, values.to_numpy(zero_copy_only=False)


def _lists(
    table: pa.Table, name: str, what: str = "lists", fits: Callable[[pa.DataType], bool] = bool
) -> tuple[NDArray[np.int64], Any]:
    """Return the starts and the values of a column of lists, after checking that no list has a null."""
    column = _column(table, name)
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not fits(kind.value_type):
        raise MalformedMatrixError(f"The column {name!r} has type {kind}; {what} are needed.", field=name)
    values = column.flatten()
    if values.null_count:
        raise MalformedMatrixError(f"The column {name!r} has {values.null_count} nulls in its lists.", field=name)
    starts = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    return starts - starts[0], values


def _cells_from(table: pa.Table, meta: Mapping[str, Any]) -> CountMatrix:
    if "gene_ids" not in meta:
        raise InvalidParameterError("metadata lacks 'gene_ids', which cells need.", field="gene_ids")
    return check.count_matrix(meta["gene_ids"], **counts_from(table), first_row=meta.get("first_row", 0))


def counts_from(table: pa.Table, *, first_row: int = 0) -> dict[str, Any]:
    """Return the arrays of a matrix, ``indptr, indices, data, totals``, from its columns."""
    starts, indices = _ragged(table, "indices")
    starts_of_counts, counts = _ragged(table, "counts")
    differ = np.flatnonzero(np.diff(starts) != np.diff(starts_of_counts))
    if len(differ):
        row = int(differ[0])
        raise MalformedMatrixError(
            f"Row {first_row + row} has {int(np.diff(starts)[row])} indices and "
            f"{int(np.diff(starts_of_counts)[row])} counts.",
            field="counts",
        )
    totals = plain(table, "total_counts") if "total_counts" in table.column_names else None
    return {"indptr": starts, "indices": indices, "data": counts, "totals": totals}


def vectors(values: NDArray[np.float32]) -> Any:
    """Return vectors as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def vectors_from(table: pa.Table, name: str = "embedding") -> NDArray[np.float32]:
    """Return the vectors in a column, as a view."""
    column = _column(table, name)
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type) or kind.list_size < 1:
        raise InvalidEmbeddingError(
            f"The column {name!r} has type {kind}; a fixed-size list of floats is needed.", field=name
        )
    values = column.flatten()
    if values.null_count:
        raise InvalidEmbeddingError(f"The column {name!r} has {values.null_count} nulls.", field=name)
    return check.embedding_matrix(values.to_numpy(zero_copy_only=False).reshape(-1, kind.list_size))


def _labels(table: pa.Table, name: str) -> tuple[str, ...]:
    """Return a column of strings; it may be dictionary-encoded, as pandas writes categories."""
    column = _column(table, name)
    codes = None
    if pa.types.is_dictionary(column.type):
        # Decoded by hand: to cast would copy each name once a cell, however long a hostile caller made it.
        column, codes = column.dictionary, column.indices.to_pylist()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InvalidParameterError(f"The column {name!r} has type {column.type}; strings are needed.", field=name)
    names = check.texts(column.to_pylist(), name)
    return names if codes is None else tuple(names[code] for code in codes)


def output_columns(outputs: Mapping[str, OutputValues]) -> dict[str, Any]:
    """Return the columns of outputs beside the cell embedding; :func:`outputs_from` reads them.

    An output per cell is the column ``outputs.<name>`` of vectors. One per token is a column of lists of vectors, one
    for each gene that the model read; ``gene_ids`` has their names, the same for all such outputs.
    """
    columns: dict[str, Any] = {}
    for name, output in outputs.items():
        rows = vectors(output.values)
        if output.offsets is not None:
            kind, offsets = _list_kind(int(output.offsets[-1]))
            starts = pa.array(output.offsets.astype(offsets))
            rows = kind.from_arrays(starts, rows)
            names, codes = genes_of(output)
            genes = pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))
            columns[GENES] = kind.from_arrays(starts, genes)
        columns[OUTPUT + name] = rows
    return columns


def _list_kind(n_values: int) -> tuple[Any, Any]:
    return (pa.ListArray, np.int32) if n_values < 2**31 else (pa.LargeListArray, np.int64)


def outputs_from(table: pa.Table, specs: Any) -> dict[str, OutputValues]:
    """Return the outputs of an answer, whose descriptions are in its metadata. Raises errors that name the field."""
    if not isinstance(specs, list):
        raise InvalidParameterError("outputs must be a list of descriptions.", field="outputs")
    found = {}
    for spec in map(spec_from_dict, specs):
        column = OUTPUT + spec.name
        if spec.per == "cell":
            found[spec.name] = output_of(spec, vectors_from(table, column).copy(), table.num_rows)
            continue
        starts, rows = _lists(table, column)
        starts_of_genes, genes = _lists(table, GENES)
        wanted = pa.list_(pa.float32(), spec.width)
        if rows.type != wanted or not pa.types.is_dictionary(genes.type):
            raise InvalidParameterError(
                f"The column {column!r} has lists of {rows.type}, and gene_ids of {genes.type}; lists of {wanted} and "
                "of a dictionary are needed.",
                field="outputs",
            )
        values = rows.flatten()
        if rows.null_count or values.null_count or genes.null_count or not np.array_equal(starts, starts_of_genes):
            raise InvalidParameterError(f"The column {column!r} has nulls, or does not fit gene_ids.", field="outputs")
        found[spec.name] = output_of(
            spec,
            values.to_numpy(zero_copy_only=False).reshape(-1, rows.type.list_size).copy(),
            table.num_rows,
            offsets=starts,
            genes=genes.indices.to_numpy(zero_copy_only=False).copy(),
            gene_names=check.texts(genes.dictionary.to_pylist(), GENES),
        )
    return found


def _numbers(table: pa.Table, item: Field) -> NDArray[Any]:
    if item.dtype.kind == "b":
        column = _column(table, item.column)
        if not pa.types.is_boolean(column.type):
            raise MalformedMatrixError(
                f"The column {item.column!r} has type {column.type}; booleans are needed.", field=item.column
            )
        flags: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return flags
    return check.numbers_as(plain(table, item.column), item.name, item.dtype)


_COLUMNS: Mapping[Kind, Callable[[pa.Table, Field], Any]] = {
    "vectors": lambda table, item: vectors_from(table, item.column).copy(),
    "labels": lambda table, item: _labels(table, item.column),
    "numbers": _numbers,
}
"""Function that reads each kind of field that is a column, or columns."""
