"""Messages as JSON, which curl sends and reads. NaN and infinity travel as null."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, cast

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, PerturbScopeError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol import checks as check
from perturbscope.protocol.messages import (
    Answer,
    AnyAnswer,
    AnyRequest,
    ModelInfo,
    ModelsAnswer,
    Request,
)
from perturbscope.protocol.tables import (
    embed_meta,
    embeddings_of,
    kinds_of,
    meta_from_dict,
    meta_to_dict,
    result_answer,
    rows_of,
)

_CELLS = ("gene_ids", "indptr", "indices", "data")
_PER_CELL = ("lengths", "n_detected", "known_share")
_PIECE = 16_384
"""Numbers that are encoded at a time, which takes some milliseconds."""


def request_to_json(request: Request) -> bytes:
    """Encode a request as an object with its fields, of `cells` and `embeddings` the one that is given."""
    values = {item.name: getattr(request, item.name) for item in fields(request)}
    return _dump(
        {
            name: _WRITERS[name](value) if name in _WRITERS else value
            for name, value in values.items()
            if value is not None or name not in ("cells", "embeddings")
        }
    )


def request_from_json(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """Decode a request of this kind. Raises errors of :mod:`perturbscope.errors` for bad input."""
    names, required = check.field_names(kind)
    optional = [name for name in names if name not in required]
    data = check.mapping(check.parse_request(body), "body", required=required, optional=optional)
    given = [name for name in names if name in required or data.get(name) is not None]
    return kind(**{name: _READERS[name](data[name], name) for name in given})


def answer_to_json(answer: Answer) -> bytes:
    """Encode an answer.

    Embeddings are ``{"embeddings", "lengths", "n_detected", "known_share", "below_min_genes", "meta"}``, scores and
    comparisons ``{"results": [{column: value}], "meta"}``, models ``{"models": [{"name", ...}]}``, the default first.
    """
    match answer:
        case Embeddings():
            return _embeddings_to_json(answer)
        case ModelsAnswer():
            return _dump({"models": [asdict(model) for model in answer.models]})
        case _:
            result = answer.result
            meta = {**meta_to_dict(answer.meta, result.warnings), "provenance": result.provenance}
            rows = rows_of(result.table, kinds_of(type(answer)))
            return _dump({"results": check.finite(rows), "meta": check.finite(meta)})


def answer_from_json(kind: type[AnyAnswer], body: bytes) -> AnyAnswer:
    """Decode an answer of this kind. Raises errors of :mod:`perturbscope.errors` that name the field."""
    data = check.parse_json(body)
    found: Answer
    if kind is Embeddings:
        found = _embeddings_from(data)
    elif kind is ModelsAnswer:
        found = _models_from(data)
    else:
        data = _require(data, "answer", "results", "meta")
        found = result_answer(kind, data["results"], meta_from_dict(data["meta"]))
    return cast("AnyAnswer", found)


def error_to_json(error: PerturbScopeError) -> bytes:
    """Encode an error as ``{"error": {"code", "message", "field"}}``."""
    return _dump({"error": error.to_dict()})


def _dump(value: Mapping[str, Any] | list[Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _require(value: Any, where: str, *names: str) -> dict[str, Any]:
    """Check that an object of an answer has these keys; it may have others, which a newer server added."""
    if not isinstance(value, dict):
        raise InvalidParameterError(f"{where} must hold an object; got {check.shown(value)}.", field=where)
    for name in names:
        if name not in value:
            raise InvalidParameterError(f"{where} lacks {name!r}.", field=name)
    return value


def _embeddings_to_json(answer: Embeddings) -> bytes:
    rest = _dump(
        {
            "lengths": answer.lengths.tolist(),
            "n_detected": answer.n_detected.tolist(),
            "known_share": check.short_floats(answer.known_share),
            "below_min_genes": answer.below_min_genes.tolist(),
            "meta": check.finite(meta_to_dict(embed_meta(answer), answer.warnings())),
        }
    )
    # Python's encoder lets no other thread run until it is done, and makes an object of every number: so, in pieces.
    step = max(1, _PIECE // max(1, answer.values.shape[1]))
    pieces = (
        _dump(check.short_floats(answer.values[start : start + step]))[1:-1]
        for start in range(0, len(answer.values), step)
    )
    return b'{"embeddings":[' + b",".join(pieces) + b"]," + rest[1:]


def _embeddings_from(value: Any) -> Embeddings:
    data = _require(value, "answer", "embeddings", *_PER_CELL, "meta")
    meta, _, _ = meta_from_dict(data["meta"])
    columns = (check.numbers(data[name], name, InvalidParameterError) for name in _PER_CELL)
    return embeddings_of(meta, check.rows_of_numbers(data["embeddings"]), *columns)


def _models_from(value: Any) -> ModelsAnswer:
    models = _require(value, "answer", "models")["models"]
    if not isinstance(models, list):
        raise InvalidParameterError("models must be a list.", field="models")
    names = [item.name for item in fields(ModelInfo)]
    needed = [item.name for item in fields(ModelInfo) if item.default is MISSING]
    found = []
    for item in models:
        model = _require(item, "models", *needed)
        texts = {name: check.text(model[name], name) for name in names if name != "width" and name in model}
        found.append(ModelInfo(width=check.integer(model["width"], "width"), **texts))
    return ModelsAnswer(models=tuple(found))


def _cells_to_dict(cells: CountMatrix) -> dict[str, Any]:
    return {
        "gene_ids": cells.gene_ids.tolist(),
        "indptr": cells.counts.indptr.tolist(),
        "indices": cells.counts.indices.tolist(),
        "data": cells.counts.data.tolist(),
        "total_counts": cells.totals.tolist(),
        "first_row": cells.first_row,
    }


def _cells_from(value: Any, field: str) -> CountMatrix:
    data = check.mapping(value, field, required=_CELLS, optional=["total_counts", "first_row"])
    totals = data.get("total_counts")
    return check.count_matrix(
        data["gene_ids"],
        check.numbers(data["indptr"], "indptr"),
        check.numbers(data["indices"], "indices"),
        check.numbers(data["data"], "data"),
        totals=None if totals is None else check.numbers(totals, "total_counts"),
        first_row=data.get("first_row", 0),
    )


_WRITERS: Mapping[str, Callable[[Any], Any]] = {
    "cells": _cells_to_dict,
    "embeddings": check.short_floats,
    "options": lambda options: options.to_dict(),
}
_READERS = {**check.READERS, "cells": _cells_from, "embeddings": check.rows_of_numbers}
