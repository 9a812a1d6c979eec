"""Nothing that comes in over the wire may end in anything but an error of the tree."""

from __future__ import annotations

import json
import struct
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import (
    DuplicateGenesError,
    EmptyCellError,
    InvalidEmbeddingError,
    InvalidInputError,
    InvalidParameterError,
    MalformedMatrixError,
    NotRawCountsError,
    UnreadableFileError,
)
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb

CELLS: dict[str, Any] = {"gene_ids": ["A", "B"], "indptr": [0, 1, 3], "indices": [0, 0, 1], "data": [1, 2, 3]}
SCORE: dict[str, Any] = {"embeddings": [[1.0, 2.0], [3.0, 4.0]], "perturbations": ["a", "c"], "control": "c"}
BIG = 2**63 - 1

BAD_CELLS = {
    "not-an-object": ([], InvalidParameterError, "cells"),
    "missing-key": ({"data": ...}, InvalidParameterError, "data"),
    "unknown-key": ({"obs": {}}, InvalidParameterError, "obs"),
    "data-text": ({"data": ["1", 2, 3]}, MalformedMatrixError, "data"),
    "data-bool": ({"data": [True, 2, 3]}, MalformedMatrixError, "data"),
    "data-null": ({"data": [None, 2, 3]}, MalformedMatrixError, "data"),
    "data-nested": ({"data": [[1], 2, 3]}, MalformedMatrixError, "data"),
    "data-string": ({"data": "123"}, MalformedMatrixError, "data"),
    "data-short": ({"data": [1, 2]}, MalformedMatrixError, "indptr"),
    "data-beyond-64-bits": ({"data": [10**30, 2, 3]}, MalformedMatrixError, "data"),
    "data-nan": ({"data": [float("nan"), 2, 3]}, NotRawCountsError, "counts"),
    "data-infinite": ({"data": [float("inf"), 2, 3]}, NotRawCountsError, "counts"),
    "data-negative": ({"data": [-1, 2, 3]}, NotRawCountsError, "counts"),
    "data-fractional": ({"data": [0.5, 2, 3]}, NotRawCountsError, "counts"),
    "data-huge": ({"data": [2**62, 2, 3]}, NotRawCountsError, "counts"),
    "indices-float": ({"indices": [0.0, 0.0, 1.0]}, MalformedMatrixError, "indices"),
    "indices-outside": ({"indices": [0, 0, 2]}, MalformedMatrixError, "indices"),
    "indices-negative": ({"indices": [0, 0, -1]}, MalformedMatrixError, "indices"),
    "indptr-empty": ({"indptr": []}, MalformedMatrixError, "indptr"),
    "indptr-decreases": ({"indptr": [0, 2, 1, 3]}, MalformedMatrixError, "indptr"),
    "indptr-not-from-0": ({"indptr": [1, 3]}, MalformedMatrixError, "indptr"),
    "indptr-wraps-around": ({"indptr": [0, BIG, -BIG + 3, 3]}, MalformedMatrixError, "indptr"),
    "indptr-beyond-int64": ({"indptr": [0, 2**64 - 1, 3]}, MalformedMatrixError, "indptr"),
    "no-cells": ({"indptr": [0], "indices": [], "data": []}, MalformedMatrixError, "counts"),
    "empty-cell": ({"indptr": [0, 0, 3]}, EmptyCellError, "counts"),
    "genes-text": ({"gene_ids": "AB"}, MalformedMatrixError, "gene_ids"),
    "genes-number": ({"gene_ids": ["A", 1]}, MalformedMatrixError, "gene_ids"),
    "genes-null": ({"gene_ids": None}, MalformedMatrixError, "gene_ids"),
    "genes-twice": ({"gene_ids": ["A", "A"]}, DuplicateGenesError, "gene_ids"),
    "genes-surrogate": ({"gene_ids": ["A", "\ud800"]}, MalformedMatrixError, "gene_ids"),
    "genes-megabyte": ({"gene_ids": ["A", "B" * 10**6]}, MalformedMatrixError, "gene_ids"),
    "totals-short": ({"total_counts": [9]}, MalformedMatrixError, "total_counts"),
    "totals-small": ({"total_counts": [1, 1]}, MalformedMatrixError, "total_counts"),
    "totals-nan": ({"total_counts": [float("nan"), 9]}, MalformedMatrixError, "total_counts"),
    "totals-text": ({"total_counts": "9"}, MalformedMatrixError, "total_counts"),
    "first-row-negative": ({"first_row": -1}, InvalidParameterError, "first_row"),
    "first-row-text": ({"first_row": "1"}, InvalidParameterError, "first_row"),
}
BAD_SCORES = {
    "no-labels": ({"perturbations": ...}, InvalidParameterError, "perturbations"),
    "no-control": ({"control": ...}, InvalidParameterError, "control"),
    "unknown-key": ({"seed": 1}, InvalidParameterError, "seed"),
    "unknown-key-surrogate": ({"\ud800": 1}, InvalidParameterError, "\\ud800"),
    "neither": ({"embeddings": None}, InvalidParameterError, "cells"),
    "both": ({"cells": CELLS}, InvalidParameterError, "cells"),
    "labels-few": ({"perturbations": ["a"]}, InvalidParameterError, "perturbations"),
    "labels-numbers": ({"perturbations": [1, 2]}, InvalidParameterError, "perturbations"),
    "labels-long": ({"perturbations": ["a", "c" * 10**6]}, InvalidParameterError, "perturbations"),
    "batches-many": ({"batches": ["1", "1", "1"]}, InvalidParameterError, "batches"),
    "control-number": ({"control": 1}, InvalidParameterError, "control"),
    "model-number": ({"model": 1}, InvalidParameterError, "model"),
    "vectors-ragged": ({"embeddings": [[1.0, 2.0], [3.0]]}, InvalidEmbeddingError, "embeddings"),
    "vectors-flat": ({"embeddings": [1.0, 2.0]}, InvalidEmbeddingError, "embeddings"),
    "vectors-empty": ({"embeddings": []}, InvalidEmbeddingError, "embeddings"),
    "vectors-no-width": ({"embeddings": [[], []]}, InvalidEmbeddingError, "embeddings"),
    "vectors-nan": ({"embeddings": [[1.0, float("nan")], [3.0, 4.0]]}, InvalidEmbeddingError, "embeddings"),
    "vectors-beyond-float32": ({"embeddings": [[1.0, 1e300], [3.0, 4.0]]}, InvalidEmbeddingError, "embeddings"),
    "vectors-beyond-64-bits": ({"embeddings": [[1, 10**30], [3, 4]]}, InvalidEmbeddingError, "embeddings"),
    "vectors-text": ({"embeddings": [["1", 2.0], [3.0, 4.0]]}, InvalidEmbeddingError, "embeddings"),
    "vectors-bool": ({"embeddings": [[True, 2.0], [3.0, 4.0]]}, InvalidEmbeddingError, "embeddings"),
    "options-list": ({"options": []}, InvalidParameterError, "options"),
    "options-unknown": ({"options": {"sead": 1}}, InvalidParameterError, "sead"),
    "options-bad-value": ({"options": {"permutations": 0}}, InvalidParameterError, "permutations"),
    "options-nan": ({"options": {"permutations": float("nan")}}, InvalidParameterError, "permutations"),
    "options-nested": ({"options": {"metrics": [["e_distance"]]}}, InvalidParameterError, "metrics"),
    "options-object": ({"options": {"metrics": {"a": 1}}}, InvalidParameterError, "metrics"),
    "options-megabyte": ({"options": {"estimator": "U" * 10**6}}, InvalidParameterError, "estimator"),
}
BAD_PAIRS = {
    "text": "ab",
    "flat": ["a", "b"],
    "three": [["a", "b", "c"]],
    "numbers": [[1, 2]],
    "empty": [],
}


