"""Messages as one Arrow IPC stream: one row a cell in requests, the table in answers.

What is not a column stands as JSON in the schema's metadata under the key ``perturbscope``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError, MalformedMatrixError
from perturbscope.inference.embedder import Embeddings
from perturbscope.protocol import checks as check
from perturbscope.protocol.arrow_ipc import read_stream, write_stream
from perturbscope.protocol.messages import CompareAnswer, CompareRequest, EmbedRequest, ScoreAnswer, ScoreRequest
from perturbscope.protocol.tables import COMPARE_KINDS, SCORE_KINDS, Kind, embed_meta, embeddings_of, rows_of, table_of
from perturbscope.scoring.results import CompareResult, ScoreResult

COUNTS = ("indices", "counts", "total_counts")
"""Columns of cells."""
_META = ("gene_ids", "first_row", "options", "model")
_ARROW_TYPES: dict[Kind, Any] = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}


def embed_request_to_arrow(request: EmbedRequest) -> bytes:
    """Columns ``indices, counts, total_counts``; metadata ``{"gene_ids", "model"}``."""
    return write_stream(count_columns(request.cells), {**_count_meta(request.cells), "model": request.model})


def embed_request_from_arrow(body: bytes) -> EmbedRequest:
    """Read what :func:`embed_request_to_arrow` writes. Raises errors of :mod:`perturbscope.errors` for bad input."""
    table, meta = read_stream(body)
    expect_columns(table, COUNTS)
    meta = check.mapping(meta, "metadata", required=["gene_ids"], optional=["first_row", "model"])
    return EmbedRequest(cells=_cells_from(table, meta), model=check.optional_text(meta.get("model"), "model"))


def score_request_to_arrow(request: ScoreRequest) -> bytes:
    """Columns of cells, or ``embedding``, with ``perturbation`` and ``batch``; the rest in the metadata."""
    return write_stream(_labelled_columns(request), {**_labelled_meta(request), "control": request.control})


def score_request_from_arrow(body: bytes) -> ScoreRequest:
    """Read what :func:`score_request_to_arrow` writes. Raises errors of :mod:`perturbscope.errors` for bad input."""
    table, meta = read_stream(body)
    meta = check.mapping(meta, "metadata", required=["control"], optional=_META)
    return ScoreRequest(**_labelled_from(table, meta), control=check.text(meta["control"], "control"))


def compare_request_to_arrow(request: CompareRequest) -> bytes:
    """As :func:`score_request_to_arrow`, with ``pairs`` in the metadata."""
    meta = {**_labelled_meta(request), "pairs": request.pairs, "control": request.control}
    return write_stream(_labelled_columns(request), meta)


def compare_request_from_arrow(body: bytes) -> CompareRequest:
    """Read what :func:`compare_request_to_arrow` writes. Raises errors of :mod:`perturbscope.errors` for bad input."""
    table, meta = read_stream(body)
    meta = check.mapping(meta, "metadata", optional=(*_META, "pairs", "control"))
    return CompareRequest(
        **_labelled_from(table, meta),
        pairs=check.pairs(meta.get("pairs")),
        control=check.optional_text(meta.get("control"), "control"),
    )


def embed_answer_to_arrow(answer: Embeddings) -> bytes:
    """Columns ``embedding, length, n_detected, known_share``, one row a cell; ``meta`` in the metadata."""
    columns = {
        "embedding": vectors(answer.values),
        "length": pa.array(answer.lengths),
        "n_detected": pa.array(answer.n_detected),
        "known_share": pa.array(answer.known_share),
    }
    return write_stream(columns, check.meta_to_dict(embed_meta(answer), answer.warnings()))


def embed_answer_from_arrow(body: bytes) -> Embeddings:
    """Read what :func:`embed_answer_to_arrow` writes."""
    table, meta = read_stream(body)
    read, _, _ = check.meta_from_dict(meta)
    columns = [plain(table, name) for name in ("length", "n_detected", "known_share")]
    return embeddings_of(read, vectors_from(table).copy(), *columns)


def score_answer_to_arrow(answer: ScoreAnswer) -> bytes:
    """The table, with ``meta`` in the metadata."""
    return _result_to_arrow(answer, SCORE_KINDS)


def score_answer_from_arrow(body: bytes) -> ScoreAnswer:
    """Read what :func:`score_answer_to_arrow` writes."""
    table, metadata = read_stream(body)
    meta, warnings, provenance = check.meta_from_dict(metadata)
    return ScoreAnswer(result=ScoreResult(table_of(table.to_pylist(), SCORE_KINDS), provenance, warnings), meta=meta)


def compare_answer_to_arrow(answer: CompareAnswer) -> bytes:
    """The table, with ``meta`` in the metadata."""
    return _result_to_arrow(answer, COMPARE_KINDS)


def compare_answer_from_arrow(body: bytes) -> CompareAnswer:
    """Read what :func:`compare_answer_to_arrow` writes."""
    table, metadata = read_stream(body)
    meta, warnings, provenance = check.meta_from_dict(metadata)
    return CompareAnswer(
        result=CompareResult(table_of(table.to_pylist(), COMPARE_KINDS), provenance, warnings), meta=meta
    )


def _count_meta(cells: CountMatrix) -> dict[str, Any]:
    return {"gene_ids": cells.gene_ids.tolist(), "first_row": cells.first_row}


def count_columns(cells: CountMatrix) -> dict[str, Any]:
    """The columns of cells; see :func:`counts_from`."""
    indptr = cells.counts.indptr
    kind, offsets = (pa.ListArray, np.int32) if indptr[-1] < 2**31 else (pa.LargeListArray, np.int64)
    starts = pa.array(indptr.astype(offsets))
    return {
        "indices": kind.from_arrays(starts, pa.array(cells.counts.indices)),
        "counts": kind.from_arrays(starts, pa.array(cells.counts.data)),
        "total_counts": pa.array(cells.totals),
    }


def _labelled_columns(request: ScoreRequest | CompareRequest) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if request.cells is not None:
        columns |= count_columns(request.cells)
    elif request.embeddings is not None:
        columns["embedding"] = vectors(request.embeddings)
    columns["perturbation"] = pa.array(request.perturbations, pa.string())
    if request.batches is not None:
        columns["batch"] = pa.array(request.batches, pa.string())
    return columns


def _labelled_meta(request: ScoreRequest | CompareRequest) -> dict[str, Any]:
    about = _count_meta(request.cells) if request.cells is not None else {}
    return {**about, "options": request.options.to_dict(), "model": request.model}


def _labelled_from(table: pa.Table, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that scoring and comparing share, as arguments of their requests."""
    given = "embedding" in table.column_names
    expect_columns(table, (*(["embedding"] if given else COUNTS), "perturbation", "batch"))
    if given and "gene_ids" in meta:
        raise InvalidParameterError("gene_ids are given with embeddings; give cells or embeddings.", field="gene_ids")
    return {
        "embeddings": vectors_from(table) if given else None,
        "cells": None if given else _cells_from(table, meta),
        "perturbations": _labels(table, "perturbation"),
        "batches": _labels(table, "batch") if "batch" in table.column_names else None,
        "options": check.score_options(meta.get("options")),
        "model": check.optional_text(meta.get("model"), "model"),
    }


