"""Messages of a stream as protobuf, for gRPC."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.protobuf import (
    arrays_from,
    arrays_to,
    coverage_from_proto,
    coverage_to_proto,
    meta_from,
    meta_to_proto,
    outputs_from_proto,
    outputs_to_proto,
    spec_from_proto,
    spec_to_proto,
    vectors_from,
    vectors_to_proto,
)
from perturbscope.protocol.streams import StreamAnswer, StreamChunk, StreamEnd, StreamOpened, StreamStart, stream_start
from perturbscope.protocol.tables import embeddings_of, meta_from_dict


def stream_start_to_proto(start: StreamStart) -> pb.EmbedStreamRequest:
    """Encode the first message of a stream."""
    message = pb.EmbedStreamStart(
        gene_ids=start.gene_ids.tolist(), model=start.model, first_row=start.first_row, outputs=start.outputs
    )
    return pb.EmbedStreamRequest(start=message)


def stream_cells_to_proto(cells: CountMatrix) -> pb.EmbedStreamRequest:
    """Encode one chunk of cells."""
    return pb.EmbedStreamRequest(cells=pb.CellChunk(**arrays_to(cells)))


def stream_start_from_proto(message: pb.EmbedStreamRequest) -> StreamStart:
    """Decode the first message. Raises errors of :mod:`perturbscope.errors` for bad input."""
    if message.WhichOneof("message") != "start":
        raise InvalidParameterError(
            "The first message of the stream has no `start`; it must name the genes of all cells.", field="start"
        )
    start = message.start
    model = start.model if start.HasField("model") else None
    return stream_start(list(start.gene_ids), model, start.first_row, list(start.outputs) or None)


def stream_cells_from_proto(message: pb.EmbedStreamRequest, genes: NDArray[np.str_], first_row: int) -> CountMatrix:
    """Decode a later message: cells with these genes; `first_row` is the number of the first cell.

    Raises
    ------
    InvalidInputError
        The message is wrong; the message of the subclass says what is, and in which row.
    """
    if message.WhichOneof("message") != "cells":
        raise InvalidParameterError(
            f"The message at row {first_row} of the stream has no `cells`; only the first message is a `start`.",
            field="cells",
        )
    arrays = arrays_from(message.cells)
    return CountMatrix.from_csr(
        arrays["data"], arrays["indices"], arrays["indptr"], genes, totals=arrays["totals"], first_row=first_row
    )


def stream_answer_to_proto(answer: StreamAnswer) -> pb.EmbedStreamAnswer:
    """Encode one message of the server."""
    match answer:
        case StreamOpened():
            opened = pb.EmbedStreamOpened(
                model_id=answer.model_id,
                vocabulary_hash=answer.vocabulary_hash,
                coverage=coverage_to_proto(answer.coverage),
                chunks_in_progress=answer.chunks_in_progress,
                max_chunk_cells=answer.max_chunk_cells,
                max_chunk_bytes=answer.max_chunk_bytes,
                width=answer.width,
                variant=answer.variant,
                outputs=map(spec_to_proto, answer.outputs),
            )
            return pb.EmbedStreamAnswer(opened=opened)
        case StreamChunk():
            found = answer.embeddings
            chunk = pb.EmbedStreamChunk(
                first_row=answer.first_row,
                embeddings=vectors_to_proto(found.values),
                lengths=found.lengths,
                n_detected=found.n_detected,
                known_share=found.known_share,
                timings=found.timings,
                outputs=outputs_to_proto(found.outputs),
            )
            return pb.EmbedStreamAnswer(chunk=chunk)
        case StreamEnd():
            end = pb.EmbedStreamEnd(n_cells=answer.n_cells, meta=meta_to_proto(answer.meta))
            return pb.EmbedStreamAnswer(end=end)


def stream_answer_from_proto(message: pb.EmbedStreamAnswer, opened: StreamOpened | None) -> StreamAnswer:
    """Decode one message of the server; `opened` is the first message, or None before it arrives.

    Raises
    ------
    InvalidInputError
        The message is not an answer, or is out of place.
    """
    kind = message.WhichOneof("message")
    if (kind == "opened") != (opened is None):
        raise InvalidParameterError(f"The message {kind!r} of the stream is out of place.", field="opened")
    if opened is None:
        found = message.opened
        meta = meta_from_dict({"coverage": coverage_from_proto(found.coverage)})
        if meta.coverage is None or not found.model_id:
            raise InvalidParameterError("The stream names no model, or no gene coverage.", field="opened")
        return StreamOpened(
            model_id=found.model_id,
            vocabulary_hash=found.vocabulary_hash,
            coverage=meta.coverage,
            width=found.width,
            chunks_in_progress=found.chunks_in_progress,
            max_chunk_cells=found.max_chunk_cells,
            max_chunk_bytes=found.max_chunk_bytes,
            variant=found.variant if found.HasField("variant") else None,
            outputs=tuple(map(spec_from_proto, found.outputs)),
        )
    if kind == "chunk":
        return StreamChunk(first_row=message.chunk.first_row, embeddings=_embeddings_from(message.chunk, opened))
    if kind == "end":
        meta = meta_from(message.end.meta)
        return StreamEnd(n_cells=message.end.n_cells, meta=meta)
    raise InvalidParameterError("A message of the stream is empty.", field="message")


def _embeddings_from(chunk: pb.EmbedStreamChunk, opened: StreamOpened) -> Embeddings:
    return embeddings_of(
        replace(opened.meta, timings=dict(chunk.timings)),
        vectors_from(chunk.embeddings).copy(),
        np.fromiter(chunk.lengths, dtype=np.int64),
        np.fromiter(chunk.n_detected, dtype=np.int64),
        np.fromiter(chunk.known_share, dtype=np.float32),
        outputs_from_proto(chunk.outputs, len(chunk.lengths)),
    )
