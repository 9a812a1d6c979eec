"""Messages as one Arrow IPC stream: one row a cell in requests, the table in answers.

Everything that is not a column is JSON in the schema's metadata, under the key ``perturbscope``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, MalformedMatrixError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol import checks as check
from perturbscope.protocol.arrow_ipc import read_stream, write_stream
from perturbscope.protocol.messages import AnyAnswer, AnyRequest, CompareAnswer, Request, ScoreAnswer
from perturbscope.protocol.tables import (
    Kind,
    embed_meta,
    embeddings_of,
    kinds_of,
    meta_from_dict,
    meta_to_dict,
    result_answer,
    rows_of,
)

COUNTS = ("indices", "counts", "total_counts")
"""Columns of cells."""
_LABELS = {"perturbations": "perturbation", "batches": "batch"}
"""Column of each field of a request that has one label a cell."""
_ARROW_TYPES: dict[Kind, Any] = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}


def request_to_arrow(request: Request) -> bytes:
    """Encode a request.

    Cells are the columns ``indices, counts, total_counts``, with ``gene_ids`` and ``first_row`` in the metadata;
    embeddings are the column ``embedding``; labels are the columns ``perturbation`` and ``batch``. All other fields
    stand in the metadata.
    """
    columns: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    for name, value in ((item.name, getattr(request, item.name)) for item in fields(request)):
        if name not in ("cells", "embeddings", *_LABELS):
            meta[name] = value.to_dict() if name == "options" else value
        elif value is None:
            continue
        elif name == "cells":
            columns |= count_columns(value)
            meta |= {"gene_ids": value.gene_ids.tolist(), "first_row": value.first_row}
        else:
            columns |= {"embedding": vectors(value)} if name == "embeddings" else {_LABELS[name]: _strings(value)}
    return write_stream(columns, meta)


def request_from_arrow(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """Decode a request of this kind. Raises errors of :mod:`perturbscope.errors` for bad input."""
    names, required = check.field_names(kind)
    inside = [name for name in names if name not in ("cells", "embeddings", *_LABELS)]
    table, meta = read_stream(body)
    of_cells = ["gene_ids", "first_row"]
    needed = [name for name in inside if name in required] + (of_cells[:1] if "cells" in required else [])
    allowed = [name for name in (*of_cells, *inside) if name not in needed]
    meta = check.mapping(meta, "metadata", required=needed, optional=allowed)
    embedded = "embeddings" in names and "embedding" in table.column_names
    labels = {name: column for name, column in _LABELS.items() if name in names}
    expect_columns(table, (*(["embedding"] if embedded else COUNTS), *labels.values()))
    if embedded and "gene_ids" in meta:
        raise InvalidParameterError("gene_ids are given with embeddings; give cells or embeddings.", field="gene_ids")
    found: dict[str, Any] = {"embeddings": vectors_from(table)} if embedded else {"cells": _cells_from(table, meta)}
    for name, column in labels.items():
        if name in required or column in table.column_names:
            found[name] = _labels(table, column)
    for name in inside:
        if name in required or meta.get(name) is not None:
            found[name] = check.READERS[name](meta[name], name)
    return kind(**found)


def answer_to_arrow(answer: Embeddings | ScoreAnswer | CompareAnswer) -> bytes:
    """Encode an answer, with its ``meta`` in the metadata.

    Embeddings have the columns ``embedding, length, n_detected, known_share``, one row a cell; scores and comparisons
    those of their table.
    """
    if isinstance(answer, Embeddings):
        columns = {
            "embedding": vectors(answer.values),
            "length": pa.array(answer.lengths),
            "n_detected": pa.array(answer.n_detected),
            "known_share": pa.array(answer.known_share),
        }
        return write_stream(columns, meta_to_dict(embed_meta(answer), answer.warnings()))
    result, kinds = answer.result, kinds_of(type(answer))
    rows = rows_of(result.table, kinds)
    columns = {name: pa.array([row[name] for row in rows], _ARROW_TYPES[kind]) for name, kind in kinds.items()}
    return write_stream(columns, {**meta_to_dict(answer.meta, result.warnings), "provenance": result.provenance})


def answer_from_arrow(kind: type[AnyAnswer], body: bytes) -> AnyAnswer:
    """Decode an answer of this kind. Raises errors of :mod:`perturbscope.errors` that name the field."""
    table, metadata = read_stream(body)
    meta = meta_from_dict(metadata)
    if kind is not Embeddings:
        return cast("AnyAnswer", result_answer(kind, table.to_pylist(), meta))
    columns = [plain(table, name) for name in ("length", "n_detected", "known_share")]
    return cast("AnyAnswer", embeddings_of(meta[0], vectors_from(table).copy(), *columns))


def count_columns(cells: CountMatrix) -> dict[str, Any]:
    """Return the columns of cells; :func:`counts_from` reads them."""
    indptr = cells.counts.indptr
    kind, offsets = (pa.ListArray, np.int32) if indptr[-1] < 2**31 else (pa.LargeListArray, np.int64)
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
    column = _column(table, name)
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not _is_number(kind.value_type):
        raise MalformedMatrixError(f"The column {name!r} has type {kind}; lists of numbers are needed.", field=name)
    values = column.flatten()
    if values.null_count:
        raise MalformedMatrixError(f"The column {name!r} has {values.null_count} nulls in its lists.", field=name)
    starts = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    return starts - starts[0], values.to_numpy(zero_copy_only=False)


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


def vectors_from(table: pa.Table) -> NDArray[np.float32]:
    """Return the vectors in the column ``embedding``, as a view."""
    column = _column(table, "embedding")
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type) or kind.list_size < 1:
        raise InvalidEmbeddingError(
            f"The column 'embedding' has type {kind}; a fixed-size list of floats is needed.", field="embedding"
        )
    values = column.flatten()
    if values.null_count:
        raise InvalidEmbeddingError(f"The column 'embedding' has {values.null_count} nulls.", field="embedding")
    return check.embedding_matrix(values.to_numpy(zero_copy_only=False).reshape(-1, kind.list_size))


def _strings(labels: tuple[str, ...]) -> Any:
    return pa.array(labels, pa.string())


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
