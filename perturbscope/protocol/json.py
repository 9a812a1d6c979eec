"""Messages as JSON, which curl sends and reads. NaN and infinity travel as null."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, PerturbScopeError
from perturbscope.inference.embeddings import OutputValues
from perturbscope.protocol import checks as check
from perturbscope.protocol.fields import SILENT, Field, Kind
from perturbscope.protocol.outputs import genes_of, output_of, spec_from_dict, spec_to_dict
from perturbscope.protocol.tables import (
    form_of,
    meta_from_dict,
    meta_to_dict,
    record_to_dict,
    records_of,
    rows_of,
    table_of,
)

T = TypeVar("T")
_CELLS = ("gene_ids", "indptr", "indices", "data")
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_PIECE = 16_384
"""Numbers that are encoded at a time, which takes some milliseconds."""


def request_to_json(request: Any) -> bytes:
    """Encode a request as an object with its fields, of `cells` and `embeddings` the one that is given."""
    return _to_json(request)


def request_from_json(kind: type[T], body: bytes) -> T:
    """Decode a request of this kind. Raises errors of :mod:`perturbscope.errors` for bad input."""
    form = form_of(kind)
    optional = [name for name in form.names if name not in form.required]
    data = check.mapping(check.parse_request(body), "body", required=form.required, optional=optional)
    given = (item for item in form.fields if item.required or data.get(item.name) is not None)
    made: T = form.make(**{item.name: _read(data[item.name], item) for item in given})
    return made


def answer_to_json(answer: Any) -> bytes:
    """Encode an answer as an object with its fields.

    Embeddings are ``{"embeddings", "lengths", "n_detected", "known_share", "below_min_genes", "meta"}``, scores and
    comparisons ``{"results": [{column: value}], "meta"}``, models ``{"models": [{"name", ...}]}``, the default first.
    """
    return _to_json(answer)


def answer_from_json(kind: type[T], body: bytes) -> T:
    """Decode an answer of this kind. Raises errors of :mod:`perturbscope.errors` that name the field."""
    form = form_of(kind)
    data = _require(check.parse_json(body), "answer", *form.required)
    found: dict[str, Any] = {}
    for item in form.fields:
        if not item.derived and (item.required or data.get(item.name) is not None):
            whole = item.kind == "outputs"
            found[item.name] = _outputs_from(data[item.name], found) if whole else _read(data[item.name], item)
    made: T = form.make(**found)
    return made


def error_to_json(error: PerturbScopeError) -> bytes:
    """Encode an error as ``{"error": {"code", "message", "field"}}``."""
    return _dump({"error": error.to_dict()})


def _to_json(message: Any) -> bytes:
    form = form_of(type(message))
    values = form.take(message)
    return b"{" + b",".join(_pairs(form.fields, values)) + b"}"


def _pairs(fields: tuple[Field, ...], values: Mapping[str, Any]) -> Iterator[bytes]:
    for item in fields:
        value = values[item.name]
        if value is None and item.kind in SILENT:
            continue
        name = f'"{item.name}":'.encode()
        if value is None:
            yield name + b"null"
        elif item.kind == "vectors":
            yield name + _vectors_to_json(value)
        elif item.kind == "outputs":
            yield name + b"{" + b",".join(map(_output_to_json, value.values())) + b"}"
        else:
            yield name + _dump(_WRITERS[item.kind](value, item) if item.kind in _WRITERS else value)


def _dump(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def _require(value: Any, where: str, *names: str) -> dict[str, Any]:
    """Check that an object of an answer has these keys; it may have others, which a newer server added."""
    if not isinstance(value, dict):
        raise InvalidParameterError(f"{where} must hold an object; got {check.shown(value)}.", field=where)
    for name in names:
        if name not in value:
            raise InvalidParameterError(f"{where} lacks {name!r}.", field=name)
    return value


def _vectors_to_json(values: NDArray[np.float32]) -> bytes:
    # Python's encoder lets no other thread run until it is done, and makes an object of every number: so, in pieces.
    step = max(1, _PIECE // max(1, values.shape[1]))
    pieces = (_dump(check.short_floats(values[start : start + step]))[1:-1] for start in range(0, len(values), step))
    return b"[" + b",".join(pieces) + b"]"


def _output_to_json(output: OutputValues) -> bytes:
    """Encode one output as ``"name": {"per", "width", "meaning", "names", "values"}``; per token with ``gene_ids``."""
    said = spec_to_dict(output.spec)
    head = _dump(said.pop("name")) + b":" + _dump(said)[:-1] + b',"values":'
    if output.offsets is None:
        return head + _vectors_to_json(output.values) + b"}"
    cells = [slice(int(start), int(stop)) for start, stop in pairwise(output.offsets)]
    values = b",".join(_vectors_to_json(output.values[rows]) for rows in cells)
    genes, codes = genes_of(output)
    spelled = list(map(_dump, genes))
    ids = b",".join(b"[" + b",".join(spelled[code] for code in codes[rows]) + b"]" for rows in cells)
    return head + b"[" + values + b'],"gene_ids":[' + ids + b"]}"


def _outputs_from(value: Any, found: Mapping[str, Any]) -> dict[str, OutputValues]:
    n_cells = len(found["embeddings"])
    if not isinstance(value, dict):
        raise InvalidParameterError(f"outputs must be an object; got {check.shown(value)}.", field="outputs")
    return {name: _output_from(name, item, n_cells) for name, item in value.items()}


def _output_from(name: str, value: Any, n_cells: int) -> OutputValues:
    value = _require(value, "outputs", "per", "width", "meaning", "values")
    spec = spec_from_dict({**value, "name": name})
    rows = value["values"]
    if spec.per == "cell":
        return output_of(spec, check.rows_of_numbers(rows, "outputs"), n_cells)
    genes = _require(value, "outputs", "gene_ids")["gene_ids"]
    for part in (rows, genes):
        if not isinstance(part, list) or not all(isinstance(each, list) for each in part):
            raise InvalidParameterError(f"The output {name!r} must have one list a cell.", field="outputs")
    lengths = list(map(len, genes))
    if lengths != list(map(len, rows)):
        raise InvalidParameterError(f"The output {name!r} must have one row for each gene of a cell.", field="outputs")
    ids = check.texts(list(chain.from_iterable(genes)), "gene_ids")
    places = {gene: place for place, gene in enumerate(dict.fromkeys(ids))}
    values = check.rows_of_numbers(list(chain.from_iterable(rows)), "outputs") if ids else np.zeros((0, spec.width))
    return output_of(
        spec,
        values,
        n_cells,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        genes=np.array([places[gene] for gene in ids], dtype=np.int32),
        gene_names=tuple(places),
    )


def _read(value: Any, item: Field) -> Any:
    read = _READERS.get(item.kind)
    return check.READERS[item.kind](value, item.name) if read is None else read(value, item)


def _cells_to_dict(cells: CountMatrix, _: Field) -> dict[str, Any]:
    return {
        "gene_ids": cells.gene_ids.tolist(),
        "indptr": cells.counts.indptr.tolist(),
        "indices": cells.counts.indices.tolist(),
        "data": cells.counts.data.tolist(),
        "total_counts": cells.totals.tolist(),
        "first_row": cells.first_row,
    }


def _cells_from(value: Any, item: Field) -> CountMatrix:
    data = check.mapping(value, item.name, required=_CELLS, optional=["total_counts", "first_row"])
    totals = data.get("total_counts")
    return check.count_matrix(
        data["gene_ids"],
        check.numbers(data["indptr"], "indptr"),
        check.numbers(data["indices"], "indices"),
        check.numbers(data["data"], "data"),
        totals=None if totals is None else check.numbers(totals, "total_counts"),
        first_row=data.get("first_row", 0),
    )


def _numbers_to_list(values: NDArray[Any], item: Field) -> list[Any]:
    found: list[Any] = check.short_floats(values) if values.dtype == np.float32 else values.tolist()
    if values.dtype.kind == "f" and not item.finite:
        found = check.finite(found)
    return found


def _numbers_from(value: Any, item: Field) -> NDArray[Any]:
    if item.dtype.kind == "f" and isinstance(value, list):
        value = [np.nan if number is None else number for number in value]
    if item.dtype.kind == "b":
        if not isinstance(value, list) or not set(map(type, value)) <= {bool}:
            raise InvalidParameterError(f"{item.name} must be a list of true and false.", field=item.name)
        return np.array(value, dtype=np.bool_)
    return check.numbers_as(check.numbers(value, item.name, InvalidParameterError), item.name, item.dtype)


def _records_from(value: Any, item: Field) -> tuple[Any, ...]:
    return records_of(item.record, value, item.name)


_WRITERS: Mapping[Kind, Callable[[Any, Field], Any]] = {
    "cells": _cells_to_dict,
    "numbers": _numbers_to_list,
    "options": lambda options, _: options.to_dict(),
    "meta": lambda meta, _: check.finite(meta_to_dict(meta)),
    "table": lambda table, item: check.finite(rows_of(table, item.columns)),
    "records": lambda rows, _: list(map(record_to_dict, rows)),
}
_READERS: Mapping[Kind, Callable[[Any, Field], Any]] = {
    "cells": _cells_from,
    "vectors": lambda value, item: check.rows_of_numbers(value, item.name),
    "numbers": _numbers_from,
    "meta": lambda value, _: meta_from_dict(value),
    "table": lambda value, item: table_of(value, item.columns),
    "records": _records_from,
}
