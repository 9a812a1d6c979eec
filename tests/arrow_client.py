"""A client of the Arrow stream of cells, written with pyarrow as a user of another program would write it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, ServerError, from_code
from perturbscope.protocol import checks as check
from perturbscope.protocol.arrow import count_columns, outputs_from, plain, vectors_from
from perturbscope.protocol.arrow_ipc import END, FAILURES, KEY
from perturbscope.protocol.outputs import spec_from_dict, spec_to_dict
from perturbscope.protocol.streams import StreamAnswer, StreamChunk, StreamEnd, StreamOpened, StreamStart
from perturbscope.protocol.tables import embeddings_of, meta_from_dict

_LIMITS = ("width", "chunks_in_progress", "max_chunk_cells", "max_chunk_bytes")


def stream_request_to_arrow(start: StreamStart, chunks: Iterable[CountMatrix]) -> Iterator[bytes]:
    """Yield the bytes of a request: the schema, one piece a chunk, and the end-of-stream mark."""
    meta = {
        "gene_ids": start.gene_ids.tolist(),
        "model": start.model,
        "first_row": start.first_row,
        "outputs": start.outputs,
    }
    for number, cells in enumerate(chunks):
        batch = pa.record_batch(count_columns(cells))
        if number == 0:
            yield batch.schema.with_metadata({KEY: json.dumps(meta).encode()}).serialize().to_pybytes()
        yield batch.serialize().to_pybytes()
    yield END


def stream_answers_from_arrow(source: io.IOBase) -> Iterator[StreamAnswer]:
    """Read an answer while it arrives, up to and including its end.

    Raises
    ------
    PerturbScopeError
        The server's reason for breaking off, after all chunks that were answered.
    ServerError
        The answer was cut off, or is not an answer.
    """
    try:
        reader = pa.ipc.open_stream(pa.PythonFile(source, mode="r"))
        opened = _opened_from(reader.schema.metadata or {})
        yield opened
        while True:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            said = _said(metadata)
            if batch.num_rows:
                yield _chunk_from(batch, said, opened)
            elif "end" in said:
                meta = meta_from_dict(said["end"])
                n_cells = check.integer(said["end"].get("n_cells"), "n_cells")
                yield StreamEnd(n_cells=n_cells, meta=meta)
                return
            elif "error" in said:
                error = said["error"]
                raise from_code(str(error.get("code")), str(error.get("message")), field=error.get("field"))
    except StopIteration:
        raise ServerError("The answer of the stream was cut off before its end.") from None
    except FAILURES as error:
        raise ServerError(f"The answer of the stream cannot be read, or was cut off: {str(error)[:200]}") from error


def _said(metadata: Any) -> dict[str, Any]:
    said = check.parse_json(dict(metadata or {}).get(KEY, b"{}"), "metadata")
    if not isinstance(said, dict):
        raise InvalidParameterError("The metadata of the answer is not a JSON object.", field="metadata")
    return said


def _opened_from(metadata: Any) -> StreamOpened:
    said = _said(metadata)
    meta = meta_from_dict(said)
    if meta.model_id is None or meta.vocabulary_hash is None or meta.coverage is None:
        raise InvalidParameterError("The answer names no model, or no gene coverage.", field="meta")
    return StreamOpened(
        model_id=meta.model_id,
        vocabulary_hash=meta.vocabulary_hash,
        coverage=meta.coverage,
        variant=meta.variant,
        outputs=tuple(map(spec_from_dict, said.get("outputs", []))),
        **{name: check.integer(said.get(name), name) for name in _LIMITS},
    )


def _chunk_from(batch: pa.RecordBatch, said: Mapping[str, Any], opened: StreamOpened) -> StreamChunk:
    table = pa.Table.from_batches([batch])
    meta = meta_from_dict({"timings": said.get("timings")})
    found = embeddings_of(
        replace(opened.meta, timings=meta.timings),
        vectors_from(table).copy(),
        *(plain(table, name) for name in ("length", "n_detected", "known_share")),
        outputs_from(table, list(map(spec_to_dict, opened.outputs))),
    )
    return StreamChunk(first_row=int(plain(table, "row")[0]), embeddings=found)
