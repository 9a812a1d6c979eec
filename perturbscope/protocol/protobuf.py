"""Messages as protobuf, for gRPC."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message_factory import GetMessageClass
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidEmbeddingError, InvalidInputError, InvalidParameterError, MalformedMatrixError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import OutputValues
from perturbscope.protocol import checks as check
from perturbscope.protocol.descriptors import file_of
from perturbscope.protocol.fields import Field, Form, Kind, Meta
from perturbscope.protocol.operations import OPERATIONS
from perturbscope.protocol.outputs import genes_of, output_of, spec_from_dict
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.tables import form_of, meta_from_dict, record_of, record_to_dict, rows_of, table_of
from perturbscope.scoring.results import ScoreOptions

T = TypeVar("T")
_COUNT_DTYPES: dict[int, np.dtype[Any]] = {
    pb.COUNT_TYPE_INT32: np.dtype("<i4"),
    pb.COUNT_TYPE_FLOAT32: np.dtype("<f4"),
    pb.COUNT_TYPE_FLOAT64: np.dtype("<f8"),
}


def request_to_proto(request: Any) -> Any:
    """Encode a request as the message of its name; None leaves a field absent."""
    return _to_proto(request)


def request_from_proto(kind: type[T], message: Any) -> T:
    """Decode a request of this kind. Raises errors of :mod:`perturbscope.errors` for bad input.

    An absent field has its default, and so has an empty list; a required field must be present.
    """
    found: T = _from_proto(form_of(kind), message, "request")
    return found


def answer_to_proto(answer: Any) -> Any:
    """Encode an answer."""
    return _to_proto(answer)


def answer_from_proto(kind: type[T], message: Any) -> T:
    """Decode an answer of this kind. Raises errors of :mod:`perturbscope.errors` that name the field."""
    found: T = _from_proto(form_of(kind), message, "answer")
    return found


@functools.cache
def message_class(form: Form) -> Any:
    """Return the class of the message of a form: a generated one, or one made from the dataclass."""
    if form.name in pb.DESCRIPTOR.message_types_by_name:
        return getattr(pb, form.name)
    operation = next(each for each in OPERATIONS.values() if form in (each.takes, each.gives))
    return GetMessageClass(file_of(operation).message_types_by_name[form.name])


def _to_proto(message: Any) -> Any:
    form = form_of(type(message))
    values = form.take(message)
    made = message_class(form)
    return made(
        **{
            _place(item, value): _WRITERS[item.kind](value, item, made) if item.kind in _WRITERS else value
            for item in form.fields
            if not item.derived and (value := values[item.name]) is not None
        }
    )


def _from_proto(form: Form, message: Any, what: str) -> Any:
    found: dict[str, Any] = {}
    for item in form.fields:
        if item.derived:
            continue
        if item.kind == "names" and (several := getattr(message, _several(item))):
            found[item.name] = _names_from(getattr(message, item.name), several, item)
            continue
        value = getattr(message, item.name)
        has_presence = message.DESCRIPTOR.fields_by_name[item.name].has_presence
        present = message.HasField(item.name) if has_presence else item.required or len(value) > 0
        if item.kind == "cells" and item.required and not present:
            raise InvalidParameterError(f"The {what} has no cells.", field=item.name)
        if present or item.required:
            if item.kind == "outputs":
                found[item.name] = outputs_from_proto(value, len(found["embeddings"]))
                continue
            found[item.name] = _read(value, item)
            if item.kind == "vectors" and what == "answer":
                found[item.name] = found[item.name].copy()  # a view of the message cannot be written to
    return form.make(**found)


def _several(item: Field) -> str:
    """Return the name of the field for several strings, beside that for one."""
    return f"{item.name}s"


def _place(item: Field, value: Any) -> str:
    return _several(item) if item.kind == "names" and not isinstance(value, str) else item.name


def _names_from(one: str, several: Iterable[str], item: Field) -> Any:
    if one:
        raise InvalidParameterError(f"Both of {item.name} and {_several(item)} are given; give one.", field=item.name)
    return check.names(list(several), item.name)


def _read(value: Any, item: Field) -> Any:
    read = _READERS.get(item.kind)
    return check.READERS[item.kind](value, item.name) if read is None else read(value, item)


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


def _cells_to_proto(cells: CountMatrix, *_: Any) -> pb.CountMatrix:
    return pb.CountMatrix(gene_ids=cells.gene_ids.tolist(), **arrays_to(cells), first_row=cells.first_row)


def _cells_from(message: pb.CountMatrix, _: Field) -> CountMatrix:
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


def _options_from(message: pb.ScoreOptions, item: Field) -> ScoreOptions:
    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    for name in ("metrics", "missing_labels"):
        if name in given:
            given[name] = list(given[name])
    return check.score_options(given, item.name)


def meta_to_proto(meta: Meta) -> pb.Meta:
    """Encode the meta of an answer."""
    message = pb.Meta(
        model_id=meta.model_id,
        vocabulary_hash=meta.vocabulary_hash,
        warnings=meta.warnings,
        timings=meta.timings,
        provenance_json=check.dump_json(meta.provenance) if meta.provenance is not None else None,
        variant=meta.variant,
    )
    if meta.coverage is not None:
        message.coverage.CopyFrom(coverage_to_proto(meta.coverage))
    return message


def coverage_to_proto(coverage: GeneCoverage) -> pb.GeneCoverage:
    """Encode a coverage."""
    values = coverage.to_dict()
    ambiguous = [pb.Pair(a=a, b=b) for a, b in values.pop("ambiguous")]
    values.pop("left_out", None)  # of files that a server reads, which come over HTTP alone
    return pb.GeneCoverage(ambiguous=ambiguous, **values)


def coverage_from_proto(message: pb.GeneCoverage) -> dict[str, Any]:
    """Return the JSON form of a coverage."""
    values: dict[str, Any] = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {**values, "ambiguous": [(pair.a, pair.b) for pair in message.ambiguous]}


def meta_from(message: pb.Meta) -> Meta:
    """Return the meta of an answer."""
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


def _rows(made: Any, item: Field) -> Any:
    """Return the class of the rows in a repeated field of a message class."""
    return GetMessageClass(made.DESCRIPTOR.fields_by_name[item.name].message_type)


def _table_to_proto(table: Any, item: Field, made: Any) -> list[Any]:
    row = _rows(made, item)
    return [row(**values) for values in rows_of(table, item.columns)]


def _records_to_proto(records: tuple[Any, ...], item: Field, made: Any) -> list[Any]:
    row = _rows(made, item)
    return [row(**record_to_dict(record)) for record in records]


def _table_from(rows: Any, item: Field) -> Any:
    optional = {name for row in rows[:1] for name in item.columns if row.DESCRIPTOR.fields_by_name[name].has_presence}
    return table_of(
        [
            {name: getattr(row, name) for name in item.columns if name not in optional or row.HasField(name)}
            for row in rows
        ],
        item.columns,
    )


def _records_from(rows: Any, item: Field) -> tuple[Any, ...]:
    return tuple(record_of(item.record, _record_values(row, item.record)) for row in rows)


def _record_values(row: Any, record: type[Any]) -> dict[str, Any]:
    """Return the values of one row; an empty list of a field with a default is an absent one."""
    values: dict[str, Any] = {}
    for field in form_of(record).fields:
        value = getattr(row, field.name)
        if field.kind == "records":
            value = [_record_values(inner, field.record) for inner in value]
        elif field.kind == "texts":
            value = list(value)
        if value != [] or field.required:
            values[field.name] = value
    return values


def _numbers_from(values: Any, item: Field) -> NDArray[Any]:
    wide = {"f": np.float64, "b": np.bool_}.get(item.dtype.kind, np.int64)
    return check.numbers_as(np.fromiter(values, dtype=wide, count=len(values)), item.name, item.dtype)


def spec_to_proto(spec: OutputSpec) -> pb.Output:
    """Encode the description of an output."""
    return pb.Output(name=spec.name, per=spec.per, width=spec.width, meaning=spec.meaning, names=spec.names or ())


def spec_from_proto(message: pb.Output) -> OutputSpec:
    """Decode the description of an output. Raises InvalidParameterError."""
    said = {name: getattr(message, name) for name in ("name", "per", "width", "meaning")}
    return spec_from_dict({**said, "names": list(message.names)})


def outputs_to_proto(outputs: Mapping[str, OutputValues]) -> list[pb.NamedOutput]:
    """Encode outputs beside the cell embedding."""
    found = []
    for output in outputs.values():
        message = pb.NamedOutput(output=spec_to_proto(output.spec), values=_bytes(output.values, "<f4"))
        if output.offsets is not None:
            names, codes = genes_of(output)
            message.offsets, message.genes = _bytes(output.offsets, "<i8"), _bytes(codes, "<i4")
            message.gene_ids.extend(names)
        found.append(message)
    return found


def outputs_from_proto(messages: Iterable[pb.NamedOutput], n_cells: int) -> dict[str, OutputValues]:
    """Decode outputs beside the cell embedding. Raises errors of :mod:`perturbscope.errors`."""
    found = {}
    for message in messages:
        spec = spec_from_proto(message.output)
        values = _array(message.values, "<f4", "outputs", InvalidEmbeddingError)
        offsets = genes = None
        if message.HasField("offsets"):
            offsets = _array(message.offsets, "<i8", "outputs", InvalidParameterError)
            genes = _array(message.genes, "<i4", "outputs", InvalidParameterError).copy()
        if len(values) % spec.width:
            raise InvalidEmbeddingError(f"The output {spec.name!r} has no rows of {spec.width}.", field="outputs")
        found[spec.name] = output_of(
            spec,
            values.reshape(-1, spec.width).copy(),
            n_cells,
            offsets=offsets,
            genes=genes,
            gene_names=check.texts(list(message.gene_ids), "gene_ids"),
        )
    return found


_WRITERS: Mapping[Kind, Callable[[Any, Field, Any], Any]] = {
    "cells": _cells_to_proto,
    "vectors": lambda values, *_: vectors_to_proto(values),
    "pairs": lambda pairs, *_: [pb.Pair(a=a, b=b) for a, b in pairs],
    "options": lambda options, *_: pb.ScoreOptions(**options.to_dict()),
    "meta": lambda meta, *_: meta_to_proto(meta),
    "table": _table_to_proto,
    "records": _records_to_proto,
    "outputs": lambda outputs, *_: outputs_to_proto(outputs),
}
_READERS: Mapping[Kind, Callable[[Any, Field], Any]] = {
    "cells": _cells_from,
    "vectors": lambda matrix, _: vectors_from(matrix),
    "numbers": _numbers_from,
    "labels": lambda labels, item: check.texts(list(labels), item.name),
    "texts": lambda texts, item: check.texts(list(texts), item.name),
    "pairs": lambda pairs, item: check.pairs([[pair.a, pair.b] for pair in pairs], item.name),
    "options": _options_from,
    "meta": lambda meta, _: meta_from(meta),
    "table": _table_from,
    "records": _records_from,
}