def changed(base: dict[str, Any], change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    return {name: value for name, value in {**base, **change}.items() if value is not ...}


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def expect(kind: type[InvalidInputError], field: str | None, read: Any, sent: Any) -> None:
    with pytest.raises(kind) as caught:
        read(sent)
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert len(caught.value.message) < 600, "a message does not repeat a megabyte"
    caught.value.message.encode()


@pytest.mark.parametrize(("change", "kind", "field"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_bad_cells_in_json(change: Any, kind: type[InvalidInputError], field: str) -> None:
    sent = body({"cells": changed(CELLS, change)})
    expect(kind, field, partial(protocol.request_from_json, protocol.EmbedRequest), sent)


@pytest.mark.parametrize(("change", "kind", "field"), BAD_SCORES.values(), ids=BAD_SCORES)
def test_bad_scores_in_json(change: Any, kind: type[InvalidInputError], field: str) -> None:
    expect(kind, field, partial(protocol.request_from_json, protocol.ScoreRequest), body(changed(SCORE, change)))


@pytest.mark.parametrize("pairs", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs_in_json(pairs: Any) -> None:
    sent = body({"embeddings": [[1.0], [2.0]], "perturbations": ["a", "b"], "pairs": pairs})
    expect(InvalidParameterError, "pairs", partial(protocol.request_from_json, protocol.CompareRequest), sent)


@pytest.mark.parametrize(
    "sent",
    [b"", b"{", b"\xff\xfe\xfd", b"null x", b"[" * 100_000, b'{"cells": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "cut", "not-utf8", "trailing", "deep", "digits"],
)
def test_what_is_no_json(sent: bytes) -> None:
    expect(UnreadableFileError, "body", partial(protocol.request_from_json, protocol.EmbedRequest), sent)


@pytest.mark.parametrize("sent", [b"null", b"[]", b"3", b'"cells"'], ids=["null", "list", "number", "string"])
def test_json_that_is_no_object(sent: bytes) -> None:
    expect(InvalidParameterError, "body", partial(protocol.request_from_json, protocol.EmbedRequest), sent)


def test_a_name_that_stands_twice() -> None:
    sent = b'{"cells": 1, "cells": ' + body(CELLS) + b"}"
    expect(InvalidParameterError, "cells", partial(protocol.request_from_json, protocol.EmbedRequest), sent)


def stream(columns: dict[str, Any], meta: Any = None, **options: Any) -> bytes:
    table = pa.table(columns)
    if meta is not None:
        table = table.replace_schema_metadata({b"perturbscope": meta if isinstance(meta, bytes) else body(meta)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    sent: bytes = sink.getvalue().to_pybytes()
    return sent


INDICES, COUNTS = pa.array([[0], [0, 1]], pa.list_(pa.int32())), pa.array([[1], [2, 3]], pa.list_(pa.int32()))
COLUMNS: dict[str, Any] = {"indices": INDICES, "counts": COUNTS}
GENES = {"gene_ids": ["A", "B"]}
BAD_COLUMNS = {
    "missing": ({"counts": ...}, MalformedMatrixError, "counts"),
    "unknown": ({"obs": pa.array([1, 2])}, InvalidParameterError, "obs"),
    "ragged": ({"counts": pa.array([[1], [2]], pa.list_(pa.int32()))}, MalformedMatrixError, "counts"),
    "not-lists": ({"counts": pa.array([1, 2])}, MalformedMatrixError, "counts"),
    "text": ({"counts": pa.array([["1"], ["2", "3"]])}, MalformedMatrixError, "counts"),
    "bool": ({"counts": pa.array([[True], [True, True]])}, MalformedMatrixError, "counts"),
    "null-row": ({"counts": pa.array([[1], None], pa.list_(pa.int32()))}, MalformedMatrixError, "counts"),
    "null-value": ({"counts": pa.array([[1], [2, None]], pa.list_(pa.int32()))}, MalformedMatrixError, "counts"),
    "nested": ({"counts": pa.array([[[1]], [[2], [3]]])}, MalformedMatrixError, "counts"),
    "null-type": ({"counts": pa.nulls(2)}, MalformedMatrixError, "counts"),
    "nan": ({"counts": pa.array([[float("nan")], [2.0, 3.0]])}, NotRawCountsError, "counts"),
    "float-indices": ({"indices": pa.array([[0.0], [0.0, 1.0]])}, MalformedMatrixError, "indices"),
    "outside": ({"indices": pa.array([[0], [0, 9]], pa.list_(pa.int32()))}, MalformedMatrixError, "indices"),
    "totals-text": ({"total_counts": pa.array(["1", "2"])}, MalformedMatrixError, "total_counts"),
    "totals-null": ({"total_counts": pa.array([9.0, None])}, MalformedMatrixError, "total_counts"),
}


@pytest.mark.parametrize(("change", "kind", "field"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_bad_columns_in_arrow(change: Any, kind: type[InvalidInputError], field: str) -> None:
    expect(
        kind,
        field,
        partial(protocol.request_from_arrow, protocol.EmbedRequest),
        stream(changed(COLUMNS, change), GENES),
    )


@pytest.mark.parametrize(
    ("meta", "kind", "field"),
    [
        (None, UnreadableFileError, "metadata"),
        (b"{", UnreadableFileError, "metadata"),
        ([], InvalidParameterError, "metadata"),
        ({}, InvalidParameterError, "gene_ids"),
        ({**GENES, "seed": 1}, InvalidParameterError, "seed"),
        ({"gene_ids": "AB"}, MalformedMatrixError, "gene_ids"),
        ({"gene_ids": ["A"]}, MalformedMatrixError, "indices"),
    ],
    ids=["absent", "no-json", "list", "no-genes", "unknown", "text", "too-few-genes"],
)
def test_bad_metadata_in_arrow(meta: Any, kind: type[InvalidInputError], field: str) -> None:
    expect(kind, field, partial(protocol.request_from_arrow, protocol.EmbedRequest), stream(COLUMNS, meta))


VECTORS = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0, 3.0, 4.0], pa.float32()), 2)
LABELS = pa.array(["a", "c"])
SCORED: dict[str, Any] = {"embedding": VECTORS, "perturbation": LABELS}
BAD_SCORED = {
    "cells-too": (COLUMNS, InvalidParameterError, "indices"),
    "lists": ({"embedding": pa.array([[1.0], [2.0, 3.0]])}, InvalidEmbeddingError, "embedding"),
    "no-width": ({"embedding": pa.array([[], []], pa.list_(pa.float32(), 0))}, InvalidEmbeddingError, "embedding"),
    "integers": ({"embedding": pa.array([[1], [2]], pa.list_(pa.int32(), 1))}, InvalidEmbeddingError, "embedding"),
    "null": ({"embedding": pa.array([[1.0], [None]], pa.list_(pa.float32(), 1))}, InvalidEmbeddingError, "embedding"),
    "nan": (
        {"embedding": pa.array([[1.0], [float("nan")]], pa.list_(pa.float32(), 1))},
        InvalidEmbeddingError,
        "embeddings",
    ),
    "labels-missing": ({"perturbation": ...}, MalformedMatrixError, "perturbation"),
    "labels-numbers": ({"perturbation": pa.array([1, 2])}, InvalidParameterError, "perturbation"),
    "labels-null": ({"perturbation": pa.array(["a", None])}, MalformedMatrixError, "perturbation"),
    "labels-codes": ({"perturbation": pa.array([1, 2]).dictionary_encode()}, InvalidParameterError, "perturbation"),
    "labels-long": (
        {"perturbation": pa.array(["a", "c" * 10**6]).dictionary_encode()},
        InvalidParameterError,
        "perturbation",
    ),
    "batch-numbers": ({"batch": pa.array([1, 2])}, InvalidParameterError, "batch"),
}


@pytest.mark.parametrize(("change", "kind", "field"), BAD_SCORED.values(), ids=BAD_SCORED)
def test_bad_score_requests_in_arrow(change: Any, kind: type[InvalidInputError], field: str) -> None:
    sent = stream(changed(SCORED, change), {"control": "c"})
    expect(kind, field, partial(protocol.request_from_arrow, protocol.ScoreRequest), sent)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("encode", [False, True], ids=["batch", "dictionary"])
def test_compressed_arrow_is_refused(codec: str, encode: bool) -> None:
    labels = LABELS.dictionary_encode() if encode else LABELS
    columns = {"perturbation": labels} if encode else {"embedding": VECTORS, "perturbation": labels}
    with pytest.raises(UnreadableFileError, match="is compressed"):
        protocol.request_from_arrow(protocol.ScoreRequest, stream(columns, {"control": "c"}, compression=codec))


def test_arrow_cut_off_anywhere(tiny_cells: CountMatrix) -> None:
    sent = protocol.request_to_arrow(protocol.EmbedRequest(cells=tiny_cells))
    for length in range(0, len(sent), 7):
        expect(UnreadableFileError, "body", partial(protocol.request_from_arrow, protocol.EmbedRequest), sent[:length])


@pytest.mark.parametrize("rows", [None, 0], ids=["no-batch", "empty-batch"])
def test_arrow_without_rows(rows: int | None) -> None:
    schema = pa.table(COLUMNS).schema.with_metadata({b"perturbscope": body(GENES)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        if rows is not None:
            writer.write_batch(pa.record_batch([INDICES[:0], COUNTS[:0]], schema=schema))
    expect(
        MalformedMatrixError,
        "indices",
        partial(protocol.request_from_arrow, protocol.EmbedRequest),
        sink.getvalue().to_pybytes(),
    )


def test_arrow_file_instead_of_stream() -> None:
    sink = pa.BufferOutputStream()
    table = pa.table(COLUMNS)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    expect(
        UnreadableFileError,
        "body",
        partial(protocol.request_from_arrow, protocol.EmbedRequest),
        sink.getvalue().to_pybytes(),
    )


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_arrow_with_changed_bytes(data: st.DataObject) -> None:
    """Offsets, lengths and types of the stream are the sender's word; none of it may be followed blindly."""
    sent = bytearray(stream({**COLUMNS, "perturbation": LABELS.dictionary_encode()}, {**GENES, "control": "c"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(sent) - 9))
        sent[at] = data.draw(st.sampled_from([0, 1, 4, 8, 127, 128, 255]))
    try:
        request = protocol.request_from_arrow(protocol.ScoreRequest, bytes(sent))
    except InvalidInputError:
        return
    assert request.cells is not None
    assert len(request.cells) == len(request.perturbations)


def message(**change: Any) -> pb.EmbedRequest:
    parts: dict[str, Any] = {
        "gene_ids": ["A", "B"],
        "indptr": struct.pack("<3q", 0, 1, 3),
        "indices": struct.pack("<3i", 0, 0, 1),
        "data": struct.pack("<3i", 1, 2, 3),
        "data_type": pb.COUNT_TYPE_INT32,
    }
    return pb.EmbedRequest(cells=pb.CountMatrix(**{**parts, **change}))


@pytest.mark.parametrize(
    ("sent", "kind", "field"),
    [
        (pb.EmbedRequest(), InvalidParameterError, "cells"),
        (pb.EmbedRequest(cells=pb.CountMatrix()), MalformedMatrixError, "data_type"),
        (message(data_type=7), MalformedMatrixError, "data_type"),
        (message(indptr=b""), MalformedMatrixError, "indptr"),
        (message(indptr=b"1234567"), MalformedMatrixError, "indptr"),
        (message(indptr=struct.pack("<4q", 0, BIG, -BIG + 3, 3)), MalformedMatrixError, "indptr"),
        (message(indices=b"123"), MalformedMatrixError, "indices"),
        (message(data=b"12345"), MalformedMatrixError, "data"),
        (message(data=b""), MalformedMatrixError, "indptr"),
        (message(data=struct.pack("<3i", -1, 2, 3)), NotRawCountsError, "counts"),
        (
            message(data=struct.pack("<3d", float("nan"), 2, 3), data_type=pb.COUNT_TYPE_FLOAT64),
            NotRawCountsError,
            "counts",
        ),
        (message(total_counts=b""), MalformedMatrixError, "total_counts"),
        (message(total_counts=b"123"), MalformedMatrixError, "total_counts"),
        (message(gene_ids=["A", "B" * 10**6]), MalformedMatrixError, "gene_ids"),
        (message(gene_ids=["A", "A"]), DuplicateGenesError, "gene_ids"),
        (message(first_row=-1), InvalidParameterError, "first_row"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value,
)
def test_bad_cells_in_proto(sent: pb.EmbedRequest, kind: type[InvalidInputError], field: str) -> None:
    expect(kind, field, partial(protocol.request_from_proto, protocol.EmbedRequest), sent)


def scored(values: bytes = struct.pack("<4f", 1, 2, 3, 4), width: int = 2, **change: Any) -> pb.ScoreRequest:
    parts: dict[str, Any] = {"perturbations": ["a", "c"], "control": "c", **change}
    return pb.ScoreRequest(embeddings=pb.EmbeddingMatrix(values=values, width=width), **parts)


@pytest.mark.parametrize(
    ("sent", "kind", "field"),
    [
        (pb.ScoreRequest(perturbations=["a"], control="a"), InvalidParameterError, "cells"),
        (scored(width=0), InvalidEmbeddingError, "embeddings"),
        (scored(width=3), InvalidEmbeddingError, "embeddings"),
        (scored(values=b""), InvalidEmbeddingError, "embeddings"),
        (scored(values=b"123"), InvalidEmbeddingError, "embeddings"),
        (scored(values=struct.pack("<4f", 1, 2, 3, float("inf"))), InvalidEmbeddingError, "embeddings"),
        (scored(perturbations=["a"]), InvalidParameterError, "perturbations"),
        (scored(batches=["a"]), InvalidParameterError, "batches"),
        (scored(options=pb.ScoreOptions(seed=-1)), InvalidParameterError, "seed"),
        (scored(options=pb.ScoreOptions(metrics=["euclid"])), InvalidParameterError, "metrics"),
        (scored(options=pb.ScoreOptions(permutations=0)), InvalidParameterError, "permutations"),
    ],
)
def test_bad_score_requests_in_proto(sent: pb.ScoreRequest, kind: type[InvalidInputError], field: str) -> None:
    expect(kind, field, partial(protocol.request_from_proto, protocol.ScoreRequest), sent)


def test_the_same_mistake_has_the_same_error_by_every_route() -> None:
    told = []
    bad = np.array([1, 2, 3.5])
    for read, sent in (
        (partial(protocol.request_from_json, protocol.EmbedRequest), body({"cells": {**CELLS, "data": bad.tolist()}})),
        (
            partial(protocol.request_from_arrow, protocol.EmbedRequest),
            stream({**COLUMNS, "counts": pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), bad)}, GENES),
        ),
        (
            partial(protocol.request_from_proto, protocol.EmbedRequest),
            message(data=bad.tobytes(), data_type=pb.COUNT_TYPE_FLOAT64),
        ),
    ):
        with pytest.raises(NotRawCountsError) as caught:
            read(sent)  # type: ignore[operator]
        told.append(caught.value.to_dict())
    assert told[0] == told[1] == told[2]