def _result_to_arrow(answer: ScoreAnswer | CompareAnswer, kinds: Mapping[str, Kind]) -> bytes:
    rows = rows_of(answer.result.table, kinds)
    columns = {name: pa.array([row[name] for row in rows], _ARROW_TYPES[kind]) for name, kind in kinds.items()}
    meta = {**check.meta_to_dict(answer.meta, answer.result.warnings), "provenance": answer.result.provenance}
    return write_stream(columns, meta)


def expect_columns(table: pa.Table | pa.Schema, allowed: tuple[str, ...]) -> None:
    """Raise InvalidParameterError for a column that is unknown, or there twice."""
    names = table.names if isinstance(table, pa.Schema) else table.column_names
    for name in names:
        if name not in allowed or names.count(name) > 1:
            raise InvalidParameterError(
                f"The column {check.shown(name)} is unknown, or there twice; known are {', '.join(allowed)}.",
                field=check.printable(name),
            )


def _column(table: pa.Table, name: str) -> Any:
    """A column as one chunk, without nulls."""
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
    """A column of numbers."""
    column = _column(table, name)
    if not _is_number(column.type):
        raise MalformedMatrixError(f"The column {name!r} has type {column.type}; numbers are needed.", field=name)
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return array


def _ragged(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Starts and values of a column of lists of numbers."""
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
    """The arrays of a matrix, ``indptr, indices, data, totals``, from its columns."""
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
    """Vectors as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def vectors_from(table: pa.Table) -> NDArray[np.float32]:
    """The vectors in the column ``embedding``, as a view."""
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


def _labels(table: pa.Table, name: str) -> tuple[str, ...]:
    """A column of strings; it may be dictionary-encoded, as pandas writes categories."""
    column = _column(table, name)
    codes = None
    if pa.types.is_dictionary(column.type):
        # Decoded by hand: to cast would copy each name once a cell, however long a hostile caller made it.
        column, codes = column.dictionary, column.indices.to_pylist()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InvalidParameterError(f"The column {name!r} has type {column.type}; strings are needed.", field=name)
    names = check.texts(column.to_pylist(), name)
    return names if codes is None else tuple(names[code] for code in codes)
