"""Streams of cells as Arrow IPC streams in both directions, message by message.

The request is the Arrow form of an embed request (:func:`perturbscope.protocol.request_to_arrow`) in as many
record batches as the caller likes: columns ``indices, counts`` and perhaps ``total_counts``, one row a cell, and in the
schema's metadata, under ``perturbscope``, the JSON object ``{"gene_ids", "model", "first_row", "outputs"}``. The length
of a request is unbounded, that of a batch is bounded, and batches are not compressed.

The answer has one batch for each of the request, in order, with the columns ``row, embedding, length, n_detected,
known_share``, and those of the outputs that were asked for (:func:`perturbscope.protocol.arrow.output_columns`).
``row`` is the number of the cell, counted from ``first_row`` on. All other information is JSON, again under
``perturbscope``:

- in the schema's metadata, the model behind the vectors: ``{"model_id", "vocabulary_hash", "coverage", "variant",
  "width", "chunks_in_progress", "max_chunk_cells", "max_chunk_bytes"}``, and with outputs their descriptions,
  ``"outputs"``;
- in a batch's own metadata, ``{"timings"}``;
- in the metadata of a last batch without rows, ``{"end": {"n_cells", "warnings", "timings", ...}}``.

An answer without ``end`` is incomplete. If the server knows the reason, a batch without rows takes the place of the
end, with ``{"error": {"code", "message", "field"}, "row"}``; ``row`` is the first cell without an answer. The
end-of-stream mark is left out and the transfer is broken off, so that even a program that ignores all of this sees the
failure. To continue, send a new stream with the cells from ``row`` on, that number as ``first_row``, and the answer's
``model_id`` as ``model``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import (
    LimitExceededError,
    MalformedMatrixError,
    PerturbScopeError,
    UnreadableFileError,
)
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import Embeddings, OutputValues
from perturbscope.protocol import checks as check
from perturbscope.protocol.arrow import COUNTS, counts_from, expect_columns, output_columns, vectors
from perturbscope.protocol.arrow_ipc import (
    END,
    FAILURES,
    KEY,
    RECORD_BATCH,
    SCHEMA,
    body_length,
    check_rows,
    message_kind,
    refuse_compressed,
)
from perturbscope.protocol.outputs import spec_to_dict
from perturbscope.protocol.streams import StreamAnswer, StreamChunk, StreamEnd, StreamOpened, StreamStart, stream_start
from perturbscope.protocol.tables import meta_to_dict

PREFIX_BYTES = 8
"""Bytes before every message: a mark, and the length of its metadata."""
_CONTINUATION = b"\xff\xff\xff\xff"


def metadata_length(prefix: bytes, most: int) -> int:
    """Return the number of bytes of the metadata after a prefix; 0 for the end-of-stream mark.

    Raises
    ------
    UnreadableFileError
        `prefix` is not a prefix, or the stream ends here without its mark.
    LimitExceededError
        The number is above `most`.
    """
    if len(prefix) < PREFIX_BYTES or prefix[:4] != _CONTINUATION:
        raise UnreadableFileError(
            "The body is not an Arrow IPC stream, or is cut off: a message or the end-of-stream mark is missing. Write "
            "it with an IPC stream writer (not as a file), and close the writer.",
            field="body",
        )
    length = int.from_bytes(prefix[4:], "little")
    _check_length(length, most)
    return length


def message_length(metadata: bytes, most: int) -> int:
    """Return the number of bytes of a message's body from its metadata. Raises as :func:`metadata_length`."""
    try:
        length = body_length(metadata)
    except (struct.error, IndexError) as error:
        raise UnreadableFileError("The Arrow stream has a message that cannot be read.", field="body") from error
    if length < 0:
        raise UnreadableFileError("The Arrow stream has a message of negative length.", field="body")
    _check_length(PREFIX_BYTES + len(metadata) + length, most)
    return length


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise LimitExceededError(
            f"A message of the stream has {length:,} bytes; this server takes {most:,}. Write smaller batches.",
            field="chunk",
        )


