"""Messages as protobuf, for gRPC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidEmbeddingError, InvalidInputError, InvalidParameterError, MalformedMatrixError
from perturbscope.inference.embedder import Embeddings
from perturbscope.protocol import checks as check
from perturbscope.protocol.messages import (
    CompareAnswer,
    CompareRequest,
    EmbedRequest,
    Meta,
    ModelInfo,
    ModelsAnswer,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.tables import COMPARE_KINDS, SCORE_KINDS, embed_meta, embeddings_of, rows_of, table_of
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

_COUNT_DTYPES: dict[int, np.dtype[Any]] = {
    pb.COUNT_TYPE_INT32: np.dtype("<i4"),
    pb.COUNT_TYPE_FLOAT32: np.dtype("<f4"),
    pb.COUNT_TYPE_FLOAT64: np.dtype("<f8"),
}


def embed_request_to_proto(request: EmbedRequest) -> pb.EmbedRequest:
    """The protobuf form of a request."""
    return pb.EmbedRequest(cells=_cells_to_proto(request.cells), model=request.model)


def embed_request_from_proto(message: pb.EmbedRequest) -> EmbedRequest:
    """Read a request. Raises errors of :mod:`perturbscope.errors` for bad input."""
    if not message.HasField("cells"):
        raise InvalidParameterError("The request has no cells.", field="cells")
    return EmbedRequest(cells=_cells_from(message.cells), model=_model(message))


def score_request_to_proto(request: ScoreRequest) -> pb.ScoreRequest:
    """The protobuf form of a request."""
    return pb.ScoreRequest(**_labelled_to_proto(request), control=request.control)


def score_request_from_proto(message: pb.ScoreRequest) -> ScoreRequest:
    """Read a request. Raises errors of :mod:`perturbscope.errors` for bad input."""
    return ScoreRequest(**_labelled_from(message), control=check.text(message.control, "control"))


def compare_request_to_proto(request: CompareRequest) -> pb.CompareRequest:
    """The protobuf form of a request."""
    pairs = [pb.Pair(a=a, b=b) for a, b in request.pairs or ()]
    return pb.CompareRequest(**_labelled_to_proto(request), pairs=pairs, control=request.control)


def compare_request_from_proto(message: pb.CompareRequest) -> CompareRequest:
    """Read a request. Raises errors of :mod:`perturbscope.errors` for bad input."""
    return CompareRequest(
        **_labelled_from(message),
        pairs=check.pairs([[pair.a, pair.b] for pair in message.pairs]) or None,
        control=check.text(message.control, "control") if message.HasField("control") else None,
    )


def embed_answer_to_proto(answer: Embeddings) -> pb.EmbedAnswer:
    """The protobuf form of an answer."""
    return pb.EmbedAnswer(
        embeddings=vectors_to_proto(answer.values),
        lengths=answer.lengths,
        n_detected=answer.n_detected,
        known_share=answer.known_share,
        meta=meta_to_proto(embed_meta(answer), answer.warnings()),
    )


def embed_answer_from_proto(message: pb.EmbedAnswer) -> Embeddings:
    """Read an answer."""
    meta, _, _ = meta_from(message.meta)
    return embeddings_of(
        meta,
        vectors_from(message.embeddings).copy(),
        np.fromiter(message.lengths, dtype=np.int64),
        np.fromiter(message.n_detected, dtype=np.int64),
        np.fromiter(message.known_share, dtype=np.float32),
    )


def score_answer_to_proto(answer: ScoreAnswer) -> pb.ScoreAnswer:
    """The protobuf form of an answer."""
    rows = [pb.Score(**row) for row in rows_of(answer.result.table, SCORE_KINDS)]
    return pb.ScoreAnswer(
        results=rows, meta=meta_to_proto(answer.meta, answer.result.warnings, answer.result.provenance)
    )


def score_answer_from_proto(message: pb.ScoreAnswer) -> ScoreAnswer:
    """Read an answer."""
    meta, warnings, provenance = meta_from(message.meta)
    table = table_of(_rows_from(message.results, SCORE_KINDS), SCORE_KINDS)
    return ScoreAnswer(result=ScoreResult(table, provenance, warnings), meta=meta)


def compare_answer_to_proto(answer: CompareAnswer) -> pb.CompareAnswer:
    """The protobuf form of an answer."""
    rows = [pb.Comparison(**row) for row in rows_of(answer.result.table, COMPARE_KINDS)]
    return pb.CompareAnswer(
        results=rows, meta=meta_to_proto(answer.meta, answer.result.warnings, answer.result.provenance)
    )


def compare_answer_from_proto(message: pb.CompareAnswer) -> CompareAnswer:
    """Read an answer."""
    meta, warnings, provenance = meta_from(message.meta)
    table = table_of(_rows_from(message.results, COMPARE_KINDS), COMPARE_KINDS)
    return CompareAnswer(result=CompareResult(table, provenance, warnings), meta=meta)


def models_answer_to_proto(answer: ModelsAnswer) -> pb.ModelsAnswer:
    """The protobuf form of an answer."""
    return pb.ModelsAnswer(models=[pb.Model(**asdict(model)) for model in answer.models])


def models_answer_from_proto(message: pb.ModelsAnswer) -> ModelsAnswer:
    """Read an answer."""
    names = [item.name for item in fields(ModelInfo)]
    return ModelsAnswer(
        models=tuple(ModelInfo(**{name: getattr(model, name) for name in names}) for model in message.models)
    )


def _array(data: bytes, dtype: str | np.dtype[Any], field: str, error: type[InvalidInputError]) -> NDArray[Any]:
    dtype = np.dtype(dtype)
    if len(data) % dtype.itemsize:
        raise error(
            f"{field} has {len(data)} bytes, which is no multiple of the {dtype.itemsize} of one {dtype.name}.",
            field=field,
        )
    return np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)


def _bytes(array: NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _cells_to_proto(cells: CountMatrix) -> pb.CountMatrix:
    return pb.CountMatrix(gene_ids=cells.gene_ids.tolist(), **arrays_to(cells), first_row=cells.first_row)


def _cells_from(message: pb.CountMatrix) -> CountMatrix:
    return check.count_matrix(list(message.gene_ids), **arrays_from(message), first_row=message.first_row)


def arrays_from(message: pb.CountMatrix | pb.CellChunk) -> dict[str, Any]:
    """The arrays of a matrix, ``indptr, indices, data, totals``; what they say is not checked yet."""
    dtype = _COUNT_DTYPES.get(message.data_type)
    if dtype is None:
        raise MalformedMatrixError(
            f"data_type is {message.data_type}; give one of {', '.join(pb.CountType.keys()[1:])}.", field="data_type"
        )
    totals = None
    if message.HasField("total_counts"):
        totals = _array(message.total_counts, "<f8", "total_counts", MalformedMatrixError)
    return {
        "indptr": _array(message.indptr, "<i8", "indptr", MalformedMatrixError),
        "indices": _array(message.indices, "<i4", "indices", MalformedMatrixError),
        "data": _array(message.data, dtype, "data", MalformedMatrixError),
        "totals": totals,
    }


def arrays_to(cells: CountMatrix) -> dict[str, Any]:
    """The fields of a message that hold the counts; see :func:`arrays_from`."""
    return {
        "indptr": _bytes(cells.counts.indptr, "<i8"),
        "indices": _bytes(cells.counts.indices, "<i4"),
        "data": _bytes(cells.counts.data, "<i4"),
        "data_type": pb.COUNT_TYPE_INT32,
        "total_counts": _bytes(cells.totals, "<f8"),
    }


def vectors_to_proto(values: NDArray[np.float32]) -> pb.EmbeddingMatrix:
    """The protobuf form of vectors."""
    return pb.EmbeddingMatrix(values=_bytes(values, "<f4"), width=values.shape[1])


def vectors_from(message: pb.EmbeddingMatrix) -> NDArray[np.float32]:
    """The vectors of a message, as a view. Raises InvalidEmbeddingError."""
    values = _array(message.values, "<f4", "embeddings", InvalidEmbeddingError)
    if not message.width or not len(values) or len(values) % message.width:
        raise InvalidEmbeddingError(
            f"embeddings has {len(values)} numbers, which do not make rows of width {message.width}.",
            field="embeddings",
        )
    return check.embedding_matrix(values.reshape(-1, message.width))


def _model(message: pb.EmbedRequest | pb.ScoreRequest | pb.CompareRequest) -> str | None:
    return check.text(message.model, "model") if message.HasField("model") else None


def _labelled_to_proto(request: ScoreRequest | CompareRequest) -> dict[str, Any]:
    source: dict[str, Any] = {}
    if request.cells is not None:
        source["cells"] = _cells_to_proto(request.cells)
    elif request.embeddings is not None:
        source["embeddings"] = vectors_to_proto(request.embeddings)
    return {
        **source,
        "perturbations": request.perturbations,
        "batches": request.batches,
        "options": pb.ScoreOptions(**request.options.to_dict()),
        "model": request.model,
    }


def _labelled_from(message: pb.ScoreRequest | pb.CompareRequest) -> dict[str, Any]:
    """The parts that scoring and comparing share, as arguments of their requests."""
    source = message.WhichOneof("source")
    return {
        "cells": _cells_from(message.cells) if source == "cells" else None,
        "embeddings": vectors_from(message.embeddings) if source == "embeddings" else None,
        "perturbations": check.texts(list(message.perturbations), "perturbations"),
        "batches": check.texts(list(message.batches), "batches") or None,
        "options": _options_from(message.options),
        "model": _model(message),
    }


def _options_from(message: pb.ScoreOptions) -> ScoreOptions:
    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    if "metrics" in given:
        given["metrics"] = list(message.metrics)
    return check.score_options(given)


def meta_to_proto(meta: Meta, warnings: list[str], provenance: Mapping[str, Any] | None = None) -> pb.Meta:
    """The protobuf form of what made an answer."""
    message = pb.Meta(
        model_id=meta.model_id,
        vocabulary_hash=meta.vocabulary_hash,
        warnings=warnings,
        timings=meta.timings,
        provenance_json=check.dump_json(provenance) if provenance is not None else None,
        variant=meta.variant,
    )
    if meta.coverage is not None:
        message.coverage.CopyFrom(coverage_to_proto(meta.coverage))
    return message


def coverage_to_proto(coverage: GeneCoverage) -> pb.GeneCoverage:
    """The protobuf form of a coverage."""
    values = coverage.to_dict()
    ambiguous = [pb.Pair(a=a, b=b) for a, b in values.pop("ambiguous")]
    return pb.GeneCoverage(ambiguous=ambiguous, **values)


def coverage_from_proto(message: pb.GeneCoverage) -> dict[str, Any]:
    """The JSON form of a coverage."""
    values: dict[str, Any] = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {**values, "ambiguous": [(pair.a, pair.b) for pair in message.ambiguous]}


def meta_from(message: pb.Meta) -> tuple[Meta, list[str], dict[str, Any]]:
    """Meta, warnings and provenance of an answer."""
    values: dict[str, Any] = {
        "warnings": list(message.warnings),
        "timings": dict(message.timings),
    }
    for name in ("model_id", "vocabulary_hash", "variant"):
        if message.HasField(name):
            values[name] = getattr(message, name)
    if message.HasField("provenance_json"):
        values["provenance"] = check.parse_json(message.provenance_json, "provenance")
    if message.HasField("coverage"):
        values["coverage"] = coverage_from_proto(message.coverage)
    return check.meta_from_dict(values)


def _rows_from(rows: Iterable[Any], kinds: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{name: getattr(row, name) for name in kinds} for row in rows]
