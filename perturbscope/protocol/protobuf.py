"""Messages as protobuf, for gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidEmbeddingError, InvalidInputError, InvalidParameterError, MalformedMatrixError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol import checks as check
from perturbscope.protocol.messages import (
    Answer,
    AnyAnswer,
    AnyRequest,
    Meta,
    ModelInfo,
    ModelsAnswer,
    Request,
    ScoreAnswer,
)
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.tables import embed_meta, embeddings_of, kinds_of, meta_from_dict, result_answer, rows_of
from perturbscope.scoring.results import ScoreOptions

_COUNT_DTYPES: dict[int, np.dtype[Any]] = {
    pb.COUNT_TYPE_INT32: np.dtype("<i4"),
    pb.COUNT_TYPE_FLOAT32: np.dtype("<f4"),
    pb.COUNT_TYPE_FLOAT64: np.dtype("<f8"),
}


def request_to_proto(request: Request) -> Any:
    """Encode a request as the message of its name; None leaves a field absent."""
    values = {item.name: getattr(request, item.name) for item in fields(request)}
    for name, write in _WRITERS.items():
        if values.get(name) is not None:
            values[name] = write(values[name])
    return getattr(pb, type(request).__name__)(**values)


def request_from_proto(kind: type[AnyRequest], message: Any) -> AnyRequest:
    """Decode a request of this kind. Raises errors of :mod:`perturbscope.errors` for bad input.

    An absent field has its default, and so has an empty list; a required field must be present.
    """
    names, required = check.field_names(kind)
    found = {}
    for name in names:
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        value = getattr(message, name)
        present = message.HasField(name) if descriptor.has_presence else len(value) > 0
        if name == "cells" and name in required and not present:
            raise InvalidParameterError("The request has no cells.", field=name)
        if present or name in required:
            found[name] = _READERS[name](value, name) if name in _READERS else check.READERS[name](value, name)
    return kind(**found)


def answer_to_proto(answer: Answer) -> Any:
    """Encode an answer."""
    match answer:
        case Embeddings():
            return pb.EmbedAnswer(
                embeddings=vectors_to_proto(answer.values),
                lengths=answer.lengths,
                n_detected=answer.n_detected,
                known_share=answer.known_share,
                meta=meta_to_proto(embed_meta(answer), answer.warnings()),
            )
        case ModelsAnswer():
            return pb.ModelsAnswer(models=[pb.Model(**asdict(model)) for model in answer.models])
        case _:
            result = answer.result
            rows: Any = rows_of(result.table, kinds_of(type(answer)))
            meta = meta_to_proto(answer.meta, result.warnings, result.provenance)
            if isinstance(answer, ScoreAnswer):
                return pb.ScoreAnswer(results=[pb.Score(**row) for row in rows], meta=meta)
            return pb.CompareAnswer(results=[pb.Comparison(**row) for row in rows], meta=meta)


def answer_from_proto(kind: type[AnyAnswer], message: Any) -> AnyAnswer:
    """Decode an answer of this kind. Raises errors of :mod:`perturbscope.errors` that name the field."""
    found: Answer
    if kind is ModelsAnswer:
        names = [item.name for item in fields(ModelInfo)]
        models = (ModelInfo(**{name: getattr(model, name) for name in names}) for model in message.models)
        found = ModelsAnswer(models=tuple(models))
    elif kind is Embeddings:
        found = embeddings_of(
            meta_from(message.meta)[0],
            vectors_from(message.embeddings).copy(),
            np.fromiter(message.lengths, dtype=np.int64),
            np.fromiter(message.n_detected, dtype=np.int64),
            np.fromiter(message.known_share, dtype=np.float32),
        )
    else:
        rows = [{name: getattr(row, name) for name in kinds_of(kind)} for row in message.results]
        found = result_answer(kind, rows, meta_from(message.meta))
    return cast("AnyAnswer", found)


def _array(data: bytes, dtype: str | np.dtype[Any], field: str, error: type[InvalidInputError]) -> NDArray[Any]:
    dtype = np.dtype(dtype)
    if len(data) % dtype.itemsize:
        raise error(
            f"{field} has {len(data)} bytes, which is not a multiple of the {dtype.itemsize} of one {dtype.name}.",
            field=field,
        )
    return np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)


def _bytes(array: NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _cells_to_proto(cells: CountMatrix) -> pb.CountMatrix:
    return pb.CountMatrix(gene_ids=cells.gene_ids.tolist(), **arrays_to(cells), first_row=cells.first_row)


def _cells_from(message: pb.CountMatrix, field: str) -> CountMatrix:
    return check.count_matrix(list(message.gene_ids), **arrays_from(message), first_row=message.first_row)


def arrays_from(message: pb.CountMatrix | pb.CellChunk) -> dict[str, Any]:
    """Return the arrays of a matrix, ``indptr, indices, data, totals``; their values are not checked yet."""
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
    """Return the fields of a message that hold the counts; :func:`arrays_from` reads them."""
    return {
        "indptr": _bytes(cells.counts.indptr, "<i8"),
        "indices": _bytes(cells.counts.indices, "<i4"),
        "data": _bytes(cells.counts.data, "<i4"),
        "data_type": pb.COUNT_TYPE_INT32,
        "total_counts": _bytes(cells.totals, "<f8"),
    }


def vectors_to_proto(values: NDArray[np.float32]) -> pb.EmbeddingMatrix:
    """Encode vectors."""
    return pb.EmbeddingMatrix(values=_bytes(values, "<f4"), width=values.shape[1])


def vectors_from(message: pb.EmbeddingMatrix) -> NDArray[np.float32]:
    """Return the vectors of a message, as a view. Raises InvalidEmbeddingError."""
    values = _array(message.values, "<f4", "embeddings", InvalidEmbeddingError)
    if not message.width or not len(values) or len(values) % message.width:
        raise InvalidEmbeddingError(
            f"embeddings has {len(values)} numbers, which do not make rows of width {message.width}.",
            field="embeddings",
        )
    return check.embedding_matrix(values.reshape(-1, message.width))


def _options_from(message: pb.ScoreOptions, field: str) -> ScoreOptions:
    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    if "metrics" in given:
        given["metrics"] = list(message.metrics)
    return check.score_options(given, field)


def meta_to_proto(meta: Meta, warnings: list[str], provenance: Mapping[str, Any] | None = None) -> pb.Meta:
    """Encode the meta of an answer with its warnings and its provenance."""
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
    """Encode a coverage."""
    values = coverage.to_dict()
    ambiguous = [pb.Pair(a=a, b=b) for a, b in values.pop("ambiguous")]
    return pb.GeneCoverage(ambiguous=ambiguous, **values)


def coverage_from_proto(message: pb.GeneCoverage) -> dict[str, Any]:
    """Return the JSON form of a coverage."""
    values: dict[str, Any] = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {**values, "ambiguous": [(pair.a, pair.b) for pair in message.ambiguous]}


def meta_from(message: pb.Meta) -> tuple[Meta, list[str], dict[str, Any]]:
    """Return the meta, warnings and provenance of an answer."""
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
    return meta_from_dict(values)


_WRITERS: Mapping[str, Any] = {
    "cells": _cells_to_proto,
    "embeddings": vectors_to_proto,
    "pairs": lambda pairs: [pb.Pair(a=a, b=b) for a, b in pairs],
    "options": lambda options: pb.ScoreOptions(**options.to_dict()),
}
_READERS: Mapping[str, Any] = {
    "cells": _cells_from,
    "embeddings": lambda matrix, _: vectors_from(matrix),
    "perturbations": lambda labels, name: check.texts(list(labels), name),
    "batches": lambda labels, name: check.texts(list(labels), name),
    "pairs": lambda pairs, name: check.pairs([[pair.a, pair.b] for pair in pairs], name),
    "options": _options_from,
}