class StreamRequestReader:
    """Reader of the messages of a request, each given whole with its prefix; they are not trusted."""

    def __init__(self) -> None:
        self._schema: pa.Schema | None = None

    def start(self, message: bytes) -> StreamStart:
        """Read the schema. Raises errors of :mod:`perturbscope.errors` that name the field."""
        try:
            if message_kind(message[PREFIX_BYTES:]) != SCHEMA:
                raise UnreadableFileError("The Arrow stream does not begin with a schema.", field="body")
            schema = pa.ipc.read_schema(pa.py_buffer(message))
            expect_columns(schema, COUNTS)
            metadata = schema.metadata or {}
        except FAILURES as error:
            raise UnreadableFileError(f"The Arrow schema cannot be read: {str(error)[:200]}", field="body") from error
        if KEY not in metadata:
            raise UnreadableFileError(
                "The Arrow schema's metadata has no key 'perturbscope' with the request as JSON.", field="metadata"
            )
        for name in COUNTS[:2]:
            if name not in schema.names:
                raise MalformedMatrixError(f"The column {name!r} is missing.", field=name)
        parsed = check.parse_json(metadata[KEY], "metadata")
        given = check.mapping(parsed, "metadata", required=["gene_ids"], optional=["first_row", "model", "outputs"])
        self._schema = schema.remove_metadata()
        return stream_start(given["gene_ids"], given.get("model"), given.get("first_row", 0), given.get("outputs"))

    def cells(self, message: bytes, genes: NDArray[np.str_], first_row: int) -> CountMatrix:
        """Read a record batch of cells with these genes; `first_row` is the number of its first cell.

        Raises
        ------
        InvalidInputError
            The batch is wrong; the message of the subclass says what is, and in which row.
        """
        assert self._schema is not None, "the start comes first"  # noqa: S101  our own bug
        try:
            metadata = message[PREFIX_BYTES : PREFIX_BYTES + int.from_bytes(message[4:PREFIX_BYTES], "little")]
            refuse_compressed(metadata)
            if message_kind(metadata) != RECORD_BATCH:
                raise UnreadableFileError(
                    f"The message at row {first_row} of the Arrow stream is not a record batch; dictionaries and a "
                    "second schema are not understood.",
                    field="body",
                )
            batch = pa.ipc.read_record_batch(pa.py_buffer(message), self._schema)
            check_rows(batch.num_rows, len(message))
            # Without the full check, offsets that point outside of their buffers would be followed.
            batch.validate(full=True)
        except FAILURES as error:
            raise UnreadableFileError(
                f"The batch at row {first_row} of the Arrow stream cannot be read: {str(error)[:200]}", field="body"
            ) from error
        arrays = counts_from(pa.Table.from_batches([batch]), first_row=first_row)
        return CountMatrix.from_csr(
            arrays["data"], arrays["indices"], arrays["indptr"], genes, totals=arrays["totals"], first_row=first_row
        )


class _Writer:
    """Writer of an Arrow IPC stream, one message at a time."""

    def __init__(self) -> None:
        self._schema = pa.schema([])
        self._preamble = 0

    def open(self, columns: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
        """Return the schema message of columns of these types."""
        self._schema = pa.schema(list(columns.items()))
        self._preamble = self._schema.serialize().size
        named = self._schema.with_metadata({KEY: check.dump_json(meta).encode()})
        schema: bytes = named.serialize().to_pybytes()
        return schema

    def batch(self, columns: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> bytes:
        """Return the message of a record batch; only a writer of whole streams can give it metadata of its own."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as writer:
            metadata = None if meta is None else {KEY: check.dump_json(meta).encode()}
            writer.write_batch(pa.record_batch(dict(columns)), custom_metadata=metadata)
        whole: bytes = memoryview(sink.getvalue())[self._preamble : -len(END)].tobytes()
        return whole


class StreamAnswerWriter:
    """Writer of the messages of an answer."""

    def __init__(self) -> None:
        self._writer = _Writer()
        self._nothing = _Nothing(0, ())

    def write(self, answer: StreamAnswer) -> bytes:
        """Return the bytes of the next part of the answer; the last part ends with the end-of-stream mark."""
        match answer:
            case StreamOpened():
                self._nothing = _Nothing(answer.width, answer.outputs)
                columns = {name: column.type for name, column in self._columns(self._nothing, 0).items()}
                limits = {name: getattr(answer, name) for name in _LIMITS}
                outputs = {"outputs": list(map(spec_to_dict, answer.outputs))} if answer.outputs else {}
                return self._writer.open(columns, {**meta_to_dict(answer.meta), **limits, **outputs})
            case StreamChunk():
                columns = self._columns(answer.embeddings, answer.first_row)
                return self._writer.batch(columns, {"timings": answer.embeddings.timings})
            case StreamEnd():
                end = {"n_cells": answer.n_cells, **meta_to_dict(answer.meta)}
                return self._last({"end": end}) + END

    def error(self, error: PerturbScopeError, row: int) -> bytes:
        """Return the bytes of an error that ends the answer before `row`; no end-of-stream mark follows them."""
        return self._last({"error": error.to_dict(), "row": row})

    def _last(self, meta: Mapping[str, Any]) -> bytes:
        return self._writer.batch(self._columns(self._nothing, 0), meta)

    @staticmethod
    def _columns(found: Embeddings | _Nothing, first_row: int) -> dict[str, Any]:
        return {
            "row": pa.array(np.arange(first_row, first_row + len(found.values), dtype=np.int64)),
            "embedding": vectors(found.values),
            "length": pa.array(found.lengths),
            "n_detected": pa.array(found.n_detected),
            "known_share": pa.array(found.known_share),
            **output_columns(found.outputs),
        }


_LIMITS = ("width", "chunks_in_progress", "max_chunk_cells", "max_chunk_bytes")


class _Nothing:
    """Embeddings of no cell, for the columns of an empty batch."""

    def __init__(self, width: int, outputs: tuple[OutputSpec, ...]) -> None:
        self.values = np.zeros((0, width), dtype=np.float32)
        self.lengths = self.n_detected = np.zeros(0, dtype=np.int32)
        self.known_share = np.zeros(0, dtype=np.float32)
        start, genes = np.zeros(1, dtype=np.int64), self.lengths
        self.outputs = {
            spec.name: OutputValues(
                spec,
                np.zeros((0, spec.width), dtype=np.float32),
                start if spec.per == "token" else None,
                genes if spec.per == "token" else None,
            )
            for spec in outputs
        }
