"""Messages as JSON: what curl sends and reads. NaN and infinity travel as null."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, PerturbScopeError
from perturbscope.inference.embedder import Embeddings
from perturbscope.protocol import checks as check
from perturbscope.protocol.messages import (
    CompareAnswer,
    CompareRequest,
    EmbedRequest,
    ModelInfo,
    ModelsAnswer,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.protocol.tables import COMPARE_KINDS, SCORE_KINDS, embed_meta, embeddings_of, rows_of, table_of
from perturbscope.scoring.results import CompareResult, ScoreResult

_CELLS = ("gene_ids", "indptr", "indices", "data")
_PER_CELL = ("lengths", "n_detected", "known_share")
_PIECE = 16_384
"""Numbers that are encoded at a time: some milliseconds."""
_LABELLED = ("cells", "embeddings", "batches", "options", "model")


def embed_request_to_json(request: EmbedRequest) -> bytes:
    """``{"cells", "model"}``."""
    return _dump({"cells": _cells_to_dict(request.cells), "model": request.model})


def embed_request_from_json(body: bytes) -> EmbedRequest:
    """Read what :func:`embed_request_to_json` writes. Raises errors of :mod:`perturbscope.errors` for bad input."""
    data = check.mapping(check.parse_request(body), "body", required=["cells"], optional=["model"])
    return EmbedRequest(
        cells=_cells_from(data["cells"]),
        model=check.optional_text(data.get("model"), "model"),
    )


def score_request_to_json(request: ScoreRequest) -> bytes:
    """``{"cells" | "embeddings", "perturbations", "control", "batches", "options", "model"}``."""
    return _dump({**_labelled_to_dict(request), "control": request.control})


def score_request_from_json(body: bytes) -> ScoreRequest:
    """Read what :func:`score_request_to_json` writes. Raises errors of :mod:`perturbscope.errors` for bad input."""
    data = check.mapping(check.parse_request(body), "body", required=["perturbations", "control"], optional=_LABELLED)
    return ScoreRequest(**_labelled_from(data), control=check.text(data["control"], "control"))


def compare_request_to_json(request: CompareRequest) -> bytes:
    """``{"cells" | "embeddings", "perturbations", "pairs", "control", "batches", "options", "model"}``."""
    return _dump({**_labelled_to_dict(request), "pairs": request.pairs, "control": request.control})


def compare_request_from_json(body: bytes) -> CompareRequest:
    """Read what :func:`compare_request_to_json` writes. Raises errors of :mod:`perturbscope.errors` for bad input."""
    data = check.mapping(
        check.parse_request(body), "body", required=["perturbations"], optional=(*_LABELLED, "pairs", "control")
    )
    return CompareRequest(
        **_labelled_from(data),
        pairs=check.pairs(data.get("pairs")),
        control=check.optional_text(data.get("control"), "control"),
    )


def embed_answer_to_json(answer: Embeddings) -> bytes:
    """``{"embeddings", "lengths", "n_detected", "known_share", "below_min_genes", "meta"}``."""
    rest = _dump(
        {
            "lengths": answer.lengths.tolist(),
            "n_detected": answer.n_detected.tolist(),
            "known_share": check.short_floats(answer.known_share),
            "below_min_genes": answer.below_min_genes.tolist(),
            "meta": check.finite(check.meta_to_dict(embed_meta(answer), answer.warnings())),
        }
    )
    # Python's encoder lets no other thread run until it is done, and makes an object of every number: so, in pieces.
    step = max(1, _PIECE // max(1, answer.values.shape[1]))
    pieces = (
        _dump(check.short_floats(answer.values[start : start + step]))[1:-1]
        for start in range(0, len(answer.values), step)
    )
    return b'{"embeddings":[' + b",".join(pieces) + b"]," + rest[1:]


def embed_answer_from_json(body: bytes) -> Embeddings:
    """Read what :func:`embed_answer_to_json` writes."""
    data = _answer(body, "embeddings", *_PER_CELL, "meta")
    meta, _, _ = check.meta_from_dict(data["meta"])
    columns = (check.numbers(data[name], name, InvalidParameterError) for name in _PER_CELL)
    return embeddings_of(meta, check.rows_of_numbers(data["embeddings"]), *columns)


def score_answer_to_json(answer: ScoreAnswer) -> bytes:
    """``{"results": [{column: value}], "meta"}``."""
    return _result_to_json(answer, SCORE_KINDS)


def score_answer_from_json(body: bytes) -> ScoreAnswer:
    """Read what :func:`score_answer_to_json` writes."""
    data = _answer(body, "results", "meta")
    meta, warnings, provenance = check.meta_from_dict(data["meta"])
    return ScoreAnswer(result=ScoreResult(table_of(data["results"], SCORE_KINDS), provenance, warnings), meta=meta)


def compare_answer_to_json(answer: CompareAnswer) -> bytes:
    """``{"results": [{column: value}], "meta"}``."""
    return _result_to_json(answer, COMPARE_KINDS)


def compare_answer_from_json(body: bytes) -> CompareAnswer:
    """Read what :func:`compare_answer_to_json` writes."""
    data = _answer(body, "results", "meta")
    meta, warnings, provenance = check.meta_from_dict(data["meta"])
    return CompareAnswer(
        result=CompareResult(table_of(data["results"], COMPARE_KINDS), provenance, warnings), meta=meta
    )


def models_answer_to_json(answer: ModelsAnswer) -> bytes:
    """``{"models": [{"name", "model_id", ...}]}``; the first is the default."""
    return _dump({"models": [asdict(model) for model in answer.models]})


def models_answer_from_json(body: bytes) -> ModelsAnswer:
    """Read what :func:`models_answer_to_json` writes."""
    models = _answer(body, "models")["models"]
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


def error_to_json(error: PerturbScopeError) -> bytes:
    """``{"error": {"code", "message", "field"}}``."""
    return _dump({"error": error.to_dict()})


def _dump(value: Mapping[str, Any] | list[Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _require(value: Any, where: str, *names: str) -> dict[str, Any]:
    """An object of an answer: it may hold more than this version knows."""
    if not isinstance(value, dict):
        raise InvalidParameterError(f"{where} must hold an object; got {check.shown(value)}.", field=where)
    for name in names:
        if name not in value:
            raise InvalidParameterError(f"{where} lacks {name!r}.", field=name)
    return value


def _answer(body: bytes, *names: str) -> dict[str, Any]:
    return _require(check.parse_json(body), "answer", *names)


def _cells_to_dict(cells: CountMatrix) -> dict[str, Any]:
    return {
        "gene_ids": cells.gene_ids.tolist(),
        "indptr": cells.counts.indptr.tolist(),
        "indices": cells.counts.indices.tolist(),
        "data": cells.counts.data.tolist(),
        "total_counts": cells.totals.tolist(),
        "first_row": cells.first_row,
    }


def _cells_from(value: Any) -> CountMatrix:
    data = check.mapping(value, "cells", required=_CELLS, optional=["total_counts", "first_row"])
    totals = data.get("total_counts")
    return check.count_matrix(
        data["gene_ids"],
        check.numbers(data["indptr"], "indptr"),
        check.numbers(data["indices"], "indices"),
        check.numbers(data["data"], "data"),
        totals=None if totals is None else check.numbers(totals, "total_counts"),
        first_row=data.get("first_row", 0),
    )


def _labelled_to_dict(request: ScoreRequest | CompareRequest) -> dict[str, Any]:
    if request.cells is not None:
        source: dict[str, Any] = {"cells": _cells_to_dict(request.cells)}
    else:
        source = {"embeddings": None if request.embeddings is None else check.short_floats(request.embeddings)}
    return {
        **source,
        "perturbations": request.perturbations,
        "batches": request.batches,
        "options": request.options.to_dict(),
        "model": request.model,
    }


def _labelled_from(data: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that scoring and comparing share, as arguments of their requests."""
    cells, embeddings = data.get("cells"), data.get("embeddings")
    return {
        "cells": None if cells is None else _cells_from(cells),
        "embeddings": None if embeddings is None else check.rows_of_numbers(embeddings),
        "perturbations": check.texts(data["perturbations"], "perturbations"),
        "batches": check.optional_texts(data.get("batches"), "batches"),
        "options": check.score_options(data.get("options")),
        "model": check.optional_text(data.get("model"), "model"),
    }


def _result_to_json(answer: ScoreAnswer | CompareAnswer, kinds: Mapping[str, Any]) -> bytes:
    result = answer.result
    meta = {**check.meta_to_dict(answer.meta, result.warnings), "provenance": result.provenance}
    return _dump({"results": check.finite(rows_of(result.table, kinds)), "meta": check.finite(meta)})
